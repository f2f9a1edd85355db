"""Runs an experiment of experiments/ and writes its figures to results/; tables of pages come from these.

    python benchmarks/experiment.py avatars-small                  # benchmarks/results/avatars-small.json
    python benchmarks/experiment.py avatars --identities 16        # fewer people first; run again for all
    python benchmarks/experiment.py --tables                       # only rewrites the tables and plots

It is `hdb avatars render` and `hdb evaluate` with a preset, so the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "evaluation.md")
MARK = re.compile(
    r"(<!-- results/(?P<name>[\w-]+)\.json -->\n)(?P<table>.*?)(<!-- end of results -->)", re.DOTALL
)
KEPT = (
    "config", "base", "network", "training", "prompts", "seeds", "scorers", "judge", "rows", "paired",
    "missing", "seconds", "environment",
)  # fmt: skip
"""The fields of a report that its result keeps."""
COLUMNS = ("identity", "copy_paste", "leak", "prompt", "diversity")
ALONE = 3  # people who are also made one at a time, for the seconds that it takes then


def hdb(*words: object) -> None:
    """Runs one command in a process of its own, as a user would."""
    subprocess.run([sys.executable, "-m", "hyperdreambooth", *map(str, words)], check=True)


def recipe_of(name: str) -> dict[str, Any]:
    """Reads an experiment's file."""
    return tomllib.loads((HERE / "experiments" / f"{name}.toml").read_text(encoding="utf-8"))


def evaluated(
    out: Path, folder: str, recipe: dict[str, Any], people: int, settings: dict[str, Any], words: list[str]
) -> dict[str, Any]:
    """Evaluates some people of a recipe into a folder, and returns the report."""
    chosen = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    network = ["--hypernet", recipe["hypernet"]] if "hypernet" in recipe else []
    where = ["--out", out / folder, "--identities", people]
    hdb("evaluate", out / "photos", "--preset", recipe["preset"], *where, *network, *chosen, *words)
    return json.loads((out / folder / "report.json").read_text(encoding="utf-8"))


def run(name: str, out: Path, words: list[str]) -> Path:
    """Renders the people, evaluates, times some people alone, and keeps the figures.

    Args:
        name: of a file in experiments/.
        out: the folder for photos and pictures.
        words: further options of `hdb evaluate`.

    Returns:
        The result's file.
    """
    from hyperdreambooth.evaluate.config import PROMPTS

    recipe = recipe_of(name)
    photos = [word for key, value in recipe["photos"].items() for word in (f"--{key}", value)]
    hdb("avatars", "render", "--out", out / "photos", *photos)
    report = evaluated(out, "evaluation", recipe, recipe["photos"]["identities"], recipe["set"], words)
    side_by_side = [name for name, row in report["rows"].items() if row["cost"].get("together", 1) > 1]
    shortly = {"prompts": recipe["set"].get("prompts", PROMPTS)[:1], "seeds": [0], "together": 1}
    some = {**recipe["set"], **shortly, "rows": [name for name in side_by_side if name != "base"]}
    for method, row in evaluated(out, "alone", recipe, ALONE, some, [])["rows"].items():
        report["rows"][method]["cost"]["seconds_alone"] = row["cost"]["seconds"]
    result = {"experiment": name, "machine": machine(), **{key: report[key] for key in KEPT}}
    drawn, docs = out / "evaluation", HERE.parent / "docs"
    for row in recipe.get("sheets", ()):
        shutil.copy(drawn / "sheets" / f"{row}.jpg", docs / f"{name}-{row}.jpg")
    file = HERE / "results" / f"{name}.json"
    file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def machine() -> str:
    """Describes processor, cores and memory, and the accelerator if there is one."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    found = re.search(r"model name\s*: (.*)", info)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [found[1] if found else platform.processor(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB"]
    parts += [torch.backends.cpu.get_cpu_capability(), f"threads: {torch.get_num_threads()}"]
    return ", ".join(parts + ([torch.cuda.get_device_name()] if torch.cuda.is_available() else []))


@cache
def shipped() -> tuple[str, dict[str, Any] | None]:
    """Returns the fields of a result that identify base and hypernetwork, of those that ship today."""
    from hyperdreambooth.evaluate.report import network_summary
    from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET, load_hypernet

    network = load_hypernet(EMBEDDED_HYPERNET)
    return network.info.base_fingerprint, network_summary(network)


def of_other_weights(result: dict[str, Any]) -> bool:
    """Returns whether the result's base or hypernetwork, unless it is the recipe's own, ships no more."""
    base, network = shipped()
    own = "hypernet" in recipe_of(result["experiment"])
    return result["base"]["fingerprint"] != base or (not own and result["network"] not in (None, network))


def of_other_training(result: dict[str, Any]) -> bool:
    """Returns whether a result has trained rows, and the same settings would train other weights today."""
    from hyperdreambooth.evaluate.protocol import TRAINING

    trained = any(row["cost"].get("steps") for row in result["rows"].values())
    return trained and result.get("training", 1) != TRAINING


def table(result: dict[str, Any]) -> str:
    """Returns the table of an experiment with the sentences below it."""
    from hyperdreambooth.evaluate.report import cell, markdown_table

    rows = result["rows"]
    columns = [c for c in COLUMNS if any(row["scores"].get(c) for row in rows.values())]
    lines = [["method", "steps", *columns, "seconds, together", "seconds, alone"]]
    for name, row in rows.items():
        cost, values = row["cost"], [cell(row["scores"].get(column)) for column in columns]
        together = cost.get("seconds") if cost.get("together", 1) > 1 else None
        alone = cost.get("seconds_alone") if together else cost.get("seconds")
        seconds = [f"{value:.3g}" if value else "–" for value in (together, alone)]
        lines.append([name, f"{cost['steps']:.4g}" if cost else "–", *values, *seconds])
    return "\n".join([markdown_table(lines), "", " ".join(sentences(result)), ""])


def sentences(result: dict[str, Any]) -> list[str]:
    """Returns the sentences below a table: people, seconds, machine, and what has changed since."""
    rows = result["rows"]
    n = max(row["scores"]["identity"]["n"] for row in rows.values() if row["scores"].get("identity"))
    pictures = len(result["prompts"]) * len(result["seeds"])
    people = f"{n} people that no training has seen, {pictures} pictures each"
    found = [f"{people}; mean and 95 % interval over people."]
    if (most := max(row["cost"].get("together", 1) for row in rows.values())) > 1:
        found.append(f"Together: a person's share of the seconds when {most} people are made together.")
    found += recipe_of(result["experiment"]).get("notes", ())
    commit, _, dirty = result["environment"].get("commit", "unknown").partition("-")
    changed = " with uncommitted changes" if dirty else ""
    found.append(f"{result['machine']}; commit {commit[:12]}{changed}.")
    if of_other_weights(result):
        found.append("**With that commit's weights, not today's.**")
    if of_other_training(result):
        found.append("**The same settings would train other weights today.**")
    return found


def tables(text: str) -> str:
    """Returns a page with every table made from its result; a marker without a result stays empty."""

    def fill(match: re.Match[str]) -> str:
        file = HERE / "results" / f"{match['name']}.json"
        made = table(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ""
        return f"{match[1]}{made}{match[4]}"

    return MARK.sub(fill, text)


def draw_plots(name: str) -> None:
    """Draws the plots that a recipe asks for from its result, if there is one, into docs/."""
    from hyperdreambooth.evaluate.plots import write_plots

    recipe, file = recipe_of(name), HERE / "results" / f"{name}.json"
    if not recipe.get("plots") or not file.is_file():
        return
    result = json.loads(file.read_text(encoding="utf-8"))
    rows = {row: result["rows"][row] for row in recipe.get("plotted", result["rows"])}
    with TemporaryDirectory() as folder:
        made = write_plots({**result, "rows": rows}, Path(folder))
        for plot in {f"{plot}.png" for plot in recipe["plots"]} & set(made):
            shutil.copy(Path(folder) / plot, HERE.parent / "docs" / f"{name}-{plot}")


def main() -> None:
    """Runs the experiment, then rewrites the pages' tables and plots."""
    known = sorted(file.stem for file in (HERE / "experiments").glob("*.toml"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=known)
    parser.add_argument("--out", type=Path, help="photos and pictures [out/experiments/NAME]")
    parser.add_argument("--tables", action="store_true", help="rewrite tables and plots, and stop")
    chosen, words = parser.parse_known_args()
    if not chosen.tables:
        if chosen.name is None:
            parser.error(f"name an experiment: {', '.join(known)}")
        print(run(chosen.name, chosen.out or Path("out/experiments") / chosen.name, words))
    for page in PAGES:
        page.write_text(tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name in known:
        draw_plots(name)


if __name__ == "__main__":
    main()
