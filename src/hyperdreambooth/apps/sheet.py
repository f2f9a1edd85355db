"""The contact sheet of `prepare`: the crops, the photos that were dropped, and why."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from hyperdreambooth.faces.journal import Record
from hyperdreambooth.grid import EMPTY, PAPER, fit, grid, mark

CELL, COLUMNS, MOST = 144, 8, 64


def contact_sheet(out: Path, records: Sequence[Record], check: Mapping[str, Any]) -> Image.Image:
    """Draws what became of the photos: the first crops in the folder, and the first dropped photos.

    Crops that somebody should look at come first. Dots are the landmarks.
    """
    kept, dropped = ([one for one in records if one.kept is kind] for kind in (True, False))
    notes = _notes(check)
    kept.sort(key=lambda one: not any(note.endswith("?") for note in notes.get(one.name, ())))
    crops = [(_crop(out, one), _caption(one, notes)) for one in kept[:MOST]]
    thumbs = [(_thumb(one), f"{Path(one.photo).name}: {one.reason}") for one in dropped[:MOST]]
    parts = [_part(f"kept: {len(kept):,}", crops), _part(f"dropped: {len(dropped):,}", thumbs)]
    width = max(COLUMNS * CELL, *(part.width for part in parts))  # room for the titles of a few photos
    sheet = Image.new("RGB", (width, sum(part.height for part in parts)), PAPER)
    sheet.paste(parts[0], (0, 0))
    sheet.paste(parts[1], (0, parts[0].height))
    return sheet


def _notes(check: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns crop → what the check found; what a person should look at ends in a question mark."""
    notes: dict[str, list[str]] = {}
    for one in check["strangers"]:
        notes.setdefault(one["crop"], []).append("somebody else?")
    for names in check["duplicates"]:
        for name in names[1:]:
            notes.setdefault(name, []).append(f"same photo as {names[0]}?")
    for name in check["references"].values():
        notes.setdefault(name, []).append("best reference")
    return notes


def _caption(one: Record, notes: Mapping[str, Sequence[str]]) -> str:
    padded = [f"padded {one.padded:.0%}"] if one.padded >= 0.005 else []
    return ", ".join([one.name, *padded, *notes.get(one.name, ())])


def _part(title: str, cells: Sequence[tuple[Image.Image | None, str]]) -> Image.Image:
    lines = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    pictures = [[picture for picture, _ in line] for line in lines]
    captions = [[caption for _, caption in line] for line in lines]
    return grid(pictures, cell=CELL, captions=captions, title=title)


def _crop(out: Path, one: Record) -> Image.Image:
    with Image.open(out / f"{one.name}.png") as image:
        small = fit(image, CELL)
        mark(small, [(x * CELL / image.width, y * CELL / image.width) for x, y in one.landmarks or ()])
    return small


def _thumb(record: Record) -> Image.Image | None:
    """The small picture that the journal keeps of a dropped photo, whole."""
    if not record.thumb:
        return None
    with Image.open(io.BytesIO(base64.b64decode(record.thumb))) as image:
        return ImageOps.pad(image, (CELL, CELL), color=EMPTY)
