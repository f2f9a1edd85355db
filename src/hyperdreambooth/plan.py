"""What many people will cost, before anything starts: hours, memory, storage and price of every stage.

    seconds of a stage = fixed + rounds · (TFLOP of a round / TFLOP/s of a device) + traffic

A *round* is what one device does at once: a group of people for `preoptimize`, its part of a batch for
`train`. Its arithmetic is counted on a base without weights (`torch.utils.flop_counter`). How fast a device
does it is measured: here by running the stages for a few steps, elsewhere it is taken from `RATES`.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch.utils.flop_counter import FlopCounterMode

from hyperdreambooth.base.denoise import denoise_loss, sample_noise
from hyperdreambooth.base.load import Base
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.data import EVERY
from hyperdreambooth.hypernet.train import train_hypernet
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.memory import need
from hyperdreambooth.preopt.bank_training import preoptimize
from hyperdreambooth.preopt.config import PreoptConfig
from hyperdreambooth.runs import rng

_TERA = 1e12
_CORES = 8  # for each GPU, where nothing else is known
_LINK = 50e9  # bytes a second between GPUs, of a slow one of today's: 400 Gbit/s Ethernet
_CROP = 3.0  # bytes of a crop's file for a pixel: a PNG; measured on portraits of 512 pixels, 1.6 to 2.7
_PREPARE = 2**30  # bytes of a worker with its detector; measured, rounded up
_FEATURES = 257 * 384  # tokens and channels of the default encoder
_SHORT, _LONG = 2, 8  # steps of the two runs whose difference is the time of a step
_PHOTO = 0.145  # core seconds for each photo in `prepare`: 6.9 a second, benchmarks/results/photos.json


class PlanConfig(BaseModel):
    """The config of `plan`.

    Attributes:
        people: how many people the photos show.
        photos: of each person.
        gpus: how many of which kind, such as `8xH100`; `here` for this machine, which is then measured.
        price: of an hour of one GPU, in any currency; null for no price.
        preoptimize: settings of `hdb preoptimize`.
        train: settings of `hdb train`.
    """

    model_config = ConfigDict(extra="forbid")

    people: int = Field(15_000, ge=1)
    photos: int = Field(4, ge=1)
    gpus: str = "here"
    price: float | None = Field(None, ge=0)
    preoptimize: PreoptConfig = PreoptConfig()
    train: HypernetConfig = HypernetConfig()

    @field_validator("gpus")
    @classmethod
    def _known(cls, text: str) -> str:
        parse_gpus(text)
        return text


@dataclass(frozen=True)
class Speed:
    """How fast one device of a kind is.

    Attributes:
        flops: TFLOP a second, by stage; stages that are missing are as fast as `train`.
        fixed: seconds before the first round, by stage.
        source: what the figures rest on, for the reader.
    """

    flops: Mapping[str, float]
    fixed: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Stage:
    """What a stage costs.

    Attributes:
        name: of the command.
        work: how much of what, for the reader.
        seconds: on the clock.
        gpu_hours: of all GPUs together, busy or waiting.
        memory: bytes on each device.
        storage: bytes on the disk, caches included.
    """

    name: str
    work: str
    seconds: float
    gpu_hours: float
    memory: int
    storage: int


_H200 = 191.0  # TFLOP/s: 32 people side by side, SD 1.5 at 512 pixels, bf16: 1.74 TFLOP in 9.1 ms
_DENSE = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX4090": 165, "L4": 121}
"""TFLOP/s of dense bf16, from NVIDIA's data sheets."""
RATES: Mapping[str, Speed] = {
    name: Speed(
        {"train": _H200 * peak / 989},
        {"preoptimize": 5.0, "train": 60.0},
        "32 samples a step of SD 1.5 on an H200, 9.1 ms each"
        + ("" if name == "H200" else f", scaled by the peak of {peak} TFLOP/s; expect a third more or less"),
    )
    for name, peak in _DENSE.items()
}


def parse_gpus(text: str) -> tuple[int, str]:
    """Returns count and kind of `8xH100`, `H100` or `here`.

    Raises:
        ValueError: it says neither.
    """
    count, times, kind = text.partition("x")
    if not times or not count.isdecimal():
        count, kind = "1", text
    known = {name.lower(): name for name in RATES} | {"here": "here"}
    if kind.lower() not in known or int(count) < 1:
        raise ValueError(
            f"gpus: expected a count and one of {', '.join(known.values())}, such as 8xH100, got {text}"
        )
    return int(count), known[kind.lower()]


def kind_of(device: str) -> str | None:
    """Returns which of `RATES` a GPU is, by its driver's name (NVIDIA GeForce RTX 4090); None for others."""
    words = re.split(r"[ -]", device.lower())
    named = {*words, *map("".join, pairwise(words))}
    return next((kind for kind in RATES if kind.lower() in named), None)


def sample_flops(base: Base, text_encoder: bool, checkpointing: bool = False) -> float:
    """Counts the TFLOP of one sample's forward and backward in a training, on a skeleton.

    Args:
        base: without weights, on the meta device.
        text_encoder: whether the text encoders wear what is trained, and so run in every step.
        checkpointing: whether activations are computed again for the backward pass.
    """
    leaf = partial(torch.empty, device="meta", requires_grad=True)
    worn = {
        site.name: (leaf(1, 1, site.in_features), leaf(1, site.out_features, 1))
        for site in base.sites
        if text_encoder or site.component == base.family.DENOISER
    }
    shape = tuple(base.encode_images(torch.empty(1, 3, base.resolution, base.resolution)).shape[1:])
    noise, timestep = sample_noise(base, shape, "counted")
    latents, times = noise[None], timestep[None]
    tokens = base.family.tokenize(base.pipe, ["a person"])
    with (
        wear(base.components, worn, images=1),
        base.training(checkpointing),
        FlopCounterMode(display=False) as counted,
    ):
        embeddings = base.family.encode_prompts(base.pipe, tokens)
        # texts are encoded once for all steps where no text encoder wears anything
        once = 0 if text_encoder else counted.get_total_flops()
        denoise_loss(base, latents, embeddings, latents, times).backward()
    return (counted.get_total_flops() - once) / _TERA


def photo_flops(base: Base) -> float:
    """Counts the TFLOP of encoding one photo as latents, on a skeleton."""
    with FlopCounterMode(display=False) as counted:
        base.encode_images(torch.empty(1, 3, base.resolution, base.resolution))
    return counted.get_total_flops() / _TERA


def step_flops(base: Base, config: HypernetConfig, samples: int) -> float:
    """Counts the TFLOP of `samples` in a step of `train`, on a skeleton."""
    flops = sample_flops(base, config.text_encoder, config.checkpointing)
    # with the class term some samples more, and the bare base's answers to them, which take no backward pass
    more = 1.5 / EVERY if config.class_weight else 0.0
    return (1 + more) * samples * flops


def step_seconds(base: Base, config: HypernetConfig, speed: Speed, samples: int) -> float:
    """Estimates the seconds of a step of `train` on one device, without the exchange of gradients.

    Args:
        base: a skeleton.
        config: of the training.
        speed: of the device.
        samples: that the device gets in a step.
    """
    return step_flops(base, config, samples) / _of(speed, "train")


def measure(base: Base, skeleton: Base, config: PlanConfig) -> Speed:
    """Runs the stages for a few steps on drawn noise instead of photos, and returns how fast they are.

    Args:
        base: a base with weights, on the device.
        skeleton: the same base without weights.
        config: the plan.
    """
    bank, train = config.preoptimize, config.train
    group = min(bank.identities_per_batch, config.people)
    flops = {
        "preoptimize": group * bank.batch * sample_flops(skeleton, bank.text_encoder, bank.checkpointing),
        "train": step_flops(skeleton, train, train.batch * train.photos),
    }

    def seconds(run: Callable[[Path, Path], object], people: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            photos = Path(folder) / "photos"
            _draw_photos(photos, people, config.photos, base.resolution)
            began = time.perf_counter()
            run(photos, Path(folder) / "out")
            return time.perf_counter() - began

    def grouped(steps: int) -> float:
        few = bank.model_copy(update={"steps": steps, "identities_per_batch": group})
        return seconds(lambda photos, out: preoptimize(base, photos, out, few), group)

    def trained(steps: int, people: int = 8, every: int = 10**6) -> float:
        few = train.model_copy(update={"steps": steps, "validate_every": every, "validation": 2})
        return seconds(lambda photos, out: train_hypernet(base, photos, out, few), people)

    grouped(1)  # the first run of all warms caches and kernels up
    short, long = grouped(_SHORT), grouped(_LONG)
    step = _slope(short, long)
    first, more = trained(_SHORT), trained(_LONG)
    update = _slope(first, more)
    photo = max(0.0, trained(_SHORT, people=16) - first) / (8 * config.photos)
    validation = max(0.0, trained(_SHORT, every=1) - first) / (_SHORT - 1)
    fixed = {
        "preoptimize": max(0.0, short - _SHORT * step),
        "train": max(0.0, first - _SHORT * update - 8 * config.photos * photo),
        "photo": photo,
        "validation": validation * train.validation / 2,
    }
    rates = {"preoptimize": flops["preoptimize"] / step, "train": flops["train"] / update}
    return Speed(rates, fixed, f"{_LONG} steps of each stage, measured just now on {base.device.type}")


def _slope(short: float, long: float) -> float:
    """Returns the seconds of a step, from runs of `_SHORT` and `_LONG` steps."""
    return max(1e-6, (long - short) / (_LONG - _SHORT))


def _draw_photos(folder: Path, people: int, photos: int, side: int) -> None:
    """Writes photos of noise, all different."""
    for person in range(people):
        (folder / f"{person:04d}").mkdir(parents=True)
        for k in range(photos):
            pixels = torch.randint(256, (side, side, 3), generator=rng("plan", person, k), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{person:04d}" / f"{k}.png")


def stages(skeleton: Base, config: PlanConfig, speed: Speed, cores: int | None = None) -> list[Stage]:
    """Returns what every stage costs.

    Args:
        skeleton: the base without weights.
        config: the plan.
        speed: of one device.
        cores: that `prepare` may use; None for eight for each GPU.
    """
    devices, _ = parse_gpus(config.gpus)
    photos = config.people * config.photos
    row = 4 * skeleton.encode_images(torch.empty(1, 3, skeleton.resolution, skeleton.resolution)).numel()
    crops = Stage(
        "prepare", f"{photos:,} photos", photos * _PHOTO / (cores or devices * _CORES), 0,
        _PREPARE, int(photos * _CROP * skeleton.resolution**2),
    )  # fmt: skip
    return [
        crops,
        _bank(skeleton, config, speed, devices, row),
        _training(skeleton, config, speed, devices, row),
    ]


def total(rows: Sequence[Stage]) -> Stage:
    """Returns what all stages cost, one after the other."""
    seconds, hours = sum(row.seconds for row in rows), sum(row.gpu_hours for row in rows)
    return Stage("all", "", seconds, hours, max(row.memory for row in rows), sum(row.storage for row in rows))


def _bank(base: Base, config: PlanConfig, speed: Speed, devices: int, row: int) -> Stage:
    """Returns what `preoptimize` costs: whole groups, handed out to the devices."""
    own, photos = config.preoptimize, config.people * config.photos
    size = min(own.identities_per_batch, config.people)
    groups = math.ceil(config.people / size)
    flops = sample_flops(base, own.text_encoder, own.checkpointing)
    step = size * own.batch * flops / _of(speed, "preoptimize")
    encode = 0.0 if "photo" in speed.fixed else size * config.photos * photo_flops(base) / _of(speed, "train")
    group = speed.fixed["preoptimize"] + encode + own.last * step
    training = HypernetConfig(
        batch=size * own.batch, photos=1, text_encoder=own.text_encoder, checkpointing=own.checkpointing
    )
    needs = need(base, "train", training, offline=True)
    memory = sum(needs.values()) - needs["encoder"] - needs["trained"]
    seconds = math.ceil(groups / devices) * group
    stored = 4 * config.people * (_numbers(base, own) + 2) + photos * row
    work = f"{groups:,} groups of {size}"
    return Stage("preoptimize", work, seconds, devices * seconds / 3600, memory, stored)


def _training(base: Base, config: PlanConfig, speed: Speed, devices: int, row: int) -> Stage:
    """Returns what `train` costs: every device has a part of each batch, and they exchange gradients."""
    own, photos = config.train, config.people * config.photos
    part = math.ceil(own.batch / devices) * own.photos
    needs = need(
        base, "train", own.model_copy(update={"batch": math.ceil(own.batch / devices)}), offline=True
    )
    network = needs["trained"] // (5 if own.optimizer == "adamw" else 3)  # bytes of its numbers, roughly
    traffic = 2 * (devices - 1) / devices * network / _LINK
    step = step_seconds(base, own, speed, part) + traffic
    photo = speed.fixed.get("photo", photo_flops(base) / _of(speed, "train"))
    validations = math.ceil(own.steps / own.validate_every) - 1
    validation = speed.fixed.get("validation", own.validation * own.draws * step / part)
    seconds = speed.fixed["train"] + photos * photo + own.steps * step + validations * validation
    stored = photos * (row + 2 * _FEATURES) + 4 * network
    work = f"{own.steps:,} steps of {own.batch}"
    return Stage("train", work, seconds, devices * seconds / 3600, sum(needs.values()), stored)


def _numbers(base: Base, own: PreoptConfig) -> int:
    """Returns the numbers of a person."""
    sites = tuple(s for s in base.sites if own.text_encoder or s.component == base.family.DENOISER)
    return Layout(sites, own.rank, own.down_dim, own.up_dim).size


def _of(speed: Speed, stage: str) -> float:
    """Returns the TFLOP/s of a device in a stage."""
    return speed.flops.get(stage, speed.flops["train"])
