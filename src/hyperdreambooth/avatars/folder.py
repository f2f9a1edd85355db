"""Avatars as an ordinary photo folder: from here on they take exactly the road a user's photos take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from hyperdreambooth.avatars.captions import caption
from hyperdreambooth.avatars.draw.render import MOST_PHOTOS, SPLITS, draw, identity, photo_context
from hyperdreambooth.files import InputError, check_writable, read_json, whole_file, write_json
from hyperdreambooth.progress import Progress
from hyperdreambooth.workers import pool, processes


def photo(person: int, number: int, seed: int = 0) -> tuple[Image.Image, str]:
    """A person's photo and its caption."""
    scene = photo_context(person, number, seed)
    return draw(identity(person), scene), caption(scene)


def render_folder(
    out: Path, split: str, identities: int, photos: int, seed: int = 0, workers: int | None = None
) -> list[str]:
    """Writes `out/SPLIT-ID/K.png` with `K.txt` captions and `out/traits.json`; running it again continues.

    Args:
        out: the folder; a longer run over a shorter one adds what is missing.
        split: `base`, `train`, `val` or `test`.
        identities: how many people, the first of the split.
        photos: photos a person; every second one, the first included, is a plain reference photo.
        seed: of the contexts.
        workers: processes; None for one a core.

    Returns:
        The people's names, as their folders are called.

    Raises:
        InputError: an unknown split, counts out of range, a folder of another split or seed, or one that
            cannot be written.
    """
    _check(out, split, identities, photos, seed)
    people = {f"{split}-{person}": person for person in SPLITS[split][:identities]}
    traits = {name: asdict(identity(person)) for name, person in people.items()}
    made_of = {"split": split, "seed": seed, "photos": photos, "identities": traits}
    if not (out / "traits.json").is_file() or read_json(out / "traits.json") != made_of:
        write_json(out / "traits.json", made_of)
    jobs = [
        (out / name, person, photos, seed)
        for name, person in people.items()
        if not _complete(out / name, photos)
    ]
    with Progress("render", len(people)) as bar:
        bar.update(len(people) - len(jobs))
        for _ in _each(jobs, processes(workers)):
            bar.update(1)
    return list(people)


def _check(out: Path, split: str, identities: int, photos: int, seed: int) -> None:
    if split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    for name, count, most in (
        ("identities", identities, len(SPLITS[split])),
        ("photos", photos, MOST_PHOTOS),
    ):
        if not 1 <= count <= most:
            raise InputError(f"{name}: expected 1 to {most}, got {count}")
    if seed < 0:
        raise InputError(f"seed: expected 0 or more, got {seed}")
    check_writable(out)
    if (out / "traits.json").is_file():
        there: Any = read_json(out / "traits.json")
        if (there.get("split"), there.get("seed")) != (split, seed):
            raise InputError(
                f"{out}: holds avatars of split {there.get('split')} and seed {there.get('seed')}, asked for "
                f"{split} and {seed}; use another --out or delete it"
            )


def _complete(folder: Path, photos: int) -> bool:
    """Both files of every photo are there; each was written whole, the caption last."""
    return all((folder / f"{k}{ending}").is_file() for k in range(photos) for ending in (".png", ".txt"))


def _each(jobs: list[tuple[Path, int, int, int]], workers: int) -> Iterator[None]:
    """Runs the jobs, side by side where there are many."""
    if workers == 1 or len(jobs) < 16:
        yield from map(_render_person, jobs)
        return
    with pool(workers) as side_by_side:
        yield from side_by_side.map(_render_person, jobs, chunksize=4)


def _render_person(job: tuple[Path, int, int, int]) -> None:
    folder, person, photos, seed = job
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
