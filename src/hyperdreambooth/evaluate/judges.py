"""All scores of one person's pictures, a value a picture. Likeness is never judged by the reference photo."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from hyperdreambooth.base.load import PLACEHOLDER, Base
from hyperdreambooth.evaluate.likeness import background_copied, diversity, pose_copied
from hyperdreambooth.evaluate.models import Clip, Dino, Embed, Face, fetch
from hyperdreambooth.evaluate.scorers import Scorers, load_scorers
from hyperdreambooth.evaluate.text import found_share

Values = list[float | None]

MEANING = {
    "identity": "0 a stranger, 1 the person; against other photos, by the base's own judge",
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
"""Score → what it says; `prompt:GROUP` is the prompt's score of one group of attributes."""


_WHO = re.compile(rf"\s*{re.escape(PLACEHOLDER)}")
_READ = frozenset({".json", ".txt", ".safetensors", ".bin", ".onnx"})  # what judges are loaded from


def mean_cosine(embed: Embed, images: Sequence[Image.Image], others: Sequence[Image.Image]) -> Values:
    """Each picture's mean cosine with the other photos; an embedding of zeros is of a picture without a face.

    Returns:
        A value a picture; None where either side shows no face.
    """
    seen, known = embed(images), embed(others)
    known = known[known.any(1)]
    if not len(known):
        return [None] * len(images)
    cosines, there = (seen @ known.T).mean(1).tolist(), seen.any(1).tolist()
    return [cosine if face else None for cosine, face in zip(cosines, there, strict=True)]


@dataclass(frozen=True)
class Judges:
    """Whoever can be asked; what nobody can judge is null.

    Attributes:
        scorers: those that came with the base.
        clip: for `clip_i` and `clip_t`.
        dino: for `dino`.
        face: for `face`.
        names: which they are; part of a score's key.
        missing: a line for each that was asked for and cannot be had.
    """

    scorers: Scorers | None = None
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
        """Score → a value a picture; `diversity`, which is all pictures' together, stands at each.

        Args:
            images: `m` pictures of one person by one method.
            prompts: what each should show, as drawn; None for a photo.
            reference: the photo that the method was given.
            others: further photos of the person.
        """
        found: dict[str, Values] = {
            "pose_copied": [*pose_copied(images, reference)],
            "background_copied": [*background_copied(images, reference)],
            "diversity": [diversity(images)] * len(images),
        }
        asked = [(image, prompt) for image, prompt in zip(images, prompts, strict=True) if prompt]
        if len(asked) == len(images):
            found |= self._prompts(images, [prompt for _, prompt in asked])
        return found | self._person(images, others) if others else found

    def _person(self, images: Sequence[Image.Image], others: Sequence[Image.Image]) -> dict[str, Values]:
        """Is it the person?"""
        found: dict[str, Values] = {}
        if self.scorers is not None:
            found["identity"] = [*self.scorers.identity(images, others)]
            if self.scorers.trait_names:
                there = self.scorers.traits(others).mean(0)
                found["traits"] = (self.scorers.traits(images) - there).abs().mean(1).tolist()
        for name, judge in (("face", self.face), ("dino", self.dino), ("clip_i", self.clip)):
            if judge is not None:
                found[name] = mean_cosine(judge.embed, images, others)
        return found

    def _prompts(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Values]:
        """Did the prompt come true?"""
        found: dict[str, Values] = {}
        if self.clip is not None:
            plain = [_WHO.sub("", prompt).strip() for prompt in prompts]  # no word that CLIP could know
            found["clip_t"] = (self.clip.embed(images) * self.clip.embed_texts(plain)).sum(1).tolist()
        if self.scorers is None:
            return found
        logits, labels = self.scorers.reader.logits(images), self.scorers.reader.labels
        wanted = [self.scorers.asked(prompt) for prompt in prompts]
        found["prompt"] = [found_share(row, labels, some) for row, some in zip(logits, wanted, strict=True)]
        for group in sorted({label.split(":")[0] for some in wanted for label in some}):
            found[f"prompt:{group}"] = _of_group(logits, labels, wanted, group)
        return found


def _of_group(logits: Tensor, labels: Sequence[str], wanted: Sequence[Sequence[str]], group: str) -> Values:
    """The prompt score of one group's attributes; None where a prompt asks for none of them."""
    own = [[label for label in some if label.split(":")[0] == group] for some in wanted]
    return [found_share(row, labels, some) for row, some in zip(logits, own, strict=True)]


def load_judges(base: Base, clip: str | None, dino: str | None, face: str | None) -> Judges:
    """Everybody who can be had.

    Args:
        base: brings its own scorers, if it has any.
        clip: folder or hub id of a CLIP model; None for none.
        dino: of a DINOv2 model.
        face: of an encoder of real faces.
    """
    device, missing = base.device, list[str]()
    scorers = load_scorers(base)
    if scorers is None:
        missing.append(f"identity, prompt, traits: null, the base {base.source} came without scorers")
    loaded = (
        fetch(Clip, "clip_i, clip_t", clip, device, missing),
        fetch(Dino, "dino", dino, device, missing),
        fetch(Face, "face", face, device, missing),
    )
    sources = {"scorers": str(base.scorers), "clip": clip, "dino": dino, "face": face}
    names = {
        name: _name(source) if source is not None and one is not None else None
        for (name, source), one in zip(sources.items(), (scorers, *loaded), strict=True)
    }
    return Judges(scorers, *loaded, names=names, missing=tuple(missing))


def _name(source: str) -> str:
    """A judge's name: a hub id as it is, a folder with a hash of its weights, labels and calibration."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in _READ):
        with file.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return f"{folder.name}:{digest.hexdigest()[:16]}"
