"""How the bare base draws the class: what a training holds to, so that the class word stays what it is.

A few photos of a person teach the class word, too: soon `a photo of a face` shows the person. With a
`class_weight`, a step also takes one sample for each person from a path on which the bare base denoises a
caption of the class, and wants the answer that the bare base gives there. This is like prior preservation
(DreamBooth, equation 2), but takes no pictures, and the answers are without noise.

The photos' own latents say little: where the person can be seen in them, the bare base shows the person, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.denoise import answer, draw_of
from hyperdreambooth.base.load import Base
from hyperdreambooth.precision import autocast
from hyperdreambooth.runs import rng
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.samples import Answers, Samples

ANSWERED = 64
"""Steps after which the answers come round again."""

PATH = 8
"""Places on a path from noise to a picture."""

_TOGETHER = 8  # paths walked side by side


def bare_answers(base: Base, samples: Samples, encode: Conditioner, config: TrainConfig) -> Answers | None:
    """Returns what `Samples.answers` is for the steps of a training; None if it holds to none.

    Everything is answered before the training puts anything on the base.
    """
    steps = min(config.last, ANSWERED)
    if not samples.answered or not steps:
        return None
    paths = [(person, k) for person in range(samples.people) for k in range(-(-steps // PATH))]
    with torch.no_grad(), base.training(False), autocast(config.precision, base.device, base.dtype):
        parts = [paths[at : at + _TOGETHER] for at in range(0, len(paths), _TOGETHER)]
        walked = [_walked(base, samples, encode, config, part) for part in parts]
    kinds = [torch.cat(kind).flatten(0, 1) for kind in zip(*walked, strict=True)]
    every = [kind.unflatten(0, (samples.people, -1)) for kind in kinds]  # people, places of all their paths
    # in an order of the person's own, so that a step is not at the same place for everybody
    keys = [(config.seed, person, "class") for person in samples.names]
    orders = [torch.randperm(every[0].shape[1], generator=rng(*key))[:steps] for key in keys]
    return Answers(*(torch.stack([kind[k, own] for k, own in enumerate(orders)]) for kind in every))


def _walked(
    base: Base, samples: Samples, encode: Conditioner, config: TrainConfig, paths: list[tuple[int, int]]
) -> tuple[Tensor, ...]:
    """Walks some paths, each named by the place of its person and its number.

    Returns:
        Rows, latents, noise and timesteps of all their places, `(p, PATH, …)`.
    """
    noising, scheduler = base.family.NOISING, base.pipe.scheduler
    draws = [rng(config.seed, samples.names[person], "class", number) for person, number in paths]
    shape = tuple(samples.latents.shape[1:])
    noise = torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(base.device)
    shift = torch.stack([torch.rand((), generator=draw) for draw in draws]).to(base.device)
    rows = [samples.class_row(person, number) for person, number in paths]
    latents, told = samples.latents[rows], encode([samples.captions[row] for row in rows])
    places: list[tuple[Tensor, ...]] = []
    for k in range(PATH):  # from pure noise; the other places are somewhere in their part of the way
        way = (PATH - k - shift) / PATH if k else torch.ones_like(shift)
        draw = draw_of(base, noise, noising.at(scheduler, way))
        noisy = draw.signal * latents + draw.sigma * noise
        seen = answer(base, latents, told, draw)
        latents, noise = noising.seen(scheduler, noisy, seen, draw.signal, draw.sigma)
        places.append((torch.tensor(rows), latents.cpu(), noise.cpu(), draw.timesteps.cpu()))
    return tuple(torch.stack(kind, dim=1) for kind in zip(*places, strict=True))
