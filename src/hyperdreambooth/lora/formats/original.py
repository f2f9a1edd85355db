"""The names of layers in the original models (Stability's, Black Forest Labs'), which kohya's form uses.

Where an original model has one layer for several of diffusers' (the fused q, k, v of Flux and SD3), a site
owns some consecutive rows of that layer. In the last modulation of a stream, diffusers has the two halves of
the rows the other way round (`AdaLayerNormContinuous`: scale before shift).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from hyperdreambooth.shapes import Site


@dataclass(frozen=True)
class Rows:
    """A site's rows `start` to `start + o` of a module; its `total` rows are more if sites share it."""

    module: str
    start: int
    total: int
    swapped: bool = False  # the halves of the rows are the other way round

    def turned(self, up: Tensor) -> Tensor:
        """Exchanges the halves of a site's rows `(o, r)`, from the file's order to diffusers' or back."""
        return up.roll(len(up) // 2, 0) if self.swapped else up


# A layer of a block for picture and text: its name in diffusers, in Flux's own model and in SD3's.
_JOINT = (
    (r"attn\.to_([qkv])", "img_attn.qkv", "x_block.attn.qkv"),
    (r"attn2\.to_([qkv])", None, "x_block.attn2.qkv"),
    (r"attn\.add_([qkv])_proj", "txt_attn.qkv", "context_block.attn.qkv"),
    (r"attn\.to_out\.0", "img_attn.proj", "x_block.attn.proj"),
    (r"attn2\.to_out\.0", None, "x_block.attn2.proj"),
    (r"attn\.to_add_out", "txt_attn.proj", "context_block.attn.proj"),
    (r"ff\.net\.0\.proj", "img_mlp.0", "x_block.mlp.fc1"),
    (r"ff\.net\.2", "img_mlp.2", "x_block.mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.0", "context_block.mlp.fc1"),
    (r"ff_context\.net\.2", "txt_mlp.2", "context_block.mlp.fc2"),
    (r"norm1\.linear", "img_mod.lin", "x_block.adaLN_modulation.1"),
    (r"norm1_context\.linear", "txt_mod.lin", "context_block.adaLN_modulation.1"),
)
_SINGLE = (
    (r"(?:attn\.to_([qkv])|proj_(mlp))", "linear1", None),
    (r"proj_out", "linear2", None),
    (r"norm\.linear", "modulation.lin", None),
)
# A layer outside of the blocks: in diffusers, in Flux and in SD3.
_AROUND = {
    "x_embedder": ("img_in", None),
    "pos_embed.proj": (None, "x_embedder.proj"),
    "context_embedder": ("txt_in", "context_embedder"),
    "time_text_embed.timestep_embedder.linear_1": ("time_in.in_layer", "t_embedder.mlp.0"),
    "time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer", "t_embedder.mlp.2"),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer", "y_embedder.mlp.0"),
    "time_text_embed.text_embedder.linear_2": ("vector_in.out_layer", "y_embedder.mlp.2"),
    "time_text_embed.guidance_embedder.linear_1": ("guidance_in.in_layer", None),
    "time_text_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", None),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
    "proj_out": ("final_layer.linear", "final_layer.linear"),
}
# The U-Net's layers outside of its blocks, and those of a ResNet block.
_UNET_AROUND = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_RESNET = {
    "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip


def per_block(sites: Iterable[Site]) -> int:
    """Returns the layers in each block of a U-Net: two in all published ones, whichever sites are given.

    In a smaller one, the highest number on the way up gives it: the way up has one more than the way down.
    """
    if any(site.component == "unet" and site.out_features >= 320 for site in sites):
        return 2
    found = (re.match(r"unet\.up_blocks\.\d+\.(?:attentions|resnets)\.(\d+)\.", site.name) for site in sites)
    return max((int(match[1]) for match in found if match), default=2)


def original_rows(site: Site, layers: int) -> Iterator[Rows]:
    """Yields a denoiser's site in the original model, the likeliest name first; nothing if that lacks it.

    A transformer's layer gets Flux's name and SD3's, of which a writer chooses one by the family.
    """
    inner = site.name.partition(".")[2]
    if site.component == "unet":
        for module in _unet(inner, layers):
            yield Rows(module, 0, site.out_features)
        return
    block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", inner)
    if block is None:
        for module in filter(None, _AROUND.get(inner, ())):
            yield Rows(module, 0, site.out_features, inner == "norm_out.linear")
        return
    single, number, layer = block.groups()
    for pattern, flux, sd3 in _SINGLE if single else _JOINT:
        if found := re.fullmatch(pattern, layer):
            letter = next((part for part in found.groups() if part), "")
            for blocks, name in (
                ("single_blocks" if single else "double_blocks", flux),
                ("joint_blocks", sd3),
            ):
                if name:
                    yield _rows_of(f"{blocks}.{number}.{name}", letter, site)


def _rows_of(module: str, letter: str, site: Site) -> Rows:
    """Returns the rows of q, k or v, which follow each other, or of the MLP after them in `linear1`."""
    if not letter:
        # the last context block has a scale and a shift only, which diffusers has the other way round
        last = (
            module.endswith("context_block.adaLN_modulation.1") and site.out_features == 2 * site.in_features
        )
        return Rows(module, 0, site.out_features, last)
    wide = module.endswith("linear1")
    hidden = site.in_features if wide else site.out_features
    return Rows(module, ("q", "k", "v", "mlp").index(letter) * hidden, hidden * (7 if wide else 3))


def _unet(inner: str, layers: int) -> Iterator[str]:
    """Names a layer as the original U-Net does, which counts through all blocks and resolution changes."""
    if inner in _UNET_AROUND:
        yield _UNET_AROUND[inner]
    if found := re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d+)\.(.+)", inner):
        kind, number, rest = found.groups()
        own = {"attentions": f"1.{rest}", "resnets": f"{2 * int(number)}.{_RESNET.get(rest, rest)}"}
        yield f"middle_block.{own[kind]}"
    pattern = r"(down|up)_blocks\.(\d+)\.(attentions|resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
    if found := re.fullmatch(pattern, inner):
        way, block, kind, number, rest = found.groups()
        at = int(block) * (layers + 1) + int(number)
        place = f"input_blocks.{at + 1}" if way == "down" else f"output_blocks.{at}"
        if kind == "attentions":
            yield f"{place}.1.{rest}"
        elif kind == "resnets":
            yield f"{place}.0.{_RESNET.get(rest, rest)}"
        elif kind == "downsamplers":
            yield f"input_blocks.{at + layers + 1}.0.op"
        else:  # after the attention, where the block has one
            yield from (f"output_blocks.{at + layers}.{k}.conv" for k in (2, 1))
