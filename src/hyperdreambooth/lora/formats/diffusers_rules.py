"""What diffusers 0.42 loads of a LoRA file: it decides by the whole file first, and then by each key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperdreambooth.lora.formats.diffusers_later import LATER, Loads, pairs, unless, unread, with_a_target
from hyperdreambooth.lora.formats.layers import UNETS, Layer, LoraKeys, Reads
from hyperdreambooth.lora.formats.peft import fits

_CLIP = ("clip", "clip flat")
_PROJECTED = ("clip", "clip flat", "projection")
_JOINT = ("joint", "joint edge", "context")
_UNET = ("unet projection", "unet processor", "unet rest", "unet edge", "unet condition")
_OWN: Mapping[str, Reads] = {
    "SD 1.5": {"unet.": _UNET, "text_encoder.": _CLIP},
    "SD 2.1": {"unet.": _UNET, "text_encoder.": _CLIP},
    "SDXL": {"unet.": _UNET, "text_encoder.": _CLIP, "text_encoder_2.": _PROJECTED},
    "SD3": {"transformer.": _JOINT, "text_encoder.": _PROJECTED, "text_encoder_2.": _PROJECTED},
    "Flux": {"transformer.": _JOINT, "text_encoder.": _CLIP},
}
"""Family → what it reads in its own form. Keys of other parts are left out without an error."""

_KOHYA_UNET = ("unet projection", "unet rest", "unet edge")
_KOHYA: Mapping[str, Reads] = {
    "SD 1.5": {"lora_unet_": _KOHYA_UNET, "lora_te_": _CLIP, "lora_te1_": _CLIP},
    "SD 2.1": {"lora_unet_": _KOHYA_UNET, "lora_te_": _CLIP, "lora_te1_": _CLIP},
    "SDXL": {
        "lora_unet_": (*_KOHYA_UNET, "sgm", "sgm edge"), "lora_te_": _CLIP, "lora_te1_": _CLIP,
        "lora_te2_": _PROJECTED,
    },
    "Flux": {
        "lora_unet_": ("flux",), "diffusion_model.": ("flux",), "lora_te_": ("clip",),
        "lora_te1_": ("clip",), "text_encoders.clip_l.transformer.": ("clip",),
    },
}  # fmt: skip
"""Family → what it reads of kohya's form, and for Flux of ComfyUI's names with `lora_down`."""
_KOHYA_PREFIXES = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")
_ONETRAINER: Reads = {"lora_transformer_": _JOINT, "lora_te1_": ("clip",)}
_ATTENTION = r"(?:single_)?transformer_blocks_\d+_attn_.*"


def by_diffusers(file: LoraKeys) -> Loads:
    """Returns the layers that diffusers loads, or why it refuses the file."""
    if later := LATER.get(file.family):
        return later(file)
    if file.family == "Flux":
        return _flux(file)
    kohya = file.family in UNETS and all(key.startswith(_KOHYA_PREFIXES) for key in file.keys)
    reads = (_KOHYA if kohya else _OWN)[file.family]
    if kohya and (odd := next((layer.module for layer in file.layers if not layer.down), "")):
        return [], f"it cannot rename {odd}"
    strange = [key for key in file.keys if "lora" not in key and "dora_scale" not in key]
    if not kohya and strange:
        return [], f"it wants `lora` in every key, and finds {strange[0]}"
    return with_a_target(file, pairs(file.layers, reads), reads)


def _flux(file: LoraKeys) -> Loads:
    keys, prefixes = file.keys, {layer.prefix for layer in file.layers}
    if not any(".lora_down.weight" in key for key in keys):
        if any("base_model" in key for key in keys):
            return [], "it takes `base_model` for a form of FLUX Kontext that has other layers"
        if not any("lora" in key for key in keys):
            return [], "it wants `lora` in a key"
        return with_a_target(file, pairs(file.layers, _OWN["Flux"]), _OWN["Flux"])
    if "transformer." in prefixes:
        return pairs(file.layers, {"transformer.": _JOINT}), ""
    if "lora_transformer_" in prefixes:
        return _onetrainer(file)
    loaded = pairs(file.layers, _KOHYA["Flux"])
    ours = ("lora_unet_", "diffusion_model.")
    wanted = [layer for layer in file.layers if layer.prefix in ours and layer.naming != "flux edge"]
    return unless(unread(wanted, loaded), loaded)


def _onetrainer(file: LoraKeys) -> Loads:
    """Reads OneTrainer's names of Flux, of which the blocks' attentions alone are known."""
    loaded = pairs(file.layers, _ONETRAINER)
    for layer in loaded:
        block = layer.prefix == "lora_transformer_" and layer.naming == "joint"
        if layer.alpha is None or (block and not re.fullmatch(_ATTENTION, layer.flat)):
            return [], f"it cannot rename {layer.module}"
    return unless(unread(file.layers, loaded) or next(iter(file.others), ""), loaded)


def strength_in_diffusers(file: LoraKeys, layer: Layer) -> float:
    """Returns the factor of ΔW: by kohya's alpha tensors, or by PEFT's fields in the header."""
    if layer.prefix not in ("unet.", "transformer.", "text_encoder.", "text_encoder_2."):
        return layer.strength
    fields = file.config
    inner = layer.module.removeprefix(layer.prefix)
    try:
        patterns: dict[str, Any] = fields.get(f"{layer.prefix}alpha_pattern") or {}
        named = (value for key, value in patterns.items() if fits(Path(), "alpha_pattern", key, inner))
        alpha = float(next(named, fields.get(f"{layer.prefix}lora_alpha", layer.rank)))
    except (ValueError, TypeError, AttributeError, OverflowError):
        return 1.0  # a header that no tool can read; `inspect` shows it
    root = bool(fields.get(f"{layer.prefix}use_rslora"))
    return alpha / (layer.rank**0.5 if root else layer.rank)
