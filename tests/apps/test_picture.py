"""The one picture: where its cells lie, and that small and odd pictures fit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperdreambooth.apps.picture import CELL, GAP, MARGIN, PAPER, table
from hyperdreambooth.apps.show import head

COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30)]


def test_every_picture_is_in_its_cell() -> None:
    rows = {
        "base model": [Image.new("RGB", (32, 32), colour) for colour in COLOURS[:2]],
        "after 40 steps": [Image.new("RGB", (32, 32), colour) for colour in COLOURS[2:]],
    }
    sheet = np.asarray(table(Image.new("RGB", (64, 64), (9, 9, 9)), ["one", "two"], rows, {}))
    for line in (0, 1):
        for column in (0, 1):
            y = sheet.shape[0] - MARGIN - (1 - line) * (CELL + GAP) - CELL // 2
            x = sheet.shape[1] - MARGIN - (1 - column) * (CELL + GAP) - CELL // 2
            assert tuple(sheet[y, x]) == COLOURS[2 * line + column]
    assert tuple(sheet[sheet.shape[0] // 2 + 40, MARGIN + CELL // 2]) == (9, 9, 9)


@settings(max_examples=8, deadline=None)
@given(
    columns=st.integers(1, 4),
    rows=st.integers(1, 4),
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    words=st.text(max_size=60),
)
def test_any_size_and_words_fit(columns: int, rows: int, width: int, height: int, words: str) -> None:
    picture = Image.new("RGB", (width, height))
    sheet = table(
        picture, [words] * columns, {f"row {k}": [picture] * columns for k in range(rows)}, {"row 0": words}
    )
    assert sheet.mode == "RGB" and sheet.getpixel((0, 0)) == PAPER
    assert sheet.height > rows * CELL and sheet.width > columns * CELL


def test_heads_leave_out_what_all_prompts_say() -> None:
    assert head("a photo of a [V] face, laughing") == "laughing"
    assert head("a photo of a [V] face, surprised, on a beach") == "surprised, on a beach"
    assert head("a watercolour painting of a [V] face, smiling") == "a watercolour painting, smiling"
    assert head("a [V] person wearing a hat") == "wearing a hat"
    assert head("a [V] face") == "a [V] face"
