"""The one training loop: for pre-optimisation (paper, section 4.2), DreamBooth (4.1) and the finetune (4.3).

What is trained is a handful of leaf tensors and a way to put them on the base (`trainable.Trainable`). So
LiDB numbers, relaxed factors, a LoRA beside a frozen prediction, a fresh LoRA, the base's own weights and the
embedding of a word all go through the same loop. Leaves lead with an axis of people: many people train side
by side in one forward and backward, each as if alone, because losses are summed, gradients are clipped person
by person, Adam is elementwise and every person has noise of their own (`samples.Samples`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.denoise import sampled_loss
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.precision import autocast
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import Run
from hyperdreambooth.schedule import learning_rate
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.looks import Look, Looks
from hyperdreambooth.training.plateau import DRAWS, Plateau
from hyperdreambooth.training.samples import Samples
from hyperdreambooth.training.shots import Shots
from hyperdreambooth.training.trainable import FactorLeaves, Put, Trainable

PATIENCE = 20
"""The steps without a finite loss that end a training; float16's scaler skips a few, but not so many."""

Callback: TypeAlias = Callable[[int, float], bool | None]
"""Called after every step with its number, from 1, and the mean loss; returning False ends the training."""


def in_half(base: Base, config: TrainConfig) -> bool:
    """Returns whether gradients pass through float16, by autocast or because the weights are float16."""
    return config.precision == "fp16" or base.dtype == torch.float16


# E‖ε - ε_θ(x_t, c)‖² of the person + λ · the same of the class   (DreamBooth, equation 2)
def step_losses(base: Base, samples: Samples, encode: Conditioner, config: TrainConfig, step: int) -> Tensor:
    """Returns the loss of each person in one step, `(n,)`: the mean over the person's photos of the step.

    Class images go through the same forward.
    """
    rows = samples.rows(step)
    index = torch.tensor(rows, device=samples.latents.device)
    mask = None if samples.masks is None else samples.masks[index]
    with autocast(config.precision, base.device):
        conditioning = encode([samples.captions[row] for row in rows], samples.each)
        losses = sampled_loss(base, samples.latents[index], samples.keys(step), conditioning, config, mask)
    return (losses * samples.weights[index]).unflatten(0, (samples.people, -1)).sum(1) / config.batch


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        history: the losses `(steps, n)` of all steps, on the CPU.
        steps: for each person, the steps behind the leaves.
        reasons: for each person, why it ended there; empty where all the steps asked for were taken.
    """

    history: Tensor
    steps: list[int]
    reasons: list[str]

    def metadata(self, k: int) -> dict[str, str]:
        """Returns the steps, the mean loss of the last tenth and the reason for a file's header."""
        found = {"steps": str(self.steps[k])}
        if len(self.history):
            found["loss"] = f"{self.history[-max(1, len(self.history) // 10) :, k].mean():.5f}"
        return {**found, "stopped": self.reasons[k]} if self.reasons[k] else found


def check_loss(metadata: Mapping[str, str]) -> None:
    """Refuses the result of a training whose loss was not finite: all its gradients may have been skipped.

    Args:
        metadata: `Outcome.metadata` of the person.

    Raises:
        InputError: the loss was NaN or infinite.
    """
    if not math.isfinite(float(metadata.get("loss", 0.0))):
        raise InputError(
            f"the loss is {metadata['loss']} at the end; lower lr, or load the base with dtype=bfloat16"
        )


def train(
    base: Base,
    trainable: Trainable,
    people: Sequence[Sequence[Shots]],
    config: TrainConfig,
    run: Run | None = None,
    *,
    title: str = "finetune",
    judged: Sequence[Sequence[Shots]] = (),
    cache: Path | None = None,
    callback: Callback | None = None,
    look: Look | None = None,
) -> Outcome:
    """Trains the leaves in place; the base is as before afterwards.

    Args:
        base: the frozen base.
        trainable: the leaves, and how to put them on the base.
        people: the photos of each person and, with prior preservation, the class images.
        config: steps, learning rate, batch, …
        run: a run folder for the log and checkpoints; None to keep none.
        title: the title of the progress bar.
        judged: what each person is judged on where `steps` is `auto`; else empty.
        cache: a folder of encoded captions; None to keep none.
        callback: called after every step, see `Callback`. When it ends the training, the leaves stay as they
            are (with `auto`, as they were at the lowest loss).
        look: looks at pictures of the one person who is trained with a fixed number of steps.

    Raises:
        InputError: several people in float16.
    """
    half, count = in_half(base, config), len(people)
    if half and count > 1:  # one person's overflow would skip everybody's step, unseen
        raise InputError(
            "precision: float16 trains one person at a time; use bf16 or float32, or train them one by one"
        )
    samples, looks = Samples(people, config), Samples(judged, config) if judged else None
    captions = [*samples.captions, *(looks.captions if looks else [])]
    encode = Conditioner(base, captions, bool(trainable.parts & set(base.family.TEXT_ENCODERS)), cache)
    base.rest(trainable.parts)
    ended = False
    with (
        trainable.on(base) as put,
        base.training(config.checkpointing),
        Progress(title, config.last) as bar,
    ):
        watch = None
        if look is not None:
            worn = trainable.worn if isinstance(trainable, FactorLeaves) else None
            watch = Looks(trainable.leaves, look, partial(put, 1), worn)
        elif looks is not None:
            watch = Plateau(trainable.leaves, count, partial(_judge, base, looks, encode, config, put))
        state = _State(trainable, count, config, GradScaler(base.device.type, enabled=half), watch)
        losses = state.resume(run, base.device)
        bar.start_at(len(losses))
        for step in range(len(losses), config.last):
            if watch is not None and watch.done(step):
                break
            put(samples.each)
            losses.append(state.update(step_losses(base, samples, encode, config, step), step))
            mean = losses[-1].mean().item()
            bar.update(1, loss=mean)
            ended = callback is not None and callback(step + 1, mean) is False
            if run is not None:
                state.record(run, losses, mean, ended)
            if ended or _ruined(losses):
                break
        if watch is not None:
            if losses and losses[-1].isfinite().any():
                watch.done(len(losses))
            watch.put_back()
    reasons = watch.reasons() if watch else [""] * count
    if ended:
        reasons = ["the callback ended the training"] * count
    history = torch.stack(losses).cpu() if losses else torch.empty(0, count)
    return Outcome(history, watch.steps(len(losses)) if watch else [len(losses)] * count, reasons)


def _ruined(losses: Sequence[Tensor]) -> bool:
    """Returns whether nobody's loss is finite any more; while one person's is, the training goes on."""
    if len(losses) < PATIENCE or losses[-1].isfinite().any():
        return False
    return not torch.stack(list(losses[-PATIENCE:])).isfinite().any()


def _judge(base: Base, samples: Samples, encode: Conditioner, config: TrainConfig, put: Put) -> Tensor:
    """Returns each person's loss on noise that no step draws, that of the steps below 0, `(n,)`."""
    put(samples.each)
    found = [step_losses(base, samples, encode, config, -1 - k).detach() for k in range(DRAWS)]
    return torch.stack(found).mean(0)


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


class _State:
    """What changes from step to step, and all that a checkpoint holds."""

    def __init__(
        self,
        trainable: Trainable,
        people: int,
        config: TrainConfig,
        scaler: GradScaler,
        watch: Plateau | Looks | None,
    ) -> None:
        self._trainable, self._people, self._config = trainable, people, config
        self._scaler, self._watch = scaler, watch
        self._leaves = list(trainable.leaves.values())
        self._starts = [leaf.detach().clone() for leaf in self._leaves] if config.size_weight else []
        # fused: one pass over memory instead of ten; over the weights of a whole base a quarter of the time
        self._optimizer = torch.optim.Adam(self._leaves, lr=config.lr, fused=True)

    def _rate(self, step: int) -> float:
        config = self._config
        return learning_rate(config.lr, step, config.last, warmup=config.warmup, shape=config.schedule)

    def update(self, losses: Tensor, step: int) -> Tensor:
        """Takes one step of the optimiser on everybody's loss `(n,)`, and returns the loss detached."""
        people = self._people
        self._optimizer.param_groups[0]["lr"] = self._rate(step)
        total = losses.sum()
        if self._starts:
            pairs = zip(self._leaves, self._starts, strict=True)
            away = [(leaf - start).square().reshape(people, -1) for leaf, start in pairs]
            total = total + self._config.size_weight * torch.cat(away, dim=1).mean(1).sum()
        self._scaler.scale(total).backward()
        self._scaler.unscale_(self._optimizer)
        clip_people(self._leaves, self._config.clip, people)
        self._scaler.step(self._optimizer)  # the scaler does nothing except in float16
        self._scaler.update()
        self._optimizer.zero_grad()
        return losses.detach()

    def record(self, run: Run, losses: Sequence[Tensor], mean: float, ended: bool) -> None:
        """Logs a step, and replaces the checkpoint now and then and at the end.

        A ruined training leaves no checkpoint, so that it is never taken for a finished one.
        """
        done, config = len(losses), self._config
        run.log(done, loss=mean, lr=self._rate(done - 1))
        if math.isfinite(mean) and (ended or done % config.save_every == 0 or done == config.last):
            state = {
                "leaves": dict(self._trainable.leaves), "losses": torch.stack(list(losses)),
                "optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict(),
                "watch": self._watch and self._watch.state(),
            }  # fmt: skip
            run.save(done, state, keep=1)

    def resume(self, run: Run | None, device: torch.device) -> list[Tensor]:
        """Restores the newest checkpoint, if there is one, and returns the losses of the steps before it."""
        found = None if run is None else run.latest()
        if found is None:
            return []
        state = found[1]
        with torch.no_grad():
            for name, leaf in self._trainable.leaves.items():
                leaf.copy_(state["leaves"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._watch is not None:
            self._watch.load(state["watch"])
        return list(state["losses"].to(device))
