"""One loop over leaf tensors, for DreamBooth (paper, section 4.1) and for the fast finetune (section 4.3).

What is trained is a handful of leaf tensors and a way to put them on the base (`trainable.Trainable`), so
rank-relaxed factors, a trainable LoRA beside a frozen prediction, LiDB numbers, a fresh LoRA, the base's own
weights and the vector of a word go through the same loop. Leaves lead with an identity axis: many people
train side by side in one forward and backward, each as if alone (losses are summed, gradients clipped person
by person, Adam is elementwise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.denoise import denoise_loss, draw_noise
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import FinetuneConfig, TrainConfig
from hyperdreambooth.finetune.plateau import DRAWS, Plateau
from hyperdreambooth.finetune.shots import Photos, Sample, Shots, inputs_of, shots_of
from hyperdreambooth.finetune.trainable import Put, Trainable, Worn, beside, each, hashed, pairs, together
from hyperdreambooth.lora.inject import linear_sites
from hyperdreambooth.lora.relax import fresh, relax, truncate
from hyperdreambooth.precision import autocast
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import Run
from hyperdreambooth.shapes import Factors, Site


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
    keys, offset = [(config.seed, "finetune", step, k) for k in range(per)], config.offset_noise
    drawn = [draw_noise(base, shape, *key, offset=offset) for key in keys] * len(people)
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

    def facts(self, k: int) -> dict[str, str]:
        """What an adapter's header tells of person `k`."""
        found = {"steps": str(self.steps[k])}
        if self.losses is not None:
            found["loss"] = f"{self.losses[k]:.5f}"
        return {**found, "stopped": self.reasons[k]} if self.reasons[k] else found


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
    """
    leaves, losses = list(trainable.leaves.values()), list[Tensor]()
    # fused: one pass over memory instead of ten; over a whole base's weights a quarter of the time
    optimizer = torch.optim.Adam(leaves, lr=config.lr, fused=True)
    # gradients through float16 weights are as small as those of float16 autocast
    half = config.precision == "fp16" or base.dtype == torch.float16
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
        if watch is not None:
            watch.done(config.last)
            watch.put_back()
    tail = losses[-max(1, len(losses) // 10) :]
    return Outcome(
        torch.stack(tail).mean(0).tolist() if tail else None,
        watch.at.tolist() if watch else [config.last] * len(people),
        watch.reasons() if watch else [""] * len(people),
    )


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


def _fitting_sites(base: Base, adapters: Sequence[Adapter]) -> tuple[Site, ...]:
    """The base's sites that the adapters change.

    Raises:
        InputError: an adapter belongs to another base, or they do not change the same sites.
    """
    names = set(adapters[0].factors)
    sites = tuple(site for site in linear_sites(base.components) if site.name in names)
    for adapter in adapters:
        if adapter.base_fingerprint not in ("", base.fingerprint):
            raise InputError(
                f"adapter: made for base {adapter.base_fingerprint}, this base {base.source} is "
                f"{base.fingerprint}; load the base it was made for"
            )
        if odd := sorted(set(adapter.factors) - {site.name for site in sites}):
            raise InputError(
                f"adapter: {base.source} has no linear layer {odd[0]} ({len(odd)} such); load the base it "
                "was made for, or take an adapter without convolutions"
            )
        if set(adapter.factors) != names:
            raise InputError("adapters: expected all of the same sites; finetune those of other sites alone")
    return sites


def finetune(
    base: Base,
    adapter: Adapter,
    photos: Photos,
    config: FinetuneConfig | None = None,
    *,
    out: Path | None = None,
    sample: Sample | None = None,
) -> Adapter:
    """`finetune_many` of one person.

    Raises:
        InputError: as there, or the loss is no number any more.
    """
    made = finetune_many(base, [adapter], [photos], config, out=out, sample=sample)[0]
    check_loss(made.metadata)
    return made


def check_loss(outcome: Mapping[str, str]) -> None:
    """Refuses what a training left whose loss was no number: its gradients may all have been skipped.

    Args:
        outcome: `Outcome.facts` of the person.

    Raises:
        InputError: it was not.
    """
    if not math.isfinite(float(outcome.get("loss", 0.0))):
        raise InputError(
            f"the loss is {outcome['loss']} at the end; lower lr, or load the base with dtype=bfloat16"
        )


def finetune_many(
    base: Base,
    adapters: Sequence[Adapter],
    people: Sequence[Photos],
    config: FinetuneConfig | None = None,
    *,
    out: Path | None = None,
    sample: Sample | None = None,
) -> list[Adapter]:
    """Trains adapters on their persons' photos for a few steps (paper, section 4.3; METHOD section 4).

    Args:
        base: the base the adapters were made for.
        adapters: usually predictions; any LiDB or LoRA. All of one rank and of the same sites.
        people: photos of each person; one will do.
        config: steps, rank, way, …
        out: a run folder for log and checkpoints; None to keep everything in memory.
        sample: prompts, a seed for each → class images; for prior preservation.

    Returns:
        A LoRA of rank `config.rank` for each, worn by nothing.

    Raises:
        InputError: an adapter of another base, one whose rank leaves no room in `config.rank`, or `out` holds
            a run of another config, base, start or photos.
    """
    config = config or FinetuneConfig()
    trainable = _relaxed_or_beside(base, adapters, config)
    run = None
    if out is not None:
        begun = hashed([adapter.factors for adapter in adapters])
        run = Run(out, config, inputs={**inputs_of(base, people, config), "adapters": begun})
    groups, judged = shots_of(base, people, config, sample)
    outcome = train(base, trainable, groups, config, run, judged=judged)
    return [
        _finished(one, factors, config, outcome.facts(k))
        for k, (one, factors) in enumerate(zip(adapters, each(trainable.worn()), strict=True))
    ]


def _finished(
    adapter: Adapter, factors: Factors, config: FinetuneConfig, outcome: Mapping[str, str]
) -> Adapter:
    """The trained factors in the adapter's place, of the rank that was asked for."""
    error = 0.0
    if next(iter(factors.values()))[0].shape[1] > config.rank:
        factors, error = truncate(factors, config.rank)
    facts = {**outcome, "way": config.way, "truncation_error": f"{error:.3g}"}
    return replace(adapter, factors=factors, lidb=None, metadata={**adapter.metadata, **facts})


def _relaxed_or_beside(base: Base, adapters: Sequence[Adapter], config: FinetuneConfig) -> Worn:
    """METHOD section 4's two ways; both are exact before the first step."""
    sites, highest = _fitting_sites(base, adapters), max(adapter.rank for adapter in adapters)
    if highest > config.rank:
        raise InputError(f"rank: expected at least {highest}, the adapter's own, got {config.rank}; raise it")
    if config.way == "complement":
        relaxed = [relax(adapter.factors, config.rank, config.seed) for adapter in adapters]
        return pairs(together(relaxed), base.device)
    free = config.trained_rank or config.rank - highest
    if free < 1:
        raise InputError(
            f"rank: {config.rank} leaves nothing beside the adapter's rank {highest}; raise it, or give "
            "trained_rank"
        )
    still = together([adapter.factors for adapter in adapters])
    return beside(still, together([fresh(sites, free, config.seed)] * len(adapters)), base.device)
