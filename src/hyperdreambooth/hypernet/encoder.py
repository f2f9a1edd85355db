"""The frozen image encoder of the hypernetwork: any transformers vision model (paper, section 4.2)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils.hub import cached_file

from hyperdreambooth.base.load import EMBEDDED, is_embedded
from hyperdreambooth.base.open import DAMAGED
from hyperdreambooth.files import InputError, first_line, read_json, write_json

AVATARS = "avatars"
"""The name of the encoder that ships with the avatars' hypernetwork."""
PROCESSOR = "preprocessor_config.json"
_BILINEAR, _BICUBIC = 2, 3  # PIL's numbers, which preprocessor files use


@dataclass(frozen=True)
class Preprocess:
    """The model's image preprocessing: a resize, then `(x - mean) / std` of values in [0, 1].

    transformers' own processors are not used: they take 8-bit images one after the other on the CPU. At other
    sides than the model's they round to 8 bits, which moves features of the shipped encoder by 2 %.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bicubic: bool = False

    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns pixels `(b, 3, h, w)` in [-1, 1] as `(b, 3, size, size)`, normalised."""
        if pixels.shape[-2:] != (self.size, self.size):
            square, mode = (self.size, self.size), "bicubic" if self.bicubic else "bilinear"
            pixels = F.interpolate(pixels, square, mode=mode, antialias=True, align_corners=False)
            pixels = pixels.clamp(-1, 1)  # bicubic interpolation overshoots
        mean, std = (
            torch.tensor(each, device=pixels.device).view(1, 3, 1, 1) for each in (self.mean, self.std)
        )
        return (pixels * 0.5 + 0.5 - mean) / std


class Encoder:
    """A frozen vision model with its preprocessing; of a model with two towers only the vision tower runs.

    `layers` are the hidden states that are concatenated, or the last one; `tokens`, `channels` are `t`, `c`.
    """

    def __init__(self, model: Any, source: str, layers: Sequence[int], preprocess: Preprocess) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.source, self.layers, self.preprocess = source, tuple(layers), preprocess
        self.tower: Any = getattr(model, "vision_model", model)
        size = preprocess.size
        self.tokens, self.channels = self(torch.zeros(1, 3, size, size, device=self.device)).shape[1:]

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns the features `(b, t, c)`, float32, of pixels `(b, 3, h, w)` of any size in [-1, 1]."""
        shown = self.preprocess(pixels.to(self.device, torch.float32))
        if not self.layers:
            return _tokens(self.tower(pixel_values=shown).last_hidden_state)
        states: Sequence[Tensor] = self.tower(pixel_values=shown, output_hidden_states=True).hidden_states
        if outside := [k for k in self.layers if not -len(states) <= k < len(states)]:
            raise InputError(
                f"encoder_layers: expected hidden states from 0 to {len(states) - 1} of {self.source}, got "
                f"{outside}; correct them"
            )
        chosen = [states[k] for k in self.layers]
        if chosen[0].ndim == 4:  # maps are averaged down to the smallest of them
            side = min(state.shape[-1] for state in chosen)
            chosen = [F.adaptive_avg_pool2d(state, side) for state in chosen]
        return torch.cat([_tokens(state) for state in chosen], dim=-1)

    @torch.no_grad()
    def texture(self, pixels: Tensor) -> Tensor:
        """Returns mean and deviation of every channel of three early states, `(b, k)`, see `familiar.py`."""
        shown = self.preprocess(pixels.to(self.device, torch.float32))
        states: Sequence[Tensor] = self.tower(pixel_values=shown, output_hidden_states=True).hidden_states
        early = [states[place] for place in sorted({k * (len(states) - 1) // 4 for k in range(3)})]
        tokens = [_tokens(state) for state in early]
        return torch.cat([part for each in tokens for part in (each.mean(1), each.std(1, correction=0))], 1)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of weights, preprocessing and layers, which the features depend on."""
        made = self.preprocess
        settings = f"(Preprocess(size={made.size}, mean={made.mean}, std={made.std}), {self.layers})"
        digest = hashlib.sha256((settings + "bicubic" * made.bicubic).encode())
        for name, tensor in sorted(self.tower.state_dict().items()):
            if "pooler" in name:  # it is not used, and random where the checkpoint has none
                continue
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Writes the model and its preprocessing as an ordinary transformers folder."""
        self.model.save_pretrained(folder)
        made = self.preprocess
        size, resample = {"height": made.size, "width": made.size}, _BICUBIC if made.bicubic else _BILINEAR
        settings = {"size": size, "image_mean": made.mean, "image_std": made.std, "resample": resample}
        write_json(folder / PROCESSOR, settings)


def _tokens(state: Tensor) -> Tensor:
    """Returns a feature map `(b, c, h, w)` as tokens `(b, h·w, c)`, and tokens as they are."""
    return (state.flatten(2).transpose(1, 2) if state.ndim == 4 else state).float()


def encoder_of(base: str | Path | None) -> str:
    """Returns the name of the encoder for a base where nobody names one."""
    return AVATARS if is_embedded(base) else "facebook/dinov2-small"


def encoder_place(source: str | Path) -> str:
    """Returns the folder or hub id that an encoder's name stands for."""
    return str(EMBEDDED.parent / "hypernet" / "encoder") if source == AVATARS else str(source)


def load_encoder(
    source: str | Path, layers: Sequence[int] = (), device: torch.device | str = "cpu"
) -> Encoder:
    """Loads a vision model (ViT, CLIP, DINOv2, ResNet, …), frozen and in float32, from safetensors only."""
    place = encoder_place(source)
    try:
        config: Any = AutoConfig.from_pretrained(place)
        model: nn.Module = AutoModel.from_pretrained(place, use_safetensors=True, dtype=torch.float32)
        file = cached_file(place, PROCESSOR, _raise_exceptions_for_missing_entries=False)
    except DAMAGED as error:
        reason = first_line(error)
        advice = "pass a transformers vision model folder with safetensors, avatars, or a hub id while online"
        raise InputError(f"encoder {place}: cannot be loaded ({reason}); {advice}") from error
    preprocess = _preprocess(read_json(Path(file)) if file else {}, getattr(config, "vision_config", config))
    try:
        return Encoder(model.to(device), place, layers, preprocess)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"encoder {place}: expected a vision model, got {type(model).__name__}; pass another one"
        ) from error


def _preprocess(settings: dict[str, Any], config: Any) -> Preprocess:
    """Reads size, mean and standard deviation from the model's own files; the defaults are 224 and 0.5.

    Photos are square already, so where a model crops the centre, they are resized to the size of the crop.
    """
    crop = settings.get("crop_size") if settings.get("do_center_crop", True) else None
    sizes = (crop, settings.get("size"), getattr(config, "image_size", None))
    side = next((_side(size) for size in sizes if size is not None), 224)
    mean, std = (tuple(settings.get(name, (0.5,) * 3)) for name in ("image_mean", "image_std"))
    if not settings.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return Preprocess(side, mean, std, settings.get("resample") == _BICUBIC)


def _side(size: Any) -> int:
    """Returns the side in pixels from any of the forms that transformers has used for sizes."""
    if isinstance(size, dict):
        return int(next(size[key] for key in ("height", "shortest_edge", "longest_edge") if key in size))
    return int(size[0] if isinstance(size, (list, tuple)) else size)
