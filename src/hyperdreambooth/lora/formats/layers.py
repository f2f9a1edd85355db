"""What the keys of any LoRA file mean: layers, their spelling and the family of bases that has them.

`read` reads what a base can wear and refuses the rest. This file only names what is there, so that `tools`
can judge files of every spelling, also those that `read` refuses. It knows names from written rules alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hyperdreambooth.lora.formats.container import Entry
from hyperdreambooth.lora.formats.keys import split_key, up_of
from hyperdreambooth.lora.formats.peft import ADAPTER_METADATA, MAX_CONFIG

_PREFIXES = (
    "lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lycoris_",
    "base_model.model.", "diffusion_model.", "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.", "text_encoders.t5xxl.transformer.", "unet.", "transformer.",
    "text_encoder.", "text_encoder_2.", "text_encoder_3.",
)  # fmt: skip
"""What names the part of the pipeline. A module without any of them has the prefix `""`."""

_TRANSFORMER = r"transformer_blocks_\d+_(?:attn[12]_to_(?:[qkv]|out_0)|ff_net_(?:0_proj|2))"
_EMBEDDERS = (
    r"x_embedder|pos_embed_proj|proj_out|norm_out_linear"
    r"|time_text_embed_(?:timestep|guidance|text)_embedder_linear_[12]"
)
_ZIMAGE = r"(?:layers|noise_refiner|context_refiner)_\d+"
_NAMINGS: Mapping[str, str] = {
    "unet projection": r"(?:(?:down|up)_blocks_\d+|mid_block)_attentions_\d+_transformer_blocks_\d+_attn[12]"
    r"_to_(?:[qkv]|out_0)",
    "unet processor": r"(?:(?:down|up)_blocks_\d+|mid_block)_attentions_\d+_transformer_blocks_\d+_attn[12]"
    r"_processor_to_(?:[qkv]|out)",
    "unet rest": r"(?:(?:down|up)_blocks_\d+|mid_block)_(?:attentions_\d+_(?:proj_in|proj_out"
    r"|transformer_blocks_\d+_ff_net_(?:0_proj|2))|resnets_\d+_(?:conv[12]|time_emb_proj|conv_shortcut)"
    r"|(?:down|up)samplers_0_conv)",
    "unet edge": r"conv_in|conv_out|time_embedding_linear_[12]",
    "unet condition": r"add_embedding_linear_[12]",
    "sgm": rf"(?:(?:in|out)put_blocks_\d+|middle_block)_\d+_(?:proj_in|proj_out|{_TRANSFORMER}|in_layers_2"
    r"|out_layers_3|emb_layers_1|skip_connection|op|conv)",
    "sgm edge": r"time_embed_[02]|label_emb_0_[02]|input_blocks_0_0|out_2",
    "sd3": r"joint_blocks_\d+_(?:x|context)_block_(?:attn2?_(?:qkv|proj)|mlp_fc[12]|adaLN_modulation_1)",
    "context": r"context_embedder",
    "sd3 edge": r"[ty]_embedder_mlp_[02]|x_embedder_proj"
    r"|final_layer_(?:linear|adaLN_modulation_1)",
    "flux": r"double_blocks_\d+_(?:img|txt)_(?:attn_(?:qkv|proj)|mlp_[02]|mod_lin)"
    r"|single_blocks_\d+_(?:linear[12]|modulation_lin)",
    "flux edge": r"(?:img|txt)_in|(?:time|vector|guidance)_in_(?:in|out)_layer"
    r"|final_layer_(?:linear|adaLN_modulation_1)",
    "joint": r"transformer_blocks_\d+_(?:attn2?_(?:to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)"
    r"|ff(?:_context)?_net_(?:0_proj|2)|norm1(?:_context)?_linear)"
    r"|single_transformer_blocks_\d+_(?:attn_to_[qkv]|proj_mlp|proj_out|norm_linear)",
    "joint edge": _EMBEDDERS,
    "zimage split": rf"{_ZIMAGE}_attention_to_(?:[qkv]|out_0)|all_x_embedder_2-1"
    r"|all_final_layer_2-1_(?:linear|adaLN_modulation_1)",
    "zimage fused": rf"{_ZIMAGE}_attention_(?:qkv|out)",
    "zimage": rf"{_ZIMAGE}_(?:feed_forward_w[123]|adaLN_modulation_0)|cap_embedder_1",
    "flux2 joint": r"transformer_blocks_\d+_ff(?:_context)?_linear_(?:in|out)"
    r"|single_transformer_blocks_\d+_attn_to_(?:qkv_mlp_proj|out)",
    "flux2 edge": r"(?:double_stream_modulation_(?:img|txt)|single_stream_modulation)_lin",
    "flux2 joint edge": r"(?:double_stream_modulation_(?:img|txt)|single_stream_modulation)_linear"
    r"|time_guidance_embed_(?:timestep|guidance)_embedder_linear_[12]",
    "qwen": r"transformer_blocks_\d+_(?:img|txt)_(?:mlp_net_(?:0_proj|2)|mod_1)",
    "krea2 joint": r"(?:transformer_blocks|text_fusion_(?:layerwise|refiner)_blocks)_\d+"
    r"_(?:attn_to_(?:[qkv]|out_0|gate)|ff_(?:gate|up|down))"
    r"|time_embed_linear_[12]|time_mod_proj|txt_in_linear_[12]|text_fusion_projector",
    "krea2 qkv": r"transformer_blocks_\d+_attn_to_qkv",
    "krea2": r"(?:blocks|txtfusion_(?:layerwise|refiner)_blocks)_\d+"
    r"_(?:attn_(?:w[qkvo]|gate)|mlp_(?:gate|up|down))"
    r"|first|last_linear|tmlp_[02]|tproj_1|txtmlp_[13]|txtfusion_projector",
    "clip": r"text_model_encoder_layers_\d+_(?:self_attn_(?:[qkv]|out)_proj|mlp_fc[12])",
    "clip flat": r"encoder_layers_\d+_(?:self_attn_(?:[qkv]|out)_proj|mlp_fc[12])",
    "projection": r"text_projection",
    "t5": r"encoder_block_\d+_layer_\d_(?:SelfAttention_[qkvo]|DenseReluDense_w[io](?:_[01])?)",
}
"""Naming → the modules that have it, with `_` for every `.`; the first one that matches counts."""


@dataclass
class Layer:
    """One adapted layer of a file."""

    module: str  # as the file spells it
    keys: dict[str, str] = field(default_factory=dict[str, str])  # tail → key
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])  # tail → shape
    alpha: float | None = None

    @cached_property
    def prefix(self) -> str:
        """What names the part of the pipeline, of `_PREFIXES`; empty if nothing does."""
        return next((prefix for prefix in _PREFIXES if self.module.startswith(prefix)), "")

    @cached_property
    def flat(self) -> str:
        """The module's name without its prefix, with `_` for every `.`."""
        return self.module.removeprefix(self.prefix).replace(".", "_")

    @cached_property
    def naming(self) -> str:
        """Whose name the module has, of `_NAMINGS`; empty for names that no supported family has."""
        return next((naming for naming, names in _NAMINGS.items() if re.fullmatch(names, self.flat)), "")

    @property
    def down(self) -> str:
        """The tail of the matrix that is multiplied first; empty where the layer has no such pair."""
        return next((tail for tail in self.keys if up_of(tail) in self.keys), "")

    @property
    def up(self) -> str:
        """The tail of the matrix that is multiplied last."""
        return up_of(self.down)

    @property
    def rank(self) -> int:
        """The rank by which alpha is divided; 0 where the kind of adapter divides by none."""
        tails = (self.down, "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        return next((self.shapes[tail][0] for tail in tails if tail in self.shapes), 0)

    @property
    def strength(self) -> float:
        """Alpha over the rank, and 1 without an alpha tensor: most tools ignore what the header says."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    @property
    def magnitudes(self) -> bool:
        """Whether it has a DoRA's magnitudes, which change the weights also where ΔW is zero."""
        return any("dora_scale" in tail or "lora_magnitude" in tail for tail in self.keys)

    @property
    def kind(self) -> str:
        """What kind of adapter it is: `lora`, `dora`, `loha`, `lokr`, `difference`, or `unknown`."""
        if self.down:
            return "dora" if self.magnitudes else "lora"
        tails = " ".join(self.keys)
        marks = {"hada_": "loha", "lokr_": "lokr", "diff": "difference", "_norm": "difference"}
        return next((kind for mark, kind in marks.items() if mark in tails), "unknown")


Reads = Mapping[str, Sequence[str]]
"""Prefix of a module → the namings that a tool knows behind it."""


@dataclass(frozen=True)
class LoraKeys:
    """What the rules look at: the layers of a file, its other keys, its family and its metadata."""

    layers: Sequence[Layer]
    others: Sequence[str]
    family: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @cached_property
    def config(self) -> dict[str, Any]:
        """PEFT's fields in the header; none where they cannot be read."""
        text = self.metadata.get(ADAPTER_METADATA, "{}")
        try:
            found = json.loads(text) if len(text) <= MAX_CONFIG else {}
        except (ValueError, RecursionError):
            found = {}
        return found if isinstance(found, dict) else {}

    @property
    def keys(self) -> list[str]:
        """Every key of the file."""
        return [key for layer in self.layers for key in layer.keys.values()] + list(self.others)


def layers_of(entries: Mapping[str, Entry]) -> tuple[list[Layer], list[str]]:
    """Sorts the keys of a file into layers, and returns the keys besides that belong to no layer.

    Args:
        entries: key → number format and shape, as `read_header` gives them.
    """
    layers, others = dict[str, Layer](), list[str]()
    for key, entry in entries.items():
        if (found := split_key(key)) is None:
            others.append(key)
            continue
        module, tail, _ = found
        layer = layers.setdefault(module, Layer(module))
        layer.keys[tail], layer.shapes[tail] = key, entry.shape
    return list(layers.values()), others


UNETS = ("SD 1.5", "SD 2.1", "SDXL")
"""The families whose denoiser is a U-Net."""
_TOKEN_WIDTHS = {768: "SD 1.5", 1024: "SD 2.1", 2048: "SDXL"}
_HEADERS = (
    (r"sdxl|stable-diffusion-xl", "SDXL"), (r"sd3|stable-diffusion-3|sd_3", "SD3"),
    (r"flux[._-]?2|klein", "FLUX.2"), (r"flux", "Flux"), (r"qwen", "Qwen-Image"), (r"z-?_?image", "Z-Image"),
    (r"krea[._-]?2", "Krea 2"), (r"sd_v2|stable-diffusion-v2", "SD 2.1"),
    (r"sd_v1|stable-diffusion-v1", "SD 1.5"),
)  # fmt: skip
_HEADER_FIELDS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")


def family_in_header(metadata: Mapping[str, str]) -> str:
    """Returns the family that a file's metadata names; empty where it names none."""
    for name in _HEADER_FIELDS:
        text = metadata.get(name, "").lower()
        if found := next((family for pattern, family in _HEADERS if re.search(pattern, text)), ""):
            return found
    return ""


def family_of(layers: Sequence[Layer], metadata: Mapping[str, str]) -> str:
    """Returns the family of a file: by its layers, its header, or the likeliest one; empty if unknown."""
    found = family_in_layers(layers) or family_in_header(metadata)
    if found:
        return found
    if any(layer.naming in ("flux", "joint") for layer in layers):
        return "Flux"
    if {layer.prefix for layer in layers} & {"lora_te1_", "lora_te2_", "text_encoder_2."}:
        return "SDXL"
    return "SD 1.5" if any(layer.naming for layer in layers) else ""


_OWN_NAMES = {"zimage": "Z-Image", "flux2": "FLUX.2", "qwen": "Qwen-Image", "krea2": "Krea 2", "sd3": "SD3"}


def family_in_layers(layers: Iterable[Layer]) -> str:
    """Returns the family whose names and widths the layers have; empty where several families have them."""
    every = list(layers)
    prefixes = {layer.prefix for layer in every}
    namings = {layer.naming.partition(" ")[0] for layer in every if layer.naming != "sd3 edge"}
    if own := next((family for naming, family in _OWN_NAMES.items() if naming in namings), ""):
        return own
    if namings & {"unet", "sgm"}:
        return _unet_family(every, prefixes)
    if namings & {"flux", "joint"}:
        core = [layer for layer in every if layer.naming in ("flux", "joint")]
        return _transformer_family(core or every)
    widths = Counter(_columns(layer) for layer in every)
    if prefixes & {"lora_te_"} and widths.keys() & _TOKEN_WIDTHS.keys():
        return _TOKEN_WIDTHS[max(widths.keys() & _TOKEN_WIDTHS.keys())]
    return ""


_GATED = {"linear1": {7: "Flux", 9: "FLUX.2"}, "mlp_0": {4: "Flux", 6: "FLUX.2"}}
"""Layers that Flux and FLUX.2 name alike → outputs for each input: FLUX.2's MLPs are gated."""
_FLUXS = r"single_transformer_blocks_|double_blocks_(?:[5-9]|1\d)_|single_blocks_[23]\d_"


def _transformer_family(layers: list[Layer]) -> str:
    """Returns the family of a transformer whose names several have: by its widths, or by its depth.

    Attention layers of 3072 numbers may be those of Flux, with 19 and 38 blocks, of FLUX.2 klein 4B, with 5
    and 20, or of Qwen-Image with 60.
    """
    flats, widths = [layer.flat for layer in layers], {_columns(layer) for layer in layers}
    for layer in layers:
        ratios = next((ratios for end, ratios in _GATED.items() if layer.flat.endswith(end)), {})
        if family := ratios.get(_rows(layer) // max(_columns(layer), 1)):
            return family
    # Flux and SD 3 alone have these
    older = any(re.search(r"_ff_(?:context_)?net_|_norm1_", flat) for flat in flats)
    if 4096 in widths:
        return "FLUX.2"
    if 6144 in widths and not older:
        text = any(re.search(r"attn_(?:add|to_add)_|^double_", flat) for flat in flats)
        return "FLUX.2" if text else "Krea 2"
    if any("_attn2_" in flat for flat in flats) or widths & {1536, 2432, 6144, 9728}:
        return "SD3"
    if any(re.match(_FLUXS, flat) for flat in flats) or (older and widths & {3072, 12288}):
        return "Flux"
    deep = any(re.match(r"transformer_blocks_(?:19|[2-9]\d)_", flat) for flat in flats)
    return "Qwen-Image" if deep and 3072 in widths else ""


def _unet_family(layers: list[Layer], prefixes: set[str]) -> str:
    """Returns the U-Net's family by the width of a prompt's token, and by what only SDXL has."""
    readers = (layer for layer in layers if re.search(r"attn2_(?:processor_)?to_[kv]$", layer.flat))
    for layer in readers:
        if family := _TOKEN_WIDTHS.get(_columns(layer)):
            return family
    deep = any(re.search(r"transformer_blocks_[1-9]_", layer.flat) for layer in layers)
    return "SDXL" if deep or prefixes & {"lora_te2_", "text_encoder_2."} else ""


def _columns(layer: Layer) -> int:
    """Returns the width of what a layer reads; of a LoKr, it is the product of both factors' widths."""
    return _side(layer, layer.down or "hada_w1_b", 1, ("lokr_w1_b", "lokr_w2_b"))


def _rows(layer: Layer) -> int:
    """Returns the width of what a layer writes."""
    return _side(layer, layer.up or "hada_w1_a", 0, ("lokr_w1_a", "lokr_w2_a"))


def _side(layer: Layer, tail: str, axis: int, halves: tuple[str, str]) -> int:
    def of(*tails: str) -> int:
        shapes = (layer.shapes.get(one, ()) for one in tails)
        return next((shape[axis] for shape in shapes if len(shape) > 1), 0)

    return of(tail) or of("lokr_w1", halves[0]) * of("lokr_w2", halves[1])
