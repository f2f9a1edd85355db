"""The scorers that come with a base: an identity encoder and an attribute reader.

Both are plain transformers folders under the base's `scorers/`. They score pictures and, with
`steps = "auto"`, the looks at a training; no gradient passes through them. A base without that folder has no
such scorers, and their scores are null.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import normalize

from hyperdreambooth.base.load import Base
from hyperdreambooth.evaluate.text import asked, found_share
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError

_TRAIT = "trait:"
_BATCH = 64  # pictures in one forward


class Calibration(BaseModel):
    """Mean cosine of two real photos of one person, and of two people, by the identity encoder."""

    same: float
    stranger: float


# (cos(generated, other photos) - cos(strangers)) / (cos(same) - cos(strangers))   (docs/concepts.md)
def identity_scores(generated: Tensor, others: Tensor, calibration: Calibration) -> Tensor:
    """Computes how much each picture looks like the person: 0 like a stranger, 1 like the person.

    Args:
        generated: unit embeddings `(m, e)` of generated pictures.
        others: unit embeddings `(k, e)` of real photos of the person. The reference photo must not be among
            them: it would reward pictures that copy its pose and light.
        calibration: the cosines that score 1 and 0.

    Returns:
        `(m,)`, means over the photos; not clipped, so that means over pictures stay unbiased.
    """
    cosine = (generated @ others.T).mean(dim=1)
    return (cosine - calibration.stranger) / (calibration.same - calibration.stranger)


class Classifier:
    """One transformers image classifier: pixels `(3, size, size)` in [-1, 1] → logits, named by `labels`."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForImageClassification

        try:
            model: Any = AutoModelForImageClassification.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"scorer {folder}: cannot be loaded ({reason}); download it again") from error
        self.model: nn.Module = model.requires_grad_(False).eval().to(device)
        self.config: Any = model.config
        self.device, self.folder = device, folder
        self.size: int = getattr(model.config, "image_size", 128)
        self.labels: list[str] = [name for _, name in sorted(model.config.id2label.items())]

    @torch.no_grad()
    def logits(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns the logits `(m, l)` of `m` pictures, float32 on the CPU."""
        if not images:
            return torch.empty(0, len(self.labels))
        pixels = torch.stack([to_pixels(image, self.size) for image in images])
        parts = [self.model(pixel_values=part.to(self.device)).logits for part in pixels.split(_BATCH)]
        return torch.cat(parts).float().cpu()

    def field(self, name: str) -> Any:
        """Returns a field that the scorer's config.json must have."""
        value = getattr(self.config, name, None)
        if value is None:
            raise InputError(f"scorer {self.folder}: config.json has no {name!r}; download the scorer again")
        return value


class BaseScorers:
    """The identity encoder and the attribute reader of one base, in folders `identity` and `attributes`."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.encoder = Classifier(folder / "identity", device)
        self.reader = Classifier(folder / "attributes", device)
        self.phrases: dict[str, str] = self.reader.field("phrases")
        traits = [label for label in self.reader.labels if label.startswith(_TRAIT)]
        self.trait_names = tuple(label.removeprefix(_TRAIT) for label in traits)
        try:
            self.calibration = Calibration.model_validate(self.encoder.field("calibration"))
        except ValidationError as error:
            expected = "calibration: expected the numbers `same` and `stranger`; download the scorer again"
            raise InputError(f"scorer {folder / 'identity'}: {expected}") from error
        if strays := sorted(set(self.phrases) - set(self.reader.labels)):
            raise InputError(
                f"scorer {folder / 'attributes'}: config.json has phrases for labels that the model lacks: "
                f"{', '.join(strays)}; download the scorer again"
            )

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns unit identity embeddings `(m, e)`."""
        return normalize(self.encoder.logits(images), dim=1)

    def identity(self, generated: Sequence[Image.Image], others: Sequence[Image.Image]) -> list[float]:
        """Scores each generated picture by `identity_scores`; `others` are photos besides the reference."""
        if not others:
            raise ValueError("the identity score needs at least one photo besides the reference photo")
        return identity_scores(self.embed(generated), self.embed(others), self.calibration).tolist()

    def prompt(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[float | None]]:
        """Returns for each picture the share of the attributes of its own prompt that the reader finds.

        `prompt` is of all of them, `prompt:GROUP` of one group; None where a prompt asks for none.
        """
        logits, labels = self.reader.logits(images), self.reader.labels
        wanted = [asked(prompt, self.phrases) for prompt in prompts]
        groups = sorted({label.split(":")[0] for some in wanted for label in some})
        prefixes = {"prompt": "", **{f"prompt:{group}": f"{group}:" for group in groups}}
        return {
            score: [
                found_share(row, labels, [label for label in some if label.startswith(prefix)])
                for row, some in zip(logits, wanted, strict=True)
            ]
            for score, prefix in prefixes.items()
        }

    def traits(self, images: Sequence[Image.Image]) -> Tensor:
        """Reads the identity traits of the pictures, `(m, len(trait_names))` in 0 to 1."""
        columns = [k for k, label in enumerate(self.reader.labels) if label.startswith(_TRAIT)]
        return self.reader.logits(images)[:, columns].sigmoid()

    def summary(
        self, images: Sequence[Image.Image], prompts: Sequence[str], others: Sequence[Image.Image] = ()
    ) -> dict[str, float | None]:
        """Returns the mean `identity` and `prompt` scores of some pictures; None if nothing can be scored."""
        likeness = self.identity(images, others) if others else []
        followed = [share for share in self.prompt(images, prompts)["prompt"] if share is not None]
        return {
            "identity": fmean(likeness) if likeness else None,
            "prompt": fmean(followed) if followed else None,
        }


def load_base_scorers(base: Base) -> BaseScorers | None:
    """Loads the scorers that came with a base; returns None if it has none."""
    return BaseScorers(base.scorers, base.device) if base.scorers.is_dir() else None
