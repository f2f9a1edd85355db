"""One picture of a personalization: the photo on the left, a table of stages × prompts on the right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from hyperdreambooth.grid import INK, LABEL, PAPER, fit, font, grid

CELL, GAP, MARGIN = 192, 10, 28


def table(
    photo: Image.Image, prompts: Sequence[str], rows: Mapping[str, Sequence[Image.Image]]
) -> Image.Image:
    """Draws the photo beside the pictures that were generated from it: label of a row → one a prompt."""
    heads = [shorten(prompt) for prompt in prompts]
    pictures, labels = [*rows.values()], [*rows]
    right = grid(pictures, cell=CELL, row_labels=labels, column_labels=heads, gap=GAP, margin=MARGIN)
    cells = len(rows) * (CELL + GAP) - GAP
    side = min(2 * CELL, cells)
    sheet = Image.new("RGB", (MARGIN + side + right.width, right.height), PAPER)
    sheet.paste(right, (MARGIN + side, 0))
    top = sheet.height - MARGIN - (cells + side) // 2
    sheet.paste(fit(photo, side), (MARGIN, top))
    middle = (MARGIN + side // 2, top - GAP)
    ImageDraw.Draw(sheet).text(middle, "the photo that was given", INK, font(LABEL), anchor="ms")
    return sheet


def shorten(prompt: str) -> str:
    """Drops the words that every prompt has: `a photo of a [V] face, sad` → `sad`."""
    short = re.sub(r"(a photo )?(of )?an? \[V\] ?\w*", ",", prompt)
    parts = [part.strip() for part in short.split(",")]
    return ", ".join(part for part in parts if part) or prompt
