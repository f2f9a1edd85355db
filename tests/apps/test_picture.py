"""The one picture of a personalization: where its cells lie, and what stands above them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from hyperdreambooth.apps.picture import CELL, GAP, MARGIN, shorten, table

COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30)]


def test_every_picture_is_in_its_cell() -> None:
    rows = {
        "base model": [Image.new("RGB", (32, 32), colour) for colour in COLOURS[:2]],
        "after 40 steps\nidentity 0.7": [Image.new("RGB", (32, 32), colour) for colour in COLOURS[2:]],
    }
    sheet = np.asarray(table(Image.new("RGB", (64, 64), (9, 9, 9)), ["one", "two"], rows))
    for line in (0, 1):
        for column in (0, 1):
            y = sheet.shape[0] - MARGIN - (1 - line) * (CELL + GAP) - CELL // 2
            x = sheet.shape[1] - MARGIN - (1 - column) * (CELL + GAP) - CELL // 2
            assert tuple(sheet[y, x]) == COLOURS[2 * line + column]
    assert tuple(sheet[sheet.shape[0] // 2 + 40, MARGIN + CELL // 2]) == (9, 9, 9)


def test_heads_leave_out_what_all_prompts_say() -> None:
    assert shorten("a photo of a [V] face, laughing") == "laughing"
    assert shorten("a photo of a [V] face, surprised, on a beach") == "surprised, on a beach"
    assert shorten("a watercolour painting of a [V] face, smiling") == "a watercolour painting, smiling"
    assert shorten("a [V] person wearing a hat") == "wearing a hat"
    assert shorten("a [V] face") == "a [V] face"
