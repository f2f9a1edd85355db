"""The journal of `prepare`: it reads what it wrote, and refuses what is no journal."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

import portrait
import processes
from hyperdreambooth.faces.journal import Journal, Record
from hyperdreambooth.files import InputError

SQUARE = ((0.1, 0.0), (1.0, 0.0), (1.0, 1.0), (0.1, 1.0))
KEPT = Record("ana/1", "x.jpg", "ab", caption="ü", landmarks=portrait.LANDMARKS, corners=SQUARE)


def test_a_journal_keeps_the_newest_record(tmp_path: Path) -> None:
    file = tmp_path / "out" / ".journal.sqlite"
    records = (KEPT, Record("b", "y.jpg", "ab"), Record("b", "y.jpg", "cd", "blurred", thumb="AAAA"))
    with closing(Journal(file)) as journal:
        for record in (*records, Record("c", "z.jpg", "ef", "blurred")):
            journal.add((record,))
        faces = tuple(Record("d", "d.jpg", "gh", number=number) for number in (1, 2, 3))
        journal.add(faces)
        journal.add(faces[:2])
    with closing(Journal(file)) as again:
        third = Record("c", "z.jpg", "ef", "blurred")
        assert again.known == {"ana/1": (KEPT,), "b": (records[2],), "c": (third,), "d": faces[:2]}
        assert again.ever_kept == {"ana/1", "b", "d-1", "d-2", "d-3"}


def killed(file: Path) -> None:
    Journal(file).add((KEPT,))
    os.kill(os.getpid(), signal.SIGKILL)


@processes.CHEAP
def test_a_record_survives_a_kill(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / "j")) as journal:  # of a second run at the same time
        process = processes.start(killed, tmp_path / "j")
        process.join()
        journal.add((Record("b", "y.jpg", "cd"),))
    with closing(Journal(tmp_path / "j")) as again:
        assert again.known.keys() == {"ana/1", "b"}


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("[]" * 999)
    with pytest.raises(InputError, match=r"j: not a journal of prepare .*; delete it"):
        Journal(tmp_path / "j")
