"""What can be seen of a run from its events: how far, how fast, and whether its process is still there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import error, hdb
from hyperdreambooth.apps.watch import duration, rows
from hyperdreambooth.cluster.shards import Shard
from hyperdreambooth.cluster.training import told as loss_of
from hyperdreambooth.events import SILENT, Events, alive, read_events, status_of
from hyperdreambooth.files import InputError
from hyperdreambooth.progress import Progress

START = {"event": "start", "time": 1000.0, "title": "train", "total": 400, "done": 100, "host": "h", "pid": 7}


def told(*more: dict[str, Any]) -> list[dict[str, Any]]:
    return [START, *more]


def at(time: float, kind: str = "progress", **facts: Any) -> dict[str, Any]:
    return {"event": kind, "time": time, **facts}


def test_how_far_how_fast_and_when_it_ends() -> None:
    events = told(at(1010, done=120, values="loss 0.5"), at(1015, "checkpoint", step=120), at(1050, done=200))
    status = status_of(events, 1060.0, lambda _: True)
    assert status is not None and status.state == "running"
    assert (status.done, status.total, status.rate, status.silent) == (200, 400, 2.0, 10.0)
    assert status.left == 200 / 2.0 - 10 and status.checkpoint == 120 and status.values == "loss 0.5"
    shown = dict(rows(status))
    assert shown["done"] == "200 of 400, 50%" and shown["ends"].startswith("in 1 min 30 s, at ")
    assert shown["run"] == "train on h, process 7" and shown["speed"] == "2 a second"


def test_units_and_lost_workers_of_the_last_start_count() -> None:
    first = told(at(1001, "unit", done=132), at(1002, "lost", what="gone before"))
    again = [
        {**START, "time": 2000.0, "total": None},
        at(2007, "unit", done=101),
        at(2008, "lost", what="gpu 3"),
    ]
    status = status_of([*first, *again], 2010.0, lambda _: True)
    assert status is not None and status.units == 1 and status.lost == ["gpu 3"] and status.starts == 2
    shown = dict(rows(status))
    assert shown["lost"] == "1, the last one: gpu 3" and shown["started"] == "2 times"
    assert shown["done"] == "101" and "ends" not in shown and shown["speed"] == "0.143 a second"


def test_a_training_that_a_loss_restarts_is_one_command() -> None:
    """Whoever is lost counts until somebody starts the command again, and nobody need do that meanwhile."""
    lost = at(1010, "lost", what="worker 1", restart=True)
    after = [at(1011, done=130), at(1012, "error", what="RuntimeError: connection closed")]
    for events in (told(lost), told(lost, *after), told(*after, lost)):
        status = status_of(events, 1020.0, lambda _: False)
        assert status is not None and status.state == "starting again" and status.lost == ["worker 1"]
        late = status_of(events, 1020.0 + SILENT, lambda _: False)
        assert late is not None and late.state.startswith(("ended without a word", "failed"))
    again = told(lost, *after, {**START, "time": 1030.0, "done": 120}, at(1040, done=150))
    status = status_of(again, 1041.0, lambda _: True)
    assert status is not None and status.state == "running" and status.starts == 2
    assert status.lost == ["worker 1"] and status.rate == 3.0
    ended = status_of([*again, at(1050, "end"), lost], 1051.0, lambda _: False)
    assert ended is not None and ended.state == "finished"
    anew = status_of([*again, {**START, "time": 2000.0}], 2001.0, lambda _: True)
    assert anew is not None and anew.lost == [] and anew.starts == 3


@pytest.mark.parametrize(
    ("events", "living", "now", "state"),
    [
        ([], False, 1001.0, "ended without a word"),
        ([], None, 1001.0, "running"),
        ([], None, 1400.0, "silent on h"),
        ([], True, 9999.0, "running"),
        ([at(1001, "end")], False, 9999.0, "finished"),
        ([at(1001, "error", what="interrupted")], False, 9999.0, "interrupted"),
        ([at(1001, "error", what="lower lr")], False, 9999.0, "failed: lower lr"),
    ],
)
def test_the_state(events: list[dict[str, Any]], living: bool | None, now: float, state: str) -> None:
    status = status_of(told(*events), now, lambda _: living)
    assert status is not None and status.state.startswith(state)
    assert status.left is None


def test_nothing_has_started(tmp_path: Path) -> None:
    assert status_of([], 0.0) is None and rows(None) == [("state", "not started")]
    assert read_events(tmp_path / "none") == []
    (tmp_path / "events.jsonl").write_text('[1]\n{"event": "end"}\n{"event": "start", "ti')
    assert read_events(tmp_path / "events.jsonl") == []


def test_a_bar_tells(tmp_path: Path) -> None:
    events = Events(tmp_path / "run" / "events.jsonl")
    with Progress("finetune", 9, done=2, events=events) as bar:
        bar.start_at(4)
        bar.update(1, loss=0.25)
        bar.update(1, loss=0.125)
    found = read_events(events.file)
    assert [event["event"] for event in found] == ["start", "progress", "progress", "end"]
    assert [event.get("done") for event in found] == [2, 4, 6, None]
    assert found[2]["values"] == "loss 0.125" and alive(found[0])
    assert alive({**found[0], "born": 1.0}) is False and alive({**found[0], "host": "elsewhere"}) is None
    for mistake, what in ((InputError("lower lr"), "lower lr"), (KeyError("x"), "KeyError: 'x'")):
        with pytest.raises(type(mistake)), Progress("finetune", 9, events=events):
            raise mistake
        assert read_events(events.file)[-1]["what"] == what
    with pytest.raises(KeyboardInterrupt), Progress("finetune", 9, events=events):
        raise KeyboardInterrupt
    assert read_events(events.file)[-1]["what"] == "interrupted"


KILLED = """
import os, signal, sys
from pathlib import Path
from hyperdreambooth.events import Events
from hyperdreambooth.progress import Progress

with Progress("train", 9, events=Events(Path(sys.argv[1]))) as bar:
    bar.update(3)
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_was_killed_is_seen_as_such(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path / "run" / "events.jsonl")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert "running" in hdb("watch", tmp_path).stdout
        os.kill(process.pid, signal.SIGKILL)
        process.stdout.read()
        process.wait()
    shown = hdb("watch", tmp_path / "run", code=1).stdout
    assert "ended without a word" in shown and "done         0 of 9, 0%" in shown


def test_watch_shows_the_shards_that_have_finished(tmp_path: Path) -> None:
    units = [f"unit-{k}" for k in range(40)]
    for number in (0, 3, 14):
        Shard(number, 15).record(tmp_path, {}, Shard(number, 15).part(units))
    shown = hdb("watch", tmp_path).stdout
    assert shown.startswith("shards       3 of 15 finished, 8 units; not finished: 1/15, 2/15, 4/15")
    assert ", 11/15, …; their own logs say more" in shown and "12/15" not in shown
    for number in range(15):
        Shard(number, 15).record(tmp_path, {}, Shard(number, 15).part(units))
    Events(tmp_path / "events.jsonl").add("start", title="earlier", total=1, done=0)
    Events(tmp_path / "events.jsonl").add("end")
    lines = hdb("watch", tmp_path).stdout.splitlines()
    assert lines[1] == "state        finished"
    assert lines[-1] == "shards       15 of 15 finished, 40 units; now run --shard merge"


def test_watch_says_what_is_wrong(tmp_path: Path) -> None:
    assert "expected the --out of a run, found no events.jsonl" in error("watch", tmp_path)
    assert "no events.jsonl" in error("watch", tmp_path / "none")


def test_durations() -> None:
    times = [(0.4, "0 s"), (59.6, "1 min 0 s"), (3 * 3600 + 300, "3 h 5 min"), (2.5 * 86400, "2 d 12 h")]
    for seconds, text in times:
        assert duration(seconds) == text


def test_every_line_is_json(tmp_path: Path) -> None:
    Events(tmp_path / "e").add("lost", what="ü\n")
    assert json.loads((tmp_path / "e").read_text())["what"] == "ü\n"


def test_a_loss_is_told_with_its_machine_and_its_reason() -> None:
    class Died(Exception):
        """As Ray words it."""

    class Wrapped(Exception):
        health_check_failure = Died("The actor died.\n\tpid: 7\n\tip: 10.0.0.5\nits node has died")

    silent = Wrapped()
    silent.health_check_failure = Died("nobody answers")
    errors = {2: silent, 1: Wrapped(), 0: RuntimeError("connection closed\nby peer")}
    assert loss_of(errors) == (
        "worker 0 (RuntimeError: connection closed), worker 1 (10.0.0.5, Died), worker 2 (Died); all go on "
        "from the last checkpoint"
    )
    assert loss_of({k: KeyError("x") for k in range(9)}).endswith(
        "worker 3 (KeyError: 'x') and 5 more; all go on from the last checkpoint"
    )
