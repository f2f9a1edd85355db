"""The table of `benchmarks/gpu.py`, at micro sizes on the CPU, so that it runs where a GPU is at hand."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from hyperdreambooth.base.load import Base, load_base


@pytest.mark.slow
def test_every_row_is_measured(micro_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import gpu

    rows: Any = gpu.Rows(micro_base, tmp_path, steps=3, drawn=3, crowds=(2,))
    made = gpu.measured(rows, time.monotonic() + 1e6)
    assert not {name: row for name, row in made.items() if "failed" in row}
    assert all(row.get("seconds", row.get("samples_a_second")) > 0 for row in made.values())
    assert made["people, 2"]["people"] == 2
    shares = made["where a step goes"]["share"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert shares["matrix products"] > 0 and shares["optimiser"] > 0 and shares["convolutions"] > 0
    late = gpu.measured(rows, 0.0)
    assert set(late) == set(made) and all(row == {"left out": "no time"} for row in late.values())


def test_a_row_that_fails_says_why(micro_base: Base) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        import gpu

        def fails() -> dict[str, Any]:
            raise RuntimeError("out of memory\nand more")

        assert gpu.attempt(micro_base, fails) == {"failed": "RuntimeError: out of memory"}


@pytest.mark.slow
def test_wearing_costs_at_most_eight_kernels_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import launches

    made = launches.rows(load_base(None, "cpu", "bfloat16"))
    assert {name: row["all"] for name, row in made.items() if row["all"] > 8} == {}


def test_the_page_has_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import gpu

    left_out = {"left out": "no time"}
    one = {"tflop_a_sample": 1.7, "people, 8": {"ms_a_step": 80.0, "people": 8}, "pictures, 1": left_out}
    warm = {"ms_a_step": 32.2, "people": 1, gpu.SAVED: 1.477}
    other = {"ours, warm": warm, "people, 8": {"failed": "OutOfMemoryError"}, "pictures, 1": left_out}
    made = gpu.table({"bases": {"one": one, "other": other}})
    assert made.splitlines() == [
        "|  | one | other |",
        "| --- | --- | --- |",
        "| people, 8 | 10 ms a person | OutOfMemoryError |",
        "| ours, warm |  | 32 ms; 1.48 s to the file |",
    ]
    text = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    assert gpu.page(text, json.loads(gpu.RESULTS.read_text())) == text
