"""Reading folders of photos: who is on which photo, and what is noted about it. No picture is opened here."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from hyperdreambooth.faces.frame import Corners
from hyperdreambooth.faces.image import KINDS, open_photo, to_rgb
from hyperdreambooth.faces.landmarks import Landmarks
from hyperdreambooth.faces.notes import METADATA, TEXTS, Note, Notes, Unused, folded, printable, read_notes
from hyperdreambooth.files import InputError

SHEET = "contact-sheet.png"  # written by `prepare`; not a photo of anybody
PHONES = frozenset({".heic", ".heif", ".hif", ".avif"})
"""Formats of phones. Such a photo is passed over where a converted one lies beside it."""
EXTENSIONS = PHONES | {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".webp",
    ".bmp", ".dib", ".tif", ".tiff", ".gif",
}  # fmt: skip
UNREAD = frozenset({
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".jxl", ".jp2", ".psd", ".svg", ".tga",
})  # fmt: skip
"""Pictures that are not read: raw photos of cameras, and what few tools write."""
# what `prepare` and computers put into folders of photos themselves
_OWN = {
    SHEET,
    "report.json",
    "config.json",
    "environment.json",
    "log.jsonl",
    "events.jsonl",
    "thumbs.db",
    "desktop.ini",
}
_NAMED = 3  # notes that a warning names; `prepare` reports all


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
        """Returns 32 hex digits of the file's content, or of a picture in memory as it is opened."""
        if self.picture is None:
            return photo_hash(self.path)
        opened = self.open()  # two pictures of the same pixels may differ in profile or orientation
        return hashlib.sha256(repr((opened.mode, opened.size)).encode() + opened.tobytes()).hexdigest()[:32]


_Source: TypeAlias = str | Path | Image.Image | Photo
Photos: TypeAlias = _Source | Sequence[_Source]
"""Photos of one person: a file, a folder of files, a PIL image, a `Photo`, or a sequence of these."""


@dataclass(frozen=True)
class Album:
    """All that lies in a folder of photos.

    Attributes:
        people: identity → its photos, both sorted by name.
        refused: photo → why its caption or landmarks cannot be read. They are still in `people`; `usable`
            leaves them out.
        unused: notes for no photo, notes that another one replaces, and pictures that are not read.
        others: everything else that is not read.
    """

    people: dict[str, tuple[Photo, ...]]
    refused: dict[Path, str]
    unused: tuple[Unused, ...] = ()
    others: tuple[Unused, ...] = ()

    def usable(self) -> dict[str, tuple[Photo, ...]]:
        """Returns the people without refused photos; warns of these and of unused notes.

        Raises:
            InputError: every photo is refused.
        """
        kept = {
            name: left
            for name, photos in self.people.items()
            if (left := tuple(photo for photo in photos if photo.path not in self.refused))
        }
        lost = [f"{printable(str(path))}: {reason}" for path, reason in self.refused.items()]
        if not kept:
            raise InputError(lost[0])
        lost += [f"{name}: {reason}" for name, reason in self.unused]
        if lost:
            more = f"; {len(lost) - _NAMED} more, which hdb prepare lists" if len(lost) > _NAMED else ""
            warnings.warn(f"not used: {'; '.join(lost[:_NAMED])}{more}", stacklevel=3)
        return kept


def read_album(folder: Path) -> Album:
    """Reads a folder of many people, see `read_faces`, with the reasons for all that is left out.

    Raises:
        InputError: there is no photo, or photos lie beside people's folders.
    """
    _check_folder(folder)
    loose, inner = _photos(folder), {path: _photos(path) for path in _children(folder) if path.is_dir()}
    homes = {path: photos for path, photos in inner.items() if photos}
    if loose and homes:
        advice = f"move {loose[0].name} into one of them"
        raise InputError(f"{folder}: photos lie beside people's folders; {advice}")
    if not loose and not homes:
        raise InputError(f"{folder}: no photo found; expected {folder.name}/PERSON/*.jpg ({KINDS})")
    people: dict[str, list[Path]] = {printable(path.name): photos for path, photos in homes.items()}
    for path in loose:
        people.setdefault(printable(path.stem), []).append(path)
    notes = _notes([path for photos in people.values() for path in photos], [*homes, folder])
    empty = [Unused(printable(str(path)), "no photo lies in it") for path in inner if path not in homes]
    left = [*_left(folder), *empty, *(one for path in homes for one in [*_left(path), *_deeper(path)])]
    return _album({name: _label(photos, name, notes) for name, photos in sorted(people.items())}, notes, left)


def _notes(photos: Sequence[Path], whole: Sequence[Path]) -> Notes:
    """Reads the notes about photos: those beside them, and metadata one folder above."""
    homes = dict.fromkeys([*(photo.parent for photo in photos), *whole])
    above = dict.fromkeys(home.parent for home in homes)
    return read_notes(photos, [*dict.fromkeys([*homes, *above])], frozenset(whole))


def _album(people: dict[str, tuple[Photo, ...]], notes: Notes, left: Iterable[Unused]) -> Album:
    """Sorts what is left out into pictures and everything else."""
    pictures, others = [], list[Unused]()
    for one in left:
        (pictures if Path(one.name).suffix.lower() in UNREAD else others).append(one)
    return Album(people, notes.refused, (*notes.unused, *pictures), tuple(others))


def read_faces(folder: Path) -> dict[str, tuple[Photo, ...]]:
    """Reads a folder of many people; returns identity → its photos, both sorted by name.

    In `folder/identity/*.png`, each subfolder is an identity. In a folder of photos alone, as CelebA is, each
    photo is an identity named by the file's stem. Captions come from `photo.txt` beside the photo, or from a
    `metadata.jsonl` in folder or subfolder: `{"file_name": …, "text": …, "landmarks": [[x, y], …]}`, the last
    two optional; `read_notes` lists every form. A photo whose caption or landmarks cannot be read is left out
    with a warning. Hidden names and subfolders without photos are ignored.
    """
    return read_album(folder).usable()


def holds_people(folder: Path) -> bool:
    """Returns whether a folder has sub-folders with photos, and no photo right in it."""
    if not folder.is_dir() or _photos(folder):
        return False
    return any(child.is_dir() and _photos(child) for child in _children(folder))


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
            for photo in person_album(Path(source), identity).usable()[identity]:
                found.setdefault(photo.path.resolve(), photo)
    return tuple(found.values())


def _person_name(first: _Source) -> str:
    if isinstance(first, Image.Image):
        return ""
    if isinstance(first, Photo):
        return first.identity
    resolved = Path(first).resolve()
    return printable(resolved.stem if resolved.is_file() else resolved.name)


def person_album(path: Path, identity: str) -> Album:
    """Reads one photo, or the photos directly in a folder, as one person's."""
    if path.is_file():
        photos, whole, left = [path], [], []
    else:
        _check_folder(path)
        photos, whole, left = _photos(path), [path], [*_left(path), *_deeper(path)]
    if not photos:
        raise InputError(f"{path}: no photo found; expected the photos of one person ({KINDS}) right in it")
    notes = _notes(photos, whole)
    return _album({identity: _label(photos, identity, notes)}, notes, left)


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
    found = [path for path in _children(folder) if path.suffix.lower() in EXTENSIONS]
    files = [path for path in found if path.name != SHEET and path.is_file()]
    stems = {folded(path.stem) for path in files if path.suffix.lower() not in PHONES}
    return [path for path in files if path.suffix.lower() not in PHONES or folded(path.stem) not in stems]


def _left(folder: Path) -> list[Unused]:
    """Returns the files of a folder that are neither photos nor notes, with the reasons."""
    photos = set(_photos(folder))
    return [
        Unused(printable(str(path)), _reason(path))
        for path in _children(folder)
        if path not in photos
        and not path.is_dir()
        and path.name.lower() not in {*_OWN, *METADATA}
        and path.suffix.lower() not in TEXTS
    ]


def _reason(path: Path) -> str:
    """Returns why a file is not read as a photo."""
    if not path.is_file():
        return "a link that leads to no file"
    if path.suffix.lower() in PHONES:
        return "a converted copy beside it is read"
    if path.suffix.lower() in UNREAD:
        return "this kind of picture is not read; convert it to JPEG or PNG"
    return f"not a photo ({KINDS})"


def _deeper(folder: Path) -> list[Unused]:
    """Returns the folders inside a person's folder."""
    reason = "folders inside a person's folder are not read"
    return [Unused(printable(str(path)), reason) for path in _children(folder) if path.is_dir()]


def _label(paths: Iterable[Path], identity: str, notes: Notes) -> tuple[Photo, ...]:
    """Makes photos of files, with their captions and landmarks."""
    known = ((path, notes.known.get(path, Note())) for path in paths)
    return tuple(
        Photo(path, identity, note.caption, note.landmarks, corners=note.corners) for path, note in known
    )
