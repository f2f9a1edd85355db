"""The judges that lie beside a base: an identity encoder and an attribute reader.

Both are plain transformers folders. They score and never train anything. A base without a `scorers` folder
has none, and its scores are null.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import normalize

from hyperdreambooth.base.load import Base
from hyperdreambooth.evaluate.identity import Calibration, identity_scores
from hyperdreambooth.evaluate.text import asked, found_share
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError

_TRAIT = "trait:"
_TOGETHER = 64  # pictures judged in one forward


class Judge:
    """One classifier over pictures, `(3, size, size)` in [-1, 1] → logits.

    Attributes:
        config: the transformers config with what the scorer says of itself.
        labels: the name of every logit.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForImageClassification

        try:
            model: Any = AutoModelForImageClassification.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"scorer {folder}: cannot be loaded ({reason}); get it again") from error
        self.model: nn.Module = model.requires_grad_(False).eval().to(device)
        self.config: Any = model.config
        self.device, self.folder = device, folder
        self.size: int = getattr(model.config, "image_size", 128)
        self.labels = [model.config.id2label[k] for k in range(len(model.config.id2label))]

    @torch.no_grad()
    def logits(self, images: Sequence[Image.Image]) -> Tensor:
        """`(m, l)` float32 on the CPU."""
        if not images:
            return torch.empty(0, len(self.labels))
        pixels = [to_pixels(image, self.size) for image in images]
        parts = [torch.stack(pixels[at : at + _TOGETHER]) for at in range(0, len(pixels), _TOGETHER)]
        return torch.cat(
            [self.model(pixel_values=part.to(self.device)).logits.float().cpu() for part in parts]
        )

    def field(self, name: str) -> Any:
        """A field that the scorer's config.json must have."""
        value = getattr(self.config, name, None)
        if value is None:
            raise InputError(f"scorer {self.folder}: config.json lacks {name!r}; get the scorer again")
        return value


class Scorers:
    """Both judges of a base.

    Args:
        folder: holds `identity` and `attributes`.
        device: where they run.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.encoder, self.reader = Judge(folder / "identity", device), Judge(folder / "attributes", device)
        self.phrases: dict[str, str] = self.reader.field("phrases")
        try:
            self.calibration = Calibration.model_validate(self.encoder.field("calibration"))
        except ValidationError as error:
            wanted = "calibration needs numbers `same` and `stranger`; get the scorer again"
            raise InputError(f"scorer {folder / 'identity'}: {wanted}") from error
        strays = sorted(set(self.phrases) - set(self.reader.labels))
        if strays:
            raise InputError(
                f"scorer {folder / 'attributes'}: phrases for unknown labels {', '.join(strays)}"
            )

    @cached_property
    def trait_names(self) -> tuple[str, ...]:
        """What `traits` reads, in order."""
        return tuple(label.removeprefix(_TRAIT) for label in self.reader.labels if label.startswith(_TRAIT))

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit identity embeddings `(m, e)`."""
        return normalize(self.encoder.logits(images), dim=1)

    def identity(self, generated: Sequence[Image.Image], others: Sequence[Image.Image]) -> list[float]:
        """A score a generated picture: 0 a stranger, 1 the person.

        Args:
            generated: pictures to judge.
            others: real photos of the person that are not the reference.

        Raises:
            ValueError: no other photo, hence nothing to compare with.
        """
        if not others:
            raise ValueError("the identity score needs at least one photo besides the reference")
        return identity_scores(self.embed(generated), self.embed(others), self.calibration).tolist()

    def asked(self, prompt: str) -> list[str]:
        """The attributes a prompt asks for."""
        return asked(prompt, self.phrases)

    def prompt(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        """A score a picture: the share of its prompt's attributes found; None where it asks for none.

        Args:
            images: pictures to judge.
            prompts: the prompt of each.
        """
        logits = self.reader.logits(images)
        labels = self.reader.labels
        return [found_share(row, labels, self.asked(p)) for row, p in zip(logits, prompts, strict=True)]

    def traits(self, images: Sequence[Image.Image]) -> Tensor:
        """Identity traits read off the pictures, `(m, len(trait_names))` in 0 to 1."""
        own = [k for k, label in enumerate(self.reader.labels) if label.startswith(_TRAIT)]
        return self.reader.logits(images)[:, own].sigmoid()

    def summary(
        self, images: Sequence[Image.Image], prompts: Sequence[str], others: Sequence[Image.Image] = ()
    ) -> dict[str, float | None]:
        """Mean `identity` and `prompt` scores of some pictures, null where there is nothing to judge by."""
        likeness = self.identity(images, others) if others else []
        followed = [share for share in self.prompt(images, prompts) if share is not None]
        return {"identity": _mean(likeness), "prompt": _mean(followed)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def load_scorers(base: Base) -> Scorers | None:
    """The judges that came with a base; None where it has none."""
    if not base.scorers.is_dir():
        return None
    return Scorers(base.scorers, base.device)
