"""The files of the service, in one folder for each owner (a person or a job), named by their content.

An owner's files change in a transaction that writes (`Database.write`). So whatever has no row is rubbish of
a process that was killed, and `sweep` removes it. Files are prepared outside of the transaction, in a folder
of `work`. A worker's is named by job and fence, and becomes rubbish with the worker's right to the job.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from hyperdreambooth.files import discard, write_bytes
from hyperdreambooth.serve.tables import File, Job, new_id


@dataclass(frozen=True)
class Made:
    """A file that is to become its owner's.

    Attributes:
        kind: what it is.
        content: all of it.
        media: its media type.
        file: where a worker has written it already, in the folder of the job; None for nowhere.
    """

    kind: str
    content: bytes
    media: str
    file: Path | None = None


class Store:
    """The folder of files; `work` is where they are prepared."""

    def __init__(self, data: Path) -> None:
        self.files, self.work = data / "files", data / "work"
        for folder in (data, self.files, self.work):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)

    def path(self, file: File) -> Path:
        """Returns where a file lies."""
        return self.files / file.owner / file.hash

    def read(self, file: File) -> bytes:
        """Returns a file's content."""
        return self.path(file).read_bytes()

    def stage(self, name: str, made: Sequence[Made]) -> None:
        """Writes files into a folder of `work`, whole and flushed, so that `publish` only has to rename."""
        for one in made:
            place = self.work / name / _hash(one)
            if one.file is None:
                write_bytes(place, one.content)
            else:
                os.replace(one.file, place)

    def publish(self, session: Session, owner: str, made: Sequence[Made], staged: str) -> None:
        """Makes files their owner's: moves them from the folder of `work` in which they were staged."""
        (self.files / owner).mkdir(exist_ok=True)
        for number, one in enumerate(made):
            name = _hash(one)
            source, place = self.work / staged / name, self.files / owner / name
            if source.exists():
                os.replace(source, place)
            elif not place.exists():  # swept since; a file may also be there twice, as two equal pictures
                write_bytes(place, one.content)
            about = {"kind": one.kind, "hash": name, "bytes": len(one.content), "media": one.media}
            session.add(File(id=new_id("file"), owner=owner, number=number, **about))

    def remove(self, owner: str, hashes: Iterable[str] | None = None) -> None:
        """Deletes some files of an owner, or the owner's folder."""
        if hashes is None:
            discard(self.files / owner)
        else:
            for name in hashes:
                discard(self.files / owner / name)

    def sweep(self, session: Session) -> int:
        """Deletes what no row names, in a transaction that writes; returns how many files and folders."""
        known = {(owner, name) for owner, name in session.execute(select(File.owner, File.hash))}
        running = select(Job.id, Job.fence).where(Job.state == "running")
        at_work = {f"{job}-{fence}" for job, fence in session.execute(running)}
        owners = {owner for owner, _ in known}
        rubbish = [folder for folder in self.files.iterdir() if folder.name not in owners]
        rubbish += [file for file in _inside(self.files) if (file.parent.name, file.name) not in known]
        rubbish += [folder for folder in self.work.iterdir() if folder.name not in at_work]
        for path in rubbish:
            discard(path)
        return len(rubbish)


def _inside(folder: Path) -> Iterator[Path]:
    return (file for owner in folder.iterdir() if owner.is_dir() for file in owner.iterdir())


def _hash(made: Made) -> str:
    return hashlib.sha256(made.content).hexdigest()
