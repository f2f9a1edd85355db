"""From scores of pictures to a report: values of people, intervals over people, differences, tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from hyperdreambooth.evaluate.protocol import TRAINING, Protocol, Row
from hyperdreambooth.evaluate.scorers import MEANING
from hyperdreambooth.evaluate.statistics import Interval, interval, paired
from hyperdreambooth.hypernet.predictor import Predictor

Persons = dict[str, dict[str, float]]
"""Score → person → value."""


def by_person(row: Row) -> Persons:
    """Returns the mean over each person's pictures; people without a value of a score are left out of it."""
    found: Persons = {}
    for person, scores in row.scores.items():
        for score, values in scores.items():
            if known := [value for value in values if value is not None]:
                found.setdefault(score, {})[person] = fmean(known)
    return found


def summary(protocol: Protocol, rows: Mapping[str, Row]) -> dict[str, Any]:
    """Collects all figures of an experiment.

    Returns:
        `rows`: name → `scores` (score → n, mean, low, high), `cost` (means over people), `settings`;
        `paired`: the row `against`, and score → interval of each row's difference from it, person by person;
        `people`: name → score → person → value; `judge`: what judged identity, or None; `prompts`, `seeds`,
        `scorers`, `missing`, `base`, `network`, and `training`, the version of the training that the rows
        went through.
    """
    persons = {name: by_person(row) for name, row in rows.items()}
    names = sorted({score for one in persons.values() for score in one} | set(MEANING))
    return {
        "rows": {
            name: {
                "scores": {score: interval([*persons[name].get(score, {}).values()]) for score in names},
                # the cost of the user's own adapter is unknown
                "cost": {} if protocol.methods[name].kind == "file" else _cost(row),
                "settings": row.settings,
            }
            for name, row in rows.items()
        },
        "paired": _paired(persons, protocol.config.compared(), names),
        "people": persons,
        "prompts": protocol.prompts,
        "seeds": list(protocol.config.seeds),
        "scorers": dict(protocol.scorers.names),
        "judge": protocol.scorers.base and protocol.scorers.base.judge.summary(),
        "missing": [*_missing(protocol, rows)],
        "base": {"source": protocol.base.source, "fingerprint": protocol.base.fingerprint},
        "network": network_summary(protocol.makers.network),
        "training": TRAINING,
    }


def network_summary(network: Predictor | None) -> dict[str, Any] | None:
    """Returns what identifies the hypernetwork of the rows; None if no row needed one."""
    return network and {"fingerprint": network.fingerprint, "strength": network.info.strength}


def _missing(protocol: Protocol, rows: Mapping[str, Row]) -> Iterable[str]:
    """Yields lines that say which scores are null, and why."""
    yield from protocol.scorers.missing
    if alone := [person for person in protocol.people if not protocol.others(person)]:
        yield f"likeness: null for {', '.join(alone)}, who have one photo only"
    for name, row in rows.items():
        if row.diverged:
            yield f"{name}: null for {', '.join(row.diverged)}: the training diverged; lower its lr"
        judged = [value for scores in row.scores.values() for value in scores.get("identity", ())]
        if lost := judged.count(None):
            why = "no face is found on them, or on any other photo of the person"
            yield f"{name}: {lost} of {len(judged)} pictures have no identity score: {why}"


def _paired(persons: Mapping[str, Persons], against: str | None, names: Sequence[str]) -> dict[str, Any]:
    """Returns the differences of the row `against` minus each other row."""
    if against is None or against not in persons:
        return {"against": None, "rows": {}}
    ours, differences = persons[against], dict[str, dict[str, Interval]]()
    for name in [name for name in persons if name != against]:
        pairs = {score: paired(ours.get(score, {}), persons[name].get(score, {})) for score in names}
        differences[name] = {score: found for score, found in pairs.items() if found is not None}
    return {"against": against, "rows": differences}


def _cost(row: Row) -> dict[str, float | None]:
    """Returns the means over people; empty for a bound."""
    if not (costs := list(row.costs.values())):
        return {}
    memory = [cost.megabytes for cost in costs if cost.megabytes is not None]
    return {
        "seconds": round(fmean(cost.seconds for cost in costs), 3),
        "steps": round(fmean(cost.steps for cost in costs), 1),
        "megabytes": max(memory) if memory else None,
        "bytes": max(cost.bytes for cost in costs),
        "together": max(cost.together for cost in costs),
    }


def shown_scores(report: Mapping[str, Any]) -> list[str]:
    """Returns the scores that some row has, in the order of `MEANING`; attribute groups come last."""
    rows = report["rows"].values()
    found = {score for row in rows for score, value in row["scores"].items() if value is not None}
    return [name for name in MEANING if name in found] + sorted(found - set(MEANING))


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table of scores and costs as text, its head first."""
    scores = [name for name in shown_scores(report) if ":" not in name]
    lines = [["method", "n", *scores, "seconds", "steps", "MB peak", "kB a person"]]
    for name, row in report["rows"].items():
        n = max([0, *(one["n"] for one in row["scores"].values() if one is not None)])
        values = [cell(row["scores"].get(score)) for score in scores]
        lines.append([name, str(n), *values, *_cost_cells(row["cost"])])
    return lines


def _cost_cells(cost: Mapping[str, Any]) -> list[str]:
    """Returns the cells of seconds, steps, peak memory and size of a row."""
    if not cost:
        return ["–"] * 4
    seconds = f"{cost['seconds']:.3g}" + (f" ({cost['together']} at once)" if cost["together"] > 1 else "")
    memory = "–" if cost["megabytes"] is None else f"{cost['megabytes']:.0f}"
    return [seconds, f"{cost['steps']:.4g}", memory, f"{cost['bytes'] / 1000:,.1f}" if cost["bytes"] else "–"]


def groups_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table of prompt scores by group of attributes; only a head if there are none."""
    groups = [name for name in shown_scores(report) if ":" in name]
    rows = {name: [cell(row["scores"].get(g)) for g in groups] for name, row in report["rows"].items()}
    kept = [[name, *cells] for name, cells in rows.items() if any(text != "–" for text in cells)]
    return [["prompt followed", *(g.split(":", 1)[1] for g in groups)], *kept]


def paired_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table of differences, person by person; only a head if there are none."""
    paired = report["paired"]
    scores = [name for name in shown_scores(report) if ":" not in name]
    rows = paired["rows"].items()
    lines = [[name, *(cell(row.get(score), difference=True) for score in scores)] for name, row in rows]
    return [[f"{paired['against']} minus", *scores], *lines]


def cell(value: Interval | None, difference: bool = False) -> str:
    """Formats an interval as `.453 [.360, .560]`; a difference gets a sign, and a star if 0 is outside."""
    if value is None:
        return "–"
    mean, low, high = value["mean"], value["low"], value["high"]
    text = ("+" if difference and mean > 0 else "") + short(mean)
    if low is None or high is None:
        return text
    star = " *" if difference and (low > 0 or high < 0) else ""
    return f"{text} [{short(low)}, {short(high)}]{star}"


def short(value: float) -> str:
    """Formats a figure with three places and without a leading zero, as the paper does."""
    text = f"{value:z.3f}"  # z: no minus before a zero
    return text.replace("0.", ".", 1) if abs(value) < 0.9995 else text


def markdown(report: Mapping[str, Any]) -> str:
    """Returns all tables and the meaning of the scores as Markdown."""
    parts = [markdown_table(table(report))]
    if len(groups := groups_table(report)) > 1:
        parts.append(markdown_table(groups))
    if report["paired"]["rows"]:
        parts += [markdown_table(paired_table(report)), "\\* the 95 % interval excludes 0."]
    parts.append("\n".join(f"- {line}" for line in notes(report)))
    return "\n\n".join(parts) + "\n"


def notes(report: Mapping[str, Any]) -> Iterable[str]:
    """Yields lines that explain the tables: n, intervals, the meaning of each score, what is missing."""
    pictures = len(report["prompts"]) * len(report["seeds"])
    yield f"n people, {pictures} pictures each; mean and 95 % bootstrap interval over people"
    yield from (f"{name}: {MEANING[name]}" for name in shown_scores(report) if name in MEANING)
    yield "another-photo, somebody-else: real photos through the base's autoencoder, as bounds"
    if judge := report["judge"]:
        yield _judged_by(judge)
    yield from report["missing"]


def _judged_by(judge: Mapping[str, Any]) -> str:
    """Describes the identity scorer in one line."""
    places = f"a cosine of {judge['same']:g} scores 1, {judge['stranger']:g} scores 0"
    more = [f"calibrated on {judge['source']}"] if judge["source"] else []
    more += [f"licence {judge['licence']}"] if judge["licence"] else []
    return "; ".join([f"identity is judged by {judge['name']}: {places}", *more])


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Formats a table, its head first, as Markdown."""
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows])
