"""What people pass as a base by mistake, recognised by names and headers alone: no torch, no weights, no hub.

Whatever is not recognised goes on to the loaders, which know more and take longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hyperdreambooth.files import InputError, read_json

INDEX = "model_index.json"
_NETWORKS = ("unet", "transformer", "vae")
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".avif"})
_ADAPTER = "pass it as an adapter (generate: --adapter), and a pipeline as the base"
_WHOLE = "pass the whole pipeline as the base"
_LORA = ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up", "hada_w", "lokr_w", "oft_")
_PARTS = {
    "a ControlNet": ("control_model.", "controlnet_", "input_hint_block."),
    "a T2I adapter": ("adapter.body.", "body.0.resnets"),
    "an IP-Adapter": ("ip_adapter.", "image_proj."),
}
"""A network that changes a base, and how names in its file start."""
_INPUTS = {
    9: "an inpainting model", 8: "a model that edits pictures (instruct-pix2pix)", 7: "an upscaler",
    5: "a depth model",
}  # fmt: skip
"""The input channels of Stable Diffusion's U-Net where it also takes a picture, in place of 4."""


VARIANTS = {
    "Flux2Pipeline": "FLUX.2 dev; use FLUX.2 klein, black-forest-labs/FLUX.2-klein-base-4B",
    "QwenImage21Pipeline": "Qwen-Image 2.1; use Qwen-Image, Qwen/Qwen-Image",
    "QwenImageEditPipeline": "Qwen-Image Edit, which edits pictures; use Qwen-Image, Qwen/Qwen-Image",
    "QwenImageEditPlusPipeline": "Qwen-Image Edit, which edits pictures; use Qwen-Image, Qwen/Qwen-Image",
    "Flux2KleinKVPipeline": "a klein for pictures that refer to others; use Flux2KleinPipeline",
}
"""Pipelines that look like one of a family and are not, and what to use instead (docs/families.md)."""


def check_base(place: str | Path) -> None:
    """Refuses what is recognised as something other than a base.

    Args:
        place: a file or a folder; other names may be of the hub, and pass.

    Raises:
        InputError: says what it is and what to do with it.
    """
    path, found = Path(place), None
    if path.is_file():
        found = _file(path)
    elif (path / INDEX).is_file():
        unet, transformer, vae = (_json(path / part / "config.json") for part in _NETWORKS)
        check_channels(str(path), unet or transformer, vae)
    elif path.is_dir():
        found = _folder(path)
    if found:
        raise InputError(f"base {place}: expected a text-to-image pipeline, found {found}")


def only_variant(place: str | Path) -> str | None:
    """Returns `fp16` of a folder whose weights are all in files like `model.fp16.safetensors`.

    None stands for files without such a word, and for more than one word.
    """
    words = set[str]()
    for file in Path(place).glob("*/*.safetensors"):
        parts = file.name.removesuffix(".safetensors").split(".")
        words.add(parts[1].partition("-")[0] if len(parts) == 2 else "")
    return words.pop() or None if len(words) == 1 else None


def check_channels(source: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuses a denoiser that takes more than noisy latents: inpainting, editing, upscaling and depth models.

    Args:
        source: the name of the base, for the message.
        denoiser: the config of the U-Net or transformer.
        vae: the config of the autoencoder.
    """
    got, latent = denoiser.get("in_channels"), vae.get("latent_channels", vae.get("z_dim"))
    if not isinstance(got, int) or not isinstance(latent, int):
        return
    # the Fluxes, and all whose autoencoder is Qwen's, take 2 x 2 squares
    packed = 4 * latent if "guidance_embeds" in denoiser or "z_dim" in vae else latent
    if got != packed:
        what = _INPUTS.get(got) if packed == 4 else None
        raise InputError(
            f"base {source}: expected a text-to-image pipeline, whose denoiser takes {packed} channels, "
            f"found {what or 'another kind of model'}, which takes {got}; use the base it was made from"
        )


def _file(path: Path) -> str | None:
    if path.suffix.lower() in _PICTURES:
        return "a picture; pass it as a photo"
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            first = "model.diffusion_model.input_blocks.0.0.weight"
            channels = file.get_slice(first).get_shape()[1] if first in names else 4
    except (SafetensorError, OSError, LookupError):
        return None
    if channels in _INPUTS:
        return f"{_INPUTS[channels]}; use the checkpoint it was made from"
    if "lidb_format" in metadata:
        return f"a LiDB; {_ADAPTER}"
    if any(mark in name for name in names for mark in _LORA):
        return f"a LoRA; {_ADAPTER}"
    if kind := _part(names):
        return f"{kind}; {_WHOLE}"
    if len(names) <= 3 and not any("." in name for name in names):
        return f"the embedding of a word; {_WHOLE}"
    return None


def _part(names: Sequence[str]) -> str | None:
    for kind, starts in _PARTS.items():
        if any(name.startswith(starts) for name in names):
            return kind
    return None


def _folder(path: Path) -> str | None:
    """Describes a folder that has no `model_index.json`."""
    names = sorted(file.name for file in path.iterdir() if file.name[0] != ".")
    config = _json(path / "config.json")
    if not names:
        return f"an empty folder; {_WHOLE}"
    if "modular_model_index.json" in names:
        return "a modular pipeline (FLUX 3 is one), which is not supported; use one with model_index.json"
    if inside := next((one.parent for one in sorted(path.glob(f"*/{INDEX}"))), None):
        return f"a folder with one inside; pass {inside}"
    if inside := next((one.parent for one in sorted(path.glob(f"snapshots/*/{INDEX}"))), None):
        return f"the hub's cache of a pipeline; pass {inside}"
    if "facts" in config and "network" in config:
        return "a hypernetwork; pass it as --hypernet"
    if {"manifest.json", "start.safetensors"} <= {*names}:
        return "a bank; pass it to export, or to train as --bank"
    if "adapter_config.json" in names or "pytorch_lora_weights.safetensors" in names:
        return f"a folder with a LoRA; name the file in it and {_ADAPTER.removeprefix('pass it ')}"
    if kind := config.get("_class_name"):
        return f"{kind}, one part of a pipeline; {_WHOLE}"
    if kind := config.get("model_type"):
        return f"a {kind} model of transformers; {_WHOLE}"
    if files := [name for name in names if name.endswith(".safetensors")]:
        return f"a folder of files; pass one of them, such as {path / files[0]}"
    if any(file.suffix.lower() in _PICTURES for file in [*path.glob("*"), *path.glob("*/*")]):
        return "a folder of pictures; pass it as photos"
    return None


def _json(path: Path) -> dict[str, Any]:
    """Returns a table of a JSON file; an empty one if there is none."""
    with suppress(InputError):
        found = read_json(path)
        return found if isinstance(found, dict) else {}
    return {}
