"""Many rendered avatars, cached on disk: the training data of every model of the embedded world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hyperdreambooth.avatars.draw import people as persons
from hyperdreambooth.avatars.draw.people import ATTRIBUTES, CATEGORICAL, CONTINUOUS, SPLITS, Context, Identity
from hyperdreambooth.avatars.draw.render import draw
from hyperdreambooth.avatars.folder import in_processes
from hyperdreambooth.files import whole_file
from hyperdreambooth.progress import Progress

CHUNK = 500


@dataclass
class Pictures:
    """`m` rendered pictures, `each` of every person, person by person.

    Their pixels are uint8, memory-mapped in chunks `(CHUNK, h, w, 3)`; each has an identity and a context.
    """

    pixels: list[npt.NDArray[np.uint8]]
    identities: list[Identity]
    contexts: list[Context]
    each: int

    def __len__(self) -> int:
        return len(self.contexts)

    def batch(self, rows: Tensor) -> Tensor:
        """Returns pixels `(b, 3, h, w)` in [-1, 1] of the rows `(b,)`."""
        stack = np.stack([self.pixels[row // CHUNK][row % CHUNK] for row in rows.tolist()])
        return torch.from_numpy(stack).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def pictures(split: str, people: int, each: int, cache: Path, album: bool) -> Pictures:
    """Renders `each` pictures of the first `people` of a split, or reads them from the cache.

    Args:
        cache: folder of chunks; each is written whole, so the same call continues an interrupted one.
        album: makes every second picture a plain one, the first included, as in a photo folder.
    """
    drawn = [
        (persons.identity(person), persons.photo_context(person, number, album=album))
        for person in SPLITS[split][:people]
        for number in range(each)
    ]
    cache.mkdir(parents=True, exist_ok=True)
    kind = f"{split}-{each}-{'album' if album else 'any'}"
    files = [cache / f"{kind}-{start:07d}.npy" for start in range(0, len(drawn), CHUNK)]
    tasks = [(file, drawn[i * CHUNK : (i + 1) * CHUNK]) for i, file in enumerate(files)]
    missing = [task for task in tasks if not _complete(*task)]
    with Progress("render", len(missing)) as bar:
        for _ in in_processes(_render, missing, None):
            bar.update(1)
    maps = [np.load(file, mmap_mode="r") for file in files]
    return Pictures(maps, [who for who, _ in drawn], [scene for _, scene in drawn], each)


def _complete(file: Path, wanted: list[tuple[Identity, Context]]) -> bool:
    """Returns whether a chunk has all pictures; that of an earlier, smaller run may have fewer."""
    return file.is_file() and len(np.load(file, mmap_mode="r")) >= len(wanted)


def _render(task: tuple[Path, list[tuple[Identity, Context]]]) -> None:
    file, wanted = task
    drawn = np.stack([np.asarray(draw(who, scene), dtype=np.uint8) for who, scene in wanted])
    with whole_file(file) as part, part.open("wb") as stream:
        np.save(stream, drawn)


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
