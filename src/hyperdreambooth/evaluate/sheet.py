"""`sheets/ROW.jpg`: everybody's pictures of one method on one sheet, not the best ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from hyperdreambooth.evaluate.protocol import BOUNDS, Protocol, Row
from hyperdreambooth.faces.image import open_photo, to_image, to_pixels
from hyperdreambooth.files import whole_file

CELL = 64  # pixels of a picture
ACROSS = 2  # people a line


def write_sheets(protocol: Protocol, rows: Mapping[str, Row], out: Path) -> list[str]:
    """Writes a sheet for every row that draws.

    Args:
        protocol: the experiment.
        rows: finished.
        out: the experiment's folder.

    Returns:
        The files, relative to `out`.
    """
    bounds = {name for name, method in protocol.methods.items() if method.kind in BOUNDS}
    plain = {name: re.sub(r"[^\w@-]+", "-", name) for name in rows if name not in bounds}
    files = {name: f"sheets/{word}.jpg" for name, word in plain.items()}
    for name, file in files.items():
        picture = _sheet(protocol, rows[name])
        with whole_file(out / file) as part:
            picture.save(part, format="JPEG", quality=88)
    return [*files.values()]


def _sheet(protocol: Protocol, row: Row) -> Image.Image:
    """The photo that was given and the first seed's pictures, `ACROSS` people a line."""
    count = len(protocol.prompts)
    wide, people = (count + 1) * CELL + CELL // 4, list(protocol.people)
    sheet = Image.new("RGB", (ACROSS * wide - CELL // 4, -(-len(people) // ACROSS) * CELL), "white")
    for k, person in enumerate(people):
        files = [protocol.people[person][0].path, *(cell.file for cell in row.cells[person][:count])]
        for column, file in enumerate(files):
            small = to_image(to_pixels(open_photo(file), CELL))
            sheet.paste(small, ((k % ACROSS) * wide + column * CELL, (k // ACROSS) * CELL))
    return sheet
