"""Counts what wearing an adapter asks of a device: operators a site and step that are no views.

Each of them is a kernel on a GPU, whose start costs the host about as much as a small kernel runs. Counted on
the CPU, which dispatches the same operators: a step of the training with an adapter, less the forward and
backward of the bare base with gradients to embeddings and latents, divided by the number of sites.

    python benchmarks/launches.py
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.denoise import denoise_loss, sample_noises
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.lidb.basis import seeded_basis
from hyperdreambooth.lidb.weights import Layout, start
from hyperdreambooth.lora.relax import fresh, padded
from hyperdreambooth.training.samples import Samples
from hyperdreambooth.training.shots import Shots
from hyperdreambooth.training.step import Step, step_inputs
from hyperdreambooth.training.trainable import Trainable, numbers_of, pairs

CAPTION = "a photo of a [V] face"


class Kernels(TorchDispatchMode):
    """Counts operators whose outputs are new memory, or that write to memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema = func._schema
        view = not schema.is_mutable and any(one.alias_info is not None for one in schema.returns)
        name = func.name().removeprefix("aten::")
        if not view and not name.startswith(("_unsafe_view", "empty", "profiler::")):
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def bare(base: Base, people: int) -> Counter[str]:
    """Counts the frozen base's forward and backward with gradients to the embeddings and the latents."""
    encoder: Any = base.components["text_encoder"]
    tokens, shape = base.tokenize([CAPTION] * people), _latents(base)
    latents = torch.zeros(people, *shape, requires_grad=True)
    noise, times = sample_noises(base, shape, [(0, k) for k in range(people)])

    def live(module: Any, inputs: Any, output: Tensor) -> None:
        output.requires_grad_()

    with getattr(encoder, "text_model", encoder).embeddings.register_forward_hook(live), Kernels() as kernels:
        denoise_loss(base, latents, base.encode_prompts(tokens), noise, times).sum().backward()
    return kernels.counted


def worn(base: Base, trainable: Trainable, people: int) -> Counter[str]:
    """Counts the second step of a training: factors, loss, backward, clipping, Adam."""
    config = FinetuneConfig(batch=1, precision="float32")
    shots = [[Shots(torch.zeros(1, *_latents(base)), (CAPTION,), str(k))] for k in range(people)]
    samples, step = Samples(shots, config), Step(base, trainable, people, config)
    step.encode = Conditioner(base, samples.captions, text_worn=True)
    inputs = step_inputs(base, samples, step.encode, config, 0)
    with trainable.on(base) as step.put:
        step.take(inputs, 0)
        with Kernels() as kernels:
            step.take(inputs, 0)
    return kernels.counted


def _latents(base: Base) -> tuple[int, ...]:
    side: int = base.denoiser.config.sample_size
    return base.denoiser.config.in_channels, side, side


def rows(base: Base) -> dict[str, dict[str, float]]:
    """Returns the operators a site and step, all and by kind: of LoRA and of LiDB, one person and two."""
    layout, basis = Layout(base.sites, 1, 8, 8), seeded_basis(base.sites, 8, 8, 0)
    made: dict[str, dict[str, float]] = {}
    for people in (1, 2):
        kinds: dict[str, Trainable] = {
            "LoRA": pairs(padded([fresh(base.sites, 4)] * people), base.device),
            "LiDB": numbers_of(layout, basis, start(layout, 0), people, base.device),
        }
        for kind, trainable in kinds.items():
            more = worn(base, trainable, people)
            more.subtract(bare(base, people))
            each = {name: round(count / len(base.sites), 2) for name, count in more.most_common() if count}
            made[f"{kind}, people: {people}"] = {"all": round(more.total() / len(base.sites), 2), **each}
    return made


if __name__ == "__main__":
    for dtype in ("float32", "bfloat16"):
        print(dtype, json.dumps(rows(load_base(None, "cpu", dtype)), indent=1))
