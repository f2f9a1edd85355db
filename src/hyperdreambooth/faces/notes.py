"""Captions and landmarks beside photos: text files and metadata files, each brought to the photos it is for.

A note that cannot be read stops no other: its photo is refused, and a note for no photo is listed as unused.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from hyperdreambooth.faces.frame import Corners, as_corners
from hyperdreambooth.faces.landmarks import Landmarks, as_landmarks
from hyperdreambooth.files import decode_text

MAX_CAPTION = 2**16  # bytes; a text encoder reads a few hundred words at most
TEXTS = (".txt", ".caption")  # in order of precedence
METADATA = ("metadata.jsonl", "metadata.csv")  # as Hugging Face's image folders have them
CAPTIONS = ("text", "caption", "prompt")
_EXPECTED = 'expected {"file_name": …, "text": …, "landmarks": five [x, y] or none}'


@dataclass(frozen=True)
class Note:
    """The caption and landmarks of a photo, and the corners of the true photo in a padded crop."""

    caption: str | None = None
    landmarks: Landmarks | None = None
    corners: Corners | None = None


class Unused(NamedTuple):
    """Something in a photo folder that is not used, and why."""

    name: str
    reason: str


@dataclass
class Notes:
    """What is noted about some photos.

    Attributes:
        known: photo → its caption and landmarks.
        refused: photo → why a note about it cannot be read.
        unused: notes for no photo, and notes that another one replaces.
    """

    known: dict[Path, Note] = field(default_factory=dict[Path, Note])
    refused: dict[Path, str] = field(default_factory=dict[Path, str])
    unused: list[Unused] = field(default_factory=list[Unused])


def printable(text: str) -> str:
    """Escapes bytes of a file name that are not UTF-8: no report can hold Python's lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


def folded(name: str) -> str:
    """Returns a name as the file systems of Windows and macOS compare it."""
    return unicodedata.normalize("NFC", name).casefold()


def note_of(text: object, landmarks: object, corners: object = None) -> Note:
    """Returns a caption as one line, landmarks and corners as pairs, None for what is missing.

    Raises:
        ValueError: no five pairs of numbers, or a caption with characters that no text has.
    """
    words = " ".join(str(text).split()) if text else ""
    if any(letter in "\0\ufffd" or "\ud800" <= letter <= "\udfff" for letter in words):  # JSON spells halves
        raise ValueError("the caption has characters that no text has; save it as UTF-8")
    points = None if landmarks is None else as_landmarks(landmarks)
    return Note(words or None, points, None if corners is None else as_corners(corners))


def pick(fields: Mapping[str, Any], usual: Iterable[str], asked: str | None = None) -> Any:
    """Returns the value of the key asked for, or else of the first usual key that is present."""
    keys = (asked,) if asked else usual
    return next((fields[key] for key in keys if fields.get(key) is not None), None)


class _Found(NamedTuple):
    """A note as it was found: the photos it is for, and its content or why that cannot be read."""

    file: Path
    line: int | None
    photos: Sequence[Path]
    note: Note | ValueError


def read_notes(photos: Sequence[Path], folders: Sequence[Path], whole: Collection[Path]) -> Notes:
    """Reads what is noted about photos.

    Of two notes for one photo, the first counts: text files beside the photo (`photo.txt`, `photo.jpg.txt`,
    `photo.caption`), then metadata in the order of `folders`, `metadata.jsonl` before `metadata.csv`, and the
    first entry before others. A caption and landmarks may come from different notes.

    Args:
        photos: the photos, in any of the folders.
        folders: where notes are looked for.
        whole: the folders all of whose photos are given, so that a note for any other photo is for none.
    """
    notes = Notes()
    homes: dict[Path, list[Path]] = {folder: [] for folder in whole}
    for photo in photos:
        homes.setdefault(photo.parent, []).append(photo)
    found = [one for folder, inside in homes.items() for one in _texts(folder, inside)]
    for folder in folders:
        for file in _metadata(folder):
            found += _entries(file, _Names.of(photos, folder), notes.unused)
    for one in found:
        where = printable(f"{one.file}: line {one.line}" if one.line else str(one.file))
        if not one.photos and one.file.parent in whole:
            notes.unused.append(Unused(where, "there is no photo of this name here"))
        for photo in one.photos:
            _take(notes, photo, one, where)
    return notes


def _take(notes: Notes, photo: Path, found: _Found, where: str) -> None:
    """Adds what a note has to what is known of a photo."""
    if isinstance(found.note, ValueError):
        short = f"{found.file.name}: line {found.line}" if found.line else found.file.name
        notes.refused.setdefault(photo, printable(f"{short}: {found.note}"))
        return
    known, new = notes.known.get(photo, Note()), found.note
    for name in ("caption", "landmarks", "corners"):
        old, value = getattr(known, name), getattr(new, name)
        if old is None and value is not None:
            known = replace(known, **{name: value})
        elif value not in (None, old):
            reason = f"{photo.name} has another {name.removesuffix('s')} entry, which takes precedence"
            notes.unused.append(Unused(where, printable(reason)))
    notes.known[photo] = known


def _files(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """Returns a folder's visible files of a kind; none if it cannot be read, as a parent may not be."""
    try:
        return [path for path in folder.iterdir() if path.name[0] != "." and wanted(path) and path.is_file()]
    except OSError:
        return []


def _metadata(folder: Path) -> list[Path]:
    """Returns the metadata files of a folder, whatever the case of their names, in order of precedence."""
    files = _files(folder, lambda path: folded(path.name) in METADATA)
    return sorted(files, key=lambda path: (METADATA.index(folded(path.name)), path.name))


def _texts(folder: Path, photos: Sequence[Path]) -> Generator[_Found]:
    """Yields the text files of a folder in order of precedence."""
    names = _Names()
    for photo in photos:
        names.add(photo.stem, photo)
        names.add(photo.name, photo)
    files = _files(folder, lambda path: path.suffix.lower() in TEXTS)
    files.sort(key=lambda path: (TEXTS.index(path.suffix.lower()), len(path.name), path.name))
    for file in files:
        owners = names.get(file.stem)
        yield _Found(file, None, owners, _caption(file) if owners else Note())


def _caption(file: Path) -> Note | ValueError:
    try:
        if (size := file.stat().st_size) > MAX_CAPTION:
            return ValueError(f"expected a caption of at most {MAX_CAPTION:,} bytes, got {size:,}")
        return note_of(decode_text(file.read_bytes()), None)
    except OSError as error:
        return ValueError(f"cannot read the caption ({error.strerror})")
    except ValueError as error:
        return ValueError(f"expected a caption as text, in UTF-8 for example ({error})")


class _Names:
    """Photos by the names that notes may call them: exactly, or as other systems compare names."""

    def __init__(self) -> None:
        self._exact: dict[str, list[Path]] = {}
        self._folded: dict[str, list[Path]] = {}

    @staticmethod
    def of(photos: Iterable[Path], folder: Path) -> _Names:
        """Returns photos by their paths from a folder."""
        names = _Names()
        for photo in photos:
            if photo.is_relative_to(folder):
                names.add(photo.relative_to(folder).as_posix(), photo)
        return names

    def add(self, name: str, photo: Path) -> None:
        """Adds a photo's name."""
        self._exact.setdefault(name, []).append(photo)
        self._folded.setdefault(folded(name), []).append(photo)

    def get(self, name: str) -> Sequence[Path]:
        """Returns the photos of exactly this name, or else of this name in another spelling."""
        return self._exact.get(name) or self._folded.get(folded(name), ())

    def listed(self, name: str) -> Sequence[Path]:
        """Returns the photo that metadata names: with `/` or `\\`, and from any folder if it is absolute."""
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        absolute = name[:1] in ("/", "\\") or re.match(r"[A-Za-z]:[/\\]", name)
        tails = ("/".join(parts[at:]) for at in range(len(parts) if absolute else 1))
        found = next(filter(None, map(self.get, (name, *tails))), ())
        return found if len(found) == 1 else ()


def _entries(file: Path, names: _Names, unused: list[Unused]) -> Generator[_Found]:
    """Yields the entries of a metadata file; what is no entry is listed as unused."""
    try:
        text = decode_text(file.read_bytes(), "replace")
        rows = _table(text) if file.suffix.lower() == ".csv" else _lines(text)
        for number, entry in rows:
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if not isinstance(name, str) or not name:
                unused.append(Unused(printable(f"{file}: line {number}"), _EXPECTED))
                continue
            try:
                points = [_points(entry.get(key)) for key in ("landmarks", "corners")]
                note: Note | ValueError = note_of(pick(entry, CAPTIONS), *points)
            except (ValueError, RecursionError) as error:
                note = ValueError(str(error) or _EXPECTED)
            yield _Found(file, number, names.listed(name), note)
    except (OSError, csv.Error) as error:
        unused.append(Unused(printable(str(file)), f"cannot be read ({error})"))


def _lines(text: str) -> Generator[tuple[int, Any]]:
    """Yields the objects of JSON lines with their numbers; None for a line that is not JSON."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _table(text: str) -> Generator[tuple[int, Any]]:
    """Yields the rows of a table as Hugging Face writes it, or as spreadsheets of other countries do."""
    header = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count))
    if "file_name" not in (rows.fieldnames or ()):
        yield 1, None
        return
    for row in rows:
        yield rows.line_num, {key: value or None for key, value in row.items() if isinstance(key, str)}


def _points(value: Any) -> Any:
    """Returns points as JSON has them; a table holds JSON in a cell."""
    return json.loads(value) if isinstance(value, str) else value
