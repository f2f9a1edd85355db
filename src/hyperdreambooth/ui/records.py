"""What the page knows: one folder a person and one a drawing, which outlive the tab and the program.

people/ID/person.json           name, settings, state, the step that is kept
people/ID/photos/               the crops that the person is made from
people/ID/looks/00005-0.png     the pictures after 5 steps; 00005.safetensors, the person of that step;
                                00005.json, its scores, written last
people/ID/training/             log and checkpoints of the finetune
people/ID/person.safetensors …  the files to use elsewhere, README.md, report.json
drawings/ID/drawing.json        what was asked for; 0-0.png …, the pictures
"""

from __future__ import annotations

import json
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from hyperdreambooth.files import InputError, read_json, write_json

State = Literal["waiting", "running", "done", "stopped", "failed"]


class Record(BaseModel):
    """A job, and what became of it.

    Attributes:
        made: when it was asked for, in seconds since 1970.
        message: one sentence about the state; empty where the state says all.
    """

    made: float = Field(default_factory=time.time)
    state: State = "waiting"
    message: str = ""


class Person(Record):
    """A person in the making, or made.

    Attributes:
        name: as the user wrote it.
        changed: the settings that the user changed, over those of the command.
        anyway: whether photos that are far from the hypernetwork's training are finetuned all the same.
        last: the step at which the finetune ends; 0 before it has begun.
        proposed: the step that is proposed, and why.
        kept: the step that the files hold.
        files: what → file name.
        seconds: stage → seconds.
        notes: sentences about the photos.
    """

    name: str
    changed: dict[str, int] = {}
    anyway: bool = False
    last: int = 0
    proposed: int | None = None
    why: str = ""
    kept: int | None = None
    files: dict[str, str] = {}
    seconds: dict[str, float] = {}
    notes: tuple[str, ...] = ()


class Drawing(Record):
    """Pictures that were asked for.

    Attributes:
        weights: person → weight, of the people whose sum is drawn; empty for the bare base.
        beside: the person who is drawn beside them from the same noise; `BASE` for the bare base; or nobody.
        labels: a line for each row of pictures.
        prompts: one or more.
        seeds: every prompt is drawn with each of them.
    """

    weights: dict[str, float]
    beside: str = ""
    labels: tuple[str, ...] = ()
    prompts: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)

    @property
    def columns(self) -> list[tuple[str, int]]:
        """Prompt and seed of every column."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


BASE = "the base model"
FILES: Mapping[type[Record], str] = {Person: "person.json", Drawing: "drawing.json"}
Kind = TypeVar("Kind", bound=Record)


@dataclass(frozen=True)
class Seen:
    """The person after some steps: scores (None where nothing can be scored) and pictures."""

    step: int
    scores: Mapping[str, float | None]
    pictures: tuple[Path, ...]


def read(folder: Path, kind: type[Kind]) -> Kind:
    """Reads the record of a folder.

    Raises:
        InputError: the record is missing or damaged.
    """
    file = folder / FILES[kind]
    try:
        return kind.model_validate(read_json(file))
    except ValidationError:
        raise InputError(f"{file}: is damaged; delete the folder {folder.name}") from None


def write(folder: Path, record: Record) -> None:
    """Writes the record of a folder, whole."""
    write_json(folder / FILES[type(record)], record.model_dump(mode="json"))


def every(folder: Path, kind: type[Kind]) -> dict[str, Kind]:
    """Returns the readable records of all folders in a folder by id, the newest first."""
    found = dict[str, Kind]()
    for file in folder.glob(f"[!.]*/{FILES[kind]}"):
        with suppress(InputError):
            found[file.parent.name] = read(file.parent, kind)
    return dict(sorted(found.items(), key=lambda entry: -entry[1].made))


def told_apart(names: Mapping[str, str]) -> dict[str, str]:
    """Returns names by key; those that several have are followed by the key."""
    count = Counter(names.values())
    return {key: f"{name} ({key})" if count[name] > 1 else name for key, name in names.items()}


def new_folder(home: Path, name: str) -> Path:
    """Makes a folder of its own for a name: plain letters, with a number where the name is taken."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    stem = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:40] or "person"
    home.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = home / (stem if number == 1 else f"{stem}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


def look_file(folder: Path, step: int, ending: str) -> Path:
    """Returns a file of a look: `.json`, `.safetensors`, `-0.png`, …"""
    return folder / "looks" / f"{step:05d}{ending}"


def looks(folder: Path) -> list[Seen]:
    """Returns the looks at a person, by step."""
    found = list[Seen]()
    for file in sorted((folder / "looks").glob("[0-9]*.json")):
        with suppress(InputError):
            step = int(file.stem)
            pictures = sorted(file.parent.glob(f"{file.stem}-*.png"))
            found.append(Seen(step, read_json(file), tuple(pictures)))
    return found


def losses(folder: Path) -> list[tuple[int, float]]:
    """Returns the steps and losses of the training's log; a kill may have cut off its last line."""
    file, found = folder / "training" / "log.jsonl", dict[int, float]()
    if not file.is_file():
        return []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            found[int(entry["step"])] = float(entry["loss"])  # null, of a ruined step, is left out
    return sorted(found.items())


def nearest(seen: list[Seen], step: float) -> Seen | None:
    """Returns the look whose step is nearest to one of the slider."""
    return min(seen, key=lambda one: abs(one.step - step), default=None)
