"""One loop over leaf tensors, for DreamBooth (paper, section 4.1) and for the fast finetune (section 4.3).

What is trained is a handful of leaf tensors and a function that makes LoRA factors of them, so rank-relaxed
factors, a trainable LoRA beside a frozen prediction, LiDB numbers and a fresh LoRA go through the same loop.
Leaves lead with an identity axis: many people train side by side in one forward and backward, each as if
alone (losses are summed, gradients clipped a person at a time, Adam is elementwise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.denoise import denoise_loss, draw_noise
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo, photo_hash
from hyperdreambooth.finetune.config import FinetuneConfig, TrainConfig
from hyperdreambooth.finetune.shots import Conditioner, Sample, Shots, class_shots, photo_shots
from hyperdreambooth.finetune.trainable import Trainable, beside, each, pairs, together
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import fresh, relax, truncate
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import InputError, Run
from hyperdreambooth.shapes import Factors, Site

Photos: TypeAlias = Sequence[Photo]
"""Of one person."""

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate at a step: constant, or half a cosine from `lr` to 0."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))


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
    drawn = [draw_noise(base, shape, config.seed, "finetune", step, k) for k in range(per)] * len(people)
    noise, timesteps = torch.stack([n for n, _ in drawn]), torch.stack([t for _, t in drawn])
    mask = torch.stack([shots.mask() for shots, _ in picks])
    with torch.autocast(base.device.type, DTYPES[config.precision], enabled=config.precision != "float32"):
        conditioning = encode([shots.captions[index] for shots, index in picks])
        losses = denoise_loss(base, latents, conditioning, noise, timesteps, mask, config.snr_gamma)
    weights = losses.new_tensor([shots.weight for shots, _ in picks])
    return (losses * weights).unflatten(0, (len(people), per)).sum(1) / config.batch


def train(
    base: Base,
    trainable: Trainable,
    people: Sequence[Sequence[Shots]],
    config: TrainConfig,
    run: Run | None = None,
    title: str = "finetune",
) -> Tensor | None:
    """Moves the leaves in place; the base is as before afterwards.

    Args:
        base: the frozen base.
        trainable: the leaves, each with `n` people in front, and what they mean.
        people: of each, the latents and captions and, with prior preservation, the class's.
        config: steps, rate, batch, …
        run: a run folder for the log and checkpoints; None for a short finetune.
        title: of the progress bar.

    Returns:
        Everybody's mean loss of the last tenth of the steps taken now, `(n,)`; None when none were.
    """
    leaves, now = list(trainable.leaves.values()), trainable.worn()
    losses: list[Tensor] = []
    optimizer = torch.optim.Adam(leaves, lr=config.lr)
    scaler = GradScaler(base.device.type, enabled=config.precision == "fp16")
    first = _resume(run, trainable, optimizer, scaler)
    captions = [caption for groups in people for shots in groups for caption in shots.captions]
    encode = Conditioner(base, captions, any(site.startswith("text") for site in now))
    images = len(people[0]) * config.batch
    with wear(base.components, now) as worn, Progress(title, config.steps, first) as bar:
        for step in range(first, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            worn.set(trainable.to_factors(trainable.leaves), images)
            loss = step_losses(base, people, encode, config, step)
            _update(loss.sum(), leaves, optimizer, scaler, config.clip)
            losses.append(loss.detach())
            mean = loss.mean().item()
            bar.update(1, loss=mean)
            _record(run, step + 1, mean, config, lambda: _state(trainable, optimizer, scaler))
    return torch.stack(losses[-max(1, len(losses) // 10) :]).mean(0).cpu() if losses else None


def _update(
    loss: Tensor, leaves: list[Tensor], optimizer: torch.optim.Optimizer, scaler: GradScaler, clip: float
) -> None:
    """One step of the optimiser; the scaler does nothing except for fp16."""
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    clip_people(leaves, clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def clip_people(leaves: Sequence[Tensor], limit: float) -> None:
    """Scales each person's own gradient, over all leaves `(n, …)`, down to a norm of at most `limit`."""
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = limit / norms.clamp_min(limit)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))


def _record(
    run: Run | None, done: int, loss: float, config: TrainConfig, state: Callable[[], dict[str, object]]
) -> None:
    """Logs a step, and keeps a checkpoint now and then and at the end."""
    if run is None:
        return
    run.log(done, loss=loss, lr=learning_rate(config, done - 1))
    if done % config.save_every == 0 or done == config.steps:
        run.save(done, state(), keep=1)


def _state(trainable: Trainable, optimizer: torch.optim.Optimizer, scaler: GradScaler) -> dict[str, object]:
    return {"leaves": trainable.leaves, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}


def _resume(
    run: Run | None, trainable: Trainable, optimizer: torch.optim.Optimizer, scaler: GradScaler
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
    return step


def shots_of(
    base: Base, people: Sequence[Photos], config: TrainConfig, sample: Sample | None, folder: Path | None
) -> list[list[Shots]]:
    """What each person is trained on: photos and, with prior preservation, the class's images."""
    shots = [photo_shots(base, photos, config.prompt, config.background) for photos in people]
    if config.prior_weight == 0:
        return [[person] for person in shots]
    if sample is None:
        raise ValueError("prior_weight > 0 needs `sample`, which makes the class images")
    count, weight = config.prior_images, config.prior_weight
    shared = class_shots(base, config.prior_prompt, count, config.seed, weight, sample, folder)
    return [[person, shared] for person in shots]


def _fitting_sites(base: Base, adapters: Sequence[Adapter]) -> tuple[Site, ...]:
    """The base's sites that the adapters change.

    Raises:
        InputError: an adapter belongs to another base, or they do not change the same sites.
    """
    names = set(adapters[0].factors)
    sites = tuple(site for site in base.sites if site.name in names)
    for adapter in adapters:
        if adapter.base_fingerprint not in ("", base.fingerprint) or len(sites) < len(adapter.factors):
            raise InputError(
                f"adapter: made for base {adapter.base_fingerprint or 'of other sites'}, this base "
                f"{base.source} is {base.fingerprint}; load the base it was made for"
            )
        if set(adapter.factors) != names:
            raise InputError("adapters: expected all of the same sites; finetune those of other sites alone")
    return sites


def photos_fingerprint(people: Sequence[Photos]) -> str:
    """Names the photos, person by person: a run folder of others is refused."""
    return ";".join(",".join(sorted(photo_hash(photo.path)[:12] for photo in photos)) for photos in people)


def finetune(
    base: Base,
    adapter: Adapter,
    photos: Photos,
    config: FinetuneConfig | None = None,
    *,
    out: Path | None = None,
    sample: Sample | None = None,
) -> Adapter:
    """`finetune_many` of one person."""
    return finetune_many(base, [adapter], [photos], config, out=out, sample=sample)[0]


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
        InputError: an adapter of another base, or one whose rank leaves no room in `config.rank`.
    """
    config = config or FinetuneConfig()
    trainable = _relaxed_or_beside(base, adapters, config)
    inputs = {"base": base.fingerprint, "photos": photos_fingerprint(people)}
    run = Run(out, config, inputs=inputs) if out is not None else None
    groups = shots_of(base, people, config, sample, out / "class" if out is not None else None)
    losses = train(base, trainable, groups, config, run)
    done = [
        _finished(one, factors, config) for one, factors in zip(adapters, each(trainable.worn()), strict=True)
    ]
    if losses is not None:
        for adapter, loss in zip(done, losses.tolist(), strict=True):
            adapter.metadata["loss"] = f"{loss:.5f}"
    return done


def _finished(adapter: Adapter, factors: Factors, config: FinetuneConfig) -> Adapter:
    """The trained factors in the adapter's place, of the rank that was asked for."""
    error = 0.0
    if next(iter(factors.values()))[0].shape[1] > config.rank:
        factors, error = truncate(factors, config.rank)
    facts = {"steps": str(config.steps), "way": config.way, "truncation_error": f"{error:.3g}"}
    return replace(adapter, factors=factors, lidb=None, metadata={**adapter.metadata, **facts})


def _relaxed_or_beside(base: Base, adapters: Sequence[Adapter], config: FinetuneConfig) -> Trainable:
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
