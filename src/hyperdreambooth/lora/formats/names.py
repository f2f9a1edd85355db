"""The names that tools give a site: diffusers' dotted names, kohya's underscored ones, the original models'.

Families differ in names only. Where an original model has one layer for several of diffusers' (the fused q,
k, v of Flux and SD3), a site owns some consecutive rows of that layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hyperdreambooth.files import InputError
from hyperdreambooth.shapes import Site, canonical


@dataclass(frozen=True)
class LoraFamily:
    """A family of bases: the header fields of its LoRA files, and the prefixes of its text encoders."""

    name: str
    architecture: str  # ModelSpec's, without `/lora`
    version: str  # kohya's `ss_base_model_version`; A1111 shows an SDXL LoRA only if it starts with `sdxl_`
    network: str  # kohya's `ss_network_module`
    origin: str  # ModelSpec's implementation: the model whose names kohya's form uses
    text: Mapping[str, str]  # text encoder → kohya's prefix


_BOTH = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_STABILITY = "https://github.com/Stability-AI/generative-models"
_KOHYA = "networks.lora"
SD1 = LoraFamily("sd1", "stable-diffusion-v1", "sd_v1", _KOHYA, "diffusers", {"text_encoder": "lora_te_"})
SD2 = LoraFamily("sd2", "stable-diffusion-v2-512", "sd_v2", _KOHYA, "diffusers", {"text_encoder": "lora_te_"})
SDXL = LoraFamily("sdxl", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", _KOHYA, _STABILITY, _BOTH)
SD3 = LoraFamily("sd3", "stable-diffusion-3-m", "sd3_m", "networks.lora_sd3", _STABILITY, _BOTH)
FLUX = LoraFamily(
    "flux", "flux-1-dev", "flux1", "networks.lora_flux", "https://github.com/black-forest-labs/flux",
    {"text_encoder": "lora_te1_"},
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """A site's rows `start` to `start + o` of a module; its `total` rows are more if sites share it."""

    module: str
    start: int
    total: int


def family_of(sites: Iterable[Site]) -> LoraFamily:
    """Recognises the family by names and widths, because other people's files hold nothing else.

    A token of SD 1.x has 768 numbers, one of SD 2.x 1024. Flux is 3072 wide, four times that within its MLPs;
    no SD3 is.
    """
    names = {site.name for site in sites}
    readers = ("attn2.to_k", "self_attn.q_proj", "attn.to_q")
    widths = {site.in_features for site in sites if site.name.endswith(readers)}
    parts = {site.component for site in sites}
    if "transformer" in parts:
        single = any(name.startswith("transformer.single_transformer_blocks.") for name in names)
        wide = any(site.in_features in (3072, 12288) for site in sites if site.component == "transformer")
        return FLUX if single or wide else SD3
    if "text_encoder_2" in parts or 2048 in widths or any(".transformer_blocks.1." in name for name in names):
        return SDXL
    return SD2 if 1024 in widths else SD1


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
    (r"norm1\.linear", "img_mod.lin", None),
    (r"norm1_context\.linear", "txt_mod.lin", None),
)
_SINGLE = (
    (r"(?:attn\.to_([qkv])|proj_(mlp))", "linear1", None),
    (r"proj_out", "linear2", None),
    (r"norm\.linear", "modulation.lin", None),
)


def _unet(inner: str, per_block: int) -> str | None:
    """Names a layer as the original U-Net does, which counts through all blocks and resolution changes."""
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.(.+)", inner)
    if found is None:
        return None
    way, block, number, rest = found.groups()
    if way is None:
        return f"middle_block.1.{rest}"
    at = int(block) * (per_block + 1) + int(number)
    return f"input_blocks.{at + 1}.1.{rest}" if way == "down" else f"output_blocks.{at}.1.{rest}"


def _original(site: Site, family: LoraFamily, per_block: int) -> Rows | None:
    """Finds a denoiser's site in the original model; None if that has no such layer."""
    inner = site.name.partition(".")[2]
    if site.component == "unet":
        module = _unet(inner, per_block)
        return Rows(module, 0, site.out_features) if module else None
    block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", inner)
    if block is None or family not in (FLUX, SD3):
        return None
    single, number, layer = block.groups()
    blocks = "joint_blocks" if family is SD3 else "single_blocks" if single else "double_blocks"
    for pattern, flux, sd3 in _SINGLE if single else _JOINT:
        name = flux if family is FLUX else sd3
        if name and (found := re.fullmatch(pattern, layer)):
            letter = next((part for part in found.groups() if part), "")
            return _rows_of(f"{blocks}.{number}.{name}", letter, site)
    return None


def _rows_of(module: str, letter: str, site: Site) -> Rows:
    """Returns the rows of q, k or v, which follow each other, or of the MLP after them in `linear1`."""
    if not letter:
        return Rows(module, 0, site.out_features)
    wide = module.endswith("linear1")
    hidden = site.in_features if wide else site.out_features
    return Rows(module, ("q", "k", "v", "mlp").index(letter) * hidden, hidden * (7 if wide else 3))


def _per_block(sites: Iterable[Site]) -> int:
    """Returns the layers in each block of a U-Net: two in all published ones, whichever sites are given.

    In a smaller one, the highest number on the way up gives it: the way up has one more than the way down.
    """
    if any(site.component == "unet" and site.out_features >= 320 for site in sites):
        return 2
    found = (re.match(r"unet\.up_blocks\.\d+\.attentions\.(\d+)\.", site.name) for site in sites)
    return max((int(match[1]) for match in found if match), default=2)


def kohya_rows(sites: Sequence[Site]) -> dict[str, Rows]:
    """Places every site in kohya's form, by the original models' names, which all of its readers know.

    For SD 1.x and 2.x, kohya trains diffusers' own U-Net, for SDXL and later the original models.
    """
    family, per_block = family_of(sites), _per_block(sites)
    made: dict[str, Rows] = {}
    for site in sites:
        inner = site.name.partition(".")[2]
        if prefix := family.text.get(site.component):
            rows = Rows(prefix + _clip(inner), 0, site.out_features)
        elif site.component == "unet" and family in (SD1, SD2):
            rows = Rows(f"lora_unet_{inner}", 0, site.out_features)
        elif rows := _original(site, family, per_block):
            rows = replace(rows, module=f"lora_unet_{rows.module}")
        else:
            raise InputError(f"the kohya form has no name for {site.name}; use the diffusers form")
        made[site.name] = replace(rows, module=rows.module.replace(".", "_"))
    return made


def is_convolution(site: Site, family: LoraFamily) -> bool:
    """Returns whether the layer is a 1×1 convolution: around SD 1.x's transformers, or any shortcut."""
    around = family is SD1 and re.fullmatch(r"unet\..*\.attentions\.\d+\.proj_(in|out)", site.name)
    return bool(around) or site.name.endswith(".conv_shortcut")


def diffusers_module(site: Site, family: LoraFamily) -> str:
    """Returns the name in diffusers' form; old and new transformers read CLIP's with `text_model.`"""
    inner = site.name.partition(".")[2]
    return f"{site.component}.{_clip(inner)}" if site.component in family.text else site.name


def _clip(inner: str) -> str:
    """Adds `text_model.` to a layer of a CLIP text encoder; its projection lies outside of that."""
    return f"text_model.{inner}" if inner.startswith("encoder.") else inner


def lookup(sites: Sequence[Site]) -> dict[str, list[tuple[Site, Rows]]]:
    """Maps every spelling of a module (see `plain`) to its sites: several if the layer is fused."""
    family, per_block = family_of(sites), _per_block(sites)
    found: dict[str, list[tuple[Site, Rows]]] = {}
    for site in sites:
        for rows in _spellings(site, family, per_block):
            others = found.setdefault(rows.module, [])
            if rows.total > site.out_features or not others:  # a name without its component may be ambiguous
                others.append((site, rows))
    return found


def _spellings(site: Site, family: LoraFamily, per_block: int) -> Iterator[Rows]:
    inner = site.name.partition(".")[2]
    flat, prefixes = inner.replace(".", "_"), ("lora_unet_", "lora_transformer_")
    if site.component in _BOTH:
        prefixes = ("lora_te_", "lora_te1_") if site.component == "text_encoder" else ("lora_te2_",)
        prefixes += tuple(f"{prefix}text_model_" for prefix in prefixes)
    # PEFT's own files name no component
    for module in (site.name, inner, *(prefix + flat for prefix in prefixes)):
        yield Rows(module, 0, site.out_features)
    if site.component not in _BOTH and (rows := _original(site, family, per_block)):
        kohya = "lora_unet_" + rows.module.replace(".", "_")
        for module in (rows.module, f"diffusion_model.{rows.module}", kohya):
            yield replace(rows, module=module)


def plain(module: str) -> str:
    """Returns a module's name in a file without wrappers, as `lookup` spells it."""
    return canonical("", module.removeprefix("base_model.model."))[1:]
