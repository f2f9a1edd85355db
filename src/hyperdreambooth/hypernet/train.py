"""Stage 3, one visible loop (paper, section 4.2): draw people, predict from a photo, denoise another.

Plain and "pro" (`learn_basis`), with a bank and without, on one process or several: the same loop. What
differs is which parameters the network holds and which terms of the loss have something to compare with.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.data import TrainingBatch, collect, person_losses, pick
from hyperdreambooth.hypernet.decoder import HyperNetwork
from hyperdreambooth.hypernet.loss import at, number_loss, size_loss, weight_loss
from hyperdreambooth.hypernet.predictor import HypernetInfo, Predictor, load_hypernet
from hyperdreambooth.hypernet.setup import (
    State,
    Training,
    end_accelerate,
    finished,
    prepare,
    start_accelerate,
)
from hyperdreambooth.hypernet.validate import PersonSampler, Score, pictures, tell_apart
from hyperdreambooth.lidb.weights import factors
from hyperdreambooth.lora.inject import Worn, wear
from hyperdreambooth.progress import Progress
from hyperdreambooth.shapes import Factors

_FIGURES = 6  # sums of loss, denoise, weights, size; people covered; parts counted


def train_hypernet(
    base: Base, photos: Path, out: Path, config: HypernetConfig, bank: Path | None = None,
    sample: PersonSampler | None = None, score: Score | None = None,
) -> Predictor:  # fmt: skip
    """Trains a hypernetwork, or goes on with the one in `out`; run again when finished, it returns it.

    On several processes every one of them calls this; the first one writes.

    Args:
        base: the frozen base; as before afterwards.
        photos: folder of many people.
        out: the hypernetwork's folder; `run/` in it holds log and checkpoints, `cache/` encoded photos.
        config: everything else.
        bank: pre-optimised numbers of some of the people: start, scale, targets.
        sample: draws validation pictures.
        score: scores them.

    Returns:
        The averaged (EMA) network as `out` holds it; unfinished where `max_minutes` ended it.

    Raises:
        InputError: bad photos, bank, encoder or settings, or `out` holds another training.
    """
    accelerator = start_accelerate(base, config)
    try:
        job, state = prepare(base, photos, out, config, bank, accelerator)
        if not finished(out, config):
            _wear_and_train(job, state, sample, score)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and finished(out, config):
            job.run.clear()
            _retell(out, config)
        accelerator.wait_for_everyone()
    finally:
        end_accelerate(accelerator)
    return load_hypernet(out, base.device)


def _wear_and_train(job: Training, state: State, sample: PersonSampler | None, score: Score | None) -> None:
    """Goes on from the newest checkpoint, the base worn once for all steps."""
    with job.accelerator.main_process_first():
        found = job.run.latest()
    if found is not None:
        state.load(job, found[1])
    job.base.rest(_parts(job))
    with (
        job.base.training(job.config.checkpointing),
        wear(job.base.components, _nobody(state.ema), name="hypernet") as worn,
    ):
        train(job, state, worn, found[0] if found else 0, sample, score)


def _parts(job: Training) -> set[str]:
    """The parts of the base that wear what is trained."""
    return {site.component for site in job.targets.layout.sites}


def train(
    job: Training,
    state: State,
    worn: Worn,
    first: int,
    sample: PersonSampler | None = None,
    score: Score | None = None,
) -> None:
    """The loop, from step `first` on."""
    config, accelerator, started = job.config, job.accelerator, time.monotonic()
    parameters = [p for p in state.network.parameters() if p.requires_grad]
    totals = torch.zeros(_FIGURES, device=job.base.device)
    norm: Any = None
    told = dict[str, float]()
    with Progress("train", config.steps, first) as bar:
        for step in range(first, config.steps):
            for group in state.optimizer.param_groups:
                group["lr"] = group["full_lr"] * rate(config, step)
            for part in range(config.accumulation):
                with accelerator.accumulate(state.model):
                    loss, figures = step_loss(job, state, worn, step, part)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(parameters, config.clip)
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                totals += figures
            average(state, config, step)
            last = step + 1 == config.steps or _out_of_time(job, started)
            if last or (step + 1) % config.log_every == 0:
                told["loss"] = _tell(job, step + 1, totals, norm)
                totals.zero_()
            told |= _judge_and_save(job, state, worn, step + 1, last, sample, score)
            bar.update(1, **told)
            job.base.rest(_parts(job))  # pictures of a validation need everything
            if last:
                return


# α · denoise + β · weights + γ · size   (paper, section 4.2; training.md 4, 8)
def step_loss(job: Training, state: State, worn: Worn, step: int, part: int) -> tuple[Tensor, Tensor]:
    """The loss of this process's part of a step.

    Where α is 0 the base is not run at all: a warm-up on weights alone costs next to nothing, and draws only
    people that the bank covers.

    Returns:
        The loss `()`, and the figures `(6,)` to be summed.
    """
    config, base, covered = job.config, job.base, job.targets.covered
    alpha, beta, gamma = (at(each, step) for each in (config.alpha, config.beta, config.gamma))
    silent = alpha == 0 and beta > 0 and bool(covered)
    share = 1.0 if silent else config.bank_share if beta > 0 else 0.0
    pools, places = ([job.trained, covered] if covered else [job.trained]), _places(job, part)
    key = (config.seed, "train", step)
    slots = [pick(job.faces, pools, share, config.photos, *key, k) for k in places]
    batch = collect(base, job.faces, slots, config.timestep_bias)
    with job.accelerator.autocast():
        numbers, factors_ = state.model(batch.features)
        denoise = numbers.new_zeros(())
        if not silent:
            worn.set(factors_, images=config.photos)
            denoise = person_losses(base, batch, config.weighting).mean()
            if job.accelerator.num_processes > 1:
                # they wait for everybody's gradient, and SDXL never reads its first text encoder's last layer
                denoise = denoise + 0 * sum(part.sum() for pair in factors_.values() for part in pair)
    weights, known = known_losses(job, state.network, numbers, batch)
    size = size_loss(numbers, state.network.mean, state.network.spread).mean()
    loss = alpha * denoise + beta * weights / len(places) + gamma * size
    sums = [loss.detach(), denoise.detach(), weights.detach(), size.detach()]
    return loss, torch.stack([*sums, loss.new_tensor(float(known)), loss.new_tensor(1.0)])


def known_losses(
    job: Training, network: HyperNetwork, numbers: Tensor, batch: TrainingBatch
) -> tuple[Tensor, int]:
    """The weight losses of a batch's people whom the bank covers, summed `()`, and how many they are."""
    rows, device = job.targets.rows, numbers.device
    places = [k for k, one in enumerate(batch.identities) if one in rows]
    if not places:
        return numbers.new_zeros(()), 0
    ours = numbers[places].float()
    known = job.targets.numbers[[rows[batch.identities[k]] for k in places]].to(device)
    if job.config.weight_loss == "numbers":
        return number_loss(ours, known, network.spread).sum(), len(places)
    return weight_loss(network.layout, ours, known, job.targets.scale.to(device)).sum(), len(places)


def _places(job: Training, part: int) -> range:
    """This process's slots of the global batch, in one accumulated part."""
    processes = job.accelerator.num_processes
    size = job.config.batch // (processes * job.config.accumulation)
    first = (part * processes + job.accelerator.process_index) * size
    return range(first, first + size)


def rate(config: HypernetConfig, step: int) -> float:
    """Share of the full learning rate at a step: a linear warm-up, then half a cosine down to 0."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


@torch.no_grad()
def average(state: State, config: HypernetConfig, step: int) -> None:
    """Moves the average towards the network, faster at first: there is little worth remembering yet."""
    decay = min(config.ema, (1 + step) / (10 + step))
    for old, new in zip(state.ema.parameters(), state.network.parameters(), strict=True):
        old.lerp_(new, 1 - decay)


def _nobody(network: HyperNetwork) -> Factors:
    """Zero factors of one identity: a base that wears them answers like the bare one."""
    with torch.no_grad():
        worn = factors(network.layout, network.basis(), network.mean[None])
    return {name: (torch.zeros_like(down), torch.zeros_like(up)) for name, (down, up) in worn.items()}


def _tell(job: Training, done: int, totals: Tensor, norm: Any) -> float:
    """Logs the means since the last time, over all processes.

    Raises:
        InputError: the loss is no number any more.
    """
    everywhere: Any = job.accelerator.reduce(totals.clone(), "sum")
    loss, denoise, weights, size, known, parts = everywhere.tolist()
    if not math.isfinite(loss):
        raise InputError(
            f"{job.out}: the loss is {loss} at step {done}; lower lr or clip and begin in another --out"
        )
    if job.accelerator.is_main_process:
        figures = {"loss": loss / parts, "denoise": denoise / parts, "size": size / parts}
        known_figures = {"weights": weights / known} if known else {}
        job.run.log(
            done, **figures, **known_figures, lr=job.config.lr * rate(job.config, done - 1), norm=norm
        )
    return loss / parts


def _out_of_time(job: Training, started: float) -> bool:
    """Whether `max_minutes` are over; the processes agree, as their clocks do not."""
    if job.config.max_minutes is None:
        return False
    over = torch.tensor(
        float(time.monotonic() - started > job.config.max_minutes * 60), device=job.accelerator.device
    )
    everywhere: Any = job.accelerator.reduce(over, "sum")
    return float(everywhere) > 0


def _judge_and_save(
    job: Training,
    state: State,
    worn: Worn,
    done: int,
    last: bool,
    sample: PersonSampler | None,
    score: Score | None,
) -> dict[str, float]:
    """Validation, checkpoint and export, by the first process; the loop depends on none of them.

    Returns:
        `apart`, to be told beside the loss, where people were judged.
    """
    judge, save = last or done % job.config.validate_every == 0, last or done % job.config.save_every == 0
    if not job.accelerator.is_main_process or not (judge or save):
        return {}
    figures: dict[str, float] = {}
    if judge and job.held:
        with job.accelerator.autocast():
            own = (job.base, job.faces, job.held, state.ema, worn, job.config)
            figures = tell_apart(*own, together=len(_places(job, 0)))
        job.run.log(done, kind="validation", **figures)
        if sample is not None:
            worn.set(_nobody(state.ema))
            picture = job.run.folder / "pictures" / f"step-{done:07d}.png"
            scores = pictures(job.base, job.faces, job.held, state.ema, job.config, picture, sample, score)
            job.run.log(done, kind="pictures", picture=picture.name, **scores)
    if save:
        # in this order: after the last checkpoint there is no step left that would export again
        Predictor(state.ema, job.encoder, _facts(job, done, figures)).save(job.out, job.config.stored)
        state.save(job, done)
    return {"apart": figures["apart"]} if figures else {}


def _retell(out: Path, config: HypernetConfig) -> None:
    """What a finished network is worn with may change without training it again."""
    made = load_hypernet(out)
    training = {**made.info.training, "config": config.model_dump(mode="json")}
    facts = replace(made.info, training=training, finetune=config.finetune, strength=config.strength)
    if facts != made.info:
        Predictor(made.network, made.encoder, facts).save(out, config.stored)


def _facts(job: Training, done: int, figures: dict[str, float]) -> HypernetInfo:
    """What the exported folder says of its making."""
    base = job.base
    training = {
        "step": done, "identities": len(job.trained), "held_out": len(job.held), "covered":
        len(job.targets.rows), "validation": figures, "config": job.config.model_dump(mode="json"),
    }  # fmt: skip
    return HypernetInfo(
        base.fingerprint, base.source, base.trigger, base.class_word, base.resolution, training,
        job.config.finetune, job.config.strength,
    )  # fmt: skip
