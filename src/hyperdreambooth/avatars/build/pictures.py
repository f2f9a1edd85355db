"""Many rendered avatars at once, cached on disk: what every model of the embedded world is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hyperdreambooth.avatars.captions import ATTRIBUTES
from hyperdreambooth.avatars.draw.render import (
    CATEGORICAL,
    CONTINUOUS,
    SPLITS,
    Context,
    Identity,
    draw,
    identity,
    photo_context,
)
from hyperdreambooth.files import whole_file
from hyperdreambooth.progress import Progress
from hyperdreambooth.workers import pool, processes

CHUNK = 500


@dataclass
class Pictures:
    """Rendered pictures of `people × each`, person by person.

    Attributes:
        pixels: `(m, h, w, 3)` uint8, memory-mapped.
        identities: the `m` people drawn.
        contexts: the `m` contexts drawn.
        each: pictures a person.
    """

    pixels: list[npt.NDArray[np.uint8]]
    identities: list[Identity]
    contexts: list[Context]
    each: int

    def __len__(self) -> int:
        return len(self.contexts)

    def batch(self, rows: Tensor) -> Tensor:
        """Pixels `(b, 3, h, w)` in [-1, 1] of the rows `(b,)`."""
        stack = np.stack([self.pixels[row // CHUNK][row % CHUNK] for row in rows.tolist()])
        return torch.from_numpy(stack).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def pictures(
    split: str, people: int, each: int, cache: Path, album: bool = False, workers: int | None = None
) -> Pictures:
    """Renders (or finds in the cache) `each` pictures of the first `people` of a split.

    Args:
        split: `base`, `train`, `val` or `test`.
        people: how many.
        each: pictures a person, each in a context of its own.
        cache: folder of chunks; a chunk is written whole, so an interrupted run continues.
        album: every second picture, the first included, is a plain one, as in a photo folder.
        workers: processes; None for one a core.
    """
    drawn = [
        (identity(person), photo_context(person, number, album=album))
        for person in SPLITS[split][:people]
        for number in range(each)
    ]
    cache.mkdir(parents=True, exist_ok=True)
    kind = f"{split}-{each}-{'album' if album else 'any'}"
    files = [cache / f"{kind}-{start:07d}.npy" for start in range(0, len(drawn), CHUNK)]
    jobs = [(f, drawn[i * CHUNK : (i + 1) * CHUNK]) for i, f in enumerate(files)]
    missing = [job for job in jobs if not _complete(*job)]
    with Progress("render", len(missing)) as bar:
        for _ in _each(missing, processes(workers)):
            bar.update(1)
    maps = [np.load(f, mmap_mode="r") for f in files]
    return Pictures(maps, [who for who, _ in drawn], [scene for _, scene in drawn], each)


def _complete(file: Path, wanted: list[tuple[Identity, Context]]) -> bool:
    """A chunk of a shorter earlier run may hold fewer pictures than are wanted now."""
    return file.is_file() and len(np.load(file, mmap_mode="r")) >= len(wanted)


def _each(jobs: list[tuple[Path, list[tuple[Identity, Context]]]], workers: int) -> Iterator[None]:
    if workers == 1 or len(jobs) < 2:
        yield from map(_chunk, jobs)
        return
    with pool(workers) as side_by_side:
        yield from side_by_side.map(_chunk, jobs)


def _chunk(job: tuple[Path, list[tuple[Identity, Context]]]) -> None:
    file, wanted = job
    drawn = np.stack([np.asarray(draw(who, scene), dtype=np.uint8) for who, scene in wanted])
    with whole_file(file) as part, part.open("wb") as stream:
        np.save(stream, drawn)


# --- what the scorers and the encoder learn to read


def trait_targets(people: list[Identity]) -> tuple[Tensor, Tensor]:
    """Continuous traits `(m, c)` in [0, 1] and categorical ones `(m, k)` as indices."""
    continuous = torch.tensor([[p.traits[name] for name in CONTINUOUS] for p in people])
    kinds = torch.tensor(
        [[values.index(p.kinds[name]) for name, values in CATEGORICAL.items()] for p in people]
    )
    return continuous, kinds


def attribute_targets(contexts: list[Context]) -> Tensor:
    """The value's index in every group of `ATTRIBUTES`, `(m, groups)`."""
    return torch.tensor(
        [[list(values).index(getattr(c, group)) for group, values in ATTRIBUTES.items()] for c in contexts]
    )
