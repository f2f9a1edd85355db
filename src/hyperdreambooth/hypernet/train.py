"""Stage 3, the training of a hypernetwork (paper, section 4.2): predict from one photo, denoise another."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.base.alone import alone
from hyperdreambooth.base.denoise import sampled_answer
from hyperdreambooth.base.load import Base
from hyperdreambooth.captured import sent
from hyperdreambooth.files import InputError
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.data import (
    EVERY,
    Example,
    TrainingBatch,
    anybody,
    collect,
    person_losses,
    pick,
)
from hyperdreambooth.hypernet.decoder import HyperNetwork
from hyperdreambooth.hypernet.loss import size_loss, weight_loss
from hyperdreambooth.hypernet.predictor import HypernetInfo, Predictor, load_hypernet
from hyperdreambooth.hypernet.setup import (
    State,
    Training,
    check_inputs,
    end_accelerate,
    finished,
    set_up,
    start_accelerate,
)
from hyperdreambooth.hypernet.validate import PersonSampler, Score, pictures, tell_apart
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.weights import factors
from hyperdreambooth.lora.inject import Worn, wear
from hyperdreambooth.progress import Progress
from hyperdreambooth.schedule import learning_rate
from hyperdreambooth.shapes import Factors

_FIGURES = 7  # sums of loss, denoise, class, weights and size, covered people, and parts


@alone
def train_hypernet(
    base: Base,
    photos: str | Path,
    out: str | Path,
    config: HypernetConfig | None = None,
    bank: Bank | str | Path | None = None,
    sample: PersonSampler | None = None,
    score: Score | None = None,
) -> Predictor:
    """Trains a hypernetwork, or continues the training in `out`. A finished one is returned as it is.

    With several processes, each of them calls this function, and the first one writes. The averaged (EMA)
    network is returned; it is unfinished if `max_minutes` ended the training.

    Args:
        base: the frozen base; it is unchanged afterwards.
        photos: a folder with a subfolder for each person; thousands of people, best with several photos each.
        out: the hypernetwork's folder, which also has `run/` and `cache/`.
        config: all other settings; the default image encoder is fetched from the hub.
        bank: the pre-optimised LiDBs of some of the people, or their folder or URL: start, scale and targets.
        sample, score: draw and score validation pictures, see `PersonSampler` and `Score`.

    Raises:
        InputError: photos, bank, encoder or settings cannot be used, or `out` holds another training.
    """
    out, config = Path(out), config or HypernetConfig()
    bank = bank if isinstance(bank, Bank | None) else Bank.open(bank)
    accelerator = start_accelerate(base, config)
    try:
        inputs = check_inputs(base, Path(photos), out, config, bank, accelerator)
        if not finished(out, config):
            _wear_and_train(*set_up(base, inputs, out, config, accelerator, sample, score))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and finished(out, config):
            inputs.run.clear()
            _update_info(out, config)
        accelerator.wait_for_everyone()
    finally:
        end_accelerate(accelerator)
    return load_hypernet(out, base.device)


def _wear_and_train(training: Training, state: State) -> None:
    """Continues from the newest checkpoint, with one injection for all steps."""
    base = training.base
    with training.accelerator.main_process_first():
        found = training.run.latest()
    if found is not None:
        for name, part in state.parts(training).items():
            part.load_state_dict(found[1][name])
    base.rest(training.components)
    bare = _zero_factors(state.ema)
    config = training.config
    with (
        base.training(config.checkpointing, config.compile_blocks),
        wear(base.components, bare, name="hypernet") as worn,
    ):
        train(training, state, worn, found[0] if found else 0)


def train(training: Training, state: State, worn: Worn, first: int) -> None:
    """Runs the loop from step `first` on."""
    config, accelerator, started = training.config, training.accelerator, time.monotonic()
    parameters = [p for p in state.network.parameters() if p.requires_grad]
    totals = torch.zeros(_FIGURES, device=training.base.device)
    norm: Any = None
    shown = dict[str, float]()
    events = training.run.events if accelerator.is_main_process else None
    with Progress("train", config.steps, first, events) as bar:
        for step in range(first, config.steps):
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(group["peak_lr"], step, config.steps, warmup=config.warmup)
            for part in range(config.accumulation):
                with accelerator.accumulate(state.model):
                    loss, figures = step_loss(training, state, worn, step, part)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(parameters, config.clip)
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                totals += figures
            average(state, config, step)
            last = step + 1 == config.steps or _out_of_time(training, started)
            if last or (step + 1) % config.log_every == 0:
                shown["loss"] = _log(training, step + 1, totals, norm)
                totals.zero_()
            shown |= _validate_and_save(training, state, worn, step + 1, last)
            bar.update(1, **shown)
            training.base.rest(training.components)  # validation pictures need all networks
            if last:
                return


# α · denoise + class_weight · class + β · weights + γ · size   (paper, section 4.2; training.md 4, 8)
def step_loss(training: Training, state: State, worn: Worn, step: int, part: int) -> tuple[Tensor, Tensor]:
    """Returns this process's loss `()` of a part of a step, and the figures `(7,)` to be summed for the log.

    With `alpha = 0` and a bank, only people of the bank are drawn and the base does not run, so a warm-up on
    the weight loss alone costs next to nothing.
    """
    config, base, network = training.config, training.base, state.network
    covered = list(training.targets.rows)
    weights_alone = config.alpha == 0 and bool(covered)
    pool, places = covered if weights_alone else training.trained, _places(training, part)
    examples = [pick(training.faces, pool, config.photos, config.seed, "train", step, k) for k in places]
    unnamed: list[Example] = []
    if config.class_weight and not weights_alone:
        unnamed = anybody(training.faces, training.trained, config.photos, config.seed, step, places)
    batch = collect(base, training.faces, [*examples, *unnamed])
    with training.accelerator.autocast():
        numbers, predicted = state.model(batch.features)
        denoise = kept = numbers.new_zeros(())
        if not weights_alone:
            losses = worn_losses(training, worn, predicted, batch, unnamed, -places.start % EVERY)
            denoise = losses[: len(examples)].mean()
            # as a mean over those of the whole batch, however many of them are in this part
            kept = losses[len(examples) :].sum() / len(places) * config.batch / -(-config.batch // EVERY)
            if training.accelerator.num_processes > 1:
                # DDP waits for all gradients, but SDXL never uses the last layer of its first text encoder
                denoise = denoise + 0 * sum(factor.sum() for pair in predicted.values() for factor in pair)
    weights, known = known_losses(training, network, numbers, batch)
    size = size_loss(numbers, network.mean, network.spread).mean()
    loss = config.alpha * denoise + config.beta * weights / len(places) + config.gamma * size
    loss = loss + config.class_weight * kept if unnamed else loss
    # parts may differ by one person, and the mean of their gradients must be that of the whole batch
    share = len(places) * _parts(training) / config.batch
    sums = [share * loss.detach(), share * denoise.detach(), share * kept.detach()]
    sums += [weights.detach(), share * size.detach()]
    return share * loss, torch.stack([*sums, loss.new_tensor(float(known)), loss.new_tensor(1.0)])


def worn_losses(
    training: Training,
    worn: Worn,
    predicted: Factors,
    batch: TrainingBatch,
    unnamed: Sequence[Example],
    first: int,
) -> Tensor:
    """Returns each example's denoising loss; that of `unnamed`, the last ones, by the bare base's answers.

    Person number `first` wears the first of them, and every `EVERY`th person after that another.
    """
    base, config, answers = training.base, training.config, None
    if unnamed:
        worn.set(_zeros(predicted))
        own = collect(base, training.faces, unnamed)
        answers = sampled_answer(base, own.latents, own.keys, own.conditioning(), config)
        predicted = {
            name: (torch.cat([down, down[first::EVERY]]), torch.cat([up, up[first::EVERY]]))
            for name, (down, up) in predicted.items()
        }
    worn.set(predicted, images=config.photos)
    return person_losses(base, batch, config, answers)


def known_losses(
    training: Training, network: HyperNetwork, numbers: Tensor, batch: TrainingBatch
) -> tuple[Tensor, int]:
    """Returns the sum `()` of the weight losses of the people whom the bank covers, and their number."""
    targets, device = training.targets, numbers.device
    places = [k for k, identity in enumerate(batch.identities) if identity in targets.rows]
    if not places:
        return numbers.new_zeros(()), 0
    known = sent(targets.known([batch.identities[k] for k in places]), device)
    mine = numbers[sent(torch.tensor(places), device)].float()
    losses = weight_loss(network.layout, mine, known, sent(targets.scale, device))
    return losses.sum(), len(places)


def _parts(training: Training) -> int:
    """Returns the number of parts of a batch."""
    return training.accelerator.num_processes * training.config.accumulation


def _places(training: Training, part: int) -> range:
    """Returns this process's places in the global batch, for one accumulated part."""
    parts, batch = _parts(training), training.config.batch
    mine = part * training.accelerator.num_processes + training.accelerator.process_index
    return range(batch * mine // parts, batch * (mine + 1) // parts)


@torch.no_grad()
def average(state: State, config: HypernetConfig, step: int) -> None:
    """Moves the averaged network towards the network, faster in the first steps."""
    decay = min(config.ema, (1 + step) / (10 + step))
    parts = tuple(state.ema.parameters()), tuple(state.network.parameters())
    torch._foreach_lerp_(*parts, 1 - decay)  # pyright: ignore[reportPrivateUsage,reportPrivateImportUsage]


def _zero_factors(network: HyperNetwork) -> Factors:
    """Returns zero factors of one identity: a base that wears them predicts like the bare one."""
    with torch.no_grad():
        return _zeros(factors(network.layout, network.basis(), network.mean[None]))


def _zeros(people: Factors) -> Factors:
    """Returns zero factors of one identity, of the same sites and ranks."""
    return {
        name: (torch.zeros_like(down[:1]), torch.zeros_like(up[:1])) for name, (down, up) in people.items()
    }


def _log(training: Training, done: int, totals: Tensor, norm: Any) -> float:
    """Logs the means since the last log line over all processes, and returns the loss."""
    config = training.config
    everywhere: Any = training.accelerator.reduce(totals.clone(), "sum")
    loss, denoise, kept, weights, size, known, parts = everywhere.tolist()
    if not math.isfinite(loss):
        raise InputError(
            f"{training.out}: the loss is {loss} at step {done}; lower lr or clip and start in another --out"
        )
    if training.accelerator.is_main_process:
        figures = {"loss": loss / parts, "denoise": denoise / parts, "size": size / parts}
        if config.class_weight:
            figures["class"] = kept / parts
        if known:
            figures["weights"] = weights / known
        lr = learning_rate(config.lr, done - 1, config.steps, warmup=config.warmup)
        training.run.log(done, **figures, lr=lr, norm=norm)
    return loss / parts


def _out_of_time(training: Training, started: float) -> bool:
    """Returns whether `max_minutes` are over for any process, so that all of them stop together."""
    if training.config.max_minutes is None:
        return False
    over = float(time.monotonic() - started > training.config.max_minutes * 60)
    if training.accelerator.num_processes == 1:  # nobody else to ask, and no GPU to wait for
        return over > 0
    mine = torch.tensor(over, device=training.accelerator.device)
    everywhere: Any = training.accelerator.reduce(mine, "sum")
    return float(everywhere) > 0


def _validate_and_save(
    training: Training, state: State, worn: Worn, done: int, last: bool
) -> dict[str, float]:
    """Validates, exports and saves when it is time, in the first process; returns figures for the bar."""
    base, faces, held, config = training.base, training.faces, training.held, training.config
    validate, save = last or done % config.validate_every == 0, last or done % config.save_every == 0
    if not training.accelerator.is_main_process or not (validate or save):
        return {}
    figures: dict[str, float] = {}
    if validate and held:
        with training.accelerator.autocast():
            figures = tell_apart(base, faces, held, state.ema, worn, config, len(_places(training, 0)))
        training.run.log(done, kind="validation", **figures)
        if training.sample is not None:
            worn.set(_zero_factors(state.ema))
            picture = training.run.folder / "pictures" / f"step-{done:07d}.png"
            asked = (training.sample, training.score)
            scores = pictures(base, faces, held, state.ema, config, picture, *asked)
            training.run.log(done, kind="pictures", picture=picture.name, **scores)
    if save:
        # in this order, as no step after the last checkpoint would export again
        info = _info(training, done, figures)
        Predictor(state.ema, training.encoder, info, training.familiar).save(training.out, config.stored)
        parts = state.parts(training)
        training.run.save(done, {name: part.state_dict() for name, part in parts.items()})
    return {"apart": figures["apart"]} if figures else {}


def _info(training: Training, done: int, figures: dict[str, float]) -> HypernetInfo:
    """Returns the info of the exported folder."""
    base, config = training.base, training.config
    summary = {
        "step": done, "identities": len(training.trained), "held_out": len(training.held), "covered":
        len(training.targets.rows), "validation": figures, "config": config.model_dump(mode="json"),
    }  # fmt: skip
    return HypernetInfo(
        base.fingerprint, base.source, base.trigger, base.class_word, base.resolution, summary,
        config.finetune, config.strength,
    )  # fmt: skip


def _update_info(out: Path, config: HypernetConfig) -> None:
    """Writes the settings into a finished folder that may change without another training."""
    made = load_hypernet(out)
    summary = {**made.info.training, "config": config.model_dump(mode="json")}
    info = replace(made.info, training=summary, finetune=config.finetune, strength=config.strength)
    if info != made.info:
        Predictor(made.network, made.encoder, info, made.familiar).save(out, config.stored)
