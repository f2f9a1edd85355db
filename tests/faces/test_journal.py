"""The journal of `prepare`: what it wrote is what it reads."""

from __future__ import annotations

from pathlib import Path

import portrait
from hyperdreambooth.faces.journal import Journal, Record


def test_a_journal_line_says_all(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    made = Record("ana/1", "x.jpg", "ab", caption="ü", landmarks=portrait.LANDMARKS)
    for record in (made, Record("b", "y.jpg", "cd", "blurred", thumb="AAAA"), Record("b", "y.jpg", "ef")):
        journal.add(record)
    journal.close()
    again = Journal(tmp_path)
    assert again.known == {"ana/1": made, "b": Record("b", "y.jpg", "ef")}
    assert again.ever_kept == {"ana/1", "b"}
