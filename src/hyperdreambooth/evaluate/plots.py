"""Two plots, as PNG and SVG: likeness against steps, and likeness against the prompt score (the front)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hyperdreambooth.evaluate.statistics import Interval
from hyperdreambooth.files import whole_file

LIKENESS, FOLLOWING = ("identity", "dino", "clip_i"), ("prompt", "clip_t")
_INK, _QUIET, _PAPER = "#1c1e24", "#686c76", "#fcfbf8"
# Paul Tol's "bright" and "muted" qualitative colours, which colour-blind people can distinguish
_COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee",
    "#aa3377", "#332288", "#882255", "#44aa99", "#999933",
)  # fmt: skip

Point = tuple[float, Interval]
"""Training steps and the score after them."""


def axis(report: Mapping[str, Any], wanted: tuple[str, ...]) -> str | None:
    """Returns the first of the wanted scores that a row of the report has; None if no row has any."""
    rows = report["rows"].values()
    return next((name for name in wanted if any(row["scores"].get(name) for row in rows)), None)


def families(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns method → its rows by rising steps: `NAME` and `NAME@STEPS` are one line of a plot."""
    found: dict[str, list[str]] = {}
    for name in report["rows"]:
        found.setdefault(name.partition("@")[0], []).append(name)
    return {method: sorted(names, key=lambda name: _steps(report, name)) for method, names in found.items()}


def _steps(report: Mapping[str, Any], name: str) -> float:
    return report["rows"][name]["cost"].get("steps", 0)


def drawable() -> bool:
    """Returns whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_plots(report: Mapping[str, Any], out: Path) -> list[str]:
    """Draws the plots whose figures the report has; returns the files' names, none without matplotlib.

    Plots of an earlier run are deleted, so that the page never shows them beside other rows.
    """
    for name in ("steps", "front"):
        for ending in (".png", ".svg"):
            (out / name).with_suffix(ending).unlink(missing_ok=True)
    likeness, following = axis(report, LIKENESS), axis(report, FOLLOWING)
    if likeness is None or not drawable():
        return []
    trained = any(_steps(report, name) > 0 for name in report["rows"])
    files = _write(_against_steps(report, likeness), out / "steps") if trained else []
    if following is not None:
        files += _write(_front(report, likeness, following), out / "front")
    return files


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    """Returns an empty plot in our colours, without a change of matplotlib's global state."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(8, 5), dpi=150, facecolor=_PAPER, layout="constrained")
    plot: Any = figure.add_subplot(facecolor=_PAPER)
    plot.set_title(title, loc="left", color=_INK, fontsize=12)
    plot.set_xlabel(x, color=_QUIET)
    plot.set_ylabel(y, color=_QUIET)
    plot.spines[["top", "right"]].set_visible(False)
    plot.grid(True, color="#e4e2dc", linewidth=0.8)
    plot.set_axisbelow(True)
    return figure, plot


def _against_steps(report: Mapping[str, Any], score: str) -> Any:
    """Draws a line for a method with several rows, else a point; a row without training is a level line."""
    figure, plot = _figure(f"{score} against steps", "training steps", f"{score}, mean and 95 % interval")
    for k, (method, names) in enumerate(families(report).items()):
        colour = _COLOURS[k % len(_COLOURS)]
        points = [(_steps(report, n), one) for n in names if (one := report["rows"][n]["scores"].get(score))]
        if points and points[-1][0] > 0:
            _line(plot, points, colour, method)
        elif points:
            plot.axhline(points[0][1]["mean"], color=colour, linestyle=":", linewidth=1.5, label=method)
    plot.set_xscale("symlog", linthresh=10)
    plot.set_xlim(left=0)
    ticks = apart({_steps(report, name) for name in report["rows"]})
    plot.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    plot.minorticks_off()
    _legend(plot)
    return figure


def apart(steps: Iterable[float]) -> list[float]:
    """Returns the steps without those whose label would overlap that of a larger one."""
    kept: list[float] = []
    for step in sorted(steps, reverse=True):
        if not kept or step == 0 or kept[-1] > 1.3 * step:
            kept.append(step)
    return kept[::-1]


def _line(plot: Any, points: list[Point], colour: str, label: str) -> None:
    xs = [steps for steps, _ in points]
    plot.plot(xs, [one["mean"] for _, one in points], color=colour, marker="o", markersize=5, label=label)
    bands = [(steps, one["low"], one["high"]) for steps, one in points if one["low"] is not None]
    if len(bands) > 1:
        plot.fill_between(*zip(*bands, strict=True), color=colour, alpha=0.12, linewidth=0)
    for steps, low, high in bands if len(points) == 1 else []:
        plot.plot([steps, steps], [low, high], color=colour, linewidth=1)


def _front(report: Mapping[str, Any], likeness: str, following: str) -> Any:
    """Draws a point for each row, with its intervals; rows of one method are joined."""
    figure, plot = _figure(
        f"{likeness} against {following}: up and right is better",
        f"{following} (does it show what was asked for)",
        f"{likeness} (is it the person)",
    )
    for k, (method, names) in enumerate(families(report).items()):
        scores = [report["rows"][name]["scores"] for name in names]
        pairs = [(s.get(following), s.get(likeness)) for s in scores]
        there = [(x, y) for x, y in pairs if x is not None and y is not None]
        colour = _COLOURS[k % len(_COLOURS)]
        if there:
            xs, ys = ([one["mean"] for one in side] for side in zip(*there, strict=True))
            look = {"color": colour, "marker": "o", "markersize": 6, "linewidth": 1, "clip_on": False}
            plot.plot(xs, ys, label=method, **look)
            for x, y in there:
                across, up = (x["low"], x["high"]), (y["low"], y["high"])
                if None not in (*across, *up):
                    plot.plot(across, [y["mean"]] * 2, color=colour, linewidth=0.8, alpha=0.6)
                    plot.plot([x["mean"]] * 2, up, color=colour, linewidth=0.8, alpha=0.6)
        elif level := next((y for _, y in pairs if y is not None), None):
            plot.axhline(level["mean"], color=colour, linestyle=":", linewidth=1.5, label=method)
    if following == "prompt":  # a share: nothing lies beyond 1
        plot.set_xlim(max(0.0, min(plot.get_xlim()[0], 0.9)), 1)
    _legend(plot)
    return figure


def _legend(plot: Any) -> None:
    plot.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=_INK)


def _write(figure: Any, stem: Path) -> list[str]:
    """Writes the figure as PNG and SVG, without dates, so that the same figures give the same files."""
    for ending, about in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        with whole_file(stem.with_suffix(ending)) as part:
            figure.savefig(part, metadata=about)
    return [f"{stem.name}.png", f"{stem.name}.svg"]
