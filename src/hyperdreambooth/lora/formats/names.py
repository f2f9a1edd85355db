"""What tools call a site: diffusers' dotted names, kohya's underscored ones, the original models' own.

Families differ in names only. Where an original model has one layer for several of diffusers' (the fused q,
k, v of Flux and SD3), a site owns a stretch of that layer's rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hyperdreambooth.files import InputError
from hyperdreambooth.shapes import Site, canonical


@dataclass(frozen=True)
class LoraFamily:
    """What a file has to say of a family of bases, and how tools spell its parts.

    Attributes:
        name: short name, for people.
        architecture: ModelSpec's, without `/lora`.
        version: kohya's `ss_base_model_version`; A1111 shows an SDXL LoRA only where it starts with `sdxl_`.
        network: kohya's `ss_network_module`.
        origin: ModelSpec's implementation, of the model whose names kohya's form uses.
        text: text encoder → kohya's prefix.
    """

    name: str
    architecture: str
    version: str
    network: str
    origin: str
    text: Mapping[str, str]


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
    """Rows `start` to `start + o` of a module of `total` rows are a site's.

    Attributes:
        module: its name in a file.
        start: the site's first row; 0 in a module of its own.
        total: the module's rows; more than the site's own `o` where several sites share it.
    """

    module: str
    start: int
    total: int


def family_of(sites: Iterable[Site]) -> LoraFamily:
    """Tells the family from names and widths: SD 1.x conditions on 768 numbers a token, SD 2.x on 1024.

    Flux is 3072 wide, and four times that within its MLPs; no SD3 is.
    """
    names = {site.name for site in sites}
    widths = {
        site.in_features
        for site in sites
        if site.name.endswith(("attn2.to_k", "self_attn.q_proj", "attn.to_q"))
    }
    parts = {site.component for site in sites}
    if "transformer" in parts:
        single = any(name.startswith("transformer.single_transformer_blocks.") for name in names)
        wide = any(site.in_features in (3072, 12288) for site in sites if site.component == "transformer")
        return FLUX if single or wide else SD3
    if "text_encoder_2" in parts or 2048 in widths or any(".transformer_blocks.1." in name for name in names):
        return SDXL
    return SD2 if 1024 in widths else SD1


# -- the original models' names ------------------------------------------------------------------------------

_FLUX = (
    (r"transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"double_blocks.\1.img_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj", r"double_blocks.\1.txt_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (r"single_transformer_blocks\.(\d+)\.(?:attn\.to_([qkv])|proj_(mlp))", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
)
_SD3 = (
    (r"transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"joint_blocks.\1.x_block.attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_([qkv])", r"joint_blocks.\1.x_block.attn2.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj", r"joint_blocks.\1.context_block.attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"joint_blocks.\1.x_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_out\.0", r"joint_blocks.\1.x_block.attn2.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
)
_DIT = {"flux": _FLUX, "sd3": _SD3}


def _unet(inner: str, per_block: int) -> str | None:
    """The original U-Net counts layers through all blocks, resolution changes included."""
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.(.+)", inner)
    if found is None:
        return None
    way, block, number, rest = found.groups()
    if way is None:
        return f"middle_block.1.{rest}"
    at = int(block) * (per_block + 1) + int(number)
    return f"input_blocks.{at + 1}.1.{rest}" if way == "down" else f"output_blocks.{at}.1.{rest}"


def _original(site: Site, family: LoraFamily, per_block: int) -> Rows | None:
    """Where a denoiser's site lies in the original model; None where that has no such layer."""
    inner = site.name.partition(".")[2]
    if site.component == "unet":
        module = _unet(inner, per_block)
        return Rows(module, 0, site.out_features) if module else None
    for pattern, name in _DIT.get(family.name, ()):
        if found := re.fullmatch(pattern, inner):
            fused = [part for part in found.groups()[1:] if part]
            return _stretch(found.expand(name), fused[0] if fused else "", site)
    return None


def _stretch(module: str, letter: str, site: Site) -> Rows:
    """q, k, v follow each other; `linear1` goes on with an MLP four times as wide."""
    if not letter:
        return Rows(module, 0, site.out_features)
    wide = module.endswith("linear1")
    hidden = site.in_features if wide else site.out_features
    return Rows(module, ("q", "k", "v", "mlp").index(letter) * hidden, hidden * (7 if wide else 3))


def _per_block(sites: Iterable[Site]) -> int:
    """Layers a block of the U-Net: two in all that are published, whichever of them the sites are of.

    A smaller one's sites tell: the way up has one more than the way down.
    """
    if any(site.component == "unet" and site.out_features >= 320 for site in sites):
        return 2
    found = (re.match(r"unet\.up_blocks\.\d+\.attentions\.(\d+)\.", site.name) for site in sites)
    return max((int(match[1]) for match in found if match), default=2)


# -- spelling ------------------------------------------------------------------------------------------------


def kohya_slots(sites: Sequence[Site]) -> dict[str, Rows]:
    """How kohya's form names every site; the original names are those that all of its readers know.

    For SD 1.x and 2.x, kohya trains diffusers' own U-Net, for SDXL and later the original models.

    Raises:
        InputError: a site that the form has no name for.
    """
    family, per_block = family_of(sites), _per_block(sites)
    made: dict[str, Rows] = {}
    for site in sites:
        inner = site.name.partition(".")[2]
        if prefix := family.text.get(site.component):
            slot = Rows(prefix + _clip(inner), 0, site.out_features)
        elif site.component == "unet" and family in (SD1, SD2):
            slot = Rows(f"lora_unet_{inner}", 0, site.out_features)
        elif slot := _original(site, family, per_block):
            slot = Rows(f"lora_unet_{slot.module}", slot.start, slot.total)
        else:
            raise InputError(f"the kohya form has no name for {site.name}; use the diffusers form")
        made[site.name] = Rows(slot.module.replace(".", "_"), slot.start, slot.total)
    return made


def is_convolution(site: Site, family: LoraFamily) -> bool:
    """Whether the layer is a 1×1 convolution: around the transformers of SD 1.x, in the shortcuts of all."""
    around = family is SD1 and re.fullmatch(r"unet\..*\.attentions\.\d+\.proj_(in|out)", site.name)
    return bool(around) or site.name.endswith(".conv_shortcut")


def diffusers_module(site: Site, family: LoraFamily) -> str:
    """The name old and new transformers both read: `text_model.` is always there in CLIP text encoders."""
    inner = site.name.partition(".")[2]
    return f"{site.component}.{_clip(inner)}" if site.component in family.text else site.name


def _clip(inner: str) -> str:
    """A layer of a CLIP text encoder as old and new transformers read it; the projection lies outside."""
    return f"text_model.{inner}" if inner.startswith("encoder.") else inner


def lookup(sites: Sequence[Site]) -> dict[str, list[tuple[Site, Rows]]]:
    """Every spelling of a module (see `plain`) → the sites it changes, several where the layer is fused."""
    family, per_block = family_of(sites), _per_block(sites)
    found: dict[str, list[tuple[Site, Rows]]] = {}
    for site in sites:
        for slot in _spellings(site, family, per_block):
            others = found.setdefault(slot.module, [])
            if slot.total > site.out_features or not others:  # a name without its component may be ambiguous
                others.append((site, slot))
    return found


def _spellings(site: Site, family: LoraFamily, per_block: int) -> Iterator[Rows]:
    rows, inner = site.out_features, site.name.partition(".")[2]
    yield Rows(site.name, 0, rows)
    yield Rows(inner, 0, rows)  # PEFT's own files name no component
    if site.component in _BOTH:
        for prefix in ("lora_te_", "lora_te1_") if site.component == "text_encoder" else ("lora_te2_",):
            yield Rows(f"{prefix}text_model_{inner}".replace(".", "_"), 0, rows)
            yield Rows(f"{prefix}{inner}".replace(".", "_"), 0, rows)
        return
    for prefix in ("lora_unet_", "lora_transformer_"):
        yield Rows(prefix + inner.replace(".", "_"), 0, rows)
    if slot := _original(site, family, per_block):
        for module in (slot.module, f"diffusion_model.{slot.module}", f"lora_unet_{slot.module}"):
            spelled = module.replace(".", "_") if module.startswith("lora_unet_") else module
            yield Rows(spelled, slot.start, slot.total)


def plain(module: str) -> str:
    """A module's name in a file without wrappers, as `lookup` has it."""
    return canonical("", module.removeprefix("base_model.model."))[1:]
