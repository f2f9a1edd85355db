"""LoRA files of Z-Image, FLUX.2, Qwen-Image and Krea 2 as tools spell them, made without those tools.

Every list of names was written from the tools' own rules: ai-toolkit, SimpleTuner and OneTrainer (August
2026), musubi-tuner (June 2026), and ComfyUI's `comfy/lora.py` and `comfy/utils.py` (August 2026).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from spellings import KOHYA, PEFT, RANK, Made, State, lokr, pair, written

from hyperdreambooth.shapes import Site

Sizes = Mapping[str, tuple[int, int]]
"""Layer → its inputs and outputs."""


def _sizes(stem: str, ends: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{stem}.{end}": size for end, size in ends.items()}


def _square(names: str, width: int) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(names.split(), (width, width))


_ZIMAGE_MLP = {
    "feed_forward.w1": (3840, 10240),
    "feed_forward.w2": (10240, 3840),
    "feed_forward.w3": (3840, 10240),
}
_JOINT = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out"
_QWEN_MLP = {"net.0.proj": (3072, 12288), "net.2": (12288, 3072)}
_KREA_MLP = {"gate": (6144, 16384), "up": (6144, 16384), "down": (16384, 6144)}
DIFFUSERS: Mapping[str, Sizes] = {
    "Z-Image": {
        **_sizes("layers.0.attention", _square("to_q to_k to_v to_out.0", 3840)),
        **_sizes("layers.0", _ZIMAGE_MLP),
        **_sizes("noise_refiner.0.attention", _square("to_q to_k to_v to_out.0", 3840)),
    },
    "FLUX.2": {
        **_sizes("transformer_blocks.0.attn", _square(_JOINT, 4096)),
        **_sizes("transformer_blocks.0.ff", {"linear_in": (4096, 24576), "linear_out": (12288, 4096)}),
        **_sizes(
            "single_transformer_blocks.0.attn", {"to_qkv_mlp_proj": (4096, 36864), "to_out": (16384, 4096)}
        ),
    },
    "Qwen-Image": {
        **_sizes("transformer_blocks.0.attn", _square(_JOINT, 3072)),
        **_sizes("transformer_blocks.0.img_mlp", _QWEN_MLP),
        **_sizes("transformer_blocks.0.txt_mlp", _QWEN_MLP),
    },
    "Krea 2": {
        **_sizes("transformer_blocks.0.attn", _square("to_q to_out.0 to_gate", 6144)),
        **_sizes("transformer_blocks.0.attn", {"to_k": (6144, 1536), "to_v": (6144, 1536)}),
        **_sizes("transformer_blocks.0.ff", _KREA_MLP),
    },
}
"""Family → the layers of one block, in diffusers' names; FLUX.2 is klein 9B."""
_KREA_NAMES = {"to_q": "wq", "to_k": "wk", "to_v": "wv", "to_out.0": "wo", "to_gate": "gate"}
PARTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Z-Image": {
        f"{block}.attention.{own}": tuple(f"{block}.attention.{part}" for part in parts.split())
        for block in ("layers.0", "noise_refiner.0")
        for own, parts in (("qkv", "to_q to_k to_v"), ("out", "to_out.0"))
    },
    "FLUX.2": {
        f"{own}.{end}": tuple(f"{theirs}.{part}" for part in parts.split())
        for own, theirs, end, parts in (
            ("double_blocks.0", "transformer_blocks.0.attn", "img_attn.qkv", "to_q to_k to_v"),
            (
                "double_blocks.0",
                "transformer_blocks.0.attn",
                "txt_attn.qkv",
                "add_q_proj add_k_proj add_v_proj",
            ),
            ("double_blocks.0", "transformer_blocks.0.attn", "img_attn.proj", "to_out.0"),
            ("double_blocks.0", "transformer_blocks.0.attn", "txt_attn.proj", "to_add_out"),
            ("double_blocks.0", "transformer_blocks.0.ff", "img_mlp.0", "linear_in"),
            ("double_blocks.0", "transformer_blocks.0.ff", "img_mlp.2", "linear_out"),
            ("single_blocks.0", "single_transformer_blocks.0.attn", "linear1", "to_qkv_mlp_proj"),
            ("single_blocks.0", "single_transformer_blocks.0.attn", "linear2", "to_out"),
        )
    },
    "Qwen-Image": {},
    "Krea 2": {
        **{f"blocks.0.attn.{own}": (f"transformer_blocks.0.attn.{end}",) for end, own in _KREA_NAMES.items()},
        **{f"blocks.0.mlp.{end}": (f"transformer_blocks.0.ff.{end}",) for end in _KREA_MLP},
    },
}
"""Family → layer of the original model → the layers of diffusers that are its rows; others have one name."""


def _original(family: str) -> Sizes:
    own = DIFFUSERS[family]
    renamed = {part for parts in PARTS[family].values() for part in parts}
    fused = {
        name: (own[parts[0]][0], sum(own[part][1] for part in parts)) for name, parts in PARTS[family].items()
    }
    return {**fused, **{name: size for name, size in own.items() if name not in renamed}}


ORIGINAL: Mapping[str, Sizes] = {family: _original(family) for family in DIFFUSERS}
"""Family → the same layers in the original model's names."""


def sites(family: str) -> tuple[Site, ...]:
    return tuple(Site(f"transformer.{name}", i, o) for name, (i, o) in DIFFUSERS[family].items())


def _dotted(
    sizes: Sizes, prefix: str, halves: tuple[str, str] = PEFT, alpha: float | None = None
) -> Callable[[Path], Made]:
    """Names with dots."""

    def make(folder: Path) -> Made:
        del folder
        state: State = {}
        for name, (columns, rows) in sizes.items():
            state |= pair(prefix + name, columns, rows, halves)
            state |= {} if alpha is None else {f"{prefix}{name}.alpha": torch.tensor(alpha)}
        return state, {}

    return make


def _flat(sizes: Sizes, alpha: float = 1.0) -> Callable[[Path], Made]:
    """Names without dots behind `lora_unet_`, with alpha."""
    return _dotted({name.replace(".", "_"): size for name, size in sizes.items()}, "lora_unet_", KOHYA, alpha)


def _with_header(family: str) -> Callable[[Path], Made]:
    """SimpleTuner's and diffusers' trainers, with alpha 8 in the header."""

    def make(folder: Path) -> Made:
        state, _ = _dotted(DIFFUSERS[family], "transformer.")(folder)
        fields = {"r": RANK, "lora_alpha": 8, "target_modules": sorted(DIFFUSERS[family])}
        header = {f"transformer.{field}": value for field, value in fields.items()}
        return state, {"lora_adapter_metadata": json.dumps(header, sort_keys=True)}

    return make


def _lokr(sizes: Sizes, prefix: str, flat: bool = False) -> Callable[[Path], Made]:
    """LoKr with one matrix of low rank."""

    def make(folder: Path) -> Made:
        del folder
        state: State = {}
        for name, (columns, rows) in sizes.items():
            state |= lokr(prefix + (name.replace(".", "_") if flat else name), columns, rows)
        return state, {}

    return make


def _fused_qkv() -> Callable[[Path], Made]:
    """SimpleTuner's Krea 2 with fused projections: q of 6144 rows, k and v of 1536 each."""
    sizes = {
        "transformer_blocks.0.attn.to_qkv": (6144, 9216),
        "transformer_blocks.0.attn.to_gate": (6144, 6144),
    }
    return _lokr(sizes, "lycoris_", flat=True)


def _ours(family: str, form: Literal["diffusers", "kohya", "original"]) -> Callable[[Path], Made]:
    return partial(written, sites(family), family, form)


def _common(family: str) -> dict[tuple[str, str], Callable[[Path], Made]]:
    own, original = DIFFUSERS[family], ORIGINAL[family]
    return {
        (family, "ours, kohya's form"): _ours(family, "kohya"),
        (family, "ours, diffusers' form"): _ours(family, "diffusers"),
        (family, "ours, original names"): _ours(family, "original"),
        (family, "ai-toolkit"): _dotted(own if family == "Z-Image" else original, "diffusion_model."),
        (family, "ai-toolkit, LoKr"): _lokr(own if family == "Z-Image" else original, "diffusion_model."),
        (family, "musubi-tuner, alpha 1 of rank 4"): _flat(own if family == "Z-Image" else original),
        (family, "OneTrainer, ComfyUI's names"): _dotted(
            own if family == "Z-Image" else original, "diffusion_model.", PEFT, 1.0
        ),
        (family, "OneTrainer before 2026"): _dotted(own, "transformer.", KOHYA, 1.0),
        (family, "SimpleTuner, alpha 8 in the header"): _with_header(family),
        (family, "SimpleTuner, LyCORIS, LoKr"): _lokr(own, "lycoris_", flat=True),
        (family, "PEFT, the denoiser alone"): _dotted(own, "base_model.model."),
    }


FILES: Mapping[tuple[str, str], Callable[[Path], Made]] = {
    **_common("Z-Image"),
    ("Z-Image", "musubi-tuner, converted for ComfyUI"): _flat(ORIGINAL["Z-Image"]),
    **_common("FLUX.2"),
    ("FLUX.2", "PEFT, original names"): _dotted(ORIGINAL["FLUX.2"], "base_model.model."),
    **_common("Qwen-Image"),
    ("Qwen-Image", "DiffSynth"): _dotted(
        DIFFUSERS["Qwen-Image"], "", ("lora_A.default.weight", "lora_B.default.weight")
    ),
    **_common("Krea 2"),
    ("Krea 2", "PEFT, original names"): _dotted(ORIGINAL["Krea 2"], "base_model.model."),
    ("Krea 2", "SimpleTuner, LyCORIS, fused q, k, v"): _fused_qkv(),
}
"""(family, who writes it so) → the file."""
