"""Writing a LoRA so that every tool loads it, and reading it back before the file appears.

The scale is in the matrices, all sites have one rank, and alpha equals it: readers that ignore alpha get the
same ΔW. Where the original model has one layer for q, k and v, these become one block-diagonal LoRA of rank
3r.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hyperdreambooth.files import InputError, save_tensors, whole_file
from hyperdreambooth.lora.formats.filename import check_name
from hyperdreambooth.lora.formats.headers import (
    BASE_FINGERPRINT,
    BASE_NAME,
    CONSENT,
    LoraInfo,
    content_hash,
    kohya_fields,
    model_spec,
    peft_config,
)
from hyperdreambooth.lora.formats.names import (
    LoraFamily,
    diffusers_rows,
    family_of,
    kernel_of,
    kohya_rows,
    left_out_by,
    original_rows_of,
)
from hyperdreambooth.lora.formats.original import Rows
from hyperdreambooth.lora.formats.peft import ADAPTER_METADATA
from hyperdreambooth.lora.formats.read import read_lora
from hyperdreambooth.lora.relax import padded, relative_distance
from hyperdreambooth.shapes import Factors, Site

Form = Literal["diffusers", "kohya", "original"]

_ROWS = {"diffusers": diffusers_rows, "kohya": kohya_rows, "original": original_rows_of}
"""Form → what places sites in it."""
TOLERANCE = 1e-5  # relative, of a site's ΔW as read back from what was written
ROUNDING = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Number format → the relative error of a site's ΔW that rounding may cause, several times the usual one."""


def write_lora(
    path: Path, factors: Factors, form: Form, info: LoraInfo, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a standard LoRA file and checks that it can be read back; if it cannot, no file is left.

    Args:
        path: a `.safetensors` file, of a name that diffusers does not ignore.
        factors: one identity, down `(1, r, i)` and up `(1, o, r)`; smaller ranks are zero-padded.
        form: `diffusers` for `pipe.load_lora_weights`, `kohya` for ComfyUI, A1111 and Forge, `original` for
            tools that know the original model's names only; it has no alpha, at which some readers stop.
        info: what the header says about the adapter, and the family of its base.
        dtype: number format in the file; refused if it cannot hold a number, or only with a large error.
    """
    check_name(path)
    sites = sites_of(factors)
    family = check_form(sites, form, info.family)
    flat = _at_one_rank(factors, dtype)
    rank = next(iter(flat.values()))[0].shape[1]
    tensors = _tensors(flat, sites, family, form)
    digest = content_hash(tensors)
    metadata = model_spec(info, family, "diffusers" if form == "diffusers" else family.origin, digest)
    if form == "diffusers":
        metadata[ADAPTER_METADATA] = peft_config(sites, rank)
    if form == "kohya":
        metadata |= kohya_fields(info, family, path.stem, rank, digest)
    metadata |= {name: value for name, value in _origin(info).items() if value}
    with whole_file(path) as temporary:
        save_tensors(temporary, tensors, metadata)
        _check(temporary, flat, sites)


def _origin(info: LoraInfo) -> dict[str, str]:
    return {BASE_FINGERPRINT: info.base_fingerprint, BASE_NAME: info.base, CONSENT: info.consent}


def state_dict(
    factors: Factors, form: Form = "diffusers", dtype: torch.dtype = torch.float32, family: str = ""
) -> dict[str, Tensor]:
    """Returns the tensors of one identity under the names of a form, as `write_lora` writes them."""
    sites = sites_of(factors)
    return _tensors(_at_one_rank(factors, dtype), sites, check_form(sites, form, family), form)


def check_form(sites: Sequence[Site], form: str, family: str = "") -> LoraFamily:
    """Refuses layers that a form has no name for; to be called before long work as well.

    It warns of layers that a tool would leave out without a word.

    Args:
        sites: the layers that a file is to change.
        form: `diffusers`, `kohya` or `original`; other forms name no layers.
        family: name of the base's family; where nobody knows it, the layers have to show it.

    Returns:
        The family.

    Raises:
        InputError: a layer without a name, or layers that several families have.
    """
    found = family_of(sites, family)
    if form in _ROWS:
        _ROWS[form](sites, found)
    if form == "kohya":
        for tools, layer in left_out_by(sites).items():
            warnings.warn(f"kohya form: {tools} out the layer {layer}", stacklevel=2)
    return found


def sites_of(factors: Factors) -> list[Site]:
    """Returns the layers that factors change, sorted by name."""
    return [Site(name, down.shape[2], up.shape[1]) for name, (down, up) in sorted(factors.items())]


def _at_one_rank(factors: Factors, dtype: torch.dtype) -> Factors:
    """Returns one identity's factors at one rank, rounded to a number format, on the CPU."""
    if several := [len(down) for down, _ in factors.values() if len(down) != 1]:
        raise ValueError(f"a LoRA file holds one identity, not {several[0]}")
    made: Factors = {}
    for site, (down, up) in sorted(padded([factors]).items()):
        whole = down.detach().cpu(), up.detach().cpu()
        made[site] = _rounded(*whole, dtype)
        name, advice = str(dtype).removeprefix("torch."), "use float32, or a lower learning rate"
        if not all(half.isfinite().all() for half in made[site]):
            raise InputError(f"{site}: NaN or infinite numbers in {dtype}; {advice}")
        error = relative_distance(whole, made[site]) if dtype in ROUNDING else 0.0
        if error > ROUNDING.get(dtype, 1.0):
            limit = f"its ΔW loses {error:.1%} in {name}, expected at most {ROUNDING[dtype]:.1%}"
            raise InputError(f"{site}: {limit}; use float32")
    return made


def _rounded(down: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds down `(1, r, i)` and up `(1, o, r)`.

    float16 has a small range. So the sizes of both are made alike first, by a power of two for each slot of
    the rank, which costs no digit and leaves ΔW as it is.
    """
    if dtype == torch.float16:
        sizes = down.abs().amax(2), up.abs().amax(1)
        alike = (sizes[0] > 0) & (sizes[1] > 0)
        ratio = sizes[1].where(alike, 1).double().log2() - sizes[0].where(alike, 1).double().log2()
        shift = (ratio / 2).round().exp2()
        down, up = down.double() * shift[:, :, None], up.double() / shift[:, None]
    return down.to(dtype), up.to(dtype)


def _tensors(flat: Factors, sites: list[Site], family: LoraFamily, form: Form) -> dict[str, Tensor]:
    """Returns the tensors of a file; some modules of the original models are several sites."""
    places = _ROWS[form](sites, family)
    members: defaultdict[str, list[tuple[Rows, Tensor, Tensor]]] = defaultdict(list)
    for site in sites:
        rows = places[site.name]
        down, up = _shaped(site, family, *flat[site.name])
        members[rows.module].append((rows, down, rows.turned(up)))
    names = ("lora_down", "lora_up") if form == "kohya" else ("lora_A", "lora_B")
    tensors: dict[str, Tensor] = {}
    for module, shares in members.items():
        down, up = _fused(sorted(shares, key=lambda share: share[0].start))
        tensors |= {f"{module}.{names[0]}.weight": down, f"{module}.{names[1]}.weight": up}
        if form == "kohya":  # alpha in float32: bfloat16 counts to 256
            tensors[f"{module}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def _shaped(site: Site, family: LoraFamily, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns down and up as matrices, or as a convolution and a 1×1 one if the layer is a convolution."""
    side = kernel_of(site, family)
    return (down[0].unflatten(1, (-1, side, side)), up[0, ..., None, None]) if side else (down[0], up[0])


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


def _check(path: Path, flat: Factors, sites: list[Site]) -> None:
    """Reads the file like any reader, and compares ΔW at every site."""
    back, _ = read_lora(path, sites)
    if back.keys() != flat.keys():
        raise RuntimeError(f"{path}: wrote {len(flat)} sites, read back {len(back)}")
    for site, (down, up) in flat.items():
        error = relative_distance((down.float(), up.float()), back[site])
        if not error < TOLERANCE:
            raise RuntimeError(f"{path}: {site} came back with a relative error of {error:.1e}")
