"""A job in n processes that know nothing of each other, as SLURM arrays start them, and their merge.

Shard I of N does every N-th unit and writes results that are named by their content. At its end it records
which units those were, and with which settings. The merge believes nothing else: every shard has to be there,
with the same settings, and every unit has to be done exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hyperdreambooth.files import InputError, discard, read_json, write_json

Unit = TypeVar("Unit")

_FOLDER = ".shards"
_ELSEWHERE = ("device",)  # may differ from shard to shard


@dataclass(frozen=True)
class Shard:
    """Part `number`, from 0, of `of` parts."""

    number: int
    of: int

    @staticmethod
    def parse(text: str) -> Shard | None:
        """Reads `I/N`, or `merge`, which is None."""
        if text == "merge":
            return None
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
            raise InputError(f"--shard: expected I/N with I from 0 to N-1, or merge, got {text!r}")
        return Shard(int(number), int(of))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def part(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """Returns the units of this shard."""
        return units[self.number :: self.of]

    def record(self, out: Path, settings: Mapping[str, Any], keys: Sequence[str]) -> None:
        """Records that this shard has done its units, named by `keys`, as the last thing that it does."""
        entry = {"shard": self.number, "of": self.of, "settings": dict(settings), "units": [*keys]}
        write_json(out / _FOLDER / f"{self.number}-of-{self.of}.json", entry)


def check_shards(
    out: Path, settings: Mapping[str, Any], keys: Sequence[str], there: Callable[[str], bool]
) -> None:
    """Refuses to merge unless every unit was done once, by shards with these settings.

    Args:
        out: the folder that the shards wrote to.
        settings: those of the merge.
        keys: the names of all units that there should be.
        there: whether the result of a unit can be found.

    Raises:
        InputError: what is missing, and which shards to run again.
    """
    records = _records(out)
    count = records[0]["of"]
    done = {record["shard"]: record for record in records}
    absent = [f"{k}/{count}" for k in range(count) if k not in done]
    _refuse(out, absent, "not finished")
    for k, record in done.items():
        _check_settings(out, f"{k}/{count}", record["settings"], settings)
    often = Counter(key for record in records for key in record["units"])
    wanted = set(keys)
    strange = [
        k for k, record in done.items() if any(n not in wanted or often[n] > 1 for n in record["units"])
    ]
    _refuse(out, [f"{k}/{count}" for k in strange], "of other input than there is now, or did work twice")
    if left := [key for key in keys if key not in often]:
        everybody = [f"{k}/{count}" for k in range(count)]
        _refuse(out, everybody, f"finished before {len(left)} of {len(keys)} units were added")
    gone = [k for k, record in done.items() if not all(map(there, record["units"]))]
    _refuse(out, [f"{k}/{count}" for k in gone], "recorded as finished, but results are gone")


def finished_shards(out: Path) -> dict[int, dict[int, int]]:
    """Returns the units that each finished shard of a folder did: number of shards → shard → units."""
    found: dict[int, dict[int, int]] = {}
    for record in map(read_json, _files(out)):
        found.setdefault(record["of"], {})[record["shard"]] = len(record["units"])
    return found


def forget_shards(out: Path) -> None:
    """Removes the records of shards that are merged."""
    discard(out / _FOLDER)


def _files(out: Path) -> list[Path]:
    """Returns the records of all finished shards, by their names."""
    return sorted((out / _FOLDER).glob("*-of-*.json"))


def _records(out: Path) -> list[dict[str, Any]]:
    """Returns the records of all finished shards, which have to be parts of one whole."""
    records = [read_json(file) for file in _files(out)]
    if not records:
        raise InputError(f"{out}: no shard has finished here; run all of them first: --shard 0/N to N-1/N")
    if len(counts := {record["of"] for record in records}) > 1:
        found = " and of ".join(map(str, sorted(counts)))
        advice = f"delete {out / _FOLDER} and run all shards of one number again; what is done is kept"
        raise InputError(f"{out}: expected shards of one whole, found parts of {found}; {advice}")
    return records


def _refuse(out: Path, shards: Sequence[str], why: str) -> None:
    if shards:
        some = ", ".join(shards[:10]) + (", …" if len(shards) > 10 else "")
        verb = "shard" if len(shards) == 1 else "shards"
        raise InputError(f"{out}: {verb} {some}: {why}; run --shard {shards[0]} again, then merge")


def _check_settings(out: Path, shard: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for key in sorted({*there, *here} - {*_ELSEWHERE}):
        if there.get(key) != here.get(key):
            found = f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
            raise InputError(f"{out}: shard {shard} had other settings ({found}); run it again with these")
