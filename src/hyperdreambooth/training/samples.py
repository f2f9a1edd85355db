"""Which samples a step takes: rows of tensors that are stacked once, and the keys of their random draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hyperdreambooth.base.denoise import Draw, Key, draw_of
from hyperdreambooth.base.load import Base
from hyperdreambooth.captured import sent
from hyperdreambooth.runs import rng
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.shots import Shots


@dataclass(frozen=True)
class Answers:
    """The bare base's answers at places on its paths, as the latents and the noise that it sees there.

    The denoiser's target for these latents and this noise is the bare base's answer. All tensors lead with
    `n` people and `s` places, and lie on the CPU.

    Attributes:
        rows: the rows of the samples whose captions were denoised, `(n, s)`.
        latents, noise: `(n, s, c, h, w)`.
        timesteps: `(n, s)`.
    """

    rows: Tensor
    latents: Tensor
    noise: Tensor
    timesteps: Tensor

    def of(self, base: Base, config: TrainConfig, step: int) -> tuple[Tensor, Tensor, Draw]:
        """Returns the rows `(n,)` of a step, and on the base's device latents `(n, c, h, w)` and draw."""
        k = step % self.rows.shape[1]
        draw = draw_of(base, self.noise[:, k], self.timesteps[:, k], config.weighting)
        return (
            self.rows[:, k],
            sent(self.latents[:, k], base.device),
            Draw(*(sent(tensor, base.device) for tensor in draw)),
        )


class Samples:
    """The samples of every step: for each person in turn, `batch` photos and as many class images.

    With a `class_weight`, one more follows in the step, see `answers.py`.

    The photos, noise and timesteps of a person are functions of (seed, person, step) alone. So everybody has
    noise of their own, and nobody's depends on who else is in the batch.

    Args:
        people: the shots of each person, the photos first, those for captions of the class last.
        config: `batch`, `photo_order` and `seed`.

    Attributes:
        people: the number of people, `n`.
        each: the samples of each person in a step.
        answered: how many of them, the last ones, are not of `rows` but places on the bare base's paths.
        answers: these places; None until they are known, or if nobody asks.
        names: the name of each person in the keys of random draws.
        captions: the caption of each row.
        latents: `(m, c, h, w)`, the images of all people; class images that people share are there once.
        masks: `(m, 1, h, w)`; None where every pixel counts alike.
        weights: `(m,)`, the weight of each image's loss.
    """

    def __init__(self, people: Sequence[Sequence[Shots]], config: TrainConfig) -> None:
        self._config, self.people = config, len(people)
        self.answers: Answers | None = None
        self.answered = sum(shots.answered for shots in people[0])
        self.each = (len(people[0]) - self.answered) * config.batch + self.answered
        kinds = list({id(shots): shots for groups in people for shots in groups}.values())
        counts = [len(shots.captions) for shots in kinds]
        first = dict(zip(map(id, kinds), accumulate(counts, initial=0), strict=False))
        self._groups = [
            (groups[0].person, [(first[id(shots)], len(shots.captions), shots.answered) for shots in groups])
            for groups in people
        ]
        self.names = [person for person, _ in self._groups]
        self.captions = [caption for shots in kinds for caption in shots.captions]
        self.latents = torch.cat([shots.latents for shots in kinds])
        weights = [shots.weight for shots in kinds for _ in shots.captions]
        self.weights = torch.tensor(weights, device=self.latents.device)
        self.masks: Tensor | None = None
        if any(shots.masks is not None for shots in kinds):
            like = torch.ones_like(self.latents[:, :1]).split(counts)
            masks = [plain if s.masks is None else s.masks for s, plain in zip(kinds, like, strict=True)]
            self.masks = torch.cat(masks)

    def rows(self, step: int) -> list[int]:
        """Returns the rows of a step, person by person, in each the photos first."""
        return [
            first + index
            for person, kinds in self._groups
            for first, count, answered in kinds
            if not answered
            for index in self._order(person, count, step)
        ]

    def class_row(self, person: int, number: int) -> int:
        """Returns the row of a person's caption of the class; a person's rows take turns."""
        first, count, _ = self._groups[person][1][-1]
        return first + number % count

    def _order(self, person: str, count: int, step: int) -> list[int]:
        """Returns the places of a step's `batch` images among `count`."""
        batch = self._config.batch
        if self._config.photo_order == "turns":
            return [k % count for k in range(step * batch, (step + 1) * batch)]
        order = torch.randperm(count, generator=rng(self._config.seed, person, step, "photo")).tolist()
        return [order[k % count] for k in range(batch)]

    def keys(self, step: int) -> list[Key]:
        """Returns the names of a step's draws of noise and timestep, in the order of `rows`."""
        shown = self.each - self.answered
        return [(self._config.seed, person, step, k) for person in self.names for k in range(shown)]
