"""Six odd-sized sites in two components, and the exact attention sites of Stable Diffusion 1.5."""

from __future__ import annotations

import torch

from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.shapes import Site

SITES = tuple(
    sorted(
        [
            Site("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 16, 16),
            Site("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 7, 16),
            Site("unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v", 12, 5),
            Site("unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", 3, 4),
            Site("text_encoder.encoder.layers.0.self_attn.q_proj", 10, 10),
            Site("text_encoder.encoder.layers.0.self_attn.out_proj", 10, 10),
        ]
    )
)
BASE = "0123456789abcdef"


def layout(rank: int = 1, down_dim: int = 8, up_dim: int = 5) -> Layout:
    """Dims that shrink at the small sites."""
    return Layout(SITES, rank, down_dim, up_dim)


def numbers(of: Layout, n: int, seed: int = 0) -> torch.Tensor:
    """`(n, P)` random numbers."""
    return torch.randn(n, of.size, generator=torch.Generator().manual_seed(seed))


def person(of: Layout | None = None, seed: int = 0) -> Lidb:
    """Somebody over the bases of seed 0."""
    of = of or layout()
    basis = seeded_basis(of.sites, of.down_dim, of.up_dim, 0)
    return Lidb(numbers(of, 1, seed)[0], of, basis.source, basis_fingerprint(basis), BASE, "sks", "some/base")


def sd15_sites() -> tuple[Site, ...]:
    """q, k, v and out of 16 transformer blocks (128 sites) and of 12 CLIP layers (48)."""
    places = [(f"down_blocks.{b}", k, w) for b, w in enumerate((320, 640, 1280)) for k in range(2)]
    places += [("mid_block", 0, 1280)]
    places += [(f"up_blocks.{b}", k, w) for b, w in ((1, 1280), (2, 640), (3, 320)) for k in range(3)]
    sites: list[Site] = []
    for block, k, width in places:
        home = f"unet.{block}.attentions.{k}.transformer_blocks.0"
        for attention, context in (("attn1", width), ("attn2", 768)):
            for layer, wide in (("to_q", width), ("to_k", context), ("to_v", context), ("to_out.0", width)):
                sites.append(Site(f"{home}.{attention}.{layer}", wide, width))
    for k in range(12):
        for layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sites.append(Site(f"text_encoder.encoder.layers.{k}.self_attn.{layer}", 768, 768))
    return tuple(sorted(sites))
