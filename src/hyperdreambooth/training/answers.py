"""What the bare base answers where a caption names the class and not the person.

A few photos of a person teach the class word, too: soon `a photo of a face` shows the person. With a
`class_weight` a step also shows one noisy photo of each person with a caption of the class, and wants the
answer that the bare base gives (`base.denoise.draw_target`). This is like prior preservation (DreamBooth,
equation 2), but takes no pictures of the class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.denoise import sampled_answer
from hyperdreambooth.base.load import Base
from hyperdreambooth.precision import autocast
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.samples import ANSWERED, Samples

_TOGETHER = 8  # samples answered in one call


def bare_answers(base: Base, samples: Samples, encode: Conditioner, config: TrainConfig) -> Tensor | None:
    """Returns what `Samples.answers` is, `(s, n, c, h, w)` on the CPU; None if nobody wants it.

    All is answered before a training puts anything on the base.
    """
    if not samples.answered or not config.last:
        return None
    steps = range(min(config.last, ANSWERED))
    rows = [row for step in steps for row in samples.rows(step)[samples.each - 1 :: samples.each]]
    keys = [key for step in steps for key in samples.keys(step)[samples.each - 1 :: samples.each]]
    done = list[Tensor]()
    with torch.no_grad(), base.training(False), autocast(config.precision, base.device, base.dtype):
        for at in range(0, len(rows), _TOGETHER):
            part = rows[at : at + _TOGETHER]
            told = encode([samples.captions[row] for row in part])
            own = keys[at : at + _TOGETHER]
            done.append(sampled_answer(base, samples.latents[part], own, told, config).cpu())
    return torch.cat(done).unflatten(0, (-1, samples.people))
