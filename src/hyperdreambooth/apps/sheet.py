"""The contact sheet of `prepare`: crops that were kept, photos that were dropped, and the reasons."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from hyperdreambooth.apps.picture import INK, PAPER, QUIET, break_lines, fit, font_of
from hyperdreambooth.faces.journal import Record

CELL, GAP, MARGIN, HEAD, COLUMNS, MOST = 144, 12, 24, 40, 8, 64
TEXT, LEADING = 13, 16
NAME_LINES, WHY_LINES = 1, 7
VOID = (226, 224, 218)


def contact_sheet(out: Path, records: Sequence[Record]) -> Image.Image:
    """Draws what became of the photos.

    Args:
        out: the folder of the crops.
        records: of all photos; the first 64 of either kind are shown.

    Returns:
        An RGB picture.
    """
    kept, dropped = ([one for one in records if one.kept is kind] for kind in (True, False))
    parts = [
        _part(f"kept {len(kept):,}", [(_open(out, one), one.name) for one in kept[:MOST]], NAME_LINES),
        _part(f"dropped {len(dropped):,}", [(_thumb(one), _why(one)) for one in dropped[:MOST]], WHY_LINES),
    ]
    sheet = Image.new("RGB", (parts[0].width, sum(part.height for part in parts) + MARGIN), PAPER)
    sheet.paste(parts[0], (0, 0))
    sheet.paste(parts[1], (0, parts[0].height))
    return sheet


def _part(title: str, cells: Sequence[tuple[Image.Image | None, str]], rows_of_text: int) -> Image.Image:
    """A heading over cells with their texts."""
    pitch = CELL + rows_of_text * LEADING + GAP
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (2 * MARGIN + COLUMNS * (CELL + GAP) - GAP, MARGIN + HEAD + rows * pitch), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, font_of(20))
    for k, (picture, text) in enumerate(cells):
        x, y = MARGIN + k % COLUMNS * (CELL + GAP), MARGIN + HEAD + k // COLUMNS * pitch
        sheet.paste(fit(picture, CELL) if picture else Image.new("RGB", (CELL, CELL), VOID), (x, y))
        for row, line in enumerate(break_lines(draw, text, font_of(TEXT), CELL)[:rows_of_text]):
            draw.text((x, y + CELL + 2 + row * LEADING), _cut(draw, line), QUIET, font_of(TEXT))
    return sheet


def _cut(draw: ImageDraw.ImageDraw, text: str) -> str:
    """A word longer than its cell loses its middle."""
    while len(text) > 3 and draw.textlength(text, font_of(TEXT)) > CELL:
        half = (len(text) - 2) // 2
        text = f"{text[:half]}…{text[len(text) - half :]}"
    return text


def _why(record: Record) -> str:
    """Name and reason, without the folders that all photos share."""
    return f"{Path(record.photo).name}: {record.reason}"


def _open(out: Path, record: Record) -> Image.Image | None:
    with Image.open(out / f"{record.name}.png") as image:
        image.draft("RGB", (CELL, CELL))
        return image.convert("RGB")


def _thumb(record: Record) -> Image.Image | None:
    """The small picture that the journal keeps of a dropped photo."""
    if not record.thumb:
        return None
    return Image.open(io.BytesIO(base64.b64decode(record.thumb))).convert("RGB")
