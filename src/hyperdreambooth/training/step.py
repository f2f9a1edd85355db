"""One step of a training: a function of tensors, which a GPU records once and replays, and its state.

`step_inputs` draws everything that differs from step to step, by keys, outside of it. The step reads these
inputs, the base's weights and the leaves, and nothing else. It makes no decision and reads nothing back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.denoise import Draw, draw_loss, sample_draw
from hyperdreambooth.base.load import Base
from hyperdreambooth.captured import Captured, sent
from hyperdreambooth.precision import autocast
from hyperdreambooth.runs import Run
from hyperdreambooth.schedule import learning_rate
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.looks import Looks
from hyperdreambooth.training.plateau import Plateau
from hyperdreambooth.training.samples import Samples
from hyperdreambooth.training.trainable import Put, Trainable

Inputs: TypeAlias = Mapping[str, Any]
"""What a step reads of its samples: `latents`, `draw`, `mask`, `captions` and their `weights` `(n, k)`."""


def in_half(base: Base, config: TrainConfig) -> bool:
    """Returns whether gradients pass through float16, by autocast or because the weights are float16."""
    return config.precision == "fp16" or base.dtype == torch.float16


def step_inputs(base: Base, samples: Samples, encode: Conditioner, config: TrainConfig, step: int) -> Inputs:
    """Returns the samples of a step, as tensors on the base's device."""
    rows = torch.tensor(samples.rows(step))
    latents = samples.latents[sent(rows, samples.latents.device)]
    draw = sample_draw(base, tuple(latents.shape[1:]), samples.keys(step), config)
    if samples.answers is not None:
        asked, seen, theirs = samples.answers.of(base, config, step)
        rows, latents = _beside(rows, asked), _beside(latents, seen)
        draw = Draw(*(_beside(*pair) for pair in zip(draw, theirs, strict=True)))
    index = sent(rows, samples.latents.device)
    with autocast(config.precision, base.device, base.dtype):
        captions = encode.inputs([samples.captions[row] for row in rows.tolist()], samples.each)
    return {
        "latents": latents,
        "draw": draw,
        "mask": None if samples.masks is None else samples.masks[index],
        "captions": captions,
        "weights": samples.weights[index].unflatten(0, (samples.people, -1)),
    }


def _beside(shown: Tensor, answered: Tensor) -> Tensor:
    """Returns the samples of `n` people `(n · k, …)` with one more `(n, …)` after those of each person."""
    people = len(answered)
    return torch.cat([shown.unflatten(0, (people, -1)), answered[:, None]], dim=1).flatten(0, 1)


# E‖ε - ε_θ(x_t, c)‖² of the person + λ · the same of the class   (DreamBooth, equation 2)
def step_losses(base: Base, encode: Conditioner, config: TrainConfig, inputs: Inputs) -> Tensor:
    """Returns the loss of each person in one step, `(n,)`: the mean over the person's photos of the step.

    Class images, and places on the bare base's paths, go through the same forward.
    """
    weights: Tensor = inputs["weights"]
    with autocast(config.precision, base.device, base.dtype):
        conditioning = encode.encode(inputs["captions"])
        losses = draw_loss(base, inputs["latents"], conditioning, inputs["draw"], inputs["mask"])
    return (losses.view_as(weights) * weights).sum(1) / config.batch


def clip_people(leaves: Sequence[Tensor], limit: float, people: int) -> None:
    """Scales each person's own gradient, over all leaves `(people, …)`, down to a norm of at most `limit`.

    Differs from the usual clipping by the norm of all gradients, which would tie people together. A single
    person's leaves may have any shape.
    """
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    norms = torch.stack([g.reshape(people, -1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = limit / norms.clamp_min(limit)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)) if people > 1 else scale)


class Step:
    """The step of a training, with all that it changes: leaves, optimiser and scaler.

    Attributes:
        trainable: the leaves, and what they stand for.
        put: puts the leaves on the base as it is worn at this moment.
        encode: encodes the captions of the people who are trained at this moment.
    """

    put: Put
    encode: Conditioner

    def __init__(self, base: Base, trainable: Trainable, people: int, config: TrainConfig) -> None:
        self.trainable, self._base, self._people, self._config = trainable, base, people, config
        self._leaves = list(trainable.leaves.values())
        self._starts = [leaf.detach().clone() for leaf in self._leaves] if config.size_weight else []
        half, cuda = in_half(base, config), base.device.type == "cuda"
        self._scaler = GradScaler(base.device.type, enabled=half)
        # a tensor, as a recorded step reads it anew; CPUs take float64, so that no digit of it is lost
        self._rate = torch.zeros(
            (), device=base.device, dtype=torch.float64 if base.device.type == "cpu" else None
        )
        # fused: one pass over memory instead of ten; over the weights of a whole base a quarter of the time
        self._optimizer = torch.optim.Adam(self._leaves, lr=self._rate, fused=True, capturable=cuda)
        self._call = Captured(self._take, base.device, enabled=not half)  # the scaler reads the host

    def take(self, inputs: Inputs, step: int) -> Tensor:
        """Takes one step of the optimiser, and returns everybody's loss before it, `(n,)`, detached."""
        self._rate.fill_(self._rate_of(step))
        return self._call(inputs)

    def _rate_of(self, step: int) -> float:
        config = self._config
        return learning_rate(config.lr, step, config.last, warmup=config.warmup, shape=config.schedule)

    def _take(self, inputs: Inputs) -> Tensor:
        """The step itself."""
        self._optimizer.zero_grad()
        with autocast(self._config.precision, self._base.device, self._base.dtype):
            self.put(inputs["weights"].shape[1])
        losses = step_losses(self._base, self.encode, self._config, inputs)
        total = losses.sum()
        if self._starts:
            pairs = zip(self._leaves, self._starts, strict=True)
            away = [(leaf - start).square().reshape(self._people, -1) for leaf, start in pairs]
            total = total + self._config.size_weight * torch.cat(away, dim=1).mean(1).sum()
        self._scaler.scale(total).backward()
        self._scaler.unscale_(self._optimizer)
        clip_people(self._leaves, self._config.clip, self._people)
        self._scaler.step(self._optimizer)  # the scaler does nothing except in float16
        self._scaler.update()
        return losses.detach()

    @torch.no_grad()
    def begin(self, trainable: Trainable) -> None:
        """Starts anew from other leaves of the same shapes, in the memory that a recorded step reads."""
        for name, leaf in self.trainable.leaves.items():
            leaf.copy_(trainable.leaves[name])
        for mine, leaf in zip(self._starts, self._leaves, strict=False):
            mine.copy_(leaf)
        for state in self._optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    def record(
        self,
        run: Run,
        losses: Sequence[Tensor],
        means: Sequence[float],
        watch: Plateau | Looks | None,
        ended: bool,
    ) -> None:
        """Logs the last steps, and replaces the checkpoint now and then and at the end.

        A ruined training leaves no checkpoint, so that it is never taken for a finished one.
        """
        done, config = len(losses), self._config
        for step, mean in enumerate(means, start=done - len(means)):
            run.log(step + 1, loss=mean, lr=self._rate_of(step))
        if math.isfinite(means[-1]) and (ended or done % config.save_every == 0 or done == config.last):
            state = {
                "leaves": dict(self.trainable.leaves), "losses": torch.stack(list(losses)),
                "optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict(),
                "watch": watch and watch.state(),
            }  # fmt: skip
            run.save(done, state, keep=1)

    def resume(self, run: Run | None, watch: Plateau | Looks | None) -> list[Tensor]:
        """Restores the newest checkpoint, if there is one, and returns the losses of the steps before it."""
        found = None if run is None else run.latest()
        if found is None:
            return []
        state = found[1]
        with torch.no_grad():
            for name, leaf in self.trainable.leaves.items():
                leaf.copy_(state["leaves"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._optimizer.param_groups[0]["lr"] = self._rate  # loading replaces it, and all of its memory
        self._call.forget()
        self._scaler.load_state_dict(state["scaler"])
        if watch is not None:
            watch.load(state["watch"])
        return list(state["losses"].to(self._base.device))
