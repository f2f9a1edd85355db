"""`steps = "auto"` without scores: a training stops when the loss on fixed noise stops falling.

The loss of the training steps is too noisy for that: it jumps with every draw of noise and timestep. Here
the loss is measured again and again on the same draws, for a photo that is left out of the training where a
person has several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

EVERY = 10  # steps between two measurements
WINDOW = 2  # measurements over which the loss must fall
SHARE = 0.2  # of the fall so far: the loss of a photo that is trained on falls for ever, but ever less
DRAWS = 4  # batches of fixed noise in a measurement


class Plateau:
    """Watches `n` people, each as if alone, and keeps everybody's leaves at the lowest loss.

    Args:
        leaves: what is trained; the first axis of each tensor is the people, unless `n` is 1.
        people: `n`.
        judge: returns the loss on the fixed draws, `(n,)`.

    Attributes:
        looks: the losses measured so far, `(n,)` each.
        at: the step of each person's lowest loss, `(n,)`.
        stopped: the step at which each person was done, `(n,)`; -1 for those who are not.
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
        """Each person's lowest loss so far, `(n,)`."""
        return torch.stack(self.looks).min(0).values

    def done(self, step: int) -> bool:
        """Measures the loss every `EVERY` steps; returns whether everybody is done."""
        if step % EVERY == 0 and step // EVERY == len(self.looks):  # a resumed run has this one already
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
        """Returns whether more than `SHARE` of the whole fall came in the last `WINDOW` looks, `(n,)`."""
        looks = torch.stack(self.looks)
        before, gained = looks[:-WINDOW].min(0).values, looks[0] - looks.min(0).values
        return before - looks[-WINDOW:].min(0).values > SHARE * gained

    @torch.no_grad()
    def put_back(self) -> None:
        """Restores everybody's leaves at the lowest loss."""
        for name, leaf in self.leaves.items():
            leaf.copy_(self.kept[name])

    def steps(self, done: int) -> list[int]:
        """Returns the steps behind each person's leaves, of a training that took `done` steps."""
        return self.at.tolist()

    def reasons(self) -> list[str]:
        """Returns why each person stopped, in words."""
        fell = f"the loss on fixed noise made less than {SHARE:.0%} of its fall in the {WINDOW * EVERY} steps"
        return [
            f"{fell} before step {stop}"
            if stop >= 0
            else "the loss on fixed noise was still falling when the steps ran out"
            for stop in self.stopped.tolist()
        ]

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {"kept": self.kept, "looks": self.looks, "at": self.at, "stopped": self.stopped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        for name, kept in self.kept.items():
            kept.copy_(state["kept"][name])
        self.looks, self.at, self.stopped = list(state["looks"]), state["at"], state["stopped"]
