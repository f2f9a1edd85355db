"""Everything the loop needs, before its first step: people, targets, network, optimiser, and accelerate."""

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
from hyperdreambooth.hypernet.data import Faces, hold_out, load_faces
from hyperdreambooth.hypernet.decoder import HyperNetwork, NetworkShape
from hyperdreambooth.hypernet.encoder import Encoder, load_encoder
from hyperdreambooth.hypernet.predictor import load_hypernet, load_info
from hyperdreambooth.hypernet.target import Targets, read_targets
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.weights import factors
from hyperdreambooth.precision import resolved
from hyperdreambooth.runs import Run
from hyperdreambooth.shapes import Factors

# of processes that wait while the first one encodes photos; NCCL has 10 minutes
_PATIENCE = timedelta(hours=12)
_ACCELERATE = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}


class Wearable(nn.Module):
    """Features → numbers and what the base wears for them: all that has gradients, one module for DDP."""

    def __init__(self, network: HyperNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor) -> tuple[Tensor, Factors]:
        """Features `(n, t, c)` → numbers `(n, P)`, factors; float32 under any autocast."""
        numbers = self.network(features)
        return numbers, factors(self.network.layout, self.network.basis(), numbers)


@dataclass(frozen=True)
class Training:
    """What does not change during a training; `trained` and `held` are identities of `faces`."""

    base: Base
    config: HypernetConfig
    faces: Faces
    trained: list[int]
    held: list[int]
    targets: Targets
    encoder: Encoder
    accelerator: Accelerator
    run: Run
    out: Path


@dataclass(frozen=True)
class State:
    """What changes: network, average, optimiser. `model` is the network as accelerate runs it."""

    network: HyperNetwork
    ema: HyperNetwork
    model: nn.Module
    optimizer: Any

    def save(self, job: Training, step: int) -> None:
        """Writes a checkpoint."""
        scaler = job.accelerator.scaler
        saved = {
            "network": self.network.state_dict(), "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {},
        }  # fmt: skip
        job.run.save(step, saved)

    def load(self, job: Training, saved: Mapping[str, Any]) -> None:
        """Puts a checkpoint back."""
        self.network.load_state_dict(saved["network"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if job.accelerator.scaler is not None:
            job.accelerator.scaler.load_state_dict(saved["scaler"])


def start_accelerate(base: Base, config: HypernetConfig) -> Accelerator:
    """Accelerate as the launcher set it up; the base moves to this process's own device.

    Raises:
        InputError: fp16 without CUDA, float16 weights otherwise, or a batch that the processes cannot share.
    """
    if config.precision == "fp16" and base.device.type != "cuda":
        raise InputError(
            f"precision: fp16 needs CUDA, the base is on {base.device.type}; use float32 or bf16"
        )
    if base.dtype == torch.float16 and config.precision != "fp16":
        raise InputError(
            f"precision: {config.precision} over float16 weights loses small gradients; use dtype=bfloat16"
        )
    if base.device.type == "cuda":  # accelerate takes whichever is the current one
        torch.cuda.set_device(base.device)
    accelerator = Accelerator(
        cpu=base.device.type == "cpu", mixed_precision=_ACCELERATE[resolved(config.precision, base.device)],
        gradient_accumulation_steps=config.accumulation,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
    )  # fmt: skip
    parts = accelerator.num_processes * config.accumulation
    if config.batch % parts:
        shared = f"{accelerator.num_processes} processes x accumulation {config.accumulation}"
        end_accelerate(accelerator)
        raise InputError(
            f"batch: {config.batch} identities cannot be shared by {shared}; use a multiple of {parts}"
        )
    if accelerator.device.type != "cpu":
        base.move(accelerator.device)
    return accelerator


def end_accelerate(accelerator: Accelerator) -> None:
    """Leaves no global state behind: a second training in this process may want another precision."""
    accelerator.free_memory()
    alone = accelerator.num_processes == 1
    AcceleratorState._reset_state(reset_partial_state=alone)  # pyright: ignore[reportPrivateUsage]


def prepare(
    base: Base, photos: Path, out: Path, config: HypernetConfig, bank: Path | None, accelerator: Accelerator
) -> tuple[Training, State]:
    """Reads and checks everything, encodes the photos (or finds them encoded), makes the network at step 0.

    Raises:
        InputError: bad photos, bank or encoder, or `out` holds another training.
    """
    people = read_faces(photos)
    trained, held = hold_out(len(people), config.validation, config.seed)
    known = None if bank is None else Bank.open(bank)
    targets = read_targets(base, config, tuple(people), held, known)
    encoder = load_encoder(config.encoder, config.encoder_layers, base.device)
    inputs = {
        **base.run_inputs, "photos": _photos_fingerprint(people), "encoder": encoder.fingerprint(),
        "targets": _numbers_fingerprint(targets),
    }  # fmt: skip
    with accelerator.main_process_first():
        run = Run(out / "run", config.deciding(), inputs=inputs)
        faces = load_faces(people, base, encoder, config.prompt, out / "cache", _text_worn(base, targets))
    job = Training(base, config, faces, trained, held, targets, encoder, accelerator, run, out)
    return job, _state(job)


def _text_worn(base: Base, targets: Targets) -> bool:
    """Whether a text encoder wears what is trained."""
    return any(site.component in base.family.TEXT_ENCODERS for site in targets.layout.sites)


def finished(out: Path, config: HypernetConfig) -> bool:
    """Whether `out` holds the network of the last step."""
    if not (out / "config.json").is_file():
        return False
    return int(load_info(out).training.get("step", 0)) >= config.steps


def _state(job: Training) -> State:
    """Network, average and optimiser before the first step."""
    config, targets = job.config, job.targets
    shape = NetworkShape(
        job.encoder.tokens,
        job.encoder.channels,
        config.width,
        config.layers,
        config.heads,
        config.refinements,
    )
    network = HyperNetwork(targets.layout, shape, targets.basis, config.learn_basis, config.seed).to(
        job.base.device
    )
    network.normalise(targets.mean, targets.spread, job.faces.features)
    if config.start_from is not None:
        _begin_with(network, job, config.start_from)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    model, optimizer = job.accelerator.prepare(Wearable(network), _optimizer(network, config))
    return State(network, ema, model, optimizer)


def _optimizer(network: HyperNetwork, config: HypernetConfig) -> torch.optim.Optimizer:
    """AdamW; learned bases have a learning rate of their own and do not decay. The loop scales `full_lr`."""
    basis = [p for name, p in network.named_parameters() if name.startswith("basis_")]
    others = [p for name, p in network.named_parameters() if not name.startswith("basis_")]
    groups: list[dict[str, Any]] = [
        {"params": others, "full_lr": config.lr, "weight_decay": config.weight_decay}
    ]
    if basis:
        groups.append({"params": basis, "full_lr": config.basis_lr, "weight_decay": 0.0})
    return _adamw(config)(groups, lr=config.lr)


def _adamw(config: HypernetConfig) -> Any:
    """AdamW, or the one that keeps its state in eight bits.

    Raises:
        InputError: it is asked for and not installed.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW
    if find_spec("bitsandbytes") is None:
        raise InputError(
            "optimizer: adamw8bit needs bitsandbytes, which is not installed; pip install bitsandbytes, or "
            "set optimizer=adamw"
        )
    return import_module("bitsandbytes").optim.AdamW8bit


def _begin_with(network: HyperNetwork, job: Training, source: str) -> None:
    """Starts from another training's weights, its scales included.

    Raises:
        InputError: another shape, layout, basis, base or encoder.
    """
    other = load_hypernet(source, job.base.device)
    other.check_fits(job.base.fingerprint)
    ours = (network.layout, network.shape, network.learn_basis, job.encoder.fingerprint())
    theirs = (other.layout, other.network.shape, other.network.learn_basis, other.encoder.fingerprint())
    names = ("layout", "network shape", "learn_basis", "encoder")
    differing = [name for name, a, b in zip(names, ours, theirs, strict=True) if a != b]
    if not network.learn_basis and other.basis_source != network.basis().source:
        differing.append("basis_seed")
    if differing:
        raise InputError(
            f"start_from {source}: has another {', '.join(differing)}; begin with one of the same shape"
        )
    network.load_state_dict(other.network.state_dict())


def _photos_fingerprint(people: Mapping[str, tuple[Photo, ...]]) -> str:
    """Sixteen hex digits of who is there, what the photos show and say."""
    digest = hashlib.sha256()
    for name, photos in people.items():
        for photo in photos:
            digest.update(repr((name, photo.caption, photo.hash())).encode())
    return digest.hexdigest()[:16]


def _numbers_fingerprint(targets: Targets) -> str:
    """Sixteen hex digits of start, scale and targets: a bank that has grown is another input."""
    digest = hashlib.sha256(targets.layout.fingerprint.encode())
    for tensor in (targets.mean, targets.spread, targets.numbers):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
