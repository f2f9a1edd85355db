"""Progress: log records, at most one every ten seconds; a bar on a terminal; nothing when turned off."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from hyperdreambooth import progress
from hyperdreambooth.progress import Progress


class Clock:
    """Stands for the time module."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "hyperdreambooth")
    return caplog


def test_log_records(clock: Clock, records: pytest.LogCaptureFixture) -> None:
    with Progress("finetune [V]", 50, done=10) as bar:
        for step in range(40):
            clock.now += 0.7
            bar.update(1, loss=step / 3, note="warm")
    assert records.messages == [
        "finetune [V] 25/50, 10 s, 1.43/s, loss 4.667 note warm",
        "finetune [V] 40/50, 21 s, 1.43/s, loss 9.667 note warm",
        "finetune [V] 50/50, 28 s, 1.43/s, loss 13 note warm",
    ]


def test_an_interrupted_job_logs_how_far_it_came(clock: Clock, records: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt), Progress("train", 9) as bar:
        bar.update(4)
        clock.now = 2
        raise KeyboardInterrupt
    assert records.messages == ["train 4/9, 2 s, 2/s"]


def test_a_stream_has_no_total(clock: Clock, records: pytest.LogCaptureFixture) -> None:
    with Progress("prepare", None) as bar:
        for _ in range(3):
            clock.now += 6
            bar.update(1)
    assert records.messages == ["prepare 2, 12 s, 0.167/s", "prepare 3, 18 s, 0.167/s"]


def test_a_library_prints_nothing_unless_logging_is_configured(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hyperdreambooth", None):  # the command line and pytest have added handlers
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    with Progress("train", 9) as bar:
        clock.now = 99
        bar.update(4)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def bars(monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal shows of two nested jobs."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=150)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with Progress("outer", 4, done=1) as outer, Progress("inner", 2) as inner:
        inner.update(2, loss=0.12345)
        outer.update(1)
    return screen.getvalue()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.NOTSET, "hyperdreambooth")  # as for a Python user who configured nothing
    screen = bars(monkeypatch)
    for text in ("outer", "inner", "2/4", "2/2", "loss 0.1235"):
        assert text in screen


def test_a_level_above_info_turns_off_bars_and_records(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "hyperdreambooth")
    assert bars(monkeypatch) == "" and not caplog.messages
