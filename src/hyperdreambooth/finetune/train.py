"""The one loop over leaf tensors: for DreamBooth (paper, section 4.1) and the fast finetune (section 4.3).

What is trained is a handful of leaf tensors and a way to put them on the base (`trainable.Trainable`), so
rank-relaxed factors, a trainable LoRA beside a frozen prediction, LiDB numbers, a fresh LoRA, the base's own
weights and the vector of a word go through the same loop. Leaves lead with an identity axis: many people
train side by side in one forward and backward, each as if alone (losses are summed, gradients clipped person
by person, Adam is elementwise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.denoise import denoise_loss, sample_noise
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import TrainConfig
from hyperdreambooth.finetune.plateau import DRAWS, Plateau
from hyperdreambooth.finetune.shots import Shots
from hyperdreambooth.finetune.trainable import Put, Trainable
from hyperdreambooth.precision import autocast
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import Run

PATIENCE = 20
"""Steps without a number that end a training: float16's scaler passes over a few, not over so many."""


def in_half(base: Base, config: TrainConfig) -> bool:
    """Whether gradients are as small as float16 makes them, by its autocast or through such weights."""
    return config.precision == "fp16" or base.dtype == torch.float16


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate at a step: constant, or half a cosine from `lr` to 0."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * step / config.last))


# E‖ε - ε_θ(x_t, c)‖² of the person + λ · the same of the class   (DreamBooth, equation 2)
def step_losses(
    base: Base, people: Sequence[Sequence[Shots]], encode: Conditioner, config: TrainConfig, step: int
) -> Tensor:
    """Everybody's loss of one step, `(n,)`; photos, noise and timesteps are functions of (seed, step) alone.

    Photos take turns, so that each is seen equally often; class images ride in the same forward.
    """
    turn = range(step * config.batch, (step + 1) * config.batch)
    picks = [(s, k % len(s.captions)) for groups in people for s in groups for k in turn]
    per = len(picks) // len(people)
    latents = torch.stack([shots.latents[index] for shots, index in picks])
    shape = tuple(latents.shape[1:])
    keys = [(config.seed, "finetune", step, k) for k in range(per)]
    bias = config.timestep_bias
    drawn = [sample_noise(base, shape, *key, bias=bias) for key in keys] * len(people)
    noise, timesteps = torch.stack([n for n, _ in drawn]), torch.stack([t for _, t in drawn])
    mask = torch.stack([shots.mask(index) for shots, index in picks])
    with autocast(config.precision, base.device):
        conditioning = encode([shots.captions[index] for shots, index in picks])
        losses = denoise_loss(base, latents, conditioning, noise, timesteps, mask, config.weighting)
    weights = losses.new_tensor([shots.weight for shots, _ in picks])
    return (losses * weights).unflatten(0, (len(people), per)).sum(1) / config.batch


@dataclass(frozen=True)
class Outcome:
    """What a training came to, a person each.

    Attributes:
        losses: mean loss of the last tenth of the steps taken now; None when none were.
        steps: those that the leaves have behind them.
        reasons: why they are not more; empty where a number of steps was asked for.
    """

    losses: list[float] | None
    steps: list[int]
    reasons: list[str]

    def metadata(self, k: int) -> dict[str, str]:
        """What an adapter's header tells of person `k`."""
        found = {"steps": str(self.steps[k])}
        if self.losses is not None:
            found["loss"] = f"{self.losses[k]:.5f}"
        return {**found, "stopped": self.reasons[k]} if self.reasons[k] else found


def check_loss(outcome: Mapping[str, str]) -> None:
    """Refuses what a training left whose loss was no number: its gradients may all have been skipped.

    Args:
        outcome: `Outcome.metadata` of the person.

    Raises:
        InputError: it was not.
    """
    if not math.isfinite(float(outcome.get("loss", 0.0))):
        raise InputError(
            f"the loss is {outcome['loss']} at the end; lower lr, or load the base with dtype=bfloat16"
        )


def train(
    base: Base,
    trainable: Trainable,
    people: Sequence[Sequence[Shots]],
    config: TrainConfig,
    run: Run | None = None,
    title: str = "finetune",
    judged: Sequence[Sequence[Shots]] = (),
) -> Outcome:
    """Moves the leaves in place; the base is as before afterwards.

    Args:
        base: the frozen base.
        trainable: the leaves, and how the base is to have them.
        people: of each, the latents and captions and, with prior preservation, the class's.
        config: steps, rate, batch, …
        run: a run folder for the log and checkpoints; None for a short finetune.
        title: of the progress bar.
        judged: of each, the shots whose loss on fixed noise tells when to stop; none for a fixed number.

    Raises:
        InputError: several people in float16.
    """
    leaves, losses = list(trainable.leaves.values()), list[Tensor]()
    # fused: one pass over memory instead of ten; over a whole base's weights a quarter of the time
    optimizer = torch.optim.Adam(leaves, lr=config.lr, fused=True)
    half = in_half(base, config)
    if half and trainable.people > 1:  # who overflows would stop everybody's steps, unseen
        raise InputError("precision: float16 trains one person at a time; take bf16, or one by one")
    scaler = GradScaler(base.device.type, enabled=half)
    captions = [c for groups in [*people, *judged] for shots in groups for c in shots.captions]
    encode = Conditioner(base, captions, bool(trainable.parts & set(base.family.TEXT_ENCODERS)))
    base.rest(trainable.parts)
    images = len(people[0]) * config.batch
    with (
        trainable.on(base) as put,
        base.training(config.checkpointing),
        Progress(title, config.last) as bar,
    ):
        watch = _plateau(base, trainable, judged, encode, config, put) if judged else None
        first = _resume(run, trainable, optimizer, scaler, watch)
        bar.start_at(first)
        for step in range(first, config.last):
            if watch is not None and watch.done(step):
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            put(images)
            loss = step_losses(base, people, encode, config, step)
            _update(loss.sum(), leaves, optimizer, scaler, config.clip, trainable.people)
            losses.append(loss.detach())
            mean = loss.mean().item()
            bar.update(1, loss=mean)
            _record(run, step + 1, mean, config, lambda: _state(trainable, optimizer, scaler, watch))
            if not math.isfinite(mean) and _ruined(losses):
                break
        if watch is not None:
            watch.done(config.last)
            watch.put_back()
    tail = losses[-max(1, len(losses) // 10) :]
    return Outcome(
        torch.stack(tail).mean(0).tolist() if tail else None,
        watch.at.tolist() if watch else [first + len(losses)] * len(people),
        watch.reasons() if watch else [""] * len(people),
    )


def _ruined(losses: Sequence[Tensor]) -> bool:
    """Whether nobody's loss was a number any more; one person's that is does not end the others'."""
    return len(losses) >= PATIENCE and not torch.stack(list(losses[-PATIENCE:])).isfinite().any()


def _plateau(
    base: Base,
    trainable: Trainable,
    judged: Sequence[Sequence[Shots]],
    encode: Conditioner,
    config: TrainConfig,
    put: Put,
) -> Plateau:
    """Watches the loss on draws that no step makes: those of steps below 0."""

    def judge() -> Tensor:
        put(config.batch)
        found = [step_losses(base, judged, encode, config, -1 - k).detach() for k in range(DRAWS)]
        return torch.stack(found).mean(0)

    return Plateau(trainable.leaves, trainable.people, judge)


def _update(
    loss: Tensor,
    leaves: list[Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    clip: float,
    people: int,
) -> None:
    """One step of the optimiser; the scaler does nothing except for fp16."""
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    clip_people(leaves, clip, people)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def clip_people(leaves: Sequence[Tensor], limit: float, people: int) -> None:
    """Scales each person's own gradient, over all leaves `(people, …)`, down to a norm of at most `limit`.

    A single person's leaves may have any shape.
    """
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    norms = torch.stack([g.reshape(people, -1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = limit / norms.clamp_min(limit)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)) if people > 1 else scale)


def _record(
    run: Run | None, done: int, loss: float, config: TrainConfig, state: Callable[[], dict[str, object]]
) -> None:
    """Logs a step, and keeps a checkpoint now and then and at the end; none that training has ruined."""
    if run is None:
        return
    run.log(done, loss=loss, lr=learning_rate(config, done - 1))
    if math.isfinite(loss) and (done % config.save_every == 0 or done == config.last):
        run.save(done, state(), keep=1)


def _state(
    trainable: Trainable, optimizer: torch.optim.Optimizer, scaler: GradScaler, watch: Plateau | None
) -> dict[str, object]:
    watched = {"watch": watch.state()} if watch is not None else {}
    parts = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    return {"leaves": dict(trainable.leaves), **parts, **watched}


def _resume(
    run: Run | None,
    trainable: Trainable,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    watch: Plateau | None,
) -> int:
    """Puts the newest checkpoint back, if there is one; the step to go on with."""
    found = run.latest() if run is not None else None
    if found is None:
        return 0
    step, state = found
    with torch.no_grad():
        for name, leaf in trainable.leaves.items():
            leaf.copy_(state["leaves"][name])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if watch is not None:
        watch.load(state["watch"])
    return step
