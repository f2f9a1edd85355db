"""Looks at a training: pictures of the person at a few steps, scored where scorers are at hand.

The pictures show how the person appears. With `steps = "auto"` they also decide: the person is left as at the
look with the highest score, because the loss falls long after pictures have stopped following their prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.shapes import Factors

FRACTIONS = (0, 0.25, 0.625, 1)  # of the training; of 40 steps: 0, 10, 25 and 40


def look_steps(last: int) -> tuple[int, ...]:
    """Returns the steps of a training with `last` steps at which it is looked at."""
    return tuple(sorted({round(part * last) for part in FRACTIONS}))


@dataclass(frozen=True)
class Look:
    """When a training of one person is looked at, and by whom.

    Attributes:
        at: the steps, rising.
        score: is called with a step while the base wears the person of that step. It draws pictures with the
            base, and returns a score, higher for a better person; None where it has none.
        choose: whether the person is left as at the highest score; else as after the last step.
        keep: is called with the step and a copy of the person's factors, before `score`; not for what is no
            adapter (`full`, `textual-inversion`).
    """

    at: tuple[int, ...]
    score: Callable[[int], float | None]
    choose: bool = False
    keep: Callable[[int, Factors], None] | None = None


class Looks:
    """Looks at one person's training, and keeps the leaves of the best look if it has to choose.

    Args:
        leaves: what is trained.
        look: when to look, and who scores.
        put: puts the current leaves on the base.
        worn: returns a copy of the factors that the leaves stand for; None for what is no adapter.
    """

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        look: Look,
        put: Callable[[], None],
        worn: Callable[[], Factors] | None = None,
    ) -> None:
        self.leaves, self.look, self.put, self.worn = leaves, look, put, worn
        self.scores: dict[int, float | None] = {}
        self.kept = {name: leaf.detach().clone() for name, leaf in leaves.items()} if look.choose else {}

    @property
    def chosen(self) -> int | None:
        """The step of the highest score, the earliest of equal ones; None where nothing is chosen."""
        scored = {step: score for step, score in self.scores.items() if score is not None}
        return max(scored, key=lambda step: (scored[step], -step)) if scored and self.look.choose else None

    def done(self, step: int) -> bool:
        """Looks if it is time; a training is never over before its last step."""
        if step in self.look.at and step not in self.scores:  # a resumed run has this one already
            with torch.no_grad():
                self.put()
            if self.look.keep is not None and self.worn is not None:
                self.look.keep(step, self.worn())
            self.scores[step] = self.look.score(step)
            if self.chosen == step:
                for name, kept in self.kept.items():
                    kept.copy_(self.leaves[name].detach())
        return False

    @torch.no_grad()
    def put_back(self) -> None:
        """Restores the leaves of the chosen look."""
        for name, kept in self.kept.items() if self.chosen is not None else ():
            self.leaves[name].copy_(kept)

    def steps(self, done: int) -> list[int]:
        """Returns the steps behind the leaves, of a training that took `done` steps."""
        return [done if self.chosen is None else self.chosen]

    def reasons(self) -> list[str]:
        """Returns why the person is left at this step, in words; empty where nothing was chosen."""
        if self.chosen is None:
            return [""]
        looks = ", ".join(
            f"{score:.2f} at {step}" for step, score in self.scores.items() if score is not None
        )
        return [f"the best of {len(self.scores)} looks: {looks}"]

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {"scores": self.scores, "kept": self.kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        self.scores = dict(state["scores"])
        for name, kept in self.kept.items():
            kept.copy_(state["kept"][name])
