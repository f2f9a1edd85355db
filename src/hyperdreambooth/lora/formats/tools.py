"""What other tools load of a LoRA file, and at what strength, by the rules of their own loaders.

The rules were read in the source of ComfyUI (August 2026, `comfy/lora.py`), A1111 1.10, Forge (June 2025) and
kohya's sd-scripts (February 2026), for the newest four families of kohya's musubi-tuner (June 2026);
`diffusers_rules` has those of diffusers. They need neither the tool nor a base: a file's keys decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hyperdreambooth.lora.formats.diffusers_rules import by_diffusers, strength_in_diffusers
from hyperdreambooth.lora.formats.layers import Layer, LoraKeys, Reads

_UNET = ("unet projection", "unet rest", "unet edge", "unet condition")
_OLD = ("unet processor", "unet rest", "unet edge", "unet condition")
_SGM = ("sgm", "sgm edge")
_CLIP = ("clip", "projection")
_JOINT = ("joint", "joint edge", "context")
_SD3, _FLUX = ("sd3", "sd3 edge", "context"), ("flux", "flux edge")

_COMFY_UNET: Reads = {
    "lora_unet_": (*_UNET, *_SGM), "lycoris_": _UNET, "diffusion_model.": _SGM, "unet.": _OLD, "": _OLD,
}  # fmt: skip
_COMFY_CLIP: Reads = {"lora_te_": ("clip",), "lora_te1_": _CLIP, "text_encoder.": ("clip",)}
_COMFY_CLIPS: Reads = {**_COMFY_CLIP, "lora_te2_": _CLIP, "text_encoder_2.": ("clip",)}
_COMFY_NAMED: Reads = {
    "text_encoders.clip_l.transformer.": _CLIP, "text_encoders.clip_g.transformer.": _CLIP,
    "text_encoders.t5xxl.transformer.": ("t5",),
}  # fmt: skip
_COMFY_SD3: Reads = {"lora_unet_": _SD3, "diffusion_model.": _SD3, "lora_te3_": ("t5",)}
_COMFY_FLUX: Reads = {
    "lora_unet_": _FLUX, "diffusion_model.": _FLUX, "transformer.": _JOINT, "lycoris_": _JOINT,
    "lora_transformer_": _JOINT, "lora_te2_": ("t5",), "lora_te3_": ("t5",),
}  # fmt: skip
_JOINT_SD3: Reads = dict.fromkeys(
    ("transformer.", "base_model.model.", "lora_transformer_", "lycoris_"), _JOINT
)

_ZIMAGE = ("zimage split", "zimage", "sd3 edge")
_ZIMAGE_OWN = ("zimage fused", "zimage", "sd3 edge", "joint edge")
_FLUX2_OWN = (*_FLUX, "flux2 edge")
_FLUX2 = ("joint", "flux2 joint", "joint edge", "context")
_QWEN = ("joint", "qwen", "joint edge", "flux edge")
_KREA2 = ("joint", "krea2 joint", "krea2 qkv", "flux edge", "sd3 edge")


def _both(own: Sequence[str], diffusers: Sequence[str]) -> Reads:
    """ComfyUI's rule for the newest families: the original model's names, and diffusers'."""
    reads = dict.fromkeys(("transformer.", "lycoris_", ""), diffusers)
    return {**reads, "lora_unet_": own, "diffusion_model.": (*own, *diffusers)}


_A1111_UNET = ("unet projection", "unet rest", "unet edge", *_SGM)
_KOHYA_UNET = ("unet projection", "unet rest")

_READS: Mapping[str, Mapping[str, Reads]] = {
    "ComfyUI": {
        "SD 1.5": {**_COMFY_UNET, **_COMFY_CLIP, **_COMFY_NAMED},
        "SD 2.1": {**_COMFY_UNET, **_COMFY_CLIP, **_COMFY_NAMED},
        "SDXL": {**_COMFY_UNET, **_COMFY_CLIPS, **_COMFY_NAMED},
        "SD3": {**_COMFY_SD3, **_JOINT_SD3, **_COMFY_CLIPS, **_COMFY_NAMED},
        "Flux": {**_COMFY_CLIP, **_COMFY_FLUX, **_COMFY_NAMED, "": _JOINT},
        "Z-Image": _both(_ZIMAGE_OWN, _ZIMAGE),
        "FLUX.2": {**_both(_FLUX2_OWN, _FLUX2), "lora_transformer_": _FLUX2},
        "Qwen-Image": _both(_QWEN, _QWEN),
        "Krea 2": _both(("krea2",), _KREA2),
    },
    "A1111": {
        "SD 1.5": {"lora_unet_": _A1111_UNET, "lora_te_": ("clip",), "lora_te1_": ("clip",)},
        "SD 2.1": {"lora_unet_": _A1111_UNET, "lora_te_": ("clip",)},
        "SDXL": {"lora_unet_": _A1111_UNET, "lora_te1_": ("clip",), "lora_te2_": ("clip",)},
        "SD3": {"lora_unet_": _SD3, "transformer.": ("joint",)},
    },
    "Forge": {
        "SD 1.5": {**_COMFY_UNET, **_COMFY_CLIP},
        "SD 2.1": {**_COMFY_UNET, **_COMFY_CLIP},
        "SDXL": {**_COMFY_UNET, **_COMFY_CLIPS},
        "SD3": {**_COMFY_SD3, **_COMFY_CLIPS},
        "Flux": {**_COMFY_CLIP, **_COMFY_FLUX},
    },
    "kohya": {
        "SD 1.5": {"lora_unet_": _KOHYA_UNET, "lora_te_": ("clip",)},
        "SD 2.1": {"lora_unet_": _KOHYA_UNET, "lora_te_": ("clip",)},
        "SDXL": {"lora_unet_": (*_KOHYA_UNET, "sgm"), "lora_te1_": ("clip",), "lora_te2_": ("clip",)},
        "SD3": {
            "lora_unet_": _SD3, "lora_te1_": ("clip",), "lora_te2_": ("clip",), "lora_te3_": ("t5",),
        },
        "Flux": {"lora_unet_": _FLUX, "lora_te1_": ("clip",), "lora_te3_": ("t5",)},
        "Z-Image": {"lora_unet_": _ZIMAGE},
        "FLUX.2": {"lora_unet_": _FLUX2_OWN},
        "Qwen-Image": {"lora_unet_": _QWEN},
        "Krea 2": {"lora_unet_": ("krea2",)},
    },
}  # fmt: skip
"""Tool → family → what it reads. A tool that cannot load the family has no entry for it."""

_PAIRS: Mapping[str, Sequence[str]] = {
    "ComfyUI": (
        "lora_up.weight", "lora_B.weight", "_lora.up.weight", "lora.up.weight",
        "lora_linear_layer.up.weight", "lora_B.default.weight",
    ),
    "Forge": (
        "lora_up.weight", "lora_B.weight", "_lora.up.weight", "lora.up.weight", "lora_linear_layer.up.weight",
    ),
    "A1111": ("lora_up.weight", "lora_B.weight"),
    "kohya": ("lora_up.weight",),
}  # fmt: skip
_KINDS: Mapping[str, Sequence[str]] = {
    "ComfyUI": ("lora", "dora", "loha", "lokr", "difference"),
    "Forge": ("lora", "dora", "loha", "lokr", "difference"),
    "A1111": ("lora", "dora", "loha", "lokr", "difference"),
    "kohya": ("lora", "dora"),
    "musubi-tuner": ("lora", "dora", "loha", "lokr"),
}
_MUSUBI = ("Z-Image", "FLUX.2", "Qwen-Image", "Krea 2")
"""The families that kohya's musubi-tuner trains, and sd-scripts does not."""


@dataclass(frozen=True)
class Reading:
    """What a tool makes of a file.

    Attributes:
        loaded: layers that it applies.
        ignored: layers that it leaves out, with at most a line in its log.
        refused: why it refuses the whole file; empty if it does not.
        strengths: the factors of ΔW that occur, each once, in rising order: alpha over rank, as the tool
            reads them.
        note: what else is lost.
    """

    tool: str
    loaded: int
    ignored: int
    refused: str = ""
    strengths: tuple[float, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        if not self.loaded:
            return "none"
        part = "all" if not self.ignored else f"{self.loaded} of {self.loaded + self.ignored}"
        low, high = self.strengths[0], self.strengths[-1]
        strength = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        return f"{part}, at {strength}" + (f"; {self.note}" if self.note else "")


TOOLS = ("ComfyUI", "A1111", "Forge", "diffusers", "kohya")
"""The tools, in the order in which they are shown."""


def readings(file: LoraKeys) -> list[Reading]:
    """Returns what each of `TOOLS` loads of a file; nothing for a family that has no rules here."""
    if not any(file.family in families for families in _READS.values()):
        return []
    return [_reading(tool, file) for tool in TOOLS]


def _reading(tool: str, file: LoraKeys) -> Reading:
    if tool == "diffusers":
        loaded, refused = by_diffusers(file)
        found = {strength_in_diffusers(file, layer) for layer in loaded}
    else:
        loaded, refused = _by_names(tool, file)
        found = {layer.strength for layer in loaded}
    if refused:
        return Reading(tool, 0, len(file.layers), refused)
    strengths = tuple(sorted({round(strength, 6) for strength in found}))
    return Reading(tool, len(loaded), len(file.layers) - len(loaded), "", strengths, _note(tool, loaded))


def _by_names(tool: str, file: LoraKeys) -> tuple[list[Layer], str]:
    """Returns the layers that a tool loads by their names alone, or why it refuses the file."""
    reads = _READS[tool].get(file.family)
    if reads is None:
        return [], f"{tool} cannot load {file.family}"
    kinds = _KINDS["musubi-tuner" if tool == "kohya" and file.family in _MUSUBI else tool]
    loaded = [layer for layer in file.layers if _known(tool, layer, reads, kinds)]
    if tool == "A1111":
        loaded = _a1111_layers(file, loaded)
    return loaded, _REFUSALS[tool](file, loaded)


def _known(tool: str, layer: Layer, reads: Reads, kinds: Sequence[str]) -> bool:
    """Returns whether a tool knows the module's name and the kind of adapter."""
    named = layer.naming in reads.get(layer.prefix, ())
    return named and layer.kind in kinds and (not layer.down or layer.up in _PAIRS[tool])


def _note(tool: str, loaded: Sequence[Layer]) -> str:
    """Names what a tool drops of a DoRA: the magnitude, in a spelling that it does not know."""
    spelling = "lora_magnitude" if tool == "diffusers" else "" if tool == "kohya" else "dora_scale"
    lost = any(
        layer.kind == "dora" and not (spelling and any(spelling in tail for tail in layer.keys))
        for layer in loaded
    )
    return "without DoRA's magnitudes" if lost else ""


def _a1111_layers(file: LoraKeys, known: Sequence[Layer]) -> list[Layer]:
    """Leaves out what A1111's names lack, and OpenCLIP's attentions unless all four layers are there."""
    if file.family == "SD3":
        own = r"transformer_blocks_\d+_attn_to_(?:[qkv]|out_0)"
        return [layer for layer in known if layer.naming != "joint" or re.fullmatch(own, layer.flat)]
    fused = {"SD 2.1": "lora_te_", "SDXL": "lora_te2_"}.get(file.family)
    names = {layer.module for layer in known}

    def whole(layer: Layer) -> bool:
        stem = re.sub(r"_(?:[qkv]|out)_proj$", "", layer.module)
        return {f"{stem}_{part}_proj" for part in ("q", "k", "v", "out")} <= names

    return [
        layer for layer in known if layer.prefix != fused or "self_attn" not in layer.flat or whole(layer)
    ]


def _refused_by_a1111(file: LoraKeys, loaded: Sequence[Layer]) -> str:
    del loaded
    if file.family == "SD3" and any(key.count(".") < 2 for key in file.keys):
        return "its loader of SD 3 stops at `.alpha` tensors"
    reads = _READS["A1111"][file.family]
    odd = (
        layer for layer in file.layers
        if layer.naming in reads.get(layer.prefix, ()) and not _known("A1111", layer, reads, _KINDS["A1111"])
    )  # fmt: skip
    return f"its loader stops at {key}" if (key := next((layer.module for layer in odd), "")) else ""


def _refused_by_forge(file: LoraKeys, loaded: Sequence[Layer]) -> str:
    """Forge leaves out a whole file, with a line in its log, if it does not know more than twelve keys."""
    unknown = ("lora_magnitude", "lora_A.bias", "lora_B.bias")
    read = sum(not tail.startswith(unknown) for layer in loaded for tail in layer.keys)
    strange = len(file.keys) - read
    return f"it does not know {strange} keys, and takes at most 12" if strange > 12 else ""


def _refused_by_kohya(file: LoraKeys, loaded: Sequence[Layer]) -> str:
    if file.family in ("SD3", "Flux") and any(layer.alpha is None for layer in loaded):
        return "it needs an `.alpha` tensor for every layer"
    return ""


_REFUSALS: Mapping[str, Callable[[LoraKeys, Sequence[Layer]], str]] = {
    "ComfyUI": lambda *_: "",
    "A1111": _refused_by_a1111,
    "Forge": _refused_by_forge,
    "kohya": _refused_by_kohya,
}
