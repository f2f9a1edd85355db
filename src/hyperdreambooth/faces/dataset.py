"""Folders of photos to people: identity, photo, caption, landmarks. Names decide; no picture is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from hyperdreambooth.faces.image import open_photo, to_rgb
from hyperdreambooth.faces.landmarks import Landmarks, as_landmarks
from hyperdreambooth.files import InputError

SHEET = "contact-sheet.png"  # what `prepare` shows of its work is nobody's photo
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
UNREAD = frozenset({".heic", ".heif", ".avif"})
"""What phones write and nobody here reads: said when it is opened, unless a conversion lies beside it."""
_KINDS = "png, jpg, webp, bmp, tiff or gif"


@dataclass(frozen=True)
class Photo:
    """One photo of one person.

    Attributes:
        path: the file; of a picture in memory, only a name for messages.
        identity: whose photo it is.
        caption: what it shows, where somebody wrote it down.
        landmarks: of the face, where somebody knows them.
        picture: the photo itself, where it came from memory and not from a file.
    """

    path: Path
    identity: str
    caption: str | None
    landmarks: Landmarks | None = None
    picture: Image.Image | None = None

    def open(self) -> Image.Image:
        """The photo as people see it: upright, RGB.

        Raises:
            InputError: the file is missing or unreadable, or the picture is too small or too large.
        """
        return open_photo(self.path) if self.picture is None else to_rgb(self.path, self.picture)

    def hash(self) -> str:
        """32 hex digits of the content of the file, or of the pixels of a picture in memory.

        Raises:
            InputError: the file cannot be read.
        """
        if self.picture is None:
            return photo_hash(self.path)
        kind = repr((self.picture.mode, self.picture.size)).encode()
        return hashlib.sha256(kind + self.picture.tobytes()).hexdigest()[:32]


Given: TypeAlias = str | Path | Image.Image | Photo
"""A photo as callers give it: a file, a folder of one person's photos, a picture in memory or a `Photo`."""

Photos: TypeAlias = Given | Sequence[Given]
"""One or several of these, always of one person."""


@dataclass(frozen=True)
class Note:
    """What a line of metadata.jsonl says of a photo."""

    caption: str | None = None
    landmarks: Landmarks | None = None


def printable(text: str) -> str:
    """What is no UTF-8 in a file's name, escaped: Python has it as lone surrogates, which no report takes."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_faces(folder: Path) -> dict[str, tuple[Photo, ...]]:
    """Read a folder of many people.

    ``folder/identity/*.png`` is one identity a subfolder; a folder of nothing but photos is one identity a
    photo, named by the file's stem (CelebA's way). Captions come from ``photo.txt`` beside the photo or a
    ``metadata.jsonl`` (``{"file_name": …, "text": …, "landmarks": [[x, y], …]}``, the last two optional) in
    the folder or the subfolder. Hidden names, and subfolders that hold no photo, are passed over.

    Args:
        folder: the folder.

    Returns:
        Identity → its photos, both sorted by name.

    Raises:
        InputError: not a folder, no photo in it, or photos beside the people's subfolders.
    """
    _check_folder(folder)
    notes = _metadata(folder)
    loose = _photos(folder)
    people: dict[str, list[Path]] = {}
    for inner in _children(folder):
        if inner.is_dir() and (photos := _photos(inner)):
            people[printable(inner.name)] = photos
            notes |= _metadata(inner)
    if loose and people:
        raise InputError(
            f"{folder}: has photos beside people's folders; move {loose[0].name} into one of them"
        )
    for path in loose:
        people.setdefault(printable(path.stem), []).append(path)
    if not people:
        raise InputError(f"{folder}: no photo found; expected {folder.name}/PERSON/*.jpg ({_KINDS})")
    return {name: _label(paths, name, notes) for name, paths in sorted(people.items())}


def read_person(photos: Photos) -> tuple[Photo, ...]:
    """Reads the photos of one person, named after the first file or folder.

    Args:
        photos: a file, a folder of photos, a picture in memory, or several of these; the same file twice
            counts once. Photos that were read before stay as they are.

    Returns:
        The photos in the order given, those of a folder sorted by name.

    Raises:
        InputError: nothing given, something missing, or a folder without photos.
    """
    given = [photos] if isinstance(photos, str | Path | Image.Image | Photo) else list(photos)
    if not given:
        raise InputError("no photo given; expected a photo of the person, or a folder of them")
    found: dict[Path, Photo] = {}
    first = given[0]
    identity = "" if isinstance(first, Image.Image | Photo) else _person_name(Path(first))
    for number, one in enumerate(given, start=1):
        if isinstance(one, Image.Image):
            name = Path(f"picture {number}")
            found[name] = Photo(name, identity or "person", None, picture=one)
        elif isinstance(one, Photo):
            found[Path(f"photo {number}")] = one
        else:
            for photo in _files_of(Path(one), identity or "person"):
                found.setdefault(photo.path.resolve(), photo)
    return tuple(found.values())


def _person_name(first: Path) -> str:
    resolved = first.resolve()
    return printable(resolved.stem if resolved.is_file() else resolved.name)


def _files_of(given: Path, identity: str) -> tuple[Photo, ...]:
    """The photo that a path names, or the photos right in a folder."""
    if given.is_file():
        return _label([given], identity, _metadata(given.parent))
    _check_folder(given)
    inside = _photos(given)
    if not inside:
        raise InputError(f"{given}: no photo found; expected the photos of one person ({_KINDS}) right in it")
    return _label(inside, identity, _metadata(given))


def photo_hash(path: Path) -> str:
    """32 hex digits of the file's content; its name and date do not matter."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise InputError(f"{path}: cannot read the photo ({error.strerror})") from None


def _check_folder(folder: Path) -> None:
    """Missing, or not a folder: say which."""
    if not folder.exists():
        raise InputError(f"{folder}: no such photo or folder of photos")
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of photos, found a file")


def _children(folder: Path) -> list[Path]:
    """What is in a folder, hidden names left out, sorted by name."""
    try:
        return sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda path: path.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot read the folder ({error.strerror})") from None


def _photos(folder: Path) -> list[Path]:
    """The photos right in a folder; never deeper, so a symlink that leads back is harmless."""
    named = [path for path in _children(folder) if path.suffix.lower() in EXTENSIONS | UNREAD]
    files = [path for path in named if path.name != SHEET and path.is_file()]
    stems = {path.stem for path in files if path.suffix.lower() in EXTENSIONS}
    return [path for path in files if path.suffix.lower() in EXTENSIONS or path.stem not in stems]


def _label(paths: Iterable[Path], identity: str, notes: dict[Path, Note]) -> tuple[Photo, ...]:
    """Attach captions and landmarks; a text file beside the photo beats metadata.jsonl."""
    known = [(path, notes.get(path, Note())) for path in paths]
    return tuple(Photo(path, identity, _beside(path) or note.caption, note.landmarks) for path, note in known)


def _beside(path: Path) -> str | None:
    """The text file beside a photo, as one line."""
    text = path.with_suffix(".txt")
    return " ".join(_read(text).split()) if text.is_file() else None


def _read(path: Path) -> str:
    """A text file, or one line on why not."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected captions as UTF-8 text ({error})") from None


def _metadata(folder: Path) -> dict[Path, Note]:
    """A folder's ``metadata.jsonl``, as Hugging Face's image folders have it."""
    file = folder / "metadata.jsonl"
    notes: dict[Path, Note] = {}
    for number, line in enumerate(_read(file).split("\n") if file.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            notes[folder / entry["file_name"]] = note_of(entry.get("text"), entry.get("landmarks"))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            expected = 'expected {"file_name": …, "text": …, "landmarks": five [x, y] or none}'
            raise InputError(f"{file}: line {number}: {expected}, got {line[:60]}") from None
    return notes


def note_of(text: object, landmarks: object) -> Note:
    """A caption as one line, landmarks as pairs; None where there is nothing.

    Raises:
        ValueError: landmarks that are not five pairs of numbers, or half a character, which JSON can spell.
    """
    words = " ".join(str(text).split()) if text else ""
    words.encode()
    return Note(words or None, as_landmarks(landmarks) if landmarks is not None else None)
