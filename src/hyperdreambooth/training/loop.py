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

from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import Run
from hyperdreambooth.storage import Store
from hyperdreambooth.training.answers import bare_answers
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.looks import Look, Looks
from hyperdreambooth.training.plateau import DRAWS, Plateau
from hyperdreambooth.training.samples import Samples
from hyperdreambooth.training.shots import Shots
from hyperdreambooth.training.step import Step, in_half, step_inputs, step_losses
from hyperdreambooth.training.trainable import FactorLeaves, Put, Trainable
from hyperdreambooth.training.warm import Warm

PATIENCE = 20
"""The steps without a finite loss that end a training; float16's scaler skips a few, but not so many."""

READ = 10
"""The steps after which losses are read from a GPU, which has to be waited for."""

Callback: TypeAlias = Callable[[int, float], bool | None]
"""Called after every step with its number, from 1, and the mean loss; returning False ends the training."""


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
    cache: Path | Store | None = None,
    callback: Callback | None = None,
    look: Look | None = None,
    warm: Warm | None = None,
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
        warm: keeps the step of the training before, and this one's for the next; None to keep none.

    Raises:
        InputError: several people in float16.
    """
    count = len(people)
    if in_half(base, config) and count > 1:  # one person's overflow would skip everybody's step, unseen
        raise InputError(
            "precision: float16 trains one person at a time; use bf16 or float32, or train them one by one"
        )
    samples, looks = Samples(people, config), Samples(judged, config) if judged else None
    captions = [*samples.captions, *(looks.captions if looks else [])]
    encode = Conditioner(base, captions, bool(trainable.parts & set(base.family.TEXT_ENCODERS)), cache)
    base.rest(trainable.parts)
    samples.answers = bare_answers(base, samples, encode, config)
    step = Step(base, trainable, count, config) if warm is None else warm.step(base, trainable, count, config)
    ended = False
    with (
        step.trainable.on(base) as put,
        base.training(config.checkpointing, config.compile_blocks),
        Progress(title, config.last, events=run and run.events) as bar,
    ):
        step.put, step.encode = put, encode
        watch = None
        if look is not None:
            worn = step.trainable.worn if isinstance(step.trainable, FactorLeaves) else None
            watch = Looks(step.trainable.leaves, look, partial(put, 1), worn)
        elif looks is not None:
            judge = partial(_judge, base, looks, encode, config, put)
            watch = Plateau(step.trainable.leaves, count, judge)
        losses = step.resume(run, watch)
        bar.start_at(len(losses))
        unread = 0
        for number in range(len(losses), config.last):
            if watch is not None and watch.done(number):
                break
            losses.append(step.take(step_inputs(base, samples, encode, config, number), number))
            unread += 1
            if not _time_to_read(base, config, number + 1, callback):
                continue
            means = [one.mean().item() for one in losses[-unread:]]
            bar.update(unread, loss=means[-1])
            unread = 0
            ended = callback is not None and callback(number + 1, means[-1]) is False
            if run is not None:
                step.record(run, losses, means, watch, ended)
            if ended or _ruined(losses):
                break
        if watch is not None:
            if losses and losses[-1].isfinite().any():
                watch.done(len(losses))
            watch.put_back()
    if warm is not None:
        warm.hand_over(trainable)
    reasons = watch.reasons() if watch else [""] * count
    if ended:
        reasons = ["the callback ended the training"] * count
    history = torch.stack(losses).cpu() if losses else torch.empty(0, count)
    return Outcome(history, watch.steps(len(losses)) if watch else [len(losses)] * count, reasons)


def _time_to_read(base: Base, config: TrainConfig, done: int, callback: Callback | None) -> bool:
    """Returns whether the losses are read after so many steps: on a GPU as rarely as possible."""
    if base.device.type != "cuda" or callback is not None:
        return True
    return done % READ == 0 or done % config.save_every == 0 or done == config.last


def _ruined(losses: Sequence[Tensor]) -> bool:
    """Returns whether nobody's loss is finite any more; while one person's is, the training goes on."""
    if len(losses) < PATIENCE or losses[-1].isfinite().any():
        return False
    return not torch.stack(list(losses[-PATIENCE:])).isfinite().any()


def _judge(base: Base, samples: Samples, encode: Conditioner, config: TrainConfig, put: Put) -> Tensor:
    """Returns each person's loss on noise that no step draws, that of the steps below 0, `(n,)`."""
    put(samples.each)
    drawn = [step_inputs(base, samples, encode, config, -1 - k) for k in range(DRAWS)]
    return torch.stack([step_losses(base, encode, config, inputs).detach() for inputs in drawn]).mean(0)
