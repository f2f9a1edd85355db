"""The curves of a training as an SVG in the page's own colours, with a text for those who do not see it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import isfinite

from hyperdreambooth.ui.records import Seen

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 460, 150  # of a panel, in units of the view box
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 112, 34, 10
_SMOOTH = 5  # steps of the loss's mean: a step's own loss depends mostly on its noise


def chart(losses: Points, seen: Sequence[Seen], last: int, kept: int | None) -> str:
    """Returns two panels above one another: likeness and prompt of the looks, and the loss of every step."""
    last = max(last, 1)
    scores = {name: _scores(seen, key) for name, key in (("likeness", "identity"), ("prompt", "prompt"))}
    known = {name: points for name, points in scores.items() if points}
    panels = list[str]()
    if known:
        top = max(1.0, *(score for points in known.values() for _, score in points))
        panels.append(_panel("Likeness and prompt, from 0", known, last, kept, (0.0, top)))
    if losses:
        smooth = _smooth(losses)
        values = [value for _, value in losses if isfinite(value)] or [1.0]
        panels.append(_panel("Loss", {"loss": smooth}, last, kept, (0.0, max(values)), faint=losses))
    return f'<div class="hdb-charts">{"".join(panels)}</div>' if panels else ""


def _scores(seen: Sequence[Seen], key: str) -> list[tuple[float, float]]:
    return [(one.step, score) for one in seen if (score := one.scores.get(key)) is not None]


def _smooth(points: Points) -> list[tuple[float, float]]:
    """Returns the mean of each value and those just before it."""
    values = [value for _, value in points]
    windows = [values[max(0, k - _SMOOTH + 1) : k + 1] for k in range(len(values))]
    return [(step, sum(part) / len(part)) for (step, _), part in zip(points, windows, strict=True)]


def _panel(
    title: str,
    lines: dict[str, list[tuple[float, float]]],
    last: int,
    kept: int | None,
    limits: tuple[float, float],
    faint: Points = (),
) -> str:
    """Draws lines over the steps; each is named at its end, so that no legend is needed."""
    low, high = limits[0], limits[1] or 1.0
    right = _WIDTH - _RIGHT

    def place(step: float, value: float) -> tuple[float, float]:
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return _LEFT + (right - _LEFT) * step / last, _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    base = _HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{right}" y2="{base}"/>']
    if faint:
        parts.append(_line([place(*point) for point in faint], "faint"))
    if kept is not None and kept <= last:
        x, _ = place(kept, low)
        parts.append(f'<line class="kept" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{base}"/>')
    labels = list[tuple[float, str, str]]()
    for name, points in lines.items():
        places = [place(*point) for point in points]
        parts.append(_line(places, name))
        parts += [f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in _dots(places)]
        labels.append((places[-1][1], name, f"{name} {points[-1][1]:.2f}"))
    parts += [
        f'<text class="{name}" x="{right + 8}" y="{y + 4:.1f}">{text}</text>'
        for y, name, text in _apart(labels)
    ]
    said = "; ".join(
        f"{name} from {points[0][1]:.2f} to {points[-1][1]:.2f}" for name, points in lines.items()
    )
    words = f"{title}: {said}, over {max(points[-1][0] for points in lines.values()):g} of {last} steps"
    heading = f'<text class="title" x="{_LEFT}" y="15">{escape(title)}</text>'
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(words)}"'
    return f'<svg class="hdb-chart" {box}>{heading}{"".join(parts)}</svg>'


def _line(places: Points, name: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="{name}" points="{path}"/>'


def _dots(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points to be marked: those of the few looks, or the last of many steps."""
    return places if len(places) <= 10 else places[-1:]


def _apart(labels: list[tuple[float, str, str]], room: float = 15) -> list[tuple[float, str, str]]:
    """Moves labels down that would lie on one another."""
    placed = list[tuple[float, str, str]]()
    for y, name, text in sorted(labels):
        placed.append((max(y, placed[-1][0] + room) if placed else y, name, text))
    return placed
