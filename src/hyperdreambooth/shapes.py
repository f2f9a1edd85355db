"""The words shared by every folder: sites, factors, and the shape letters.

Shape letters used in docstrings: `b` batch, `n` identities, `s` sites, `r` rank, `a` down_dim, `d` up_dim,
 `i`/`o` in and out features of a site, `t` tokens, `c h w` image or latent, `P` the numbers of one
identity, `K` refinements.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

_WRAPPERS = {"text_model", "base_layer", "_orig_mod", "module"}


@dataclass(frozen=True, order=True)
class Site:
    """One adapted linear layer of the base.

    Attributes:
        name: canonical name, component first, for example
            `unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q`.
        in_features: `i`.
        out_features: `o`.
    """

    name: str
    in_features: int
    out_features: int

    @property
    def component(self) -> str:
        """The part of the pipeline that owns the site: `unet`, `text_encoder`, …"""
        return self.name.split(".", 1)[0]


Factors: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""Site name → (down `(n, r, i)`, up `(n, o, r)`); `ΔW[n] = up[n] @ down[n]`. The scale is always 1."""


def canonical(component: str, path: str) -> str:
    """Names a module the same way whatever the library version or wrapper.

    transformers 5.6 dropped `text_model.` from module paths, compilation and DDP add prefixes of their own;
    seeds and file keys must not follow them.
    """
    return ".".join([component, *(part for part in path.split(".") if part not in _WRAPPERS)])


def site_fingerprint(sites: Sequence[Site]) -> str:
    """Sixteen hex digits that change when a site is added, removed or resized."""
    lines = "\n".join(f"{s.name}:{s.in_features}:{s.out_features}" for s in sorted(sites))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
