"""The names that tools give a site: diffusers' dotted names, kohya's underscored ones, the original models'.

Families differ in names only; `original.py` has the names of the original models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from hyperdreambooth.files import InputError
from hyperdreambooth.lora.formats.original import Rows, original_rows, per_block
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


_ENCODERS = {"text_encoder": "1", "text_encoder_2": "2", "text_encoder_3": "3"}  # component → its number
_BOTH = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_GITHUB = "https://github.com/"
_STABILITY = f"{_GITHUB}Stability-AI/generative-models"
_KOHYA = "networks.lora"
SD1 = LoraFamily("sd1", "stable-diffusion-v1", "sd_v1", _KOHYA, "diffusers", {"text_encoder": "lora_te_"})
SD2 = LoraFamily("sd2", "stable-diffusion-v2-512", "sd_v2", _KOHYA, "diffusers", {"text_encoder": "lora_te_"})
SDXL = LoraFamily("sdxl", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", _KOHYA, _STABILITY, _BOTH)
SD3 = LoraFamily("sd3", "stable-diffusion-3-m", "sd3_m", "networks.lora_sd3", _STABILITY, _BOTH)
FLUX = LoraFamily(
    "flux", "flux-1-dev", "flux1", "networks.lora_flux", f"{_GITHUB}black-forest-labs/flux",
    {"text_encoder": "lora_te1_"},
)  # fmt: skip
_MUSUBI = "networks.lora_"
ZIMAGE = LoraFamily("zimage", "Z-Image", "z_image", f"{_MUSUBI}zimage", f"{_GITHUB}Tongyi-MAI/Z-Image", {})
FLUX2 = LoraFamily("flux2", "Flux.2", "flux_2", f"{_MUSUBI}flux_2", f"{_GITHUB}black-forest-labs/flux2", {})
QWENIMAGE = LoraFamily(
    "qwenimage", "Qwen-Image", "qwen_image", f"{_MUSUBI}qwen_image", f"{_GITHUB}QwenLM/Qwen-Image", {}
)
KREA2 = LoraFamily("krea2", "Krea-2", "krea2", f"{_MUSUBI}krea2", f"{_GITHUB}krea-ai/krea-2", {})

FAMILIES = {family.name: family for family in (SD1, SD2, SDXL, SD3, FLUX, ZIMAGE, FLUX2, QWENIMAGE, KREA2)}
# what only a family's transformer has in its names; Stable Diffusion 3's has nothing of it
_MARKS = {
    "zimage": r"^(layers|noise_refiner|context_refiner)\.\d|^all_|^cap_embedder",
    "flux2": r"attn\.to_qkv_mlp_proj$|single_.*\.to_out$|linear_(in|out)$|stream_modulation|^time_guidance",
    "qwenimage": r"\.(img|txt)_(mlp|mod)\.",
    "krea2": r"attn\.to_gate$|\.ff\.(gate|up|down)$|^text_fusion|^time_(embed|mod)|^txt_in\.|^final_layer",
    "flux": r"^single_transformer_blocks",
}


def family_of_base(layers: Iterable[Site]) -> LoraFamily:
    """Recognises the family of a base by the names and widths of all of its layers.

    A token of SD 1.x has 768 numbers, one of SD 2.x 1024.
    """
    names = {site.name for site in layers}
    widths = {site.in_features for site in layers if site.name.endswith("attn2.to_k")}
    parts = {site.component for site in layers}
    if "transformer" in parts:
        inner = [name.partition(".")[2] for name in names]
        marked = (name for name, mark in _MARKS.items() if any(re.search(mark, one) for one in inner))
        return FAMILIES[next(marked, "sd3")]
    if "text_encoder_2" in parts or 2048 in widths or any(".transformer_blocks.1." in name for name in names):
        return SDXL
    return SD2 if 1024 in widths else SD1


def family_of(sites: Sequence[Site], name: str = "") -> LoraFamily:
    """Returns the family of that name or, where nobody knows it, the only one that has such layers.

    Raises:
        InputError: several families have them, so that the names in a file would be a guess.
    """
    if name:
        return FAMILIES[name]
    fitting = [one for one in FAMILIES.values() if all(_may_have(one, site) for site in sites)]
    if len(fitting) != 1:
        known = ", ".join(family.name for family in fitting) or "none that is known"
        raise InputError(
            f"the layers ({sites[0].name}, …) fit these families of bases: {known}; name the base that the "
            "LoRA is for (--base)"
        )
    return fitting[0]


# what a token of each family's text has in numbers, and its CLIP-L or OpenCLIP text encoder
_CONTEXT = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
_ENCODER = {"sd1": 768, "sd2": 1024, "sdxl": 768, "sd3": 768, "flux": 768}
_PUBLISHED = (768, 1024, 2048)
# the widths of the published transformers
_WIDTHS = {
    "sd3": (1536, 2432), "flux": (3072,), "zimage": (3840,), "flux2": (3072, 4096, 6144),
    "qwenimage": (3072,), "krea2": (6144,),
}  # fmt: skip
_ALL_WIDTHS = {width for widths in _WIDTHS.values() for width in widths}


def _may_have(family: LoraFamily, site: Site) -> bool:
    """Returns whether a family may have this layer; a width of no published base rules nothing out."""
    part, inner, name = site.component, site.name.partition(".")[2], family.name
    if part == "transformer":
        known = any(name == one for one, _ in original_rows(site, 0))
        width = _width(site)
        return known and (width in _WIDTHS[name] or width not in _ALL_WIDTHS)
    if part == "unet":
        if family not in (SD1, SD2, SDXL):
            return False
        if inner.endswith(("attn2.to_k", "attn2.to_v")) and site.in_features in _PUBLISHED:
            return site.in_features == _CONTEXT[name]
        return family is SDXL or not re.search(r"transformer_blocks\.[1-9]|^add_embedding", inner)
    if part == "text_encoder":
        width = site.in_features if "self_attn" in inner else 0
        return name in _ENCODER and (width not in _PUBLISHED or width == _ENCODER[name])
    if part == "text_encoder_2":
        return family is FLUX if is_t5(site) else family in (SDXL, SD3)
    return family is SD3


def _width(site: Site) -> int:
    """Returns the width of a transformer at a layer; 0 where its size does not tell."""
    if site.name.endswith((".ff.net.2", ".ff_context.net.2")):
        return site.in_features // 4
    return site.in_features if re.search(r"\.att(?:n2?|ention)\.|\.net\.0\.proj$", site.name) else 0


def is_t5(site: Site) -> bool:
    """Returns whether a layer belongs to a T5, which no LoRA of ours changes, but other people's do."""
    return ".encoder.block." in site.name


def diffusers_rows(sites: Sequence[Site], family: LoraFamily) -> dict[str, Rows]:
    """Places every site in diffusers' form; old and new transformers read CLIP's with `text_model.`"""
    del family  # the names are the same for all
    made: dict[str, Rows] = {}
    for site in sites:
        part, _, inner = site.name.partition(".")
        name = f"{part}.{_clip(inner)}" if part.startswith("text_") else site.name
        made[site.name] = Rows(name, 0, site.out_features)
    return made


def kohya_rows(sites: Sequence[Site], family: LoraFamily) -> dict[str, Rows]:
    """Places every site in kohya's form, by the original models' names, which all of its readers know.

    For SD 1.x and 2.x, kohya trains diffusers' own U-Net, for SDXL and later the original models.
    """
    made: dict[str, Rows] = {}
    own = _original_places(sites, family)
    for site in sites:
        inner = site.name.partition(".")[2]
        if is_t5(site):
            rows = Rows(f"lora_te3_{inner}", 0, site.out_features)
        elif prefix := family.text.get(site.component):
            rows = Rows(prefix + _clip(inner), 0, site.out_features)
        elif site.component == "unet" and family in (SD1, SD2):
            rows = Rows(f"lora_unet_{inner}", 0, site.out_features)
        elif rows := own.get(site.name):
            rows = replace(rows, module=f"lora_unet_{rows.module}")
        else:
            raise InputError(f"the kohya form has no name for {site.name}; use the diffusers form")
        made[site.name] = replace(rows, module=rows.module.replace(".", "_"))
    return made


def original_rows_of(sites: Sequence[Site], family: LoraFamily) -> dict[str, Rows]:
    """Places every site in the original form: the original model's own names, for a denoiser alone."""
    own = _original_places(sites, family)
    if missing := [site.name for site in sites if site.name not in own]:
        raise InputError(f"the original form has no name for {missing[0]}; use the kohya or diffusers form")
    return {name: replace(rows, module=f"diffusion_model.{rows.module}") for name, rows in own.items()}


def _original_places(sites: Sequence[Site], family: LoraFamily) -> dict[str, Rows]:
    """Places the sites that the original model of a family has."""
    layers = per_block(sites)
    made: dict[str, Rows] = {}
    for site in sites:
        for name, rows in original_rows(site, layers):
            if name == family.name:
                made.setdefault(site.name, rows)
    return made


def left_out_by(sites: Iterable[Site]) -> dict[str, str]:
    """Returns which layers of a file in kohya's form tools leave out without an error: tools → an example.

    kohya's scripts look for a U-Net's transformers, ResNet blocks and resolution changes, and for a text
    encoder's attention and MLPs. ComfyUI has known a text encoder's projection since late 2024 only.
    """
    found: dict[str, str] = {}
    for site in sites:
        if re.match(r"unet\.(time_embedding|add_embedding|conv_in|conv_out)", site.name):
            found.setdefault("kohya's own scripts leave", site.name)
        if site.name.endswith(".text_projection"):
            found.setdefault("kohya's own scripts and older versions of ComfyUI leave", site.name)
    return found


def kernel_of(site: Site, family: LoraFamily) -> int:
    """Returns the side of a convolution's kernel, and 0 for a linear layer."""
    inner = site.name.partition(".")[2]
    if inner.endswith(".conv_shortcut"):
        return 1
    if re.fullmatch(r"conv_in|conv_out|.*\.resnets\.\d+\.conv[12]|.*\.(down|up)samplers\.\d+\.conv", inner):
        return 3
    if site.name == "transformer.pos_embed.proj":
        return 2 if site.in_features % 64 == 0 else 1  # SD3 has 16 channels, in patches of 2×2
    around = (
        family is SD1 and site.component == "unet" and re.search(r"\.attentions\.\d+\.proj_(in|out)$", inner)
    )
    return 1 if around else 0


def _clip(inner: str) -> str:
    """Adds `text_model.` to a layer of a CLIP text encoder; its projection lies outside of that."""
    return f"text_model.{inner}" if inner.startswith("encoder.layers.") else inner


Places: TypeAlias = dict[str, list[tuple[Site, Rows]]]
"""Every spelling of a module (see `plain`) → its sites: several if the layer is fused."""


def lookup(sites: Sequence[Site]) -> tuple[Places, Places]:
    """Maps the spellings of modules to sites: those that name a component, and PEFT's own, which name none.

    A name without its component may belong to several components: these are alternatives, not parts.
    """
    layers = per_block(sites)
    sizes = {site.name: site.out_features for site in sites}
    named: Places = {}
    bare: Places = {}
    for site in sites:
        for rows in (*_spellings(site, layers), *_in_diffusers_fused(site, sizes)):
            others = named.setdefault(rows.module, [])
            if rows.total > site.out_features or not others:
                others.append((site, rows))
        bare.setdefault(site.name.partition(".")[2], []).append((site, Rows(site.name, 0, site.out_features)))
    return named, bare


def _spellings(site: Site, layers: int) -> Iterator[Rows]:
    inner = site.name.partition(".")[2]
    flat, dotted = inner.replace(".", "_"), [site.name]
    prefixes = ["lora_unet_", "lora_transformer_", "lycoris_"]
    if number := _ENCODERS.get(site.component):
        prefixes = [f"lora_te{number}_", *(["lora_te_", "lora_te1_"] if number == "1" else [])]
        own = {"1": "clip_l", "2": "clip_g"}.get(number, "")
        if is_t5(site):
            prefixes, own = [*prefixes, "lora_te3_"], "t5xxl"
        prefixes += [f"{prefix}text_model_" for prefix in prefixes]
        dotted.append(f"text_encoders.{own}.transformer.{inner}")
    elif site.component == "transformer":
        dotted.append(f"diffusion_model.{inner}")
    for module in dict.fromkeys([*dotted, *(prefix + flat for prefix in prefixes)]):
        yield Rows(module, 0, site.out_features)
    for rows in () if number else dict.fromkeys(rows for _, rows in original_rows(site, layers)):
        tidy = rows.module.replace(".", "_")
        for module in (rows.module, f"diffusion_model.{rows.module}", f"lora_unet_{tidy}", f"lycoris_{tidy}"):
            yield replace(rows, module=module)


def _in_diffusers_fused(site: Site, sizes: Mapping[str, int]) -> Iterator[Rows]:
    """Yields the rows of q, k or v where a trainer has fused diffusers' layers: `to_qkv`, `to_added_qkv`."""
    found = re.fullmatch(r"transformer\.(.+\.)(to_|add_)([qkv])(_proj)?", site.name)
    if not found:
        return
    stem, verb, letter, end = found.groups(default="")
    widths = [sizes.get(f"transformer.{stem}{verb}{one}{end}", 0) for one in "qkv"]
    if all(widths):
        module = f"{stem}{'to_added_qkv' if end else 'to_qkv'}"
        rows = Rows(module, sum(widths[: "qkv".index(letter)]), sum(widths))
        for name in (module, f"transformer.{module}", f"lycoris_{module.replace('.', '_')}"):
            yield replace(rows, module=name)


def plain(module: str) -> str:
    """Returns a module's name in a file without wrappers, as `lookup` spells it."""
    return canonical("", module.removeprefix("base_model.model."))[1:]
