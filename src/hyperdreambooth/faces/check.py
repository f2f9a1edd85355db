"""Looking over the crops of all people: strangers, the same photo twice, each person's best reference photo.

Everything here only reports. Nothing is deleted, because every finding may be wrong.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from hyperdreambooth.cache import cached_rows
from hyperdreambooth.faces.dataset import photo_hash
from hyperdreambooth.faces.detect import Face
from hyperdreambooth.faces.frame import framed_face
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.faces.journal import Record
from hyperdreambooth.faces.landmarks import framed, laid_onto, misfit

Embed: TypeAlias = Callable[[Sequence[Image.Image]], np.ndarray[Any, np.dtype[np.float32]]]
"""Pictures → unit vectors `(n, d)`; NaN for a picture without a face."""

LOOK = 16  # pixels per side of a photo's look
# Cosine of two looks. Copies that were mirrored, compressed, resized, brightened or made grey have .98 or
# more, different photos of one person at most .93 (54 photos of dlib's examples/johns).
_ALIKE = 0.96
_BLOCK = 512  # photos that are compared with all others at once
# Of two photos of one person, where a stranger has 0 and a usual second photo 1. In dlib's examples/johns,
# whose 55 files have one photo twice, the 275 pairs of one person have .71 or more, and the 1,210 pairs of
# two people .52 or less.
_LIKENESS = 0.65
_CLOSER = 0.15  # a crop this much nearer to another person than to its own is a stranger, too
_SIDE = 256  # pixels per side of what the encoder is shown
_SHARP = 100.0  # a reference photo gains nothing from being sharper
_TOO_ODD = 0.2  # the misfit of a half profile, which is no reference photo


@dataclass(frozen=True)
class Stranger:
    """A crop that shows somebody else than the other crops of its folder.

    Attributes:
        crop: the crop's name.
        likeness: to the others: 0 for a stranger, 1 for a usual photo of the same person.
        like: the person in another folder whom it shows, if there is one.
    """

    crop: str
    likeness: float
    like: str | None


def look(image: Image.Image) -> str:
    """Returns how a photo looks from far away, as base64, to find the same photo again."""
    small = image.convert("L").resize((LOOK, LOOK), Image.Resampling.BOX)
    return base64.b64encode(small.tobytes()).decode()


def duplicates(records: Iterable[Record]) -> list[list[str]]:
    """Returns groups of crops of the same photo, as it is, mirrored, or saved again in any quality or size.

    The photos are compared as wholes, so that a part of a photo is another photo.
    """
    photos = {one.item: one for one in reversed(list(records)) if one.kept and one.look}
    firsts = list(photos.values())[::-1]
    if not firsts:
        return []
    looks = np.stack([np.frombuffer(base64.b64decode(one.look), np.uint8) for one in firsts])
    first = list(range(len(firsts)))  # of the group that each photo is in
    for row, other in _alike(looks):
        low, high = sorted((first[row], first[other]))
        if low != high:
            first = [low if number == high else number for number in first]
    found: dict[int, list[str]] = {}
    for number, one in zip(first, firsts, strict=True):
        found.setdefault(number, []).append(one.name)
    return [names for names in found.values() if len(names) > 1]


def _alike(looks: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """Yields the pairs of looks `(n, LOOK²)` that are alike, as they are or mirrored."""
    unit = looks.astype(np.float32) - looks.mean(1, keepdims=True, dtype=np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-6)
    mirrored = unit.reshape(-1, LOOK, LOOK)[:, :, ::-1].reshape(unit.shape)
    for start in range(0, len(unit), _BLOCK):
        block = unit[start : start + _BLOCK]
        cosines = np.maximum(block @ unit[start:].T, block @ mirrored[start:].T)
        for row, other in np.argwhere(np.triu(cosines, 1) >= _ALIKE).tolist():
            yield start + row, start + other


def vectors_of(out: Path, records: Sequence[Record], embed: Embed, cache: Path) -> dict[str, Any]:
    """Returns crop → its unit vector, for the crops in which the encoder sees a face; kept in a cache.

    The encoder is shown the aligned face, see `only_face`.
    """
    known = [one for one in records if one.kept and one.landmarks is not None]
    if not known:
        return {}

    def encode(places: list[int]) -> dict[str, torch.Tensor]:
        pictures = [_aligned(out, known[place]) for place in places]
        return {"vectors": torch.from_numpy(embed(pictures))}

    names = [photo_hash(out / f"{one.name}.png") for one in known]
    rows = cached_rows(names, encode, cache, title="compare faces")["vectors"].numpy()
    return {one.name: row for one, row in zip(known, rows, strict=True) if np.isfinite(row).all()}


def _aligned(out: Path, record: Record) -> Image.Image:
    picture = open_photo(out / f"{record.name}.png")
    return laid_onto(picture, record.landmarks or (), framed(_SIDE, 0.1), _SIDE)[0]


def only_face(image: Image.Image) -> list[Face]:
    """A detector for the pictures that `vectors_of` shows: the face has the same place in all of them."""
    return [Face(*framed_face(image.width, 0.1), 1.0)]


def strangers(
    people: Mapping[str, Sequence[str]], vectors: Mapping[str, Any], scale: tuple[float, float]
) -> list[Stranger]:
    """Returns the crops whose face is unlike the others of their folder.

    A person is the largest group of crops that are like one crop in the middle. Of two crops that are unlike
    each other, the second one is reported.

    Args:
        people: the crops of each person.
        vectors: crop → unit vector; others are not judged.
        scale: the cosine of two strangers, and that of two photos of one person.
    """
    low, high = scale
    judged = {
        person: own for person, crops in people.items() if (own := [one for one in crops if one in vectors])
    }
    if not judged:
        return []
    means: list[Any] = []
    for crops in judged.values():
        rows = np.stack([vectors[name] for name in crops])
        means.append(rows[_group((rows @ rows.T - low) / (high - low))].mean(0))
    middles, persons, found = np.stack(means), list(judged), list[Stranger]()
    for at, crops in enumerate(judged.values()):
        # a mean of cosines is the cosine with the mean
        likeness = (np.stack([vectors[name] for name in crops]) @ middles.T - low) / (high - low)
        for name, scores in zip(crops, likeness, strict=True):
            own, scores[at] = float(scores[at]), -np.inf
            best = int(scores.argmax())
            nearest = float(scores[best]) if len(persons) > 1 else 0.0
            if own < _LIKENESS or nearest > own + _CLOSER:
                like = persons[best] if nearest >= _LIKENESS else None
                found.append(Stranger(name, round(own, 2), like))
    return found


def _group(likeness: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns which rows are like the row that has the most alike, itself included."""
    alike = likeness >= _LIKENESS
    np.fill_diagonal(alike, True)
    middle = int(np.lexsort((likeness.sum(1), alike.sum(1)))[-1])
    if alike[middle].sum() == 1:  # nobody is like anybody: the first one counts
        return np.arange(len(alike)) == 0
    return alike[middle]


def reference(records: Sequence[Record], odd: Iterable[str] = ()) -> str:
    """Returns the crop that is the best reference photo: sharp, frontal, alone, unoccluded, whole.

    The detector is less sure of a covered face, so that its confidence stands for "unoccluded". `odd` are
    crops to avoid.
    """
    avoided = set(odd)

    def worth(one: Record) -> float:
        frontal = 1.0 if one.landmarks is None else max(0.0, 1 - misfit(one.landmarks) / _TOO_ODD)
        alone = 1.0 if one.faces <= 1 else 0.5
        whole = 1.0 if one.corners is None else 0.8
        sharp = min(1.0, one.sharpness / _SHARP) ** 0.5
        return sharp * frontal * alone * one.score * whole * (0.1 if one.name in avoided else 1.0)

    return max(records, key=worth).name
