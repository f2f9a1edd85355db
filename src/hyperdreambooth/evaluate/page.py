"""`report.html`: tables, plots and people's pictures in one file, and `sheets/ROW.jpg` with everybody's."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hyperdreambooth.evaluate.protocol import BOUNDS, Protocol, Row
from hyperdreambooth.evaluate.report import groups_table, notes, paired_table, table
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.files import whole_file
from hyperdreambooth.grid import fit, grid

SIDE, CELL = 128, 64  # pixels of a picture on the page, on a sheet


def write_page(protocol: Protocol, rows: Mapping[str, Row], report: Mapping[str, Any], out: Path) -> None:
    """Writes `out/report.html` from `report.summary`, with the plots that are in `out`."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = list(protocol.people)[: protocol.config.shown]
    text = pages.get_template("page.html.j2").render(
        base=report["base"],
        own=report["paired"]["against"],
        scores=table(report),
        groups=groups_table(report),
        paired=paired_table(report),
        plots=[out / name for name in ("steps.svg", "front.svg") if (out / name).is_file()],
        people={person: _shown(protocol, rows, person) for person in shown},
        prompts=protocol.prompts,
        notes=[*notes(report)],
        picture=_picture,
        data=_data,
    )
    with whole_file(out / "report.html") as part:
        part.write_text(text, encoding="utf-8")


def _shown(protocol: Protocol, rows: Mapping[str, Row], person: str) -> dict[str, dict[str, list[Path]]]:
    """Returns row → files of one person: `photos`, which have no prompt, and `drawn`, a file a prompt."""
    photos, drawn = {"the photo": [protocol.people[person][0].path]}, dict[str, list[Path]]()
    for name, row in rows.items():
        bound = protocol.methods[name].kind in BOUNDS
        (photos if bound else drawn)[name] = _first_seed(protocol, row, person)
    return {"photos": photos, "drawn": drawn}


def _first_seed(protocol: Protocol, row: Row, person: str) -> list[Path]:
    return [cell.file for cell in row.cells[person][: len(protocol.prompts)]]


def _picture(file: Path) -> str:
    """Returns a picture's centre square as the source of an image element."""
    held = io.BytesIO()
    fit(open_photo(file), SIDE).save(held, format="JPEG", quality=85)
    return _data(held.getvalue(), "jpeg")


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def write_sheets(protocol: Protocol, rows: Mapping[str, Row], out: Path) -> list[str]:
    """Writes a sheet for every row that draws and returns the files, relative to `out`.

    Each line shows one person: the reference photo, then the first seed's pictures.
    """
    files: list[str] = []
    for name, row in rows.items():
        if protocol.methods[name].kind in BOUNDS:
            continue
        lines = [
            [open_photo(file) for file in (photos[0].path, *_first_seed(protocol, row, person))]
            for person, photos in protocol.people.items()
        ]
        plain = re.sub(r"[^\w@-]+", "-", name)
        files.append(f"sheets/{plain}.jpg")
        with whole_file(out / files[-1]) as part:
            sheet = grid(lines, cell=CELL, row_labels=[*protocol.people], gap=2)
            sheet.save(part, format="JPEG", quality=88)
    return files
