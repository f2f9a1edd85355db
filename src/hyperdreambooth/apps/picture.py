"""One picture of a personalization: the photo at the left, a table of prompts × stages at its right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, MARGIN, HEAD, LABEL = 192, 10, 28, 76, 132
PAPER, INK, QUIET = (252, 251, 248), (28, 30, 36), (104, 108, 118)


def table(
    photo: Image.Image,
    heads: Sequence[str],
    rows: Mapping[str, Sequence[Image.Image]],
    notes: Mapping[str, str],
) -> Image.Image:
    """Draws the photo beside its generated pictures.

    Args:
        photo: the reference photo.
        heads: one short text a column.
        rows: row label → its pictures, one a column.
        notes: row label → a quiet second line (its scores); rows without one are left out.

    Returns:
        An RGB picture on a light ground.
    """
    side = min(2 * CELL, len(rows) * CELL + (len(rows) - 1) * GAP)
    left = MARGIN + side + 2 * GAP + LABEL
    width = left + len(heads) * (CELL + GAP) - GAP + MARGIN
    height = MARGIN + HEAD + len(rows) * (CELL + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    _photo(sheet, photo, side, height)
    for column, head in enumerate(heads):
        _centred(sheet, head, left + column * (CELL + GAP), MARGIN, CELL, HEAD - GAP)
    for line, (label, pictures) in enumerate(rows.items()):
        top = MARGIN + HEAD + line * (CELL + GAP)
        _label(sheet, label, notes.get(label, ""), left - LABEL - GAP, top)
        for column, picture in enumerate(pictures):
            sheet.paste(fit(picture, CELL), (left + column * (CELL + GAP), top))
    return sheet


def fit(picture: Image.Image, side: int) -> Image.Image:
    """Square and of the cell's size; small pictures are enlarged smoothly."""
    short = min(picture.size)
    x, y = (picture.width - short) // 2, (picture.height - short) // 2
    return picture.convert("RGB").resize(
        (side, side), Image.Resampling.LANCZOS, box=(x, y, x + short, y + short)
    )


def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _photo(sheet: Image.Image, photo: Image.Image, side: int, height: int) -> None:
    """The reference photo, large, in the middle of the table's height, with a line below it."""
    top = MARGIN + HEAD + (height - 2 * MARGIN - HEAD - side) // 2
    sheet.paste(fit(photo, side), (MARGIN, top))
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN + side // 2, top - 14), "the one photo given", INK, font_of(20), anchor="ms")


def _centred(sheet: Image.Image, text: str, x: int, y: int, width: int, height: int) -> None:
    """Text broken into lines that fit, standing on the foot of its box."""
    font, draw = font_of(18), ImageDraw.Draw(sheet)
    lines = break_lines(draw, text, font, width)
    for row, line in enumerate(reversed(lines)):
        draw.text((x + width // 2, y + height - 4 - 22 * row), line, INK, font, anchor="ms")


def _label(sheet: Image.Image, label: str, note: str, x: int, top: int) -> None:
    """A row's name with its note below, set flush right against the row."""
    draw = ImageDraw.Draw(sheet)
    parts = [(line, INK, 20) for line in break_lines(draw, label, font_of(20), LABEL)]
    parts += [
        (line, QUIET, 15)
        for part in note.split("\n")
        if part
        for line in break_lines(draw, part, font_of(15), LABEL)
    ]
    y = top + CELL // 2 - 12 * (len(parts) - 1)
    for text, colour, size in parts:
        draw.text((x + LABEL, y), text, colour, font_of(size), anchor="rm")
        y += 24


def break_lines(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Words packed greedily into lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
