"""Which samples a step takes: rows of tensors that are stacked once, and the keys of their random draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperdreambooth.base.denoise import Key
from hyperdreambooth.runs import rng
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.shots import Shots


class Samples:
    """The samples of every step: for each person in turn, `batch` photos and as many class images.

    Which photos, which noise and which timestep a person gets is a function of (seed, person, step) alone. So
    everybody has noise of their own, and nobody's depends on who else is in the batch.

    Args:
        people: the shots of each person, the photos first.
        config: `batch`, `photo_order` and `seed`.

    Attributes:
        people: the number of people, `n`.
        each: the samples of each person in a step.
        captions: the caption of each row.
        latents: `(m, c, h, w)`, the images of all people; class images that people share are there once.
        masks: `(m, 1, h, w)`; None where every pixel counts alike.
        weights: `(m,)`, the weight of each image's loss.
    """

    def __init__(self, people: Sequence[Sequence[Shots]], config: TrainConfig) -> None:
        self._config, self.people, self.each = config, len(people), len(people[0]) * config.batch
        kinds = list({id(shots): shots for groups in people for shots in groups}.values())
        first, at = dict[int, int](), 0
        for shots in kinds:
            first[id(shots)] = at
            at += len(shots.captions)
        self._groups = [
            (groups[0].person, [(first[id(shots)], len(shots.captions)) for shots in groups])
            for groups in people
        ]
        self.captions = [caption for shots in kinds for caption in shots.captions]
        self.latents = torch.cat([shots.latents for shots in kinds])
        self.masks: Tensor | None = None
        if any(shots.background != 1 for shots in kinds):
            self.masks = torch.stack([s.mask(k) for s in kinds for k in range(len(s.captions))])
        weights = [shots.weight for shots in kinds for _ in shots.captions]
        self.weights = torch.tensor(weights, device=self.latents.device)

    def rows(self, step: int) -> list[int]:
        """Returns the rows of a step, person by person, in each the photos first."""
        return [
            first + index
            for person, kinds in self._groups
            for first, count in kinds
            for index in self._order(person, count, step)
        ]

    def _order(self, person: str, count: int, step: int) -> list[int]:
        """Returns the places of a step's `batch` images among `count`."""
        batch = self._config.batch
        if self._config.photo_order == "turns":
            return [k % count for k in range(step * batch, (step + 1) * batch)]
        order = torch.randperm(count, generator=rng(self._config.seed, person, step, "photo")).tolist()
        return [order[k % count] for k in range(batch)]

    def keys(self, step: int) -> list[Key]:
        """Returns the names of a step's draws of noise and timestep, in the order of `rows`."""
        return [(self._config.seed, person, step, k) for person, _ in self._groups for k in range(self.each)]
