"""One loop over leaf tensors, for fast finetuning (paper, section 4.3) and for DreamBooth (section 4.1).

What is trained is a handful of leaf tensors and a function that makes LoRA factors of them, so rank-relaxed
factors, a trainable LoRA beside a frozen prediction, LiDB numbers and a fresh LoRA go through the same loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.denoise import denoise_loss, draw_noise
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo, photo_hash
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig, TrainConfig
from hyperdreambooth.finetune.shots import Conditioner, Sample, Shots, class_shots, photo_shots
from hyperdreambooth.finetune.trainable import Trainable, beside, leaf, pairs
from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.weights import Layout, factors, start
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import fresh, relax, truncate
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import InputError, Run
from hyperdreambooth.shapes import Site

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate at a step: constant, or half a cosine from `lr` to 0."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))


# E‖ε - ε_θ(x_t, c)‖² of the person + λ · the same of the class   (DreamBooth, equation 2)
def step_loss(
    base: Base, groups: Sequence[Shots], encode: Conditioner, config: TrainConfig, step: int
) -> Tensor:
    """The loss of one step, `()`; its photos, noise and timesteps are functions of (seed, step) alone.

    Photos take turns, so that each is seen equally often; class images ride in the same forward.
    """
    turn = range(step * config.batch, (step + 1) * config.batch)
    picks = [(shots, index % len(shots.captions)) for shots in groups for index in turn]
    latents = torch.stack([shots.latents[index] for shots, index in picks])
    drawn = [
        draw_noise(base, tuple(latents.shape[1:]), config.seed, "finetune", step, k)
        for k in range(len(picks))
    ]
    noise, timesteps = torch.stack([n for n, _ in drawn]), torch.stack([t for _, t in drawn])
    with torch.autocast(base.device.type, DTYPES[config.precision], enabled=config.precision != "float32"):
        conditioning = encode([shots.captions[index] for shots, index in picks])
        losses = denoise_loss(base, latents, conditioning, noise, timesteps)
    return (losses * losses.new_tensor([shots.weight for shots, _ in picks])).sum() / config.batch


def train(
    base: Base,
    trainable: Trainable,
    groups: Sequence[Shots],
    config: TrainConfig,
    run: Run | None = None,
    title: str = "finetune",
) -> float | None:
    """Moves the leaves in place; the base is as before afterwards.

    Args:
        base: the frozen base.
        trainable: the leaves and what they mean.
        groups: the person's latents and captions and, with prior preservation, the class's.
        config: steps, rate, batch, …
        run: a run folder for the log and checkpoints; None for a short finetune.
        title: of the progress bar.

    Returns:
        The mean loss of the last tenth of the steps taken now; None when none were.
    """
    leaves, losses, now = list(trainable.leaves.values()), [], trainable.worn()
    optimizer = torch.optim.Adam(leaves, lr=config.lr)
    scaler = GradScaler(base.device.type, enabled=config.precision == "fp16")
    first = _resume(run, trainable, optimizer, scaler)
    encode = Conditioner(
        base, [c for shots in groups for c in shots.captions], any(k.startswith("text") for k in now)
    )
    with wear(base.components, now) as worn, Progress(title, config.steps, first) as bar:
        for step in range(first, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            worn.set(trainable.to_factors(trainable.leaves))
            loss = step_loss(base, groups, encode, config, step)
            _update(loss, leaves, optimizer, scaler, config.clip)
            losses.append(loss.item())
            bar.update(1, loss=losses[-1])
            _record(run, step + 1, losses[-1], config, lambda: _state(trainable, optimizer, scaler))
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else None


def _update(
    loss: Tensor, leaves: list[Tensor], optimizer: torch.optim.Optimizer, scaler: GradScaler, clip: float
) -> None:
    """One step of the optimiser; the scaler does nothing except for fp16."""
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(leaves, clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


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


def _groups(
    base: Base, photos: Sequence[Photo], config: TrainConfig, sample: Sample | None, folder: Path | None
) -> list[Shots]:
    person = photo_shots(base, photos, config.prompt)
    if config.prior_weight == 0:
        return [person]
    if sample is None:
        raise ValueError("prior_weight > 0 needs `sample`, which makes the class images")
    count, weight = config.prior_images, config.prior_weight
    return [person, class_shots(base, config.prior_prompt, count, config.seed, weight, sample, folder)]


def _fitting_sites(base: Base, adapter: Adapter) -> tuple[Site, ...]:
    """The base's sites that the adapter changes.

    Raises:
        InputError: the adapter belongs to another base.
    """
    sites = tuple(site for site in base.sites if site.name in adapter.factors)
    if adapter.base_fingerprint not in ("", base.fingerprint) or len(sites) < len(adapter.factors):
        raise InputError(
            f"adapter: made for base {adapter.base_fingerprint or 'of other sites'}, this base {base.source} "
            f"is {base.fingerprint}; load the base it was made for"
        )
    return sites


def _photos_fingerprint(photos: Sequence[Photo]) -> str:
    return ",".join(sorted(photo_hash(photo.path)[:12] for photo in photos))


def finetune(
    base: Base,
    adapter: Adapter,
    photos: Sequence[Photo],
    config: FinetuneConfig | None = None,
    *,
    out: Path | None = None,
    sample: Sample | None = None,
) -> Adapter:
    """Trains an adapter on a person's photos for a few steps (paper, section 4.3; METHOD section 4).

    Args:
        base: the base the adapter was made for.
        adapter: usually a prediction; any LiDB or LoRA.
        photos: of the one person; one will do.
        config: steps, rank, way, …
        out: a run folder for log and checkpoints; None to keep everything in memory.
        sample: prompts, a seed for each → class images; for prior preservation.

    Returns:
        A LoRA of rank `config.rank`, worn by nothing.

    Raises:
        InputError: an adapter of another base, or one whose rank leaves no room in `config.rank`.
    """
    config = config or FinetuneConfig()
    trainable = _relaxed_or_beside(base, adapter, config)
    inputs = {"base": base.fingerprint, "photos": _photos_fingerprint(photos)}
    run = Run(out, config, inputs=inputs) if out is not None else None
    groups = _groups(base, photos, config, sample, out / "class" if out is not None else None)
    loss = train(base, trainable, groups, config, run)
    done, error = trainable.worn(), 0.0
    if next(iter(done.values()))[0].shape[1] > config.rank:
        done, error = truncate(done, config.rank)
    facts = {"steps": str(config.steps), "way": config.way, "truncation_error": f"{error:.3g}"}
    facts |= {"loss": f"{loss:.5f}"} if loss is not None else {}
    return replace(adapter, factors=done, lidb=None, metadata={**adapter.metadata, **facts})


def _relaxed_or_beside(base: Base, adapter: Adapter, config: FinetuneConfig) -> Trainable:
    """METHOD section 4's two ways; both are exact before the first step."""
    sites = _fitting_sites(base, adapter)
    if adapter.rank > config.rank:
        raise InputError(
            f"rank: expected at least {adapter.rank}, the adapter's own, got {config.rank}; raise it"
        )
    if config.way == "complement":
        return pairs(relax(adapter.factors, config.rank, config.seed), base.device)
    free = config.trained_rank or config.rank - adapter.rank
    if free < 1:
        raise InputError(
            f"rank: {config.rank} leaves nothing beside the adapter's rank {adapter.rank}; raise it, or give "
            "trained_rank"
        )
    return beside(adapter.factors, fresh(sites, free, config.seed), base.device)


def dreambooth(
    base: Base,
    photos: Sequence[Photo],
    out: Path,
    config: DreamboothConfig | None = None,
    *,
    sample: Sample | None = None,
) -> Adapter:
    """Trains one person from scratch (paper, section 4.1); running it again resumes.

    Args:
        base: the frozen base.
        photos: of the one person.
        out: run folder: log, checkpoints, class images.
        config: method, steps, rank, …
        sample: prompts, a seed for each → class images; for prior preservation.

    Returns:
        A LiDB or a LoRA, as `config.method` says.

    Raises:
        InputError: `out` holds a run of another config, base or photos.
    """
    config = config or DreamboothConfig()
    run = Run(out, config, inputs={"base": base.fingerprint, "photos": _photos_fingerprint(photos)})
    groups = _groups(base, photos, config, sample, out / "class")
    learn = partial(train, base, groups=groups, config=config, run=run, title="dreambooth")
    return (_light if config.method == "lidb" else _lora)(base, config, learn)


def _lora(base: Base, config: DreamboothConfig, learn: Callable[[Trainable], object]) -> Adapter:
    """An ordinary LoRA at every site."""
    trainable = pairs(fresh(base.sites, config.rank, config.seed), base.device)
    learn(trainable)
    return Adapter(trainable.worn(), base.trigger, base.fingerprint, base.source)


def _light(base: Base, config: DreamboothConfig, learn: Callable[[Trainable], object]) -> Adapter:
    """Lightweight DreamBooth: numbers over frozen seeded bases, from the start that a bank's people share."""
    layout = Layout(base.sites, config.rank, config.down_dim, config.up_dim)
    basis = seeded_basis(base.sites, config.down_dim, config.up_dim, config.basis_seed)
    near, numbers = basis.to(base.device), leaf(start(layout, config.seed)[None], base.device)
    learn(Trainable({"numbers": numbers}, lambda now: factors(layout, near, now["numbers"])))
    lidb = Lidb(
        numbers=numbers.detach()[0].cpu(),
        layout=layout,
        basis_source=basis.source,
        basis_fingerprint=basis_fingerprint(basis),
        base_fingerprint=base.fingerprint,
        trigger=base.trigger,
        base_source=base.source,
    )
    return Adapter.from_lidb(lidb, basis)
