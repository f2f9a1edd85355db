"""A summary of a LoRA file, whatever base it was made for: what is in it, and what each tool loads of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from hyperdreambooth.files import InputError, check_finite, open_tensors
from hyperdreambooth.lora.formats.container import read_header
from hyperdreambooth.lora.formats.headers import BASE_FINGERPRINT
from hyperdreambooth.lora.formats.layers import (
    Layer,
    LoraKeys,
    family_in_header,
    family_in_layers,
    family_of,
    layers_of,
)
from hyperdreambooth.lora.formats.tools import Reading, readings
from hyperdreambooth.lora.relax import norm


def describe(path: Path) -> dict[str, Any]:
    """Summarises a LoRA file, whatever base it is for; refuses one that is damaged, or no LoRA.

    `family` is that of the layers, `format` whose names they have, and `kinds` counts the kinds of adapter.
    `base`, `base_fingerprint`, `trigger` and `metadata` are the header's; `ranks`, `alphas` and `dtypes` are
    those of the tensors. `layers` counts the layers of each part, and `norms` has the norm of ΔW of each
    pair, at the strength of its alpha. `tools` has what each tool loads, and `warnings` names whatever keeps
    the file from having an effect.
    """
    entries, metadata = read_header(path)
    layers, others = layers_of(entries)
    if not any(layer.kind != "unknown" for layer in layers):
        raise InputError(f"{path}: expected a LoRA (lora_A and lora_B, or lora_down and lora_up), found none")
    shapes = ((layer.keys[tail], tail, shape) for layer in layers for tail, shape in layer.shapes.items())
    if odd := next((key for key, tail, shape in shapes if not _sound(tail, shape)), ""):
        raise InputError(f"{path}: tensor {odd[:120]!r} has a shape that no LoRA has; get the file again")
    file = LoraKeys(layers, others, family_of(layers, metadata), metadata)
    zero, norms = list[Layer](), dict[str, float]()
    with open_tensors(path) as tensors:
        for layer in layers:
            parts = {tail: tensors.get_tensor(key) for tail, key in layer.keys.items()}
            for tail, tensor in parts.items():
                check_finite(path, layer.keys[tail], tensor)
            layer.alpha = float(parts["alpha"].flatten()[0]) if "alpha" in parts else None
            if not layer.magnitudes and _is_zero(layer, parts):
                zero.append(layer)
            if layer.down:
                norms[layer.module] = _norm(layer, parts)
        for key in others:
            check_finite(path, key, tensors.get_tensor(key))
    made, trigger = readings(file), _trigger(metadata)
    return {
        "format": _form(layers),
        "family": file.family or "unknown",
        "kinds": dict(Counter(layer.kind for layer in layers)),
        "base": metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture") or "unknown",
        "base_fingerprint": metadata.get(BASE_FINGERPRINT, ""),
        "trigger": trigger,
        "ranks": sorted({layer.rank for layer in layers if layer.rank}),
        "alphas": sorted({layer.alpha for layer in layers if layer.alpha is not None}),
        "layers": dict(Counter(layer.prefix.rstrip("_.") or "without a prefix" for layer in layers)),
        "dtypes": sorted({entry.dtype for entry in entries.values()}),
        "tools": {reading.tool: asdict(reading) | {"text": str(reading)} for reading in made},
        "warnings": _warnings(file, made, zero, trigger),
        "norms": norms,
        "metadata": metadata,
    }


def _sound(tail: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a part has as many dimensions as its kind needs, and none of them is 0."""
    if tail == "alpha":
        return prod(shape) == 1
    matrix = re.match(r"_?lora(?!_magnitude)|hada_w|lokr_w", tail) and not tail.endswith(".bias")
    return 0 not in shape and len(shape) <= 5 and (len(shape) > 1 or not matrix)


def _form(layers: list[Layer]) -> str:
    """Returns whose names most layers have."""
    prefix = Counter(layer.prefix for layer in layers).most_common(1)[0][0]
    if prefix == "lycoris_":
        return "LyCORIS"
    if prefix.startswith("lora_"):
        return "kohya"
    own = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
    return "diffusers" if prefix in own else "PEFT or the original model"


def _is_zero(layer: Layer, parts: Mapping[str, Tensor]) -> bool:
    """Returns whether a factor of ΔW is zero everywhere, and so ΔW."""
    factors = [part for tail, part in parts.items() if re.match(r"_?lora|hada_w|lokr_w|diff", tail)]
    return layer.alpha == 0 or any(not bool(factor.float().any()) for factor in factors)


def _norm(layer: Layer, parts: Mapping[str, Tensor]) -> float:
    """Returns the norm of ΔW of a pair, at the strength of its alpha."""
    down, up = (parts[tail].flatten(1).float()[None] for tail in (layer.down, layer.up))
    return abs(layer.strength) * norm((down, up)) if down.shape[1] == up.shape[2] else float("nan")


def _trigger(metadata: Mapping[str, str]) -> str:
    """Returns the word for the person in the header: ModelSpec's, else kohya's most frequent caption."""
    if trigger := metadata.get("modelspec.trigger_phrase", ""):
        return trigger
    try:
        folders: Any = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts = {tag: int(count) for folder in folders.values() for tag, count in folder.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return ""
    return max(counts, key=lambda tag: counts[tag], default="").strip()


def _warnings(file: LoraKeys, made: Sequence[Reading], zero: Sequence[Layer], trigger: str) -> list[str]:
    """Names what keeps a file from having an effect."""
    found: list[str] = []
    every = len(file.layers)
    if len(zero) == every:
        found.append("inert: ΔW is zero at every layer; it was saved before it was trained")
    elif zero:
        found.append(f"ΔW is zero at {len(zero)} of {every} layers, such as {zero[0].module}")
    broken = [layer.module for layer in file.layers if layer.kind == "unknown"]
    if broken:
        found.append(f"{len(broken)} layers lack one of their matrices, such as {broken[0][:120]}")
    named, seen = family_in_header(file.metadata), family_in_layers(file.layers)
    if named and seen and named != seen:
        found.append(f"the header names {named}, but the layers are those of {seen}")
    if not trigger:
        found.append("the header names no trigger; prompts must use the words of its training")
    if file.family and not made:
        found.append(f"{file.family} has no rules here; ask the tool that loads it")
    if not file.family:
        found.append("its layers have names that no known family has")
    if made and not any(reading.loaded for reading in made):
        found.append("none of these tools loads any layer of it")
    return found
