"""The records of `prepare`, in SQLite: a killed run continues after the last photo that it recorded."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass
from pathlib import Path

from hyperdreambooth.faces.landmarks import Landmarks, as_landmarks
from hyperdreambooth.files import InputError

_TABLE = "CREATE TABLE IF NOT EXISTS records (name TEXT PRIMARY KEY, ever_kept INTEGER, record TEXT)"
_ADD = """INSERT INTO records VALUES (?, ?, ?) ON CONFLICT (name)
DO UPDATE SET ever_kept = max(ever_kept, excluded.ever_kept), record = excluded.record"""


@dataclass(frozen=True)
class Record:
    """The outcome for one photo."""

    name: str  # the crop's, without folder and extension
    photo: str  # where the photo came from
    content: str  # fingerprint of photo, caption and landmarks
    reason: str = ""  # why the photo was dropped; empty if it was kept
    caption: str | None = None
    landmarks: Landmarks | None = None  # in pixels of the crop
    thumb: str = ""  # a small base64 JPEG of a dropped photo; empty if it could not be opened

    @property
    def kept(self) -> bool:
        """Whether there is a crop."""
        return not self.reason


class Journal:
    """The newest record of every photo of an output folder. Several runs may use it at the same time.

    `known` are the records of earlier runs by name, `ever_kept` the names that had a crop after any of them.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(file, timeout=60, isolation_level=None)
        try:
            # a kill loses nothing; waiting for the disk, which only a power cut needs, takes 15 ms per photo
            self._database.execute("PRAGMA synchronous = OFF")
            self._database.execute(_TABLE)
            rows = self._database.execute("SELECT name, ever_kept, record FROM records").fetchall()
        except sqlite3.DatabaseError as error:
            self.close()
            raise InputError(f"{file}: not a journal of prepare ({error}); delete it and run again") from None
        self.known = {name: _record(text) for name, _, text in rows}
        self.ever_kept = {name for name, ever_kept, _ in rows if ever_kept}

    def add(self, record: Record) -> None:
        """Replaces a photo's record, so that a later kill cannot lose it; a full disk is an `OSError`."""
        try:
            self._database.execute(_ADD, (record.name, record.kept, json.dumps(asdict(record))))
        except sqlite3.OperationalError as error:
            raise OSError(f"the journal of prepare cannot be written ({error})") from None

    def close(self) -> None:
        """Closes the database."""
        self._database.close()


def _record(text: str) -> Record:
    fields = json.loads(text)
    points = fields.pop("landmarks")
    return Record(**fields, landmarks=None if points is None else as_landmarks(points))
