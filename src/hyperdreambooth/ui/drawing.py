"""Draws what a drawing's record asks for: one person or a sum of several, and somebody beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from operator import add
from pathlib import Path
from threading import Event

from PIL import Image

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.generate import generate_images
from hyperdreambooth.ui.making import save_png
from hyperdreambooth.ui.records import BASE, Drawing, read

MOST = 64  # pictures of a drawing


class Stopped(Exception):
    """The user stopped the job."""


def check(drawing: Drawing) -> None:
    """Refuses a drawing of too much.

    Raises:
        InputError: more than `MOST` pictures.
    """
    count = len(drawing.columns) * (2 if drawing.beside else 1)
    if count > MOST:
        raise InputError(
            f"{count} pictures are too many, expected at most {MOST}; take fewer prompts or seeds"
        )


def labels(drawing: Drawing, names: Mapping[str, str]) -> tuple[str, ...]:
    """Returns a line for each row of pictures; `names` has the name of every person."""
    parts = [
        names[one] if len(drawing.weights) == 1 and weight == 1 else f"{names[one]} × {weight:g}"
        for one, weight in drawing.weights.items()
    ]
    beside = drawing.beside and (BASE if drawing.beside == BASE else names[drawing.beside])
    return tuple(row for row in (" + ".join(parts) or BASE, beside) if row)


def draw(
    base: Base,
    open_person: Callable[[str], Adapter],
    folder: Path,
    stop: Event,
    steps: int,
    guidance: float,
) -> None:
    """Draws the pictures of a folder's record; each is written as soon as it is there.

    Every row starts from the same noise, because noise depends on seed and prompt alone.

    Raises:
        Stopped: `stop` was set; the pictures that are drawn stay.
    """
    drawing = read(folder, Drawing)
    weighted = [weight * open_person(one) for one, weight in drawing.weights.items()]
    rows: list[Adapter | None] = [reduce(add, weighted) if weighted else None]
    if drawing.beside:
        rows.append(None if drawing.beside == BASE else open_person(drawing.beside))
    prompts, seeds = zip(*drawing.columns, strict=True)
    for row, adapter in enumerate(rows):

        def save(number: int, picture: Image.Image, row: int = row) -> None:
            save_png(folder / f"{row}-{number:02d}.png", picture)
            if stop.is_set():
                raise Stopped

        generate_images(
            base, prompts, adapter, seed=seeds, steps=steps, guidance=guidance, batch=4, drawn=save
        )
