"""Avatars as an ordinary photo folder, which all commands treat like a user's photos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from hyperdreambooth.avatars.captions import caption
from hyperdreambooth.avatars.draw.people import MOST_PHOTOS, SPLITS, identity, photo_context
from hyperdreambooth.avatars.draw.render import draw
from hyperdreambooth.files import InputError, check_writable, read_json, whole_file, write_json
from hyperdreambooth.progress import Progress
from hyperdreambooth.workers import pool, processes

T = TypeVar("T")


def photo(person: int, number: int, seed: int = 0) -> tuple[Image.Image, str]:
    """Returns a person's photo and its caption."""
    scene = photo_context(person, number, seed)
    return draw(identity(person), scene), caption(scene)


def render_folder(
    out: Path, split: str, identities: int, photos: int, seed: int = 0, workers: int | None = None
) -> list[str]:
    """Writes `out/SPLIT-ID/K.png`, captions `K.txt` and `out/traits.json`; the same call continues.

    Args:
        out: the folder; a call with larger counts adds what is missing.
        split: a name of `SPLITS`.
        identities: how many people, from the first of the split on.
        photos: photos a person; every second one, the first included, is a plain reference photo.
        seed: of the contexts.
        workers: processes; None for one per core.

    Returns:
        The people's names, which are the names of their folders.

    Raises:
        InputError: an unknown split, a count out of range, or a folder that holds another split or seed or
            cannot be written.
    """
    _check(out, split, identities, photos, seed)
    people = {f"{split}-{person}": person for person in SPLITS[split][:identities]}
    traits = {name: asdict(identity(person)) for name, person in people.items()}
    manifest = {"split": split, "seed": seed, "photos": photos, "identities": traits}
    if not (out / "traits.json").is_file() or read_json(out / "traits.json") != manifest:
        write_json(out / "traits.json", manifest)
    tasks = [(out / name, person, photos, seed) for name, person in people.items()]
    tasks = [task for task in tasks if not _complete(task[0], photos)]
    with Progress("render", len(people)) as bar:
        bar.update(len(people) - len(tasks))
        for _ in in_processes(_render_person, tasks, workers if len(tasks) >= 16 else 1, chunk=4):
            bar.update(1)
    return list(people)


def _check(out: Path, split: str, identities: int, photos: int, seed: int) -> None:
    if split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    limits = (("identities", identities, len(SPLITS[split])), ("photos", photos, MOST_PHOTOS))
    for name, count, most in limits:
        if not 1 <= count <= most:
            raise InputError(f"{name}: expected 1 to {most}, got {count}")
    if seed < 0:
        raise InputError(f"seed: expected 0 or more, got {seed}")
    check_writable(out)
    if (out / "traits.json").is_file():
        found: Any = read_json(out / "traits.json")
        if (found.get("split"), found.get("seed")) != (split, seed):
            raise InputError(
                f"{out}: expected avatars of split {split} and seed {seed}, got split {found.get('split')} "
                f"and seed {found.get('seed')}; use another --out or delete it"
            )


def _complete(folder: Path, photos: int) -> bool:
    """Returns whether both files of every photo exist; each was written whole, the caption last."""
    return all((folder / f"{k}{ending}").is_file() for k in range(photos) for ending in (".png", ".txt"))


def in_processes(
    work: Callable[[T], None], tasks: Sequence[T], workers: int | None, chunk: int = 1
) -> Iterable[None]:
    """Does the tasks in processes (`workers` None: one per core, 1: no other), and yields after each one."""
    count = processes(workers)
    if count == 1 or len(tasks) < 2:
        yield from map(work, tasks)
        return
    with pool(count) as running:
        yield from running.map(work, tasks, chunksize=chunk)


def _render_person(task: tuple[Path, int, int, int]) -> None:
    folder, person, photos, seed = task
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(photos):
        picture, words = folder / f"{number}.png", folder / f"{number}.txt"
        if picture.is_file() and words.is_file():
            continue
        image, text = photo(person, number, seed)
        with whole_file(picture) as part:
            image.save(part, format="PNG")
        with whole_file(words) as part:
            part.write_text(text + "\n", encoding="utf-8")
