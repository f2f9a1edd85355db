"""The log of a run goes to the trackers that the environment names."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from hyperdreambooth.files import InputError
from hyperdreambooth.runs import Run


class Nothing(BaseModel):
    """No settings."""


def test_tensorboard_has_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("HDB_TRACKERS", "tensorboard")
    run = Run(tmp_path, Nothing())
    for step in (1, 2):
        run.log(step, loss=0.5 / step, picture="a.png", norm=float("nan"))
    found = reader.EventAccumulator(str(tmp_path / "trackers" / "hyperdreambooth")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert "norm" not in found.Tags()["scalars"]


@pytest.mark.parametrize(
    ("names", "words"), [("tensorbord", "expected names among"), ("aim", "not installed")]
)
def test_a_tracker_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, words: str
) -> None:
    monkeypatch.setenv("HDB_TRACKERS", names)
    with pytest.raises(InputError, match=f"HDB_TRACKERS: .*{words}"):
        Run(tmp_path, Nothing()).log(1, loss=0.5)
