"""Loading and freezing a base, behind the few functions the rest of the package needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hyperdreambooth.base import sd
from hyperdreambooth.base.sd import Conditioning
from hyperdreambooth.runs import InputError, read_json
from hyperdreambooth.shapes import Site

EMBEDDED = Path(__file__).resolve().parent.parent / "avatars" / "assets" / "base"
EMBEDDED_NAME = "hyperdreambooth/avatars"
"""What files and cards call the embedded base: where it happens to be installed means nothing to others."""
FAMILIES: dict[str, ModuleType] = {"StableDiffusionPipeline": sd}
PLACEHOLDER = "[V]"


class Base:
    """A frozen text-to-image pipeline.

    Attributes:
        pipe: the diffusers pipeline; no parameter requires a gradient.
        source: folder or hub id it was loaded from, or `EMBEDDED_NAME`.
        fingerprint: sixteen hex digits of its weights.
        trigger: the rare word for "this person"; replaces `[V]` in prompts.
        class_word: what a person is called in captions (`face`, `person`).
        sites: the linear layers an adapter changes, sorted by name.
    """

    def __init__(
        self, pipe: Any, source: str, *, trigger: str, class_word: str, text_encoder: bool = True
    ) -> None:
        self.pipe, self.source, self.trigger, self.class_word = pipe, source, trigger, class_word
        self.family = FAMILIES[type(pipe).__name__]
        self.components: dict[str, nn.Module] = self.family.components(pipe)
        for module in (*self.components.values(), pipe.vae):
            module.requires_grad_(False).eval()
        self.sites: tuple[Site, ...] = tuple(
            s for s in self.family.sites(pipe) if text_encoder or s.component == self.family.DENOISER
        )
        self.fingerprint = weights_fingerprint(self.components)
        factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        denoiser: Any = self.components[self.family.DENOISER]
        self.resolution: int = denoiser.config.sample_size * factor

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.components[self.family.DENOISER].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's number format."""
        return next(self.components[self.family.DENOISER].parameters()).dtype

    @property
    def scorers(self) -> Path:
        """Where the base's own judges lie, if it has any."""
        return (EMBEDDED if self.source == EMBEDDED_NAME else Path(self.source)) / "scorers"

    def prompt(self, text: str) -> str:
        """Replaces the placeholder `[V]` by this base's trigger."""
        return text.replace(PLACEHOLDER, self.trigger)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels `(b, 3, h, w)` in [-1, 1] → scaled float32 latents `(b, c, h/8, w/8)`."""
        return self.family.encode_images(self.pipe, pixels.to(self.device, self.pipe.vae.dtype)).float()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents → pixels `(b, 3, h, w)` in [-1, 1]."""
        return self.family.decode_latents(self.pipe, latents.to(self.device, self.pipe.vae.dtype)).float()

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers `(b, t)` of prompts whose `[V]` is replaced by the trigger."""
        return self.family.tokenize(self.pipe, [self.prompt(p) for p in prompts]).to(self.device)

    def encode_prompts(self, tokens: Tensor) -> Conditioning:
        """Conditioning of token numbers `(b, t)`; every tensor leads with the batch axis."""
        return self.family.encode_prompts(self.pipe, tokens)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output for noisy latents `(b, c, h, w)` at timesteps `(b,)`."""
        return self.family.predict(self.pipe, noisy, timesteps, conditioning)


def weights_fingerprint(components: dict[str, nn.Module]) -> str:
    """Sixteen hex digits from the name, shape and first 64 numbers of every weight.

    The numbers are read as float16, so that float32 and float16 copies of a base accept the same adapters.
    """
    lines = [
        f"{part}.{name}:{tuple(p.shape)}"
        for part, module in sorted(components.items())
        for name, p in sorted(module.named_parameters())
    ]
    probes = [
        p.detach().flatten()[:64].half().cpu().numpy().tobytes() for m in _ordered(components) for p in m
    ]
    return hashlib.sha256("\n".join(lines).encode() + b"".join(probes)).hexdigest()[:16]


def _ordered(components: dict[str, nn.Module]) -> list[list[nn.Parameter]]:
    return [[p for _, p in sorted(module.named_parameters())] for _, module in sorted(components.items())]


def pick_device(device: str = "auto") -> torch.device:
    """`auto` → CUDA, else MPS, else CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def is_embedded(source: str | Path | None) -> bool:
    """Whether a base's name means the embedded avatars."""
    return source is None or source == EMBEDDED_NAME or Path(source).resolve() == EMBEDDED


def load_base(
    source: str | Path | None = None, device: str = "auto", dtype: str = "float32", text_encoder: bool = True
) -> Base:
    """Loads and freezes a pipeline.

    Args:
        source: folder or hub id; None (or `EMBEDDED_NAME`) for the embedded avatars.
        device: `auto`, `cpu`, `cuda`, `mps`.
        dtype: number format of the frozen weights.
        text_encoder: whether text-encoder projections count as sites.

    Raises:
        InputError: no pipeline there, or one of a family this package does not drive.
    """
    import diffusers
    import transformers

    loader: Any = diffusers
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    place = str(EMBEDDED if is_embedded(source) else source)
    if Path(place).is_absolute() and not (Path(place) / "model_index.json").is_file():
        raise InputError(
            f"base {place}: expected a diffusers pipeline folder with model_index.json, found none"
        )
    try:
        pipe: Any = loader.DiffusionPipeline.from_pretrained(place, dtype=getattr(torch, dtype))
    except (OSError, ValueError, json.JSONDecodeError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"base {place}: cannot be loaded ({first}); pass a pipeline folder or a hub id"
        ) from error
    if type(pipe).__name__ not in FAMILIES:
        raise InputError(f"base {place}: {type(pipe).__name__} is not one of {', '.join(FAMILIES)}")
    pipe.set_progress_bar_config(disable=True)
    facts = _facts(Path(place))
    name = EMBEDDED_NAME if is_embedded(place) else place
    return Base(
        pipe.to(pick_device(device)),
        name,
        trigger=facts.get("trigger", "sks"),
        class_word=facts.get("class_word", "person"),
        text_encoder=text_encoder,
    )


def _facts(folder: Path) -> dict[str, str]:
    """What a base says of itself beyond diffusers' own files: its trigger and class word."""
    file = folder / "hyperdreambooth.json"
    return read_json(file) if file.is_file() else {}
