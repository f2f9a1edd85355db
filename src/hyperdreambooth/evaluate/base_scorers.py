"""What judges a base's pictures: an identity encoder and an attribute reader.

A base may bring both, as plain transformers folders under its `scorers/`. On other bases an encoder of real
faces judges who is on a picture, and nothing reads the attributes. They score pictures and, with
`steps = "auto"`, the looks at a training; no gradient passes through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import normalize

from hyperdreambooth.base.load import Base
from hyperdreambooth.evaluate.face_encoders import NO_ENCODER, Calibration, face_encoder
from hyperdreambooth.evaluate.judge import Judge, Values, judge_of
from hyperdreambooth.evaluate.text import asked, found_share
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError, first_line

_TRAIT = "trait:"
_BATCH = 64  # pictures in one forward


class Classifier:
    """One transformers image classifier: pixels `(3, size, size)` in [-1, 1] → logits, named by `labels`."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForImageClassification

        try:
            model: Any = AutoModelForImageClassification.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = first_line(error)
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


class Reader:
    """Reads the attributes and the identity traits of pictures; `folder` is a classifier of avatars."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.classifier = Classifier(folder, device)
        self.labels, self.phrases = self.classifier.labels, self.classifier.field("phrases")
        traits = [label for label in self.labels if label.startswith(_TRAIT)]
        self.trait_names = tuple(label.removeprefix(_TRAIT) for label in traits)
        if strays := sorted(set(self.phrases) - set(self.labels)):
            raise InputError(
                f"scorer {folder}: config.json has phrases for labels that the model lacks: "
                f"{', '.join(strays)}; download the scorer again"
            )

    def prompt(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Values]:
        """Returns for each picture the share of the attributes of its own prompt that are found in it.

        `prompt` is of all of them, `prompt:GROUP` of one group; None where a prompt asks for none.
        """
        logits = self.classifier.logits(images)
        wanted = [asked(prompt, self.phrases) for prompt in prompts]
        groups = sorted({label.split(":")[0] for some in wanted for label in some})
        prefixes = {"prompt": "", **{f"prompt:{group}": f"{group}:" for group in groups}}
        return {
            score: [
                found_share(row, self.labels, [label for label in some if label.startswith(prefix)])
                for row, some in zip(logits, wanted, strict=True)
            ]
            for score, prefix in prefixes.items()
        }

    def traits(self, images: Sequence[Image.Image]) -> Tensor:
        """Reads the identity traits of the pictures, `(m, len(trait_names))` in 0 to 1."""
        columns = [k for k, label in enumerate(self.labels) if label.startswith(_TRAIT)]
        return self.classifier.logits(images)[:, columns].sigmoid()


@dataclass(frozen=True)
class BaseScorers:
    """What judges pictures of a base.

    Attributes:
        judge: who is on a picture: the base's own identity encoder, or an encoder of real faces.
        reader: what else is on it; None for a base that comes without scorers.
    """

    judge: Judge
    reader: Reader | None = None

    def identity(self, generated: Sequence[Image.Image], others: Sequence[Image.Image]) -> Values:
        """Scores each generated picture: 0 like a stranger, 1 like the person; None where there is no face.

        `others` are photos besides the reference.
        """
        return self.judge.identity(generated, others)

    def prompt(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Values]:
        """Returns the scores of `Reader.prompt`; None of every picture without a reader."""
        return self.reader.prompt(images, prompts) if self.reader else {"prompt": [None] * len(images)}

    def summary(
        self, images: Sequence[Image.Image], prompts: Sequence[str], others: Sequence[Image.Image] = ()
    ) -> dict[str, float | None]:
        """Returns the mean `identity` and `prompt` scores of some pictures; None if nothing can be scored."""
        likeness = self.identity(images, others) if others else []
        followed = self.prompt(images, prompts)["prompt"]
        return {"identity": _mean(likeness), "prompt": _mean(followed)}


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def why_not_scored(scorers: BaseScorers | None, score: str) -> str:
    """Says why no picture has a score, `identity` or `prompt`, and what would change that."""
    if score == "identity" and scorers is not None:
        advice = "hdb evaluate --adapter takes a folder of them"
        return f"not scored: no other photo of the person, or no face on it or on the pictures; {advice}"
    if score == "identity":
        return f"not scored: this base has no scorers, and {NO_ENCODER}"
    if scorers is None or scorers.reader is None:
        return "not scored: this base has no scorers"
    return "not scored: no prompt asks for anything that the scorer knows"


def load_base_scorers(base: Base, face: str | None = "auto") -> BaseScorers | None:
    """Loads what judges pictures of a base.

    Args:
        base: its own scorers come first.
        face: the encoder of real faces, as `face_encoder` names it. `auto` is for bases without scorers, and
            downloads nothing; any other judges identity on every base; None for none.

    Returns:
        None for a base without scorers where no encoder of real faces is at hand.

    Raises:
        InputError: a scorer is damaged, or the encoder that was named cannot be loaded.
    """
    there = base.scorers.is_dir()
    reader = Reader(base.scorers / "attributes", base.device) if there else None
    if there and face in ("auto", None):
        return BaseScorers(own_judge(base.scorers / "identity", base.device), reader)
    if face is None:
        return None
    try:
        return BaseScorers(judge_of(face_encoder(face)), reader)
    except InputError:
        if face != "auto":
            raise
        return None


def own_judge(folder: Path, device: torch.device) -> Judge:
    """Loads the identity encoder that came with a base."""
    encoder = Classifier(folder, device)
    try:
        calibration = Calibration.model_validate(encoder.field("calibration"))
    except ValidationError as error:
        expected = "calibration: expected the numbers `same` and `stranger`; download the scorer again"
        raise InputError(f"scorer {folder}: {expected}") from error

    def embed(pictures: Sequence[Image.Image]) -> Tensor:
        return normalize(encoder.logits(pictures), dim=1)

    return Judge("the base's own scorer", None, embed, calibration)
