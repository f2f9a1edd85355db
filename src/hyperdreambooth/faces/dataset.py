"""Reading folders of photos: identities, photos, captions, landmarks. No picture is opened here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from hyperdreambooth.faces.frame import Corners, as_corners
from hyperdreambooth.faces.image import open_photo, to_rgb
from hyperdreambooth.faces.landmarks import Landmarks, as_landmarks
from hyperdreambooth.files import InputError

SHEET = "contact-sheet.png"  # written by `prepare`; not a photo of anybody
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
UNREAD = frozenset({".heic", ".heif", ".avif"})
"""Phones' formats that Pillow cannot read. Such a photo is refused unless a converted one lies beside it."""
_KINDS = "png, jpg, webp, bmp, tiff or gif"


@dataclass(frozen=True)
class Photo:
    """One photo of one person.

    Attributes:
        path: the file; for a picture in memory only a name for messages.
        identity: the person's name.
        caption: what the photo shows ("a photo of a [V] face, smiling"), if somebody wrote it down.
        landmarks: five points of the face, `(x, y)` in pixels, if they are known.
        picture: the photo itself, if it came from memory.
        corners: those of the true photo in a padded crop, see `faces/frame.py`; None without padding.
    """

    path: Path
    identity: str
    caption: str | None
    landmarks: Landmarks | None = None
    picture: Image.Image | None = None
    corners: Corners | None = None

    def open(self) -> Image.Image:
        """Opens the photo as viewers show it: upright, RGB; refuses it where `open_photo` does."""
        return open_photo(self.path) if self.picture is None else to_rgb(self.path, self.picture)

    def hash(self) -> str:
        """Returns 32 hex digits of the file's content, or of the pixels of a picture in memory."""
        if self.picture is None:
            return photo_hash(self.path)
        kind = repr((self.picture.mode, self.picture.size)).encode()
        return hashlib.sha256(kind + self.picture.tobytes()).hexdigest()[:32]


_Source: TypeAlias = str | Path | Image.Image | Photo
Photos: TypeAlias = _Source | Sequence[_Source]
"""Photos of one person: a file, a folder of files, a PIL image, a `Photo`, or a sequence of these."""


@dataclass(frozen=True)
class Note:
    """The caption, landmarks and corners that a line of metadata.jsonl gives a photo."""

    caption: str | None = None
    landmarks: Landmarks | None = None
    corners: Corners | None = None


def printable(text: str) -> str:
    """Escapes bytes of a file name that are not UTF-8: no report can hold Python's lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_faces(folder: Path) -> dict[str, tuple[Photo, ...]]:
    """Reads a folder of many people; returns identity → its photos, both sorted by name.

    In `folder/identity/*.png`, each subfolder is an identity. In a folder of photos alone, as CelebA is, each
    photo is an identity named by the file's stem. Captions come from `photo.txt` beside the photo, or from a
    `metadata.jsonl` in folder or subfolder: `{"file_name": …, "text": …, "landmarks": [[x, y], …]}`, the last
    two optional. Hidden names and subfolders without photos are ignored.
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
        advice = f"move {loose[0].name} into one of them"
        raise InputError(f"{folder}: photos lie beside people's folders; {advice}")
    for path in loose:
        people.setdefault(printable(path.stem), []).append(path)
    if not people:
        raise InputError(f"{folder}: no photo found; expected {folder.name}/PERSON/*.jpg ({_KINDS})")
    return {name: _label(paths, name, notes) for name, paths in sorted(people.items())}


def read_person(photos: Photos) -> tuple[Photo, ...]:
    """Reads the photos of one person, named after the first file or folder; a repeated file counts once.

    They keep the given order; those of a folder are sorted by name.
    """
    given: Any = photos  # callers without types pass anything
    sources: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    if not sources:
        raise InputError("no photo given; expected a photo of the person, or a folder of photos")
    if strange := [one for one in sources if not isinstance(one, str | Path | Image.Image | Photo)]:
        raise InputError(f"photo: expected a path or a PIL image, got {type(strange[0]).__name__}")
    found: dict[Path, Photo] = {}
    identity = _person_name(sources[0]) or "person"
    for number, source in enumerate(sources, start=1):
        if isinstance(source, Image.Image):
            name = Path(f"picture {number}")
            found[name] = Photo(name, identity, None, picture=source)
        elif isinstance(source, Photo):
            found[Path(f"photo {number}")] = source
        else:
            for photo in _files_of(Path(source), identity):
                found.setdefault(photo.path.resolve(), photo)
    return tuple(found.values())


def _person_name(first: _Source) -> str:
    if isinstance(first, Image.Image):
        return ""
    if isinstance(first, Photo):
        return first.identity
    resolved = Path(first).resolve()
    return printable(resolved.stem if resolved.is_file() else resolved.name)


def _files_of(path: Path, identity: str) -> tuple[Photo, ...]:
    """Returns the photo at a path, or the photos directly in a folder."""
    if path.is_file():
        return _label([path], identity, _metadata(path.parent))
    _check_folder(path)
    inside = _photos(path)
    if not inside:
        raise InputError(f"{path}: no photo found; expected the photos of one person ({_KINDS}) right in it")
    return _label(inside, identity, _metadata(path))


def photo_hash(path: Path) -> str:
    """Returns 32 hex digits of the file's content, whatever its name and date."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise InputError(f"{path}: cannot read the photo ({error.strerror})") from None


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise InputError(f"{folder}: no such photo or folder of photos")
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of photos, found a file")


def _children(folder: Path) -> list[Path]:
    """Returns a folder's entries sorted by name, without hidden ones."""
    try:
        return sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda path: path.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot read the folder ({error.strerror})") from None


def _photos(folder: Path) -> list[Path]:
    """Returns the photos directly in a folder; nothing deeper, so a symlink that leads back is harmless."""
    named = [path for path in _children(folder) if path.suffix.lower() in EXTENSIONS | UNREAD]
    files = [path for path in named if path.name != SHEET and path.is_file()]
    stems = {path.stem for path in files if path.suffix.lower() in EXTENSIONS}
    return [path for path in files if path.suffix.lower() in EXTENSIONS or path.stem not in stems]


def _label(paths: Iterable[Path], identity: str, notes: dict[Path, Note]) -> tuple[Photo, ...]:
    """Adds captions and landmarks; a text file beside the photo takes precedence over metadata.jsonl."""
    photos: list[Photo] = []
    for path in paths:
        note, words = notes.get(path, Note()), " ".join(_read(path.with_suffix(".txt")).split())
        photos.append(Photo(path, identity, words or note.caption, note.landmarks, corners=note.corners))
    return tuple(photos)


def _read(path: Path) -> str:
    """Returns the text of a file; none if there is no file."""
    try:
        return path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected captions as UTF-8 text ({error})") from None


def _metadata(folder: Path) -> dict[Path, Note]:
    """Reads a folder's `metadata.jsonl`, a format of Hugging Face's image folders."""
    file = folder / "metadata.jsonl"
    notes: dict[Path, Note] = {}
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            given = entry.get("text"), entry.get("landmarks"), entry.get("corners")
            notes[folder / entry["file_name"]] = note_of(*given)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            expected = 'expected {"file_name": …, "text": …, "landmarks": five [x, y] or none}'
            raise InputError(f"{file}: line {number}: {expected}, got {line[:60]}") from None
    return notes


def note_of(text: object, landmarks: object, corners: object = None) -> Note:
    """Returns a caption as one line, landmarks and corners as pairs, None for what is missing.

    Raises:
        ValueError: no five pairs of numbers, or a caption with half a character, which JSON can spell.
    """
    words = " ".join(str(text).split()) if text else ""
    words.encode()
    points = None if landmarks is None else as_landmarks(landmarks)
    return Note(words or None, points, None if corners is None else as_corners(corners))
