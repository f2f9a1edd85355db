"""Progress: plain lines, at most one every ten seconds; a bar on a terminal; silence when asked."""

from __future__ import annotations

import io

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
    monkeypatch.delenv("HDB_QUIET", raising=False)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("finetune [V]", 50, done=10) as bar:
        for step in range(40):
            clock.now += 0.7
            bar.update(1, loss=step / 3, note="warm")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "finetune [V] 25/50, 10 s, 1.43/s, loss 4.667 note warm",
        "finetune [V] 40/50, 21 s, 1.43/s, loss 9.667 note warm",
        "finetune [V] 50/50, 28 s, 1.43/s, loss 13 note warm",
    ]


def test_an_interrupted_job_says_how_far_it_came(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Progress("train", 9) as bar:
        bar.update(4)
        clock.now = 2
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "train 4/9, 2 s, 2/s\n"


def test_quiet(clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDB_QUIET", "1")
    with Progress("train", 9) as bar:
        clock.now = 99
        bar.update(4)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HDB_QUIET", raising=False)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=150)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with Progress("outer", 4, done=1) as outer, Progress("inner", 2) as inner:
        inner.update(2, loss=0.12345)
        outer.update(1)
    for words in ("outer", "inner", "2/4", "2/2", "loss 0.1235"):
        assert words in screen.getvalue()


def test_a_stream_has_no_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("prepare", None) as bar:
        for _ in range(3):
            clock.now += 6
            bar.update(1)
    assert capsys.readouterr().err.splitlines() == ["prepare 2, 12 s, 0.167/s", "prepare 3, 18 s, 0.167/s"]
