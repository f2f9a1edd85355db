"""The contact sheet of `prepare`: the crops, the photos that were dropped, and why."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hyperdreambooth.faces.journal import Record
from hyperdreambooth.grid import PAPER, grid

CELL, COLUMNS, MOST = 144, 8, 64


def contact_sheet(out: Path, records: Sequence[Record]) -> Image.Image:
    """Draws what became of the photos: the first crops in the folder, and the first dropped photos."""
    kept, dropped = ([one for one in records if one.kept is kind] for kind in (True, False))
    crops = [(_crop(out / f"{one.name}.png"), one.name) for one in kept[:MOST]]
    thumbs = [(_thumb(one), f"{Path(one.photo).name}: {one.reason}") for one in dropped[:MOST]]
    parts = [_part(f"kept: {len(kept):,}", crops), _part(f"dropped: {len(dropped):,}", thumbs)]
    width = max(COLUMNS * CELL, *(part.width for part in parts))  # room for the titles of a few photos
    sheet = Image.new("RGB", (width, sum(part.height for part in parts)), PAPER)
    sheet.paste(parts[0], (0, 0))
    sheet.paste(parts[1], (0, parts[0].height))
    return sheet


def _part(title: str, cells: Sequence[tuple[Image.Image | None, str]]) -> Image.Image:
    lines = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    pictures = [[picture for picture, _ in line] for line in lines]
    captions = [[caption for _, caption in line] for line in lines]
    return grid(pictures, cell=CELL, captions=captions, title=title)


def _crop(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _thumb(record: Record) -> Image.Image | None:
    """The small picture that the journal keeps of a dropped photo."""
    return Image.open(io.BytesIO(base64.b64decode(record.thumb))) if record.thumb else None
