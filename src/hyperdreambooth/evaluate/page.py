"""`report.html`: tables, plots and everybody's pictures in one file that opens anywhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hyperdreambooth.evaluate.protocol import BOUNDS, Protocol, Row
from hyperdreambooth.evaluate.report import groups_table, notes, paired_table, table
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.files import whole_file

SIDE = 128  # pixels of a picture on the page

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e24; background: #fcfbf8 }
body { margin: 2rem auto; max-width: 96rem; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.5rem }
p, li { color: #686c76; max-width: 60rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #e4e2dc; white-space: nowrap }
tr.own td { font-weight: 600 }
.pictures th { white-space: normal; vertical-align: bottom; font-weight: 400; max-width: 128px }
.pictures td { padding: 2px; border: 0 } .pictures td:first-child { padding-right: .8rem; text-align: right }
.pictures img { display: block; width: 128px; height: 128px; border-radius: 3px }
.plots img { max-width: 49%; min-width: 24rem }
"""
_HEAD = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title>
<style>{_STYLE}</style>
"""


def write_page(protocol: Protocol, rows: Mapping[str, Row], report: Mapping[str, Any], out: Path) -> None:
    """Writes `out/report.html`, whole.

    Args:
        protocol: the experiment; its config says how many people are shown.
        rows: finished.
        report: of `report.summary`.
        out: the folder, with the plots where there are any.
    """
    own = report["paired"]["against"]
    parts = [_tag("h1", "Who is it, and did the prompt come true?"), _tag("p", _about(report))]
    parts += [_table(table(report), own), _plots(out)]
    if len(groups := groups_table(report)) > 1:
        parts += [_tag("h2", "Prompts, an attribute group each"), _table(groups, own)]
    if report["paired"]["rows"]:
        head = f"Person by person: {own} minus the others (* where the interval leaves 0 out)"
        parts += [_tag("h2", head), _table(paired_table(report), None)]
    parts += [_people(protocol, rows)]
    parts += [_tag("h2", "How to read it"), "<ul>", *(_tag("li", line) for line in notes(report)), "</ul>"]
    with whole_file(out / "report.html") as part:
        part.write_text(_HEAD + "\n".join(parts) + "</html>\n", encoding="utf-8")


def _about(report: Mapping[str, Any]) -> str:
    base = report["base"]
    same = "Every method drew the same prompts from the same noise."
    return f"Base {base['source']} ({base['fingerprint']}). {same}"


def _tag(name: str, text: str) -> str:
    return f"<{name}>{html.escape(text)}</{name}>"


def _table(lines: Sequence[Sequence[str]], own: str | None) -> str:
    """A table; the row that the others are compared with stands out."""
    head = "".join(_tag("th", text) for text in lines[0])
    rows = [
        f"<tr{' class=own' if line[0] == own else ''}>{''.join(_tag('td', text) for text in line)}</tr>"
        for line in lines[1:]
    ]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _plots(out: Path) -> str:
    """The plots as they lie in the folder."""
    files = [out / name for name in ("steps.svg", "front.svg") if (out / name).is_file()]
    images = "".join(f'<img alt="{file.stem}" src="{_data(file.read_bytes(), "svg+xml")}">' for file in files)
    return f'<div class="plots">{images}</div>'


def _people(protocol: Protocol, rows: Mapping[str, Row]) -> str:
    """A grid a person: methods as rows, prompts as columns, the same noise in a column."""
    parts: list[str] = []
    for person in list(protocol.people)[: protocol.config.shown]:
        parts += [_tag("h2", person), _grid(protocol, rows, person)]
    return "\n".join(parts)


def _grid(protocol: Protocol, rows: Mapping[str, Row], person: str) -> str:
    """Photos above the prompts, as nobody asked for what they show."""
    prompts = protocol.prompts
    photos = [_line("the photo", [protocol.people[person][0].path])]
    head = f"<tr>{''.join(_tag('th', text) for text in ('', *prompts))}</tr>"
    drawn: list[str] = []
    for name, row in rows.items():
        cells = row.cells[person][: len(prompts)]
        bound = protocol.methods[name].kind in BOUNDS
        (photos if bound else drawn).append(_line(name, [cell.file for cell in cells]))
    return f'<div class="wide"><table class="pictures">{"".join([*photos, head, *drawn])}</table></div>'


def _line(name: str, files: Sequence[Path]) -> str:
    return f"<tr>{_tag('td', name)}{''.join(map(_picture, files))}</tr>"


def _picture(file: Path) -> str:
    """A cell with the picture in it."""
    image, held = open_photo(file), io.BytesIO()
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    square.save(held, format="JPEG", quality=85)
    return f'<td><img alt="" src="{_data(held.getvalue(), "jpeg")}"></td>'


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
