"""Runs an experiment of experiments/ and writes its figures to results/; the pages' tables come of these.

    python benchmarks/experiment.py avatars-small                  # benchmarks/results/avatars-small.json
    python benchmarks/experiment.py avatars --identities 16        # fewer people first; run again for all
    python benchmarks/experiment.py --tables                       # only writes the tables anew

It is `hdb avatars render` and `hdb evaluate` with a preset: run again, it goes on where it was.
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
from typing import Any

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "evaluation.md")
MARK = re.compile(
    r"(<!-- results/(?P<name>[\w-]+)\.json -->\n)(?P<table>.*?)(<!-- end of results -->)", re.DOTALL
)
KEPT = (
    "config", "base", "network", "prompts", "seeds", "judges", "rows", "paired", "missing", "seconds",
    "environment",
)  # fmt: skip
COLUMNS = ("identity", "prompt", "background_copied", "diversity")


def hdb(*words: object) -> None:
    """One command, in a process of its own, as a user would run it."""
    subprocess.run([sys.executable, "-m", "hyperdreambooth", *map(str, words)], check=True)


def recipe_of(name: str) -> dict[str, Any]:
    """The experiment's file."""
    return tomllib.loads((HERE / "experiments" / f"{name}.toml").read_text(encoding="utf-8"))


def run(name: str, out: Path, words: list[str]) -> Path:
    """Renders the people, evaluates, and keeps the figures.

    Args:
        name: of a file in experiments/.
        out: where photos and pictures go.
        words: further words of `hdb evaluate`.
    """
    recipe = recipe_of(name)
    photos = [word for key, value in recipe["photos"].items() for word in (f"--{key}", value)]
    chosen = [f"{key}={json.dumps(value)}" for key, value in recipe["set"].items()]
    settings = [word for setting in chosen for word in ("--set", setting)]
    hdb("avatars", "render", "--out", out / "photos", *photos)
    evaluation = ["--out", out / "evaluation", "--identities", recipe["photos"]["identities"]]
    if "hypernet" in recipe:
        evaluation += ["--hypernet", recipe["hypernet"]]
    hdb("evaluate", out / "photos", "--preset", recipe["preset"], *evaluation, *settings, *words)
    report = json.loads((out / "evaluation" / "report.json").read_text(encoding="utf-8"))
    result = {"experiment": name, "machine": machine(), **{key: report[key] for key in KEPT}}
    for row in recipe.get("sheets", ()):
        shutil.copy(out / "evaluation" / "sheets" / f"{row}.jpg", HERE.parent / "docs" / f"{name}-{row}.jpg")
    file = HERE / "results" / f"{name}.json"
    file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def machine() -> str:
    """Processor, cores and memory; the accelerator where there is one."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    found = re.search(r"model name\s*: (.*)", info)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [found[1] if found else platform.processor(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB"]
    parts += [f"threads: {torch.get_num_threads()}"]
    return ", ".join(parts + ([torch.cuda.get_device_name()] if torch.cuda.is_available() else []))


@cache
def shipped() -> tuple[str, dict[str, Any] | None]:
    """What a result says of its base and its hypernetwork, for those that ship today."""
    from hyperdreambooth.evaluate.report import network_facts
    from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET, load_hypernet

    network = load_hypernet(EMBEDDED_HYPERNET)
    return network.info.base_fingerprint, network_facts(network)


def outdated(result: dict[str, Any]) -> bool:
    """Whether its base or hypernetwork ships no more; a recipe may name a hypernetwork of its own."""
    base, network = shipped()
    own = "hypernet" in recipe_of(result["experiment"])
    return result["base"]["fingerprint"] != base or (not own and result["network"] not in (None, network))


def table(result: dict[str, Any]) -> str:
    """The table of an experiment: likeness, prompt following, what is copied, what a person costs."""
    from hyperdreambooth.evaluate.report import cell

    columns = [c for c in COLUMNS if any(row["scores"].get(c) for row in result["rows"].values())]
    lines = [["method", "steps", *columns, "seconds a person"]]
    for name, row in result["rows"].items():
        cost, values = row["cost"], [cell(row["scores"].get(column)) for column in columns]
        seconds = f"{cost['seconds']:.3g}" if cost.get("seconds") else "–"
        lines.append([name, f"{cost['steps']:.4g}" if cost else "–", *values, seconds])
    n = max(
        row["scores"]["identity"]["n"] for row in result["rows"].values() if row["scores"].get("identity")
    )
    rows = [f"| {' | '.join(line)} |" for line in lines]
    pictures = len(result["prompts"]) * len(result["seeds"])
    told = (
        f"{n} people that no training has seen, {pictures} pictures each; mean and 95 % interval over people."
    )
    place = f"{result['machine']}; commit {result['environment'].get('commit', 'unknown')[:12]}."
    old = " **With that commit's weights, not today's.**" if outdated(result) else ""
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:], "", f"{told} {place}{old}", ""])


def tables(text: str) -> str:
    """A page with every table as its result says; a marker without a result keeps its place empty."""

    def fill(match: re.Match[str]) -> str:
        file = HERE / "results" / f"{match['name']}.json"
        made = table(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ""
        return f"{match[1]}{made}{match[4]}"

    return MARK.sub(fill, text)


def main() -> None:
    """Runs what was asked for, then writes the pages' tables."""
    known = sorted(file.stem for file in (HERE / "experiments").glob("*.toml"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=known)
    parser.add_argument("--out", type=Path, help="photos and pictures [out/experiments/NAME]")
    parser.add_argument("--tables", action="store_true", help="write the tables and stop")
    chosen, words = parser.parse_known_args()
    if not chosen.tables:
        if chosen.name is None:
            parser.error(f"name an experiment: {', '.join(known)}")
        print(run(chosen.name, chosen.out or Path("out/experiments") / chosen.name, words))
    for page in PAGES:
        page.write_text(tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
