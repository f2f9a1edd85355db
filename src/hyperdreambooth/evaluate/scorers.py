"""All scorers together: every score of one person's pictures, a value a picture.

Likeness is measured against other photos of the person. Against the reference photo only copying is measured.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from hyperdreambooth.base.load import PLACEHOLDER, Base
from hyperdreambooth.evaluate.base_scorers import BaseScorers, load_base_scorers
from hyperdreambooth.evaluate.face_encoders import NO_ENCODER, face_encoder
from hyperdreambooth.evaluate.judge import Embed, Values
from hyperdreambooth.evaluate.likeness import background_copied, diversity, pose_copied
from hyperdreambooth.evaluate.models import Clip, Dino, load_model
from hyperdreambooth.files import InputError

MEANING = {
    "identity": "0 a stranger, 1 another photo of the person; against other photos",
    "leak": "identity of pictures whose prompt names the class and not the person; 0 wanted",
    "sim_target": "cosine of the identity scorer's embeddings with other photos: Sim(GT) of MultiID-Bench",
    "sim_reference": "the same with the reference photo: Sim(Ref)",
    "copy_paste": "1 closer to the reference photo, -1 to the other photos; lower copies less",
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
    """Computes each picture's mean cosine with the other photos."""
    return (embed(images) @ embed(others).T).mean(1).tolist()


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
        return found | self._likeness(images, reference, others)

    def _likeness(
        self, images: Sequence[Image.Image], reference: Image.Image, others: Sequence[Image.Image]
    ) -> dict[str, Values]:
        found = self.base.judge.likeness(images, reference, others) if self.base is not None else {}
        if not others:
            return found
        if self.base is not None and (reader := self.base.reader) is not None and reader.trait_names:
            expected = reader.traits(others).mean(0)
            found["traits"] = (reader.traits(images) - expected).abs().mean(1).tolist()
        for score, model in (("dino", self.dino), ("clip_i", self.clip)):
            if model is not None:
                found[score] = mean_cosine(model.embed, images, others)
        return found

    def _prompts(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Values]:
        found: dict[str, Values] = {}
        if self.clip is not None:
            plain = [_PERSON.sub("", prompt).strip() for prompt in prompts]  # CLIP cannot know the trigger
            found["clip_t"] = (self.clip.embed(images) * self.clip.embed_texts(plain)).sum(1).tolist()
        return found | self.base.prompt(images, prompts) if self.base is not None else found


def load_scorers(base: Base, clip: str | None, dino: str | None, face: str | None = "auto") -> Scorers:
    """Loads the judge of identities, and the models given by folder or hub id, as far as they can be loaded.

    `face` is the encoder of real faces, as `load_base_scorers` takes it.
    """
    missing: list[str] = []
    judged = _judged(base, face, missing)
    models = (
        load_model(Clip, "clip_i, clip_t", clip, base.device, missing),
        load_model(Dino, "dino", dino, base.device, missing),
    )
    brought = str(base.scorers) if judged and base.scorers.is_dir() else None
    sources = {"base": brought, "clip": models[0] and clip, "dino": models[1] and dino}
    names = {name: None if source is None else _name(source) for name, source in sources.items()}
    return Scorers(judged, *models, names={**names, "face": _face(judged)}, missing=tuple(missing))


def _judged(base: Base, face: str | None, missing: list[str]) -> BaseScorers | None:
    """Loads the judge and the reader, and adds lines to `missing` that say which scores are null, and why."""
    why = NO_ENCODER if face else "no face encoder was asked for"
    if face not in ("auto", None):
        try:
            face_encoder(face)
        except InputError as error:
            face, why = None, f"{face} cannot be loaded ({error})"
            if base.scorers.is_dir():
                missing.append(f"identity: by the base's own scorer, {why}")
    found = load_base_scorers(base, face)
    if found is None:
        missing.append(f"identity, leak, sim_target, sim_reference, copy_paste: null, {why}")
    if found is None or found.reader is None:
        missing.append(f"prompt, traits: null, the base {base.source} comes without scorers")
    return found


def _face(judged: BaseScorers | None) -> str | None:
    """Names an encoder of real faces with its calibration, which is a part of every score."""
    if judged is None or judged.judge.licence is None:
        return None
    judge = judged.judge
    return f"{_name(judge.name)} {judge.calibration.same:g} {judge.calibration.stranger:g}"


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
