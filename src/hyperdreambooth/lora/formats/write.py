"""Writing a LoRA so that every tool loads it, and making sure of it before the file appears.

The scale is folded into `up`, one rank holds for all sites and alpha equals it: readers that lose alpha, or
that mis-scale sites of different alphas, then still get the same ΔW. Where the original model has one layer
for q, k and v, their factors become one block-diagonal LoRA of rank 3r, the same ΔW again.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hyperdreambooth.files import InputError, save_tensors, whole_file
from hyperdreambooth.lora.formats.headers import (
    BASE_FINGERPRINT,
    LoraInfo,
    content_hash,
    kohya_fields,
    model_spec,
    peft_config,
)
from hyperdreambooth.lora.formats.names import (
    LoraFamily,
    Rows,
    diffusers_module,
    family_of,
    is_convolution,
    kohya_slots,
)
from hyperdreambooth.lora.formats.read import ADAPTER_METADATA, Matrices, read_lora
from hyperdreambooth.lora.relax import relative_distance
from hyperdreambooth.shapes import Factors, Site

Form = Literal["diffusers", "kohya"]

UNFIT_NAMES = ("checkpoint", "optimizer", "scheduler")  # diffusers' file guesser passes over these
TOLERANCE = 1e-5  # relative, of ΔW at a site


def write_lora(
    path: Path, factors: Factors, form: Form, facts: LoraInfo, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a standard LoRA file and makes sure that it can be read back.

    Args:
        path: a `.safetensors` file.
        factors: one identity: down `(1, r, i)`, up `(1, o, r)`; smaller ranks are zero-padded to the largest.
        form: `diffusers` for `pipe.load_lora_weights`, `kohya` for ComfyUI, A1111 and Forge.
        facts: what the header tells of it.
        dtype: number format in the file.

    Raises:
        InputError: a file name that diffusers passes over, numbers that `dtype` cannot hold, or a site
            without a name in `form`.
        ValueError: several identities.
        RuntimeError: the file read back is not the adapter that was written; no file is left.
    """
    check_name(path)
    flat = _flatten(factors, dtype)
    sites = [Site(name, down.shape[1], len(up)) for name, (down, up) in flat.items()]
    family, rank = family_of(sites), len(next(iter(flat.values()))[0])
    tensors = _diffusers_tensors(flat, sites) if form == "diffusers" else _kohya_tensors(flat, sites)
    digest = content_hash(tensors)
    metadata = model_spec(facts, family, "diffusers" if form == "diffusers" else family.origin, digest)
    if form == "diffusers":
        metadata[ADAPTER_METADATA] = peft_config(sites, rank)
    else:
        metadata |= kohya_fields(facts, family, path.stem, rank, digest)
    if facts.base_fingerprint:
        metadata[BASE_FINGERPRINT] = facts.base_fingerprint
    with whole_file(path) as temporary:
        save_tensors(temporary, tensors, metadata)
        _check(temporary, flat, sites)


def state_dict(factors: Factors, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors that diffusers loads, as `write_lora` writes them.

    Args:
        factors: one identity: down `(1, r, i)`, up `(1, o, r)`.
        dtype: number format of the tensors.

    Raises:
        InputError: numbers that `dtype` cannot hold.
        ValueError: several identities.
    """
    flat = _flatten(factors, dtype)
    return _diffusers_tensors(flat, [Site(name, down.shape[1], len(up)) for name, (down, up) in flat.items()])


def check_name(path: Path) -> None:
    """Refuses a file name that tools pass over; ask before the work too.

    Raises:
        InputError: one line.
    """
    if path.suffix != ".safetensors" or any(word in path.name.lower() for word in UNFIT_NAMES):
        taboo = ", ".join(UNFIT_NAMES)
        raise InputError(f"{path}: expected a name that ends in .safetensors, without {taboo} in it")


def _flatten(factors: Factors, dtype: torch.dtype) -> Matrices:
    """One identity at one rank: site → down `(r, i)`, up `(o, r)`."""
    rank = max(down.shape[1] for down, _ in factors.values())
    flat: Matrices = {}
    for site, (down, up) in sorted(factors.items()):
        if len(down) != 1:
            raise ValueError(f"a LoRA file holds one identity, not {len(down)}")
        spare = rank - down.shape[1]
        rows = torch.nn.functional.pad(down.detach()[0], (0, 0, 0, spare)).to("cpu", dtype)
        columns = torch.nn.functional.pad(up.detach()[0], (0, spare)).to("cpu", dtype)
        if not (rows.isfinite().all() and columns.isfinite().all()):
            raise InputError(
                f"{site}: NaN or infinite numbers in {dtype}; training diverged, or needs float32"
            )
        flat[site] = rows.contiguous(), columns.contiguous()
    return flat


def _diffusers_tensors(flat: Matrices, sites: list[Site]) -> dict[str, Tensor]:
    family, tensors = family_of(sites), dict[str, Tensor]()
    for site in sites:
        down, up = _shaped(site, family, *flat[site.name])
        module = diffusers_module(site, family)
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    return tensors


def _shaped(site: Site, family: LoraFamily, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Down and up as matrices, or as the 1×1 convolutions that diffusers wants where the layer is one."""
    return (down[..., None, None], up[..., None, None]) if is_convolution(site, family) else (down, up)


def _kohya_tensors(flat: Matrices, sites: list[Site]) -> dict[str, Tensor]:
    members: defaultdict[str, list[tuple[Rows, Tensor, Tensor]]] = defaultdict(list)
    family, slots = family_of(sites), kohya_slots(sites)
    for site in sites:
        slot = slots[site.name]
        members[slot.module].append((slot, *_shaped(site, family, *flat[site.name])))
    tensors: dict[str, Tensor] = {}
    for module, shares in members.items():
        down, up = _fused(sorted(shares, key=lambda share: share[0].start))
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(float(len(down)))  # bfloat16 counts to 256
    return tensors


def _fused(shares: list[tuple[Rows, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Side by side in the rank, each reaching its own rows only; one site's own layer stays as it is."""
    if len(shares[0][2]) == shares[0][0].total:
        return shares[0][1:]
    down = torch.cat([down for _, down, _ in shares])
    up = down.new_zeros(shares[0][0].total, len(down))
    first = 0
    for slot, _, own in shares:
        up[slot.start : slot.start + len(own), first : first + own.shape[1]] = own
        first += own.shape[1]
    return down, up


def _check(path: Path, flat: Matrices, sites: list[Site]) -> None:
    """Reads the file as anybody would, and compares ΔW at every site."""
    back, _ = read_lora(path, sites)
    if back.keys() != flat.keys():
        raise RuntimeError(f"{path}: wrote {len(flat)} sites, read back {len(back)}")
    for site, (down, up) in flat.items():
        error = relative_distance((down[None].float(), up[None].float()), back[site])
        if not error < TOLERANCE:
            raise RuntimeError(f"{path}: {site} came back with a relative error of {error:.1e}")
