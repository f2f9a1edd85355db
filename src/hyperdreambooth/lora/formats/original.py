"""The names of layers in the original models, which kohya's form uses; `blocks` has those of transformers.

Where an original model has one layer for several of diffusers' (the fused q, k, v of most transformers), a
site owns some consecutive rows of that layer. In the last modulation of a stream, diffusers has the two
halves of the rows the other way round (`AdaLayerNormContinuous`: scale before shift).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from hyperdreambooth.lora.formats.blocks import PLACES
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


def original_rows(site: Site, layers: int) -> Iterator[tuple[str, Rows]]:
    """Yields a denoiser's site in original models, each with its family, the likeliest name first.

    The family of a U-Net's layer is `sdxl`: the trainers of older U-Nets know diffusers' names. Several
    families have a transformer's layer, of which a writer chooses that of its base.

    Args:
        site: a layer of a U-Net or of a transformer.
        layers: in each block of a U-Net, see `per_block`.
    """
    inner = site.name.partition(".")[2]
    if site.component == "unet":
        for module in _unet(inner, layers):
            yield "sdxl", Rows(module, 0, site.out_features)
        return
    number = re.search(r"\.(\d+)\.", inner)
    name = re.sub(r"\.\d+\.", ".*.", inner, count=1)
    for family, module, part in PLACES.get(name, ()):
        yield family, _rows_of(module.replace("*", number[1] if number else ""), part, site)


def _rows_of(module: str, part: int, site: Site) -> Rows:
    """Returns the rows of q, k or v, which follow each other, or of the MLP after them in `linear1`."""
    if part < 0:
        # the last context block has a scale and a shift only, like the final layer
        two = site.out_features == 2 * site.in_features
        ends = ("final_layer.adaLN_modulation.1", "context_block.adaLN_modulation.1")
        return Rows(module, 0, site.out_features, two and module.endswith(ends))
    wide = module.endswith("linear1")
    hidden = site.in_features if wide else site.out_features
    return Rows(module, part * hidden, hidden * (7 if wide else 3))


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
