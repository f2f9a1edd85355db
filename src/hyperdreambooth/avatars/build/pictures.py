"""Many rendered avatars, cached on disk: the training data of every model of the embedded world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from hyperdreambooth.avatars.draw import people as persons
from hyperdreambooth.avatars.draw.people import ATTRIBUTES, CATEGORICAL, CONTINUOUS, SPLITS, Context, Identity
from hyperdreambooth.avatars.draw.render import draw
from hyperdreambooth.avatars.folder import in_processes
from hyperdreambooth.files import whole_file
from hyperdreambooth.progress import Progress

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]

CHUNK = 500


@dataclass
class Pictures:
    """`m` rendered pictures, `each` of every person, person by person.

    Their pixels are uint8, memory-mapped in chunks `(CHUNK, h, w, 3)`; each has an identity and a context.
    """

    pixels: list[Pixels]
    identities: list[Identity]
    contexts: list[Context]
    each: int

    def __len__(self) -> int:
        return len(self.contexts)

    def batch(self, rows: Tensor) -> Tensor:
        """Returns pixels `(b, 3, h, w)` in [-1, 1] of the rows `(b,)`."""
        return from_bytes(np.stack([self.pixels[row // CHUNK][row % CHUNK] for row in rows.tolist()]))


def from_bytes(pictures: Pixels) -> Tensor:
    """Returns bytes `(m, h, w, 3)` as pixels `(m, 3, h, w)` in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_bytes(pixels: Tensor) -> Pixels:
    """Returns pixels `(m, 3, h, w)` in [-1, 1] as bytes `(m, h, w, 3)`; inverts `from_bytes`."""
    return pixels.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def pictures(split: str, people: int, each: int, cache: Path, album: bool) -> Pictures:
    """Renders `each` pictures of the first `people` of a split, or reads them from the cache.

    Args:
        cache: folder of chunks; each is written whole, so the same call continues an interrupted one.
        album: makes every second picture a plain one, the first included, as in a photo folder.
    """
    drawn = [
        (who, persons.photo_context(who.seed, number, album=album))
        for who in map(persons.identity, SPLITS[split][:people])
        for number in range(each)
    ]
    maps = in_chunks(drawn, render, cache, f"{split}-{each}-{'album' if album else 'any'}")
    return Pictures(maps, [who for who, _ in drawn], [scene for _, scene in drawn], each)


def in_chunks(
    wanted: Sequence[T], render_one: Callable[[T], Image.Image], cache: Path, kind: str
) -> list[Pixels]:
    """Renders pictures in processes, or reads them from the cache; the same call continues.

    Args:
        wanted: what `render_one` takes, for each picture.
        cache: folder of chunks, which appear whole.
        kind: of the chunks' names; it says all that the pictures depend on except how many they are.

    Returns:
        Pixels `(CHUNK, h, w, 3)`, memory-mapped. The last chunk may have fewer, or more than are wanted.
    """
    cache.mkdir(parents=True, exist_ok=True)
    files = [cache / f"{kind}-{start:07d}.npy" for start in range(0, len(wanted), CHUNK)]
    tasks = [(file, wanted[i * CHUNK : (i + 1) * CHUNK], render_one) for i, file in enumerate(files)]
    missing = [task for task in tasks if not complete(task[0], len(task[1]))]
    with Progress("render", len(missing)) as bar:
        for _ in in_processes(_render, missing, None):
            bar.update(1)
    return [np.load(file, mmap_mode="r") for file in files]


def complete(file: Path, count: int) -> bool:
    """Returns whether a chunk has `count` pictures; that of an earlier, smaller run may have fewer."""
    return file.is_file() and len(np.load(file, mmap_mode="r")) >= count


def write_chunk(file: Path, pixels: Pixels) -> None:
    """Writes a chunk of pictures, whole."""
    with whole_file(file) as part, part.open("wb") as stream:
        np.save(stream, pixels)


def render(drawn: tuple[Identity, Context]) -> Image.Image:
    """Draws a person in a context."""
    return draw(*drawn)


def _render(task: tuple[Path, Sequence[T], Callable[[T], Image.Image]]) -> None:
    file, wanted, render_one = task
    write_chunk(file, np.stack([np.asarray(render_one(one), dtype=np.uint8) for one in wanted]))


def trait_targets(people: list[Identity]) -> tuple[Tensor, Tensor]:
    """Returns continuous traits `(m, c)` in [0, 1] and categorical ones `(m, k)` as indices."""
    continuous = torch.tensor([[p.traits[name] for name in CONTINUOUS] for p in people])
    kinds = torch.tensor(
        [[values.index(p.kinds[name]) for name, values in CATEGORICAL.items()] for p in people]
    )
    return continuous, kinds


def attribute_targets(contexts: list[Context]) -> Tensor:
    """Returns the index of the value in every group of `ATTRIBUTES`, `(m, groups)`."""
    return torch.tensor(
        [[list(values).index(getattr(c, group)) for group, values in ATTRIBUTES.items()] for c in contexts]
    )
