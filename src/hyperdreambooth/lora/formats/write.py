"""Writing a LoRA so that every tool loads it, and reading it back before the file appears.

The scale is in `up`, all sites have one rank, and alpha equals it: readers that ignore alpha get the same ΔW.
Where the original model has one layer for q, k and v, these become one block-diagonal LoRA of rank 3r.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hyperdreambooth.files import InputError, save_tensors, whole_file
from hyperdreambooth.lora.formats.filename import check_name
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
    kohya_rows,
)
from hyperdreambooth.lora.formats.read import ADAPTER_METADATA, Matrices, read_lora
from hyperdreambooth.lora.relax import padded, relative_distance
from hyperdreambooth.shapes import Factors, Site

Form = Literal["diffusers", "kohya"]

TOLERANCE = 1e-5  # relative, of a site's ΔW


def write_lora(
    path: Path, factors: Factors, form: Form, info: LoraInfo, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a standard LoRA file and checks that it can be read back; if it cannot, no file is left.

    Args:
        path: a `.safetensors` file, of a name that diffusers does not ignore.
        factors: one identity, down `(1, r, i)` and up `(1, o, r)`; smaller ranks are zero-padded.
        form: `diffusers` for `pipe.load_lora_weights`, `kohya` for ComfyUI, A1111 and Forge.
        info: what the header says about the adapter.
        dtype: number format in the file; refused if it cannot hold a number.
    """
    check_name(path)
    flat = _flatten(factors, dtype)
    sites = [Site(name, down.shape[1], len(up)) for name, (down, up) in flat.items()]
    family, rank = family_of(sites), len(next(iter(flat.values()))[0])
    tensors = _diffusers_tensors(flat, sites) if form == "diffusers" else _kohya_tensors(flat, sites)
    digest = content_hash(tensors)
    metadata = model_spec(info, family, "diffusers" if form == "diffusers" else family.origin, digest)
    if form == "diffusers":
        metadata[ADAPTER_METADATA] = peft_config(sites, rank)
    else:
        metadata |= kohya_fields(info, family, path.stem, rank, digest)
    if info.base_fingerprint:
        metadata[BASE_FINGERPRINT] = info.base_fingerprint
    with whole_file(path) as temporary:
        save_tensors(temporary, tensors, metadata)
        _check(temporary, flat, sites)


def state_dict(factors: Factors, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Returns the tensors of one identity that diffusers loads, as `write_lora` writes them."""
    flat = _flatten(factors, dtype)
    return _diffusers_tensors(flat, [Site(name, down.shape[1], len(up)) for name, (down, up) in flat.items()])


def _flatten(factors: Factors, dtype: torch.dtype) -> Matrices:
    """Returns one identity at one rank: site → down `(r, i)`, up `(o, r)`."""
    if several := [len(down) for down, _ in factors.values() if len(down) != 1]:
        raise ValueError(f"a LoRA file holds one identity, not {several[0]}")
    flat: Matrices = {}
    for site, (down, up) in sorted(padded([factors]).items()):
        flat[site] = down.detach()[0].to("cpu", dtype), up.detach()[0].to("cpu", dtype)
        if not all(half.isfinite().all() for half in flat[site]):
            advice = "use float32, or a lower learning rate"
            raise InputError(f"{site}: NaN or infinite numbers in {dtype}; {advice}")
    return flat


def _diffusers_tensors(flat: Matrices, sites: list[Site]) -> dict[str, Tensor]:
    family, tensors = family_of(sites), dict[str, Tensor]()
    for site in sites:
        down, up = _shaped(site, family, *flat[site.name])
        module = diffusers_module(site, family)
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    return tensors


def _shaped(site: Site, family: LoraFamily, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns down and up as matrices, or as 1×1 convolutions if the layer is one, which diffusers needs."""
    return (down[..., None, None], up[..., None, None]) if is_convolution(site, family) else (down, up)


def _kohya_tensors(flat: Matrices, sites: list[Site]) -> dict[str, Tensor]:
    members: defaultdict[str, list[tuple[Rows, Tensor, Tensor]]] = defaultdict(list)
    family, places = family_of(sites), kohya_rows(sites)
    for site in sites:
        rows = places[site.name]
        members[rows.module].append((rows, *_shaped(site, family, *flat[site.name])))
    tensors: dict[str, Tensor] = {}
    for module, shares in members.items():
        down, up = _fused(sorted(shares, key=lambda share: share[0].start))
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(float(len(down)))  # in float32: bfloat16 counts to 256
    return tensors


def _fused(shares: list[tuple[Rows, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Puts sites that share a layer side by side in the rank; leaves a single site as it is."""
    if len(shares[0][2]) == shares[0][0].total:
        return shares[0][1:]
    down = torch.cat([down for _, down, _ in shares])
    up = down.new_zeros(shares[0][0].total, len(down))
    first = 0
    for rows, _, own in shares:
        up[rows.start : rows.start + len(own), first : first + own.shape[1]] = own
        first += own.shape[1]
    return down, up


def _check(path: Path, flat: Matrices, sites: list[Site]) -> None:
    """Reads the file like any reader, and compares ΔW at every site."""
    back, _ = read_lora(path, sites)
    if back.keys() != flat.keys():
        raise RuntimeError(f"{path}: wrote {len(flat)} sites, read back {len(back)}")
    for site, (down, up) in flat.items():
        error = relative_distance((down[None].float(), up[None].float()), back[site])
        if not error < TOLERANCE:
            raise RuntimeError(f"{path}: {site} came back with a relative error of {error:.1e}")
