"""Weight pre-optimisation (paper, section 4.2): one LiDB for every identity of a face set, many in one step.

Each sample of a batch wears its own identity's numbers, and all share one frozen forward and backward. No
identity influences another: all start from one shared point, noise, timestep and photo are drawn from (seed,
identity, step), losses are summed, gradients clipped row by row, and Adam is elementwise. So, in float32,
batched is alone, whatever the batch's composition.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from hyperdreambooth.base.conditioning import Conditioner, warn_unnamed
from hyperdreambooth.base.denoise import Weighting, denoise_loss, sample_noise
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo, read_faces
from hyperdreambooth.faces.latents import cached_latents, encoder_key
from hyperdreambooth.files import InputError
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.basis import Basis, basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.weights import Layout, factors, start
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.precision import autocast
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import Run, environment, rng

_READ_EVERY = 10  # steps


class PreoptConfig(BaseModel):
    """What makes a bank.

    Attributes:
        rank: `r`.
        down_dim: `a`; shrinks to `i` at small sites.
        up_dim: `d`; shrinks to `o` at small sites.
        basis_seed: names the aux bases.
        steps: for each identity.
        lr: of Adam, after the warm-up; from there half a cosine to 0.
        warmup: steps of linear rise.
        identities_per_batch: how many are trained together; only speed and memory depend on it.
        photos_per_step: photos of each identity a step, each with noise of its own.
        clip: largest norm of one identity's gradient.
        seed: names the start and all draws.
        text_encoder: whether the text encoder is adapted too; if not, prompts are encoded once.
        prompt: caption of photos without one; `{class_word}` is the base's.
        weighting: how much the denoising loss counts at each noise level, see `base.denoise.loss_weights`.
        timestep_bias: a step takes the noisiest of so many timesteps, see `denoise.sample_noise`; 1 for none.
        checkpointing: gradient checkpointing in the base's denoiser: less memory, a third slower.
        size_weight: of the mean square of the numbers' distance from the shared start.
        precision: of the base's forward and backward, `auto` is what is fast here; the numbers and Adam stay
            float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(1, ge=1)
    down_dim: int = Field(100, ge=1)
    up_dim: int = Field(50, ge=1)
    basis_seed: int = 0
    steps: int = Field(300, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup: int = Field(10, ge=0)
    identities_per_batch: int = Field(32, ge=1)
    photos_per_step: int = Field(1, ge=1)
    clip: float = Field(1.0, gt=0)
    seed: int = 0
    text_encoder: bool = True
    prompt: str = "a [V] {class_word}"
    weighting: Weighting = "uniform"
    timestep_bias: int = Field(1, ge=1)
    checkpointing: bool = False
    size_weight: float = Field(0.0, ge=0)
    precision: Literal["auto", "float32", "bf16"] = "float32"

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        if self.rank > min(self.down_dim, self.up_dim):
            raise ValueError(f"rank {self.rank} needs down_dim and up_dim of at least {self.rank}")
        return self


@dataclass(frozen=True)
class Stage:
    """What all groups share: the base, what is adapted of it, and the point everybody starts from, `(P,)`."""

    base: Base
    config: PreoptConfig
    layout: Layout
    basis: Basis
    start: Tensor

    @property
    def text_worn(self) -> bool:
        """Whether a text encoder wears what is trained."""
        return any(site.component != self.base.family.DENOISER for site in self.layout.sites)

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast of the base's forward."""
        return autocast(self.config.precision, self.base.device)

    def manifest(self) -> dict[str, Any]:
        """How the bank is made; a bank of another manifest is refused."""
        return {
            "config": self.config.model_dump(mode="json"),
            "base_fingerprint": self.base.fingerprint,
            "base_source": str(self.base.source),
            "site_fingerprint": self.layout.fingerprint,
            "basis_source": self.basis.source,
            "basis_fingerprint": basis_fingerprint(self.basis),
            "trigger": self.base.trigger,
            "layout": self.layout.to_json(),
            "environment": environment(),
        }


def prepare(base: Base, config: PreoptConfig) -> Stage:
    """Chooses the sites and draws bases and start, all from the config's seeds.

    Raises:
        InputError: float16 weights, through which small gradients vanish where nothing scales them.
    """
    if base.dtype == torch.float16:
        raise InputError("dtype: float16 weights lose small gradients here; use bfloat16 or float32")
    sites = tuple(s for s in base.sites if config.text_encoder or s.component == base.family.DENOISER)
    layout = Layout(sites, config.rank, config.down_dim, config.up_dim)
    basis = seeded_basis(sites, config.down_dim, config.up_dim, config.basis_seed, base.device)
    return Stage(base, config, layout, basis, start(layout, config.seed).to(base.device))


@dataclass(frozen=True)
class Person:
    """What one identity is trained on: latents `(m, c, h, w)` of its photos and their captions."""

    name: str
    latents: Tensor
    captions: tuple[str, ...]


def load_people(stage: Stage, people: dict[str, tuple[Photo, ...]], cache: Path) -> list[Person]:
    """Latents and captions of a group; each photo is encoded once, and never again on resume.

    Args:
        stage: its base encodes.
        people: identity → photos.
        cache: folder of the encoded latents.
    """
    base = stage.base
    photos = [photo for shots in people.values() for photo in shots]
    captions = [base.prompt(photo.caption or stage.config.prompt) for photo in photos]
    warn_unnamed(base, captions)
    key = encoder_key(base.fingerprint, base.pipe.vae)
    latents = cached_latents(photos, base.resolution, base.encode_images, cache, key)
    parts = latents.to(base.device).split([len(shots) for shots in people.values()])
    told = iter(captions)
    return [
        Person(name, part, tuple(islice(told, len(part)))) for name, part in zip(people, parts, strict=True)
    ]


# E‖ε - ε_θ(x_t, c)‖² of every identity under its own numbers   (paper, equation 1)
def person_losses(stage: Stage, told: Conditioner, people: Sequence[Person], step: int) -> Tensor:
    """The loss of every identity at a step, `(n,)`.

    Photo, noise and timestep of an identity are functions of (seed, identity, step) alone, never of who else
    is there. The batch is identity-major with `photos_per_step` samples each.
    """
    seed, each = stage.config.seed, stage.config.photos_per_step
    latents: list[Tensor] = []
    captions: list[str] = []
    drawn: list[tuple[Tensor, Tensor]] = []
    for person in people:
        generator = rng(seed, person.name, step, "photo")
        order = torch.randperm(len(person.captions), generator=generator).tolist()
        for k in range(each):
            row = order[k % len(order)]
            latents.append(person.latents[row])
            captions.append(person.captions[row])
            key, shape = (seed, person.name, step, k), tuple(person.latents.shape[1:])
            drawn.append(sample_noise(stage.base, shape, *key, bias=stage.config.timestep_bias))
    noise, timesteps = (torch.stack(tensors) for tensors in zip(*drawn, strict=True))
    with stage.precision():
        conditioning, clean = told(captions), torch.stack(latents)
        losses = denoise_loss(
            stage.base, clean, conditioning, noise, timesteps, weighting=stage.config.weighting
        )
    return losses.unflatten(0, (len(people), each)).mean(1)


def learning_rate(config: PreoptConfig, step: int) -> float:
    """Linear warm-up times half a cosine; the same for every identity, whenever its group is trained."""
    rise = min(1.0, (step + 1) / (config.warmup + 1))
    return config.lr * rise * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def clip_rows(gradient: Tensor, limit: float) -> Tensor:
    """Scales every identity's own gradient, a row of `(n, P)`, down to a norm of at most `limit`.

    Differs from the usual clipping by the norm of all parameters, which would tie identities together.
    """
    norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    return gradient * (limit / norms.clamp_min(limit))


def train_group(
    stage: Stage, people: Sequence[Person], bar: Progress | None = None, cache: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Trains some identities side by side from the shared start; the base is as before afterwards.

    Args:
        stage: what all groups share.
        people: `n` identities.
        bar: told of every step.
        cache: folder of encoded captions.

    Returns:
        Numbers `(n, P)` and losses `(steps, n)`, both on the CPU.
    """
    config, layout, basis = stage.config, stage.layout, stage.basis
    numbers = stage.start.repeat(len(people), 1).requires_grad_()
    adam = torch.optim.Adam([numbers], lr=config.lr)
    captions = [caption for person in people for caption in person.captions]
    told = Conditioner(stage.base, captions, stage.text_worn, cache)
    history: list[Tensor] = []
    stage.base.rest({site.component for site in layout.sites})
    worn_now, sparing = factors(layout, basis, numbers.detach()), config.checkpointing
    with wear(stage.base.components, worn_now) as worn, stage.base.training(sparing):
        for step in range(config.steps):
            adam.param_groups[0]["lr"] = learning_rate(config, step)
            worn.set(factors(layout, basis, numbers), config.photos_per_step)
            losses = person_losses(stage, told, people, step)
            away = (numbers - stage.start).square().mean(1)
            (gradient,) = torch.autograd.grad((losses + config.size_weight * away).sum(), numbers)
            numbers.grad = clip_rows(gradient, config.clip)
            adam.step()
            history.append(losses.detach())
            _tell(bar, step, history)
    return numbers.detach().cpu(), torch.stack(history).cpu()


def _tell(bar: Progress | None, step: int, history: Sequence[Tensor]) -> None:
    """A step for the bar, and now and then the loss: reading it makes an accelerator wait."""
    if bar is not None:
        bar.update(1, **({} if step % _READ_EVERY else {"loss": history[-1].mean().item()}))


def preoptimize(base: Base, photos: Path, out: Path, config: PreoptConfig) -> Bank:
    """Makes or continues a bank: the same command resumes, and loses at most the identities in flight.

    Args:
        base: the frozen base.
        photos: a folder for each identity. New folders may be added to a finished bank.
        out: the bank's folder, with the log and the cached latents.
        config: how; a bank made in another way is refused.

    Returns:
        The bank with every identity of `photos`.

    Raises:
        InputError: unusable photos, a bank of another config or base, or an identity whose training diverged.
    """
    people, stage = read_faces(photos), prepare(base, config)
    bank = Bank.create(out, stage.manifest(), stage.start)
    run = Run(out, config, inputs={**base.run_inputs, "sites": stage.layout.fingerprint})
    # groups end in order and whole, so what is missing after a kill falls into the groups of the first call
    missing = [name for name in sorted(people) if name not in bank]
    size = config.identities_per_batch
    groups = [missing[at : at + size] for at in range(0, len(missing), size)]
    for k, group in enumerate(groups):
        began = time.monotonic()
        loaded = load_people(stage, {name: people[name] for name in group}, out / "cache")
        with Progress("preoptimize", len(groups) * config.steps, k * config.steps) as bar:
            numbers, losses = train_group(stage, loaded, bar, out / "cache")
        tenth = max(1, len(losses) // 10)
        figures = {"first_loss": losses[:tenth].mean(0), "last_loss": losses[-tenth:].mean(0)}
        bank.append(group, numbers, figures)
        means = {name: column.mean().item() for name, column in figures.items()}
        run.log(len(bank), identities=len(group), **means, seconds=round(time.monotonic() - began, 3))
    return bank
