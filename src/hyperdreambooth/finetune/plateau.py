"""`steps = "auto"`: a training stops when the loss on fixed noise stops falling; nothing judges pictures.

The loss of training steps is too noisy to tell: it jumps with every draw of noise and timestep. Here the same
draws are looked at again and again, of a photo that is left out where there are several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

EVERY = 10  # steps between two looks
WINDOW = 2  # looks that must bring something together
SHARE = 0.2  # of what has been gained so far: a photo that is trained on falls for ever, but ever less
DRAWS = 4  # batches of fixed noise a look


class Plateau:
    """Watches `n` people, each as if alone, and keeps the leaves of everybody's best look.

    Args:
        leaves: what is trained; `n` people lead each tensor, unless `n` is 1.
        judge: the loss on the fixed draws, `(n,)`.

    Attributes:
        best: lowest loss so far, `(n,)`.
        at: the step of it, `(n,)`.
        stopped: the step at which a person was done, `(n,)`; -1 while it goes on.
    """

    def __init__(self, leaves: Mapping[str, Tensor], people: int, judge: Callable[[], Tensor]) -> None:
        self.leaves, self.judge, self.people = leaves, judge, people
        self.kept = {
            name: leaf.detach().clone(memory_format=torch.contiguous_format) for name, leaf in leaves.items()
        }
        self.looks: list[Tensor] = []
        self.at = torch.zeros(people, dtype=torch.int64)
        self.stopped = torch.full((people,), -1)

    @property
    def best(self) -> Tensor:
        """The lowest loss of each person, `(n,)`."""
        return torch.stack(self.looks).min(0).values

    def done(self, step: int) -> bool:
        """Looks, where it is time; True once everybody has stopped."""
        if step % EVERY == 0 and step // EVERY == len(self.looks):  # a resumed run has looked already
            self._look(step)
        return bool((self.stopped >= 0).all())

    def _look(self, step: int) -> None:
        with torch.no_grad():
            now = self.judge().detach().cpu()
        better = (now < self.best if self.looks else torch.ones(self.people, dtype=torch.bool)) & (
            self.stopped < 0
        )
        self.looks.append(now)
        self.at[better] = step
        for name, kept in self.kept.items():
            mine, theirs = kept.view(self.people, -1), self.leaves[name].detach().reshape(self.people, -1)
            mine[better.to(mine.device)] = theirs[better.to(mine.device)]
        if len(self.looks) > WINDOW:
            self.stopped[(self.stopped < 0) & ~self._falling()] = step

    def _falling(self) -> Tensor:
        """Whether the last `WINDOW` looks brought more than `SHARE` of all that was gained, `(n,)`."""
        looks = torch.stack(self.looks)
        before, gained = looks[:-WINDOW].min(0).values, looks[0] - looks.min(0).values
        return before - looks[-WINDOW:].min(0).values > SHARE * gained

    @torch.no_grad()
    def put_back(self) -> None:
        """Everybody's best leaves."""
        for name, leaf in self.leaves.items():
            leaf.copy_(self.kept[name])

    def reasons(self) -> list[str]:
        """Why each person stopped, in words."""
        fell = (
            f"less than {SHARE:.0%} of the fall of the loss on fixed noise came in the {WINDOW * EVERY} steps"
        )
        return [
            f"{fell} before step {stop}"
            if stop >= 0
            else "the loss on fixed noise was still falling at the most steps allowed"
            for stop in self.stopped.tolist()
        ]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"kept": self.kept, "looks": self.looks, "at": self.at, "stopped": self.stopped}

    def load(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        for name, kept in self.kept.items():
            kept.copy_(state["kept"][name])
        self.looks, self.at, self.stopped = list(state["looks"]), state["at"], state["stopped"]
