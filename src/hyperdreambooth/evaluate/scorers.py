"""All scorers together: every score of one person's pictures, a value a picture.

Likeness is never measured against the reference photo.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from hyperdreambooth.base.load import PLACEHOLDER, Base
from hyperdreambooth.evaluate.base_scorers import BaseScorers, load_base_scorers
from hyperdreambooth.evaluate.likeness import background_copied, diversity, pose_copied
from hyperdreambooth.evaluate.models import Clip, Dino, Embed, Face, load_model

Values: TypeAlias = list[float | None]

MEANING = {
    "identity": "0 a stranger, 1 the person; against other photos, by the base's own scorer",
    "face": "cosine of a real-face encoder's embeddings, against other photos",
    "dino": "cosine of DINO's embeddings, against other photos",
    "clip_i": "cosine of CLIP's embeddings, against other photos",
    "clip_t": "cosine of CLIP's embeddings of picture and prompt",
    "prompt": "share of the prompt's attributes that are in the picture",
    "traits": "mean error of the measured traits, against other photos; lower is better",
    "diversity": "mean difference of one person's pictures at 32×32 pixels; higher is more varied",
    "pose_copied": "correlation with the reference photo inside the face's oval; lower copies less",
    "background_copied": "correlation with the reference photo outside of it; lower copies less",
}
"""Score → what it means; `prompt:GROUP` is the prompt score of one group of attributes."""

_PERSON = re.compile(rf"\s*{re.escape(PLACEHOLDER)}")
_LOADED = frozenset({".json", ".txt", ".safetensors", ".bin", ".onnx"})  # files that a scorer is loaded from


def mean_cosine(embed: Embed, images: Sequence[Image.Image], others: Sequence[Image.Image]) -> Values:
    """Computes each picture's mean cosine with the other photos.

    Zeros as an embedding mean that no face was found: None for that picture, and for all if no photo has one.
    """
    seen, known = embed(images), embed(others)
    known = known[known.any(1)]
    if not len(known):
        return [None] * len(images)
    cosines, has_face = (seen @ known.T).mean(1).tolist(), seen.any(1).tolist()
    return [cosine if face else None for cosine, face in zip(cosines, has_face, strict=True)]


@dataclass(frozen=True)
class Scorers:
    """Every scorer that is at hand. The scores of the others are null.

    Attributes:
        names: which scorers these are; part of the key of every score.
        missing: a line for each scorer that was asked for and could not be loaded.
    """

    base: BaseScorers | None = None
    clip: Clip | None = None
    dino: Dino | None = None
    face: Face | None = None
    names: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    missing: tuple[str, ...] = ()

    def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str | None],
        reference: Image.Image,
        others: Sequence[Image.Image],
    ) -> dict[str, Values]:
        """Scores pictures of one person by one method.

        Args:
            prompts: the prompt that each was drawn from; None for a photo.
            reference: the photo that the method was given.
            others: further photos of the person.

        Returns:
            Score → a value a picture; `diversity`, which belongs to all pictures together, is repeated.
        """
        found: dict[str, Values] = {
            "pose_copied": [*pose_copied(images, reference)],
            "background_copied": [*background_copied(images, reference)],
            "diversity": [diversity(images)] * len(images),
        }
        texts = [prompt for prompt in prompts if prompt]
        if len(texts) == len(images):
            found |= self._prompts(images, texts)
        return found | self._likeness(images, others) if others else found

    def _likeness(self, images: Sequence[Image.Image], others: Sequence[Image.Image]) -> dict[str, Values]:
        found: dict[str, Values] = {}
        if self.base is not None:
            found["identity"] = [*self.base.identity(images, others)]
            if self.base.trait_names:
                expected = self.base.traits(others).mean(0)
                found["traits"] = (self.base.traits(images) - expected).abs().mean(1).tolist()
        for score, model in (("face", self.face), ("dino", self.dino), ("clip_i", self.clip)):
            if model is not None:
                found[score] = mean_cosine(model.embed, images, others)
        return found

    def _prompts(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Values]:
        found: dict[str, Values] = {}
        if self.clip is not None:
            plain = [_PERSON.sub("", prompt).strip() for prompt in prompts]  # CLIP cannot know the trigger
            found["clip_t"] = (self.clip.embed(images) * self.clip.embed_texts(plain)).sum(1).tolist()
        return found | self.base.prompt(images, prompts) if self.base is not None else found


def load_scorers(base: Base, clip: str | None, dino: str | None, face: str | None) -> Scorers:
    """Loads the base's own scorers, and those given by folder or hub id, as far as they can be loaded."""
    missing: list[str] = []
    own = load_base_scorers(base)
    if own is None:
        missing.append(f"identity, prompt, traits: null, the base {base.source} comes without scorers")
    models = (
        load_model(Clip, "clip_i, clip_t", clip, base.device, missing),
        load_model(Dino, "dino", dino, base.device, missing),
        load_model(Face, "face", face, base.device, missing),
    )
    sources = {"base": str(base.scorers), "clip": clip, "dino": dino, "face": face}
    names = {
        name: _name(source) if source is not None and scorer is not None else None
        for (name, source), scorer in zip(sources.items(), (own, *models), strict=True)
    }
    return Scorers(own, *models, names=names, missing=tuple(missing))


def _name(source: str) -> str:
    """Names a scorer: a hub id as it is, a folder by a hash of the files that it is loaded from."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in _LOADED):
        with file.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return f"{folder.name}:{digest.hexdigest()[:16]}"
