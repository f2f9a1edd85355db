"""Photos as people drop them → the crops that a person is made from, each with a sentence about it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.dataset import Photo, read_person
from hyperdreambooth.faces.detect import Detector
from hyperdreambooth.faces.journal import Record
from hyperdreambooth.faces.prepare import describe, prepare_photo
from hyperdreambooth.faces.sources import Item
from hyperdreambooth.files import InputError
from hyperdreambooth.grid import mark


@dataclass(frozen=True)
class Crop:
    """A photo's crop, or why there is none.

    Attributes:
        name: the photo's.
        words: a sentence about it.
        file: the crop; None for a photo that is left out.
        landmarks: the points of the face that was found, in pixels of the crop.
    """

    name: str
    words: str
    file: Path | None = None
    landmarks: Sequence[tuple[float, float]] = ()

    def shown(self) -> Image.Image | None:
        """Returns the crop with the face's points marked."""
        if self.file is None:
            return None
        with Image.open(self.file) as image:
            picture = image.convert("RGB")
        mark(picture, self.landmarks)
        return picture


def crop_photos(
    photos: Sequence[Path], out: Path, size: int, detect: Detector | None, whole: bool = False
) -> list[Crop]:
    """Writes the crops of a person's photos into a folder that `read_person` reads.

    Args:
        photos: the photos of one person.
        out: an empty folder.
        size: pixels a side of the base's pictures. Square photos of this size are taken as they are.
        detect: finds faces; None to take the centre of every photo.
        whole: whether the photos are crops of faces already.

    Raises:
        InputError: no photo is usable.
    """
    records, crops = list[Record](), list[Crop]()
    for number, photo in enumerate(_read(photos)):
        as_is = whole or detect is None or _is_crop(photo, size)
        config = PrepareConfig(size=size, several="largest", already_cropped=as_is, sharpness=0)
        item = Item(str(number), photo.path.name, photo.path, photo.caption)
        record = prepare_photo(item, "", out, config, None if as_is else detect)[0]
        records.append(record)
        crops.append(_crop(record, out, as_is, detect is None and not whole))
    if not any(crop.file for crop in crops):
        raise InputError(f"no photo can be used: {crops[0].name}: {crops[0].words}")
    describe(out, [record for record in records if not record.reason])
    return crops


def _read(photos: Sequence[Path]) -> Sequence[Photo]:
    """Reads what is noted about photos; messages name a file without its folder, which is a temporary one."""
    try:
        return read_person([*photos])
    except InputError as error:
        raise InputError(plainly(str(error), photos)) from None


def plainly(message: str, files: Sequence[Path]) -> str:
    """Returns a message that names files without their folders."""
    names: Mapping[str, str] = {str(file): file.name for file in files}
    for path, name in names.items():
        message = message.replace(path, name)
    return message


def _is_crop(photo: Photo, size: int) -> bool:
    try:
        return photo.open().size == (size, size)
    except InputError:  # `prepare_photo` says why
        return False


def _crop(record: Record, out: Path, as_is: bool, undetected: bool) -> Crop:
    """Says what became of a photo."""
    if record.reason:
        return Crop(record.photo, record.reason)
    file = out / f"{record.name}.png"
    if as_is:
        words = "the centre of the photo" if undetected else "taken as it is"
        return Crop(record.photo, words, file)
    others = f", the largest of {record.faces}" if record.faces > 1 else ""
    padded = f", {record.padded:.0%} padded" if record.padded >= 0.005 else ""
    return Crop(record.photo, f"face found{others}{padded}", file, record.landmarks or ())


def take_over(crops: Path, out: Path) -> None:
    """Copies crops, captions and notes into a person's folder."""
    out.mkdir(parents=True, exist_ok=True)
    for file in crops.iterdir():
        if file.suffix in (".png", ".txt", ".jsonl"):
            shutil.copy(file, out / file.name)
