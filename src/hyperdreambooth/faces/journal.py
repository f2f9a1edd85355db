"""What `prepare` knows of every photo: appended line by line, so that a killed run goes on where it was.

Each run appends to a file of its own: so two runs at once never write into one line, and a kill costs the
line it falls into.
"""

from __future__ import annotations

import json
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from hyperdreambooth.faces.landmarks import Landmarks, as_landmarks


@dataclass(frozen=True)
class Record:
    """What became of one photo.

    Attributes:
        name: of its crop, without folder and ending.
        photo: where it came from.
        content: fingerprint of photo, caption and landmarks.
        reason: why it was dropped; empty where it was kept.
        caption: or None.
        landmarks: in the crop.
        thumb: a dropped photo, small, as a JPEG in base64; empty where it could not be opened.
    """

    name: str
    photo: str
    content: str
    reason: str = ""
    caption: str | None = None
    landmarks: Landmarks | None = None
    thumb: str = ""

    @property
    def kept(self) -> bool:
        """Whether there is a crop."""
        return not self.reason


class Journal:
    """The records of a folder; `add` writes one down at once.

    Args:
        folder: of the journal's files, made when the first record comes.

    Attributes:
        known: name → its newest record, of all earlier runs.
        ever_kept: names that had a crop in any of them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: TextIO | None = None
        lines = _read(folder)
        self.known = {record.name: record for record in lines}
        self.ever_kept = {record.name for record in lines if record.kept}

    def add(self, record: Record) -> None:
        """Appends a line."""
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl").open(
                "a", encoding="utf-8"
            )
        self._file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Ends this run's file."""
        if self._file is not None:
            self._file.close()


def _read(folder: Path) -> list[Record]:
    """All whole lines of all runs, the oldest first."""
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    found: list[Record] = []
    for line in "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files).split("\n"):
        with suppress(ValueError, TypeError):
            found.append(_record(json.loads(line)))
    return found


def _record(fields: dict[str, Any]) -> Record:
    points = fields.pop("landmarks", None)
    return Record(**fields, landmarks=None if points is None else as_landmarks(points))
