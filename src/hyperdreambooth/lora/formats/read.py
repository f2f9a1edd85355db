"""Reading a LoRA in any spelling: what the layers of a file mean on a base."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hyperdreambooth.files import InputError, check_finite, open_tensors
from hyperdreambooth.lora.formats.change import Pair, decomposed, pair_of, rank_of, size_of
from hyperdreambooth.lora.formats.keys import Layer, LoraFile, open_lora, some
from hyperdreambooth.lora.formats.names import Places, lookup
from hyperdreambooth.lora.formats.original import Rows
from hyperdreambooth.lora.formats.peft import config_of, scale_of
from hyperdreambooth.shapes import Factors, Site

WeightOf: TypeAlias = Callable[[str], Tensor]
"""Gives a base's weight at a site; a DoRA's ΔW depends on it."""


def read_lora(
    path: Path, layers: Sequence[Site], weight_of: WeightOf | None = None
) -> tuple[Factors, dict[str, str]]:
    """Reads a LoRA in diffusers', PEFT's, kohya's or the original models' spelling, alpha folded into `up`.

    LoHa, LoKr, DoRA, convolutions and whole matrices become factors of exactly the same ΔW, of whatever rank
    that takes. What is no change of a layer (the embedding of a word) is left out with a warning.

    Args:
        path: a safetensors file; for PEFT's own names, `adapter_config.json` beside it gives alpha.
        layers: the base's layers. The file may adapt fewer of them; one that adapts others is refused.
        weight_of: the base's weights; without them, a DoRA is refused.

    Returns:
        Float32 factors with n = 1, each site of its own rank, and the file's metadata.
    """
    file = open_lora(path)
    places = _places(file, layers)
    _check_shapes(file, places)
    config = config_of(file)
    if file.left_out:
        warnings.warn(f"{path}: {', '.join(file.left_out)} is not worn; the rest is", stacklevel=2)
    with open_tensors(path) as tensors:
        for key in file.entries:
            check_finite(path, key, tensors.get_tensor(key))
        matrices: dict[str, Pair] = {}
        for name, layer in file.modules.items():
            pair = _pair(file, config, layer, places[name], tensors, weight_of)
            _check_rest(path, name, pair[1], places[name])
            for site, rows in places[name]:
                matrices[site.name] = _share(pair, site, rows)
    if overflown := [site for site, pair in matrices.items() if not pair[1].isfinite().all()]:
        too_large = "alpha times up is too large for float32"
        raise InputError(f"{path}: {overflown[0]}: {too_large}; get the file again")
    return {name: (down[None], up[None]) for name, (down, up) in sorted(matrices.items())}, file.metadata


def _places(file: LoraFile, layers: Sequence[Site]) -> Places:
    """Returns the sites of every layer of a file.

    A name without a component may be of several, as of two text encoders: shapes decide, else the name of
    the file's folder, as pipelines of diffusers are laid out.
    """
    named, bare = lookup(layers)
    found: Places = {}
    for name, layer in file.modules.items():
        if name in named:
            found[name] = named[name]
        elif alternatives := bare.get(name):
            size = size_of(file.shapes(layer))
            fitting = [one for one in alternatives if (one[0].out_features, one[0].in_features) == size]
            fitting = fitting or alternatives[:1]  # its shape is refused afterwards
            own = [one for one in fitting if one[0].component == file.path.absolute().parent.name]
            if len(fitting) > 1 and not own:
                parts = " and ".join(site.component for site, _ in fitting)
                advice = "put it into a folder of the component's name"
                raise InputError(f"{file.path}: its names fit {parts} alike; {advice}")
            found[name] = (own or fitting)[:1]
    if strange := [name for name in file.modules if name not in found]:
        t5 = any("lora_te3_" in name or "t5xxl" in name or "SelfAttention" in name for name in strange)
        why = " (they belong to a T5 text encoder, which this base has not loaded)" if t5 else ""
        what = f"keys that fit no layer of this base{why}: {some(strange)}"
        raise InputError(f"{file.path}: {what}; pass the base that it was made for")
    return found


def _check_shapes(file: LoraFile, places: Places) -> None:
    taken: set[str] = set()
    for name, layer in file.modules.items():
        shapes = file.shapes(layer)
        size = size_of(shapes)
        for site, rows in places[name]:
            where, fits = f"{file.path}: {site.name}", (rows.total, site.in_features)
            if size != fits:
                got = _seen(layer, shapes)
                wanted = f"down (r, {fits[1]}) and up ({fits[0]}, r)"
                if layer.kind != "LoRA":
                    wanted = f"a {layer.kind} of {fits[0]} outputs and {fits[1]} inputs"
                raise InputError(f"{where}: expected {wanted}, got {got}; it was made for another base")
            if layer.kind == "LoRA" and shapes["down"][0] > sum(fits):
                raise InputError(
                    f"{where}: rank {shapes['down'][0]} exceeds the layer's size; get the file again"
                )
            if site.name in taken:
                raise InputError(
                    f"{file.path}: two down matrices for {site.name}; expected one adapter per file"
                )
            taken.add(site.name)


def _seen(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Formats the shapes of a layer's matrices."""
    if layer.kind == "LoRA":
        return f"{shapes['down']} and {shapes['up']}"
    return ", ".join(f"{part} {shape}" for part, shape in sorted(shapes.items()) if part != "alpha")


def _pair(
    file: LoraFile,
    config: Mapping[str, Any],
    layer: Layer,
    parts: Sequence[tuple[Site, Rows]],
    tensors: Any,
    weight_of: WeightOf | None,
) -> Pair:
    """Reads the factors of one layer of the file, with its scale, and its magnitudes where it is a DoRA."""
    read = {part: tensors.get_tensor(key) for part, key in layer.parts.items()}
    alpha = float(read["alpha"]) if "alpha" in read else None
    down, up = pair_of({part: tensor.float() for part, tensor in read.items()})
    rank = rank_of(file.shapes(layer))
    pair = down, up * scale_of(file, config, parts[0][0].component, layer, rank, alpha)
    magnitude = read.get("dora_scale", read.get("magnitude"))
    if magnitude is None:
        return pair
    if weight_of is None:
        raise InputError(f"{file.path}: is a DoRA, whose ΔW depends on the base's weights; load the base")
    return _decomposed(file, layer, pair, magnitude.float(), parts, weight_of)


def _decomposed(
    file: LoraFile,
    layer: Layer,
    pair: Pair,
    magnitude: Tensor,
    parts: Sequence[tuple[Site, Rows]],
    weight_of: WeightOf,
) -> Pair:
    """Returns a DoRA's ΔW over the weights of the layer's sites, which are together the whole layer."""
    weights = {site.name: weight_of(site.name).detach().float().cpu() for site, _ in parts}
    channels = next(iter(weights.values())).shape[1]
    weight = torch.cat(
        [
            rows.turned(weights[site.name].flatten(1))
            for site, rows in sorted(parts, key=lambda one: one[1].start)
        ]
    )
    if len(weight) != parts[0][1].total or magnitude.numel() not in (len(weight), channels):
        sizes = f"expected {len(weight)} or {channels} magnitudes, got shape {tuple(magnitude.shape)}"
        raise InputError(f"{file.path}: {layer.module[:200]}: {sizes}; it was made for another base")
    if "magnitude" in layer.parts:  # PEFT's are always those of the outputs
        magnitude = magnitude.flatten()
    return decomposed(pair, magnitude, weight, channels)


def _share(pair: Pair, site: Site, rows: Rows) -> Pair:
    """Returns a site's part of a layer that several share: its rows, and the ranks that reach them."""
    down, up = pair
    if rows.total == site.out_features:
        return down, rows.turned(up)
    own = up[rows.start : rows.start + site.out_features]
    used = own.abs().amax(0) > 0
    used[0] |= not used.any()
    return down[used], own[:, used]


def _check_rest(path: Path, name: str, up: Tensor, parts: Sequence[tuple[Site, Rows]]) -> None:
    """Refuses a fused layer that also changes rows for which the base has no layer."""
    rest = torch.ones(len(up), dtype=torch.bool)
    for site, rows in parts:
        rest[rows.start : rows.start + site.out_features] = False
    if bool(up[rest].any()):
        advice = "pass the base that it was made for"
        raise InputError(f"{path}: {name} changes rows that no layer of this base has; {advice}")
