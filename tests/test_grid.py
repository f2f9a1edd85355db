"""The grid of pictures: where its cells lie, and that any picture and any text fit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperdreambooth.grid import EMPTY, LABEL, PAPER, drawn, font, grid, wrap

RED, GREEN, BLUE = (220, 30, 30), (30, 220, 30), (30, 30, 220)


def plain(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (32, 32), colour)


def test_a_bare_grid_is_nothing_but_its_cells() -> None:
    rows = [[plain(RED), None], [plain(BLUE)]]
    sheet = np.asarray(grid(rows, cell=8, gap=0, margin=0))
    assert sheet.shape == (16, 16, 3)
    for y, x, colour in ((0, 0, RED), (0, 8, EMPTY), (8, 0, BLUE), (8, 8, PAPER)):
        assert (sheet[y : y + 8, x : x + 8] == colour).all()


def test_labels_make_room_and_leave_the_cells_alone() -> None:
    bare = np.asarray(grid([[plain(RED), plain(GREEN)]], cell=40, margin=9))
    sheet = np.asarray(
        grid(
            [[plain(RED), plain(GREEN)]],
            cell=40,
            margin=9,
            row_labels=["row\nnote"],
            column_labels=["one", "two words"],
            title="everything",
        )
    )
    assert sheet.shape > bare.shape and (sheet[-49:, -99:] == bare[-49:, -99:]).all()
    assert (sheet[:-49] != PAPER).any() and (sheet[:, :-99] != PAPER).any()


def test_a_picture_loses_what_is_outside_its_centre_square() -> None:
    wide = Image.new("RGB", (96, 32), RED)
    wide.paste(GREEN, (32, 0, 64, 32))
    assert (np.asarray(grid([[wide]], cell=32, gap=0, margin=0)) == GREEN).all()


@given(st.text(max_size=60), st.integers(30, 300))
def test_lines_fit_and_no_word_is_lost(text: str, width: int) -> None:
    lines = wrap(text, LABEL, width)
    assert all(font(LABEL).getlength(line) <= width or len(line) <= 3 for line, _ in lines)
    if not any("…" in line for line, _ in lines):
        assert " ".join(line for line, _ in lines).split() == drawn(text).split()


def test_letters_that_the_font_lacks_are_no_boxes() -> None:
    assert drawn("3×4 Zoë Łódź, ½ · 100 %") == "3x4 Zoe ?odz, 12 · 100 %"
    assert drawn("Анна 中 a\u0301") == "???? ? a"
    box = np.asarray(grid([[None]], cell=40, title="\U0010ffff"))
    assert not np.array_equal(np.asarray(grid([[None]], cell=40, title="×")), box)


@settings(max_examples=8, deadline=None)
@given(
    columns=st.integers(1, 4),
    rows=st.integers(0, 4),
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    text=st.text(max_size=60),
)
def test_any_size_and_text_fit(columns: int, rows: int, width: int, height: int, text: str) -> None:
    lines = [[Image.new("RGB", (width, height))] * columns] * rows
    texts = [[text] * columns] * rows
    sheet = grid(
        lines, cell=50, row_labels=[text] * rows, column_labels=[text] * columns, captions=texts, title=text
    )
    assert sheet.mode == "RGB" and sheet.getpixel((0, 0)) == PAPER
    assert sheet.height > rows * 50 and (sheet.width > columns * 50 or not rows)
