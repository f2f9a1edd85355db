"""Compares a denoiser whose blocks are compiled with the plain one, in a process without type checks."""

from __future__ import annotations

import sys

import torch
from torch._dynamo.utils import counters

from hyperdreambooth.base.denoise import denoise_loss
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import fresh


def losses(base: Base, compiled: bool) -> list[float]:
    """The losses of four people after each other; the first two may compile."""
    torch.manual_seed(0)
    people = [
        {
            site: (torch.randn_like(down).requires_grad_(), torch.randn_like(up).requires_grad_())
            for site, (down, up) in fresh(base.sites, 2, k).items()
        }
        for k in range(4)
    ]
    side: int = base.denoiser.config.sample_size
    latents = torch.randn(1, base.denoiser.config.in_channels, side, side)
    found: list[float] = []
    with wear(base.components, people[0]) as worn, base.training(False, compiled):
        for k, one in enumerate(people):
            worn.set(one)
            told = base.encode_prompts(base.tokenize(["a [V] face"]))
            loss = denoise_loss(base, latents, told, latents, torch.tensor([300])).sum()
            loss.backward()
            found.append(loss.item())
            if k == 1:
                counters.clear()
    return found


if __name__ == "__main__":
    base = load_base(sys.argv[1], "cpu", "float32")
    plain, compiled = losses(base, False), losses(base, True)
    assert all(abs(a - b) <= 1e-4 * abs(a) for a, b in zip(plain, compiled, strict=True)), (plain, compiled)
    assert not any(counters[kind] for kind in ("recompiles", "graph_break", "stats", "frames")), counters
    assert not any(module._compiled_call_impl for module in base.denoiser.modules())
