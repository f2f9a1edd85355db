"""Pictures in a grid with labels: the demo's picture, the contact sheet and the evaluation's sheets."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

PAPER, INK, QUIET, EMPTY = (252, 251, 248), (28, 30, 36), (104, 108, 118), (226, 224, 218)
MARK = (255, 214, 10)
LABEL, SMALL = 18, 13  # font sizes in pixels
LABEL_WIDTH = 132  # pixels of the column of row labels
CAPTION_LINES = 7  # longer captions are cut

_NO_LETTER = "\U0010ffff"  # drawn as the box that stands for every missing letter
_SPELLED = {"×": "x", "–": "-", "−": "-", "→": "->", "ß": "ss"}
Line = tuple[str, int]  # a line of text and its font size


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    cell: int,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
    gap: int = 10,
    margin: int = 24,
) -> Image.Image:
    """Draws pictures in rows and columns.

    Args:
        rows: the pictures of each row; rows may differ in length. A grey square stands for None.
        cell: the side of a cell in pixels; pictures are cropped to the centre square and resized to it.
        row_labels: a text to the left of each row. After a line break it goes on in small grey letters.
        column_labels: a text above each column.
        captions: a text below each picture, in the layout of `rows`.
        title: a text above everything.
        gap, margin: pixels between cells and around the grid.

    Returns:
        An RGB image on a light ground. The rows of cells end at its bottom margin.
    """
    heads = [wrap(text, LABEL, cell) for text in column_labels]
    below = [[wrap(text, SMALL, cell)[:CAPTION_LINES] for text in line] for line in captions]
    pitch = cell + gap + _height(max((text for line in below for text in line), key=len, default=[]))
    left = margin + (LABEL_WIDTH + gap if row_labels else 0)
    above = margin + (2 * LABEL if title else 0)
    top = above + (max(map(_height, heads)) + gap // 2 if heads else 0)
    width = left + max(map(len, rows), default=0) * (cell + gap) - gap + margin
    height = top + len(rows) * pitch - gap * bool(rows) + margin
    titled = 2 * margin + math.ceil(font(LABEL).getlength(drawn(title)))
    sheet = Image.new("RGB", (max(width, titled), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, above - LABEL), drawn(title), INK, font(LABEL), anchor="ls")
    for column, lines in enumerate(heads):
        x, y = left + column * (cell + gap) + cell // 2, top - gap // 2 - _height(lines)
        _write(draw, lines, (x, y), "ma")
    for row, label in enumerate(row_labels):
        _write_label(draw, label, (left - gap, top + row * pitch + cell // 2))
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            x, y = left + column * (cell + gap), top + row * pitch
            sheet.paste(fit(picture, cell) if picture else EMPTY, (x, y, x + cell, y + cell))
            if below:
                _write(draw, below[row][column], (x, y + cell + 2), "la")
    return sheet


def fit(picture: Image.Image, side: int) -> Image.Image:
    """Crops a picture to its centre square and resizes it to `side` pixels."""
    return ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def mark(picture: Image.Image, points: Sequence[tuple[float, float]]) -> None:
    """Draws dots onto a picture, bright with a dark rim, so that they are seen on any skin."""
    draw, radius = ImageDraw.Draw(picture), max(2.0, picture.width / 64)
    for x, y in points:
        place = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(place, fill=MARK, outline=INK, width=max(1, round(radius / 3)))


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that no font file is needed."""
    return ImageFont.load_default(size=size)


def _shape(letter: str) -> bytes:
    picture = Image.new("L", (2 * LABEL, 2 * LABEL))
    ImageDraw.Draw(picture).text((0, 0), letter, 255, font(LABEL))
    return picture.tobytes()


@cache
def _drawn(letter: str) -> str:
    """Returns what Pillow's font can draw for a letter: itself, the letter without its accents, or `?`."""
    if letter.isspace() or letter.isascii():
        return letter
    if letter in _SPELLED:
        return _SPELLED[letter]
    if _shape(letter) != _shape(_NO_LETTER):
        return letter
    plain = "".join(part for part in unicodedata.normalize("NFKD", letter) if part.isascii())
    return plain or ("" if unicodedata.combining(letter) else "?")


def drawn(text: str) -> str:
    """Returns a text without the letters that Pillow's font lacks and would draw as boxes."""
    return "".join(map(_drawn, text))


def wrap(text: str, size: int, width: int) -> list[Line]:
    """Breaks a text into lines of at most `width` pixels; a longer word loses its middle."""
    lines: list[str] = []
    for word in drawn(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_shortened(word, size, width))
    return [(line, size) for line in lines]


def _shortened(word: str, size: int, width: int) -> str:
    while len(word) > 3 and font(size).getlength(word) > width:
        half = (len(word) - 2) // 2
        word = f"{word[:half]}…{word[len(word) - half :]}"
    return word


def _height(lines: Sequence[Line]) -> int:
    return sum(size + 4 for _, size in lines)


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[Line], start: tuple[int, int], anchor: str) -> None:
    """Writes lines downwards; large letters are dark and small ones grey."""
    x, y = start
    for text, size in lines:
        draw.text((x, y), text, INK if size == LABEL else QUIET, font(size), anchor=anchor)
        y += size + 4


def _write_label(draw: ImageDraw.ImageDraw, label: str, right_middle: tuple[int, int]) -> None:
    """Writes a row's label flush right, centred on the row."""
    name, *notes = label.split("\n")
    lines = wrap(name, LABEL, LABEL_WIDTH)
    lines += [line for note in notes for line in wrap(note, SMALL, LABEL_WIDTH)]
    x, y = right_middle
    _write(draw, lines, (x, y - _height(lines) // 2), "ra")
