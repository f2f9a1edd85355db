"""From pictures' scores to what is reported: a value a person, intervals over people, differences, tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hyperdreambooth.evaluate.judges import MEANING
from hyperdreambooth.evaluate.protocol import Protocol, Row
from hyperdreambooth.evaluate.statistics import Interval, interval, paired
from hyperdreambooth.hypernet.predictor import Predictor

Persons = dict[str, dict[str, float]]
"""Score → person → value."""


def by_person(row: Row) -> Persons:
    """The mean over each person's pictures; people whom a score says nothing about are left out."""
    found: Persons = {}
    for person, scores in row.scores.items():
        for score, values in scores.items():
            there = [value for value in values if value is not None]
            if there:
                found.setdefault(score, {})[person] = statistics.mean(there)
    return found


def summary(protocol: Protocol, rows: Mapping[str, Row]) -> dict[str, Any]:
    """All figures of an experiment.

    Returns:
        `rows`: name → `scores` (score → n, mean, low, high), `cost` (means over people), `settings`;
        `paired`: the row `against`, and score → interval of each row's difference from it, person by person;
        `people`: name → score → person → value; `prompts`, `seeds`, `judges`, `missing`, `base`, `network`.
    """
    persons = {name: by_person(row) for name, row in rows.items()}
    against = protocol.config.compared()
    names = sorted({score for one in persons.values() for score in one} | set(MEANING))
    # what they cost, nobody here knows
    brought = {name for name, method in protocol.methods.items() if method.kind == "file"}
    told = {
        name: {
            "scores": {score: interval([*persons[name].get(score, {}).values()]) for score in names},
            "cost": {} if name in brought else _cost(row),
            "settings": row.settings,
        }
        for name, row in rows.items()
    }
    return {
        "rows": told,
        "paired": _paired(persons, against, names),
        "people": persons,
        "prompts": protocol.prompts,
        "seeds": list(protocol.config.seeds),
        "judges": dict(protocol.judges.names),
        "missing": [*protocol.judges.missing, *_lonely(protocol), *_diverged(rows)],
        "base": {"source": protocol.base.source, "fingerprint": protocol.base.fingerprint},
        "network": network_facts(protocol.makers.network),
    }


def network_facts(network: Predictor | None) -> dict[str, Any] | None:
    """Which hypernetwork the rows came out of; None where no row needed one."""
    if network is None:
        return None
    return {"fingerprint": network.fingerprint, "strength": network.info.strength}


def _diverged(rows: Mapping[str, Row]) -> list[str]:
    """A line for each row that made nothing of some people."""
    return [
        f"{name}: null for {', '.join(row.diverged)}: the training diverged; lower its lr"
        for name, row in rows.items()
        if row.diverged
    ]


def _lonely(protocol: Protocol) -> list[str]:
    """A line where people have no photo besides the reference."""
    alone = [person for person in protocol.people if not protocol.others(person)]
    return [f"likeness: null for {', '.join(alone)}, who have one photo only"] if alone else []


def _paired(persons: Mapping[str, Persons], against: str | None, names: Sequence[str]) -> dict[str, Any]:
    """`against` minus each other row."""
    if against is None or against not in persons:
        return {"against": None, "rows": {}}
    ours = persons[against]
    differences = {
        name: {
            score: found
            for score in names
            if (found := paired(ours.get(score, {}), theirs.get(score, {}))) is not None
        }
        for name, theirs in persons.items()
        if name != against
    }
    return {"against": against, "rows": differences}


def _cost(row: Row) -> dict[str, float | None]:
    """Means over people; empty for a bound."""
    costs = list(row.costs.values())
    if not costs:
        return {}
    memory = [cost.megabytes for cost in costs if cost.megabytes is not None]
    return {
        "seconds": round(statistics.mean(cost.seconds for cost in costs), 3),
        "steps": round(statistics.mean(cost.steps for cost in costs), 1),
        "megabytes": max(memory) if memory else None,
        "bytes": max(cost.bytes for cost in costs),
        "together": max(cost.together for cost in costs),
    }


def shown_scores(report: Mapping[str, Any]) -> list[str]:
    """The scores that some row has, in the order of `MEANING`; those of attribute groups at the end."""
    there = {
        score for row in report["rows"].values() for score, one in row["scores"].items() if one is not None
    }
    return [name for name in MEANING if name in there] + sorted(there - set(MEANING))


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows of scores, then what a person costs, as text."""
    scores = [name for name in shown_scores(report) if ":" not in name]
    lines = [["method", "n", *scores, "seconds", "steps", "MB peak", "kB a person"]]
    for name, row in report["rows"].items():
        n = max([0, *(one["n"] for one in row["scores"].values() if one is not None)])
        values = [cell(row["scores"].get(score)) for score in scores]
        lines.append([name, str(n), *values, *_cost_cells(row["cost"])])
    return lines


def _cost_cells(cost: Mapping[str, Any]) -> list[str]:
    """Seconds, steps, peak memory and size of a row."""
    if not cost:
        return ["–"] * 4
    seconds = f"{cost['seconds']:.3g}" + (f" ({cost['together']} at once)" if cost["together"] > 1 else "")
    memory = "–" if cost["megabytes"] is None else f"{cost['megabytes']:.0f}"
    return [seconds, f"{cost['steps']:.4g}", memory, f"{cost['bytes'] / 1000:,.1f}" if cost["bytes"] else "–"]


def groups_table(report: Mapping[str, Any]) -> list[list[str]]:
    """The prompt score of every group of attributes; only a head where nobody judged them."""
    groups = [name for name in shown_scores(report) if ":" in name]
    rows = {name: [cell(row["scores"].get(g)) for g in groups] for name, row in report["rows"].items()}
    kept = [[name, *cells] for name, cells in rows.items() if any(text != "–" for text in cells)]
    return [["prompt followed", *(g.split(":", 1)[1] for g in groups)], *kept]


def paired_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Differences, person by person; those whose interval leaves 0 out are marked."""
    told = report["paired"]
    scores = [name for name in shown_scores(report) if ":" not in name]
    lines = [[f"{told['against']} minus", *scores]]
    for name, row in told["rows"].items():
        lines.append([name, *(_difference(row.get(score)) for score in scores)])
    return lines


def cell(value: Interval | None) -> str:
    """`.453 [.360, .560]`; a dash for null."""
    if value is None:
        return "–"
    low, high = value["low"], value["high"]
    if low is None or high is None:
        return short(value["mean"])
    return f"{short(value['mean'])} [{short(low)}, {short(high)}]"


def _difference(value: Interval | None) -> str:
    if value is None:
        return "–"
    low, high = value["low"], value["high"]
    sure = low is not None and high is not None and (low > 0 or high < 0)
    return ("+" if value["mean"] > 0 else "") + cell(value) + (" *" if sure else "")


def short(value: float) -> str:
    """Three places without a leading zero, as the paper prints them."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.9995 else text


def markdown(report: Mapping[str, Any]) -> str:
    """All tables, with what the scores mean, as Markdown."""
    parts = [_markdown(table(report))]
    if len(groups := groups_table(report)) > 1:
        parts.append(_markdown(groups))
    if report["paired"]["rows"]:
        parts += [_markdown(paired_table(report)), "\\* the 95 % interval leaves 0 out."]
    parts.append("\n".join(f"- {line}" for line in notes(report)))
    return "\n\n".join(parts) + "\n"


def notes(report: Mapping[str, Any]) -> Iterable[str]:
    """How to read the tables: n, intervals, what each score says, what is missing."""
    pictures = len(report["prompts"]) * len(report["seeds"])
    yield f"n people, {pictures} pictures each; mean and 95 % bootstrap interval over people"
    yield from (f"{name}: {MEANING[name]}" for name in shown_scores(report) if name in MEANING)
    yield "another-photo, somebody-else: real photos through the base's autoencoder, the bounds"
    yield from report["missing"]


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows])
