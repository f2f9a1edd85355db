"""The records of `prepare`, in SQLite: a killed run continues after the last photo that it recorded."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyperdreambooth.faces.frame import Corners, as_corners, padded
from hyperdreambooth.faces.landmarks import Landmarks, as_landmarks
from hyperdreambooth.files import InputError

_TABLES = (
    "CREATE TABLE IF NOT EXISTS photos (item TEXT PRIMARY KEY, records TEXT)",
    "CREATE TABLE IF NOT EXISTS crops (name TEXT PRIMARY KEY)",
)


@dataclass(frozen=True)
class Record:
    """The outcome for one photo, or for one face of it."""

    item: str  # the photo's name in its source, without extension
    photo: str  # where the photo came from
    content: str  # fingerprint of photo, caption and landmarks
    reason: str = ""  # why there is no crop; empty if it was kept
    caption: str | None = None
    landmarks: Landmarks | None = None  # in pixels of the crop
    corners: Corners | None = None  # of the true photo, in sides of a padded crop
    number: int = 0  # of the face from left to right, where all faces are taken; 0 otherwise
    faces: int = 1  # how many faces the photo shows
    score: float = 1.0  # the detector's confidence
    sharpness: float = 0.0
    look: str = ""  # of the whole photo, see `check.look`
    thumb: str = ""  # a small base64 JPEG of a dropped photo; empty if it could not be opened

    @property
    def name(self) -> str:
        """The crop's name, without folder and extension.

        Where all faces are taken, every crop has a number, so that no two photos have crops of one name.
        """
        return f"{self.item}-{self.number}" if self.number else self.item

    @property
    def person(self) -> str:
        """The person's name: the crop's folder, or the crop in a flat source."""
        return self.name.partition("/")[0]

    @property
    def padded(self) -> float:
        """The share of the crop that is padding."""
        return 0.0 if self.corners is None else padded(self.corners)

    @property
    def kept(self) -> bool:
        """Whether there is a crop."""
        return not self.reason


class Journal:
    """The newest records of every photo of an output folder. Several runs may use it at the same time.

    `known` are the records of earlier runs by the photo's name, `ever_kept` the names of all crops that any
    of them made.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(file, timeout=60, isolation_level=None)
        try:
            if self._database.execute("SELECT 1 FROM sqlite_master WHERE name = 'records'").fetchone():
                self._database.close()
                older = "made by an older version; pass another --out, or delete the folder"
                raise InputError(f"{file.parent}: {older}")
            # a kill loses nothing; waiting for the disk, which only a power cut needs, takes 15 ms per photo
            self._database.execute("PRAGMA synchronous = OFF")
            for table in _TABLES:
                self._database.execute(table)
            photos = self._database.execute("SELECT item, records FROM photos").fetchall()
            crops = self._database.execute("SELECT name FROM crops").fetchall()
        except sqlite3.DatabaseError as error:
            self.close()
            raise InputError(f"{file}: not a journal of prepare ({error}); delete it and run again") from None
        self.known = {item: tuple(map(_record, json.loads(text))) for item, text in photos}
        self.ever_kept = {name for (name,) in crops}

    def add(self, records: Sequence[Record]) -> None:
        """Replaces a photo's records, so that a later kill cannot lose them; a full disk is an `OSError`."""
        text = json.dumps([asdict(one) for one in records])
        crops = [(one.name,) for one in records if one.kept]
        try:
            self._database.executemany("INSERT OR IGNORE INTO crops VALUES (?)", crops)
            self._database.execute("INSERT OR REPLACE INTO photos VALUES (?, ?)", (records[0].item, text))
        except sqlite3.OperationalError as error:
            raise OSError(f"the journal of prepare cannot be written ({error})") from None

    def close(self) -> None:
        """Closes the database."""
        self._database.close()


def _record(fields: dict[str, Any]) -> Record:
    points, corners = fields.pop("landmarks"), fields.pop("corners")
    return Record(
        **fields,
        landmarks=None if points is None else as_landmarks(points),
        corners=None if corners is None else as_corners(corners),
    )
