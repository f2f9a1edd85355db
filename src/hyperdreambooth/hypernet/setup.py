"""Everything before the first step: people, targets, network, optimiser and accelerate."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo, read_faces
from hyperdreambooth.files import InputError
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.data import Faces, familiar_faces, hold_out, load_faces
from hyperdreambooth.hypernet.decoder import HyperNetwork, NetworkShape
from hyperdreambooth.hypernet.encoder import Encoder, encoder_of, load_encoder
from hyperdreambooth.hypernet.familiar import Familiar
from hyperdreambooth.hypernet.predictor import load_hypernet, load_info
from hyperdreambooth.hypernet.target import Targets, read_targets
from hyperdreambooth.hypernet.validate import PersonSampler, Score
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.weights import factors
from hyperdreambooth.precision import resolved
from hyperdreambooth.runs import Run
from hyperdreambooth.shapes import Factors

# how long processes wait while the first one encodes photos; the default of NCCL is 10 minutes
_PATIENCE = timedelta(hours=12)


class Wearable(nn.Module):
    """Features → numbers and LoRA factors: all that has gradients, in one module for DDP."""

    def __init__(self, network: HyperNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor) -> tuple[Tensor, Factors]:
        """Returns numbers `(n, P)` and factors, float32 under any autocast, of features `(n, t, c)`."""
        numbers = self.network(features)
        return numbers, factors(self.network.layout, self.network.basis(), numbers)


@dataclass(frozen=True)
class Inputs:
    """What was read and checked before any photo is encoded; `trained` and `held` are places in `people`."""

    people: dict[str, tuple[Photo, ...]]
    trained: list[int]
    held: list[int]
    targets: Targets
    encoder: Encoder
    text_worn: bool
    run: Run


@dataclass(frozen=True)
class Training:
    """What stays the same during a training; `trained` and `held` are identities of `faces`."""

    base: Base
    config: HypernetConfig
    faces: Faces
    trained: list[int]
    held: list[int]
    targets: Targets
    encoder: Encoder
    familiar: Familiar | None
    accelerator: Accelerator
    run: Run
    out: Path
    sample: PersonSampler | None
    score: Score | None

    @property
    def components(self) -> set[str]:
        """The components of the base that wear what is trained."""
        return {site.component for site in self.targets.layout.sites}


@dataclass(frozen=True)
class State:
    """What changes; `model` is the network wrapped by accelerate, `ema` the averaged network."""

    network: HyperNetwork
    ema: HyperNetwork
    model: nn.Module
    optimizer: Any

    def parts(self, training: Training) -> dict[str, Any]:
        """Returns what a checkpoint holds, with accelerate's scaler under fp16."""
        parts = {"network": self.network, "ema": self.ema, "optimizer": self.optimizer}
        scaler = training.accelerator.scaler
        return {**parts, "scaler": scaler} if scaler else parts


def start_accelerate(base: Base, config: HypernetConfig) -> Accelerator:
    """Returns accelerate as the launcher configured it, and moves the base to this process's device."""
    if config.precision == "fp16" and base.device.type != "cuda":
        raise InputError(
            f"precision: fp16 needs CUDA, the base is on {base.device.type}; use float32 or bf16"
        )
    if base.dtype == torch.float16 and config.precision != "fp16":
        raise InputError(
            f"precision: {config.precision} with float16 weights loses small gradients; use dtype=bfloat16"
        )
    if base.device.type == "cuda":  # accelerate takes the current device
        torch.cuda.set_device(base.device)
    precision = resolved(config.precision, base.device)
    accelerator = Accelerator(
        cpu=base.device.type == "cpu", mixed_precision="no" if precision == "float32" else precision,
        gradient_accumulation_steps=config.accumulation,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
    )  # fmt: skip
    parts = accelerator.num_processes * config.accumulation
    if config.batch < parts:
        shared = f"{accelerator.num_processes} processes x accumulation {config.accumulation}"
        end_accelerate(accelerator)
        raise InputError(f"batch: expected at least {parts} ({shared}), got {config.batch}; change it")
    if accelerator.device.type != "cpu":
        base.move(accelerator.device)
    return accelerator


def end_accelerate(accelerator: Accelerator) -> None:
    """Clears accelerate's global state, as a second training in this process may use another precision."""
    accelerator.free_memory()
    alone = accelerator.num_processes == 1
    AcceleratorState._reset_state(reset_partial_state=alone)  # pyright: ignore[reportPrivateUsage]


def check_inputs(
    base: Base, photos: Path, out: Path, config: HypernetConfig, bank: Bank | None, accelerator: Accelerator
) -> Inputs:
    """Reads and checks all inputs, and opens the run in `out`, which must be of the same ones."""
    people = read_faces(photos)
    trained, held = hold_out(len(people), config.validation, config.seed)
    targets = read_targets(base, config, tuple(people), held, bank)
    encoder = load_encoder(config.encoder or encoder_of(base.source), config.encoder_layers, base.device)
    text_worn = any(site.component in base.family.TEXT_ENCODERS for site in targets.layout.sites)
    shown, compared = _photos_fingerprint(people), _targets_fingerprint(targets)
    inputs = {"photos": shown, "encoder": encoder.fingerprint, "targets": compared, **base.run_inputs}
    with accelerator.main_process_first():
        run = Run(out / "run", config.deciding(), inputs=inputs)
    return Inputs(people, trained, held, targets, encoder, text_worn, run)


def set_up(
    base: Base, inputs: Inputs, out: Path, config: HypernetConfig, accelerator: Accelerator,
    sample: PersonSampler | None, score: Score | None,
) -> tuple[Training, State]:  # fmt: skip
    """Encodes the photos, and builds the network of step 0."""
    encoder, classes = inputs.encoder, config.class_weight > 0
    with accelerator.main_process_first():
        faces = load_faces(
            inputs.people, base, encoder, config.prompt, out / "cache", inputs.text_worn, classes
        )
    training = Training(
        base, config, faces, inputs.trained, inputs.held, inputs.targets, encoder, familiar_faces(faces),
        accelerator, inputs.run, out, sample, score,
    )  # fmt: skip
    return training, _initial_state(training)


def finished(out: Path, config: HypernetConfig) -> bool:
    """Returns whether `out` holds the network of the last step."""
    made = (out / "config.json").is_file()
    return made and int(load_info(out).training.get("step", 0)) >= config.steps


def _initial_state(training: Training) -> State:
    """Builds network, averaged network and optimiser."""
    config, targets, encoder = training.config, training.targets, training.encoder
    shape = NetworkShape(
        encoder.tokens, encoder.channels, config.width, config.layers, config.heads, config.refinements
    )
    network = HyperNetwork(targets.layout, shape, targets.basis, config.learn_basis, config.seed)
    network.to(training.base.device)
    network.normalise(targets.mean, targets.spread, training.faces.features)
    if config.start_from is not None:
        _start_from(network, training, config.start_from)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    model, optimizer = training.accelerator.prepare(Wearable(network), _optimizer(network, config))
    return State(network, ema, model, optimizer)


def _optimizer(network: HyperNetwork, config: HypernetConfig) -> torch.optim.Optimizer:
    """Returns AdamW. Learned bases have their own learning rate and do not decay. The loop sets `lr`."""
    basis = [p for name, p in network.named_parameters() if name.startswith("basis_")]
    others = [p for name, p in network.named_parameters() if not name.startswith("basis_")]
    kinds = ((others, config.lr, config.weight_decay), (basis, config.basis_lr, 0.0))
    groups = [{"params": some, "peak_lr": lr, "weight_decay": decay} for some, lr, decay in kinds if some]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if find_spec("bitsandbytes") is None:
        raise InputError(
            "optimizer: adamw8bit needs bitsandbytes, which is not installed; pip install bitsandbytes, or "
            "set optimizer=adamw"
        )
    return import_module("bitsandbytes").optim.AdamW8bit(groups, lr=config.lr)


def _start_from(network: HyperNetwork, training: Training, source: str) -> None:
    """Loads another training's weights and scales, which must be of the same encoder and shape.

    Its base may be another one with the same layers: what was learned for a base is a start for the next.
    """
    other = load_hypernet(source, training.base.device)
    same = {
        "layout": network.layout == other.layout,
        "network shape": network.shape == other.network.shape,
        "learn_basis": network.learn_basis == other.network.learn_basis,
        "encoder": training.encoder.fingerprint == other.encoder.fingerprint,
        "basis_seed": network.learn_basis or network.basis().source == other.basis.source,
    }
    if differing := [name for name, equal in same.items() if not equal]:
        raise InputError(
            f"start_from {source}: has another {', '.join(differing)}; start from one of the same shape"
        )
    network.load_state_dict(other.network.state_dict())


def _photos_fingerprint(people: Mapping[str, tuple[Photo, ...]]) -> str:
    """Returns sixteen hex digits of all names, captions and photos."""
    all_photos = ((name, photo) for name, photos in people.items() for photo in photos)
    lines = "".join(repr((name, photo.caption, photo.hash())) for name, photo in all_photos)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _targets_fingerprint(targets: Targets) -> str:
    """Returns sixteen hex digits of start, scale and targets, which change when a bank grows."""
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in (targets.mean, targets.spread))
    return hashlib.sha256((targets.layout.fingerprint + targets.digest).encode() + content).hexdigest()[:16]
