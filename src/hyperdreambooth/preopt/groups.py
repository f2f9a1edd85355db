"""Groups of people who are trained together, and their results: files that wait to enter the bank.

The file of a result is named by what the group's numbers depend on. It makes no difference who trains a
group, or when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.files import discard, load_tensors, save_tensors


@dataclass(frozen=True)
class Group:
    """Some people.

    Attributes:
        names: the `n` names.
        photos: the photos of each.
        key: a hash of names, photos, captions and base. A folder of results is of one config.
    """

    names: tuple[str, ...]
    photos: tuple[tuple[Photo, ...], ...]
    key: str


@dataclass(frozen=True)
class Trained:
    """What a group became.

    Attributes:
        numbers: `(n, P)`, on the CPU.
        figures: the mean loss `(n,)` of the first and of the last tenth of the steps.
        seconds: that the training took.
    """

    numbers: Tensor
    figures: Mapping[str, Tensor]
    seconds: float


HandOut: TypeAlias = Callable[[Sequence[Group]], Iterable[tuple[int, Trained]]]
"""Has groups trained; yields the place of each and its result, in any order."""


class Results:
    """The results of a folder, a file for each group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, group: Group) -> Path:
        return self.folder / f"{group.key}.safetensors"

    def __contains__(self, group: Group) -> bool:
        return self._file(group).is_file()

    def save(self, group: Group, trained: Trained) -> None:
        """Writes a result and removes the group's checkpoints, which nobody needs any more."""
        tensors = {"numbers": trained.numbers, **trained.figures}
        save_tensors(self._file(group), tensors, {"seconds": str(trained.seconds)})
        discard(self.folder / group.key)

    def read(self, group: Group) -> Trained:
        """Reads a result."""
        tensors, metadata = load_tensors(self._file(group), finite=False)  # the bank names who diverged
        return Trained(tensors.pop("numbers"), tensors, float(metadata["seconds"]))

    def discard(self, group: Group) -> None:
        """Removes a result that is in the bank."""
        discard(self._file(group))
