"""The picture of a personalization, photo and pictures of every stage, and the strip of its looks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from hyperdreambooth.grid import INK, LABEL, PAPER, fit, font, grid

CELL, GAP, MARGIN = 192, 10, 28  # pixels, of the table of pictures
_STRIP_CELL = 128


def table(
    photo: Image.Image,
    prompts: Sequence[str],
    rows: Mapping[str, Sequence[Image.Image]],
    words: str = "the photo that was given",
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
    ImageDraw.Draw(sheet).text(middle, words, INK, font(LABEL), anchor="ms")
    return sheet


def strip(prompts: Sequence[str], rows: Mapping[str, Sequence[Image.Image | None]]) -> Image.Image:
    """Draws the looks at a training, one below the other: label of a look → its pictures, one a prompt."""
    heads = [shorten(prompt) for prompt in prompts]
    return grid([*rows.values()], cell=_STRIP_CELL, row_labels=[*rows], column_labels=heads, gap=GAP)


def labelled(label: str, scores: Mapping[str, float | None]) -> str:
    """Returns a row's label with the scores below it, a line each."""
    notes = [f"{score} {value:.2f}" for score, value in scores.items() if value is not None]
    return "\n".join([label, *notes])


def shorten(prompt: str) -> str:
    """Drops the words that every prompt has: `a photo of a [V] face, sad` → `sad`."""
    short = re.sub(r"(a photo )?(of )?an? \[V\] ?\w*", ",", prompt)
    parts = [part.strip() for part in short.split(",")]
    return ", ".join(part for part in parts if part) or prompt
