"""The frozen eye of the hypernetwork: any transformers vision model, run once (paper, section 4.2)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils.hub import cached_file

from hyperdreambooth.base.open import DAMAGED
from hyperdreambooth.cache import cached_rows
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError, read_json, write_json

PROCESSOR = "preprocessor_config.json"
_BICUBIC = 3  # PIL's number, as processors note it; 2 is bilinear


@dataclass(frozen=True)
class Preprocess:
    """How the model wants its pictures: `size` pixels square, `(x - mean) / std` of values in [0, 1].

    Attributes:
        size: pixels a side.
        mean, std: a colour.
        bicubic: resized so, or bilinearly.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bicubic: bool = False

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels `(b, 3, h, w)` in [-1, 1] → `(b, 3, size, size)`, normalised. No torchvision needed."""
        if pixels.shape[-2:] != (self.size, self.size):
            square, mode = (self.size, self.size), "bicubic" if self.bicubic else "bilinear"
            pixels = F.interpolate(pixels, square, mode=mode, antialias=True, align_corners=False)
            pixels = pixels.clamp(-1, 1)  # bicubic overshoots
        mean, std = (
            torch.tensor(each, device=pixels.device).view(1, 3, 1, 1) for each in (self.mean, self.std)
        )
        return (pixels * 0.5 + 0.5 - mean) / std


class Encoder:
    """A frozen vision model and its preprocessing; of two towers (CLIP, SigLIP) only the vision tower runs.

    Attributes:
        source: folder or hub id it came from.
        layers: hidden states to put side by side along the channels; empty for the last one.
        preprocess: what is done to the pixels first.
        tokens: `t` of the features.
        channels: `c` of the features.
    """

    def __init__(self, model: Any, source: str, layers: Sequence[int], preprocess: Preprocess) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.source, self.layers, self.preprocess = source, tuple(layers), preprocess
        self.tower: Any = getattr(model, "vision_model", model)
        size = preprocess.size
        self.tokens, self.channels = self(torch.zeros(1, 3, size, size, device=self.device)).shape[1:]

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels `(b, 3, h, w)` in [-1, 1], any size → features `(b, t, c)`, float32."""
        shown = self.preprocess(pixels.to(self.device, torch.float32))
        if not self.layers:
            return _tokens(self.tower(pixel_values=shown).last_hidden_state)
        states: Sequence[Tensor] = self.tower(pixel_values=shown, output_hidden_states=True).hidden_states
        if outside := [k for k in self.layers if not -len(states) <= k < len(states)]:
            raise InputError(
                f"encoder_layers: {self.source} has hidden states 0 to {len(states) - 1}, not {outside}"
            )
        return _side_by_side([states[k] for k in self.layers])

    def fingerprint(self) -> str:
        """Sixteen hex digits of weights, preprocessing and layers: what the features depend on."""
        made = self.preprocess
        told = f"Preprocess(size={made.size}, mean={made.mean}, std={made.std})"
        digest = hashlib.sha256(f"({told}, {self.layers})".encode())
        if made.bicubic:
            digest.update(b"bicubic")
        for name, tensor in sorted(self.tower.state_dict().items()):
            if "pooler" in name:  # not read; new and random where the checkpoint has none
                continue
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def nbytes(self) -> int:
        """Size of the weights, which decides whether a copy travels with the hypernetwork."""
        return sum(tensor.nbytes for tensor in self.model.state_dict().values())

    def save(self, folder: Path) -> None:
        """Writes the model and its preprocessing as an ordinary transformers folder."""
        self.model.save_pretrained(folder)
        made = self.preprocess
        facts = {
            "size": {"height": made.size, "width": made.size},
            "image_mean": made.mean,
            "image_std": made.std,
            "resample": _BICUBIC if made.bicubic else 2,
        }
        write_json(folder / PROCESSOR, facts)


def _tokens(state: Tensor) -> Tensor:
    """Convolution maps `(b, c, h, w)` become tokens `(b, h·w, c)`; token sequences stay."""
    return (state.flatten(2).transpose(1, 2) if state.ndim == 4 else state).float()


def _side_by_side(states: Sequence[Tensor]) -> Tensor:
    """Several hidden states as one; convolution maps are averaged down to the smallest of them."""
    if states[0].ndim == 4:
        side = min(state.shape[-1] for state in states)
        states = [F.adaptive_avg_pool2d(state, side) for state in states]
    return torch.cat([_tokens(state) for state in states], dim=-1)


def load_encoder(
    source: str | Path, layers: Sequence[int] = (), device: torch.device | str = "cpu"
) -> Encoder:
    """Loads a vision model by folder or hub id, frozen, in float32; never from a pickle.

    Args:
        source: transformers model folder or hub id (ViT, CLIP, DINOv2, ResNet, …).
        layers: hidden states to concatenate; empty for the last.
        device: where to put it.

    Raises:
        InputError: nothing there, or no vision model.
    """
    place = str(source)
    try:
        config: Any = AutoConfig.from_pretrained(place)
        model: nn.Module = AutoModel.from_pretrained(place, use_safetensors=True, dtype=torch.float32)
        file = cached_file(place, PROCESSOR, _raise_exceptions_for_missing_entries=False)
    except DAMAGED as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = "pass a transformers vision model folder with safetensors, or a hub id while online"
        raise InputError(f"encoder {place}: cannot be loaded ({first}); {advice}") from error
    preprocess = _preprocess(read_json(Path(file)) if file else {}, getattr(config, "vision_config", config))
    try:
        return Encoder(model.to(device), place, layers, preprocess)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"encoder {place}: expected a vision model, got {type(model).__name__}") from error


def _preprocess(facts: dict[str, Any], config: Any) -> Preprocess:
    """Size, mean and standard deviation from the model's own files; 224 and 0.5 where they are silent.

    Faces come cropped: where the model's own recipe resizes and crops the centre, the photo is resized to the
    crop's size.
    """
    sizes = [facts.get("crop_size") if facts.get("do_center_crop", True) else None, facts.get("size")]
    side = next(
        (_side(size) for size in [*sizes, getattr(config, "image_size", None), 224] if size is not None), 224
    )
    mean, std = (tuple(facts.get(name, (0.5,) * 3)) for name in ("image_mean", "image_std"))
    if not facts.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return Preprocess(side, mean, std, facts.get("resample") == _BICUBIC)


def _side(size: Any) -> int:
    """One side out of the forms that transformers has used for it."""
    if isinstance(size, dict):
        return int(next(size[key] for key in ("height", "shortest_edge", "longest_edge") if key in size))
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def cached_features(
    photos: Sequence[Photo], size: int, encoder: Encoder, cache: Path, batch: int = 32
) -> Tensor:  # fmt: skip
    """Features of every photo, encoded once and kept on disk (a frozen encoder always answers the same).

    Args:
        photos: any number, in the order of the result.
        size: pixels a side that photos are cropped to before the encoder's own resizing: the base's
            resolution, as at prediction.
        encoder: the frozen model.
        cache: a folder; it may serve many encoders and sizes.
        batch: photos a forward pass.

    Returns:
        `(m, t, c)` float16: 20,000 photos of 64 tokens of 128 channels are 330 MB.
    """

    def make(places: list[int]) -> dict[str, Tensor]:
        pixels = torch.stack([to_pixels(photos[place].open(), size) for place in places])
        return {"features": encoder(pixels).half()}

    names, folder = [photo.hash() for photo in photos], f"features-{encoder.fingerprint()}-{size}"
    return cached_rows(names, make, cache / folder, batch, "features")["features"]
