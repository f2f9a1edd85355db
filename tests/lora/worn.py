"""Random factors, what a small base answers with them on, and the same base with ΔW added by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hyperdreambooth.base.load import Base
from hyperdreambooth.shapes import Factors, canonical

PROMPTS = ["a photo of a sks face", "a face wearing a hat", "sks smiling"]


def random_factors(base: Base, n: int, rank: int, seed: int = 0, grad: bool = False) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return {
        s.name: (
            (torch.randn(n, rank, s.in_features, generator=generator) / s.in_features**0.5).requires_grad_(
                grad
            ),
            (torch.randn(n, s.out_features, rank, generator=generator) / rank**0.5).requires_grad_(grad),
        )
        for s in base.sites
    }


def person(factors: Factors, k: int) -> Factors:
    return {site: (down[k : k + 1], up[k : k + 1]) for site, (down, up) in factors.items()}


def leaves(factors: Factors) -> list[Tensor]:
    return [factor for pair in factors.values() for factor in pair]


def scaled(factors: Factors, scale: float) -> Factors:
    return {site: (down, up * scale) for site, (down, up) in factors.items()}


def predict(base: Base, prompts: list[str], b: int, seed: int = 0) -> Tensor:
    """The denoiser's output on `b` noises, one prompt for every `b / len(prompts)` in a row."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(b, 4, 8, 8, generator=generator)
    steps = torch.randint(0, 1000, (b,), generator=generator)
    hidden = base.encode_prompts(base.tokenize(prompts))["hidden"].repeat_interleave(b // len(prompts), 0)
    return base.predict(noise, steps, {"hidden": hidden})


def pictures(pipe: Any, prompts: list[str], images: int = 1, seeds: list[int] | None = None) -> Tensor:
    generators = [torch.Generator().manual_seed(s) for s in seeds or range(len(prompts) * images)]
    made = pipe(
        prompts, num_inference_steps=2, num_images_per_prompt=images, generator=generators,
        guidance_scale=4.0, height=32, width=32, output_type="np",
    )  # fmt: skip
    return torch.from_numpy(made.images)


def close(a: Tensor, b: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.detach().abs().max()))


def fuse_by_hand(base: Base, factors: Factors) -> Base:
    """The oracle: a copy of the base whose weights have ΔW added."""
    dense = Base.from_pipeline(
        copy.deepcopy(base.pipe), base.source, trigger=base.trigger, class_word=base.class_word
    )
    for part, module in dense.components.items():
        for path, layer in module.named_modules():
            site = canonical(part, path)
            if isinstance(layer, nn.Linear) and site in factors:
                down, up = factors[site]
                layer.weight.data += up[0].detach() @ down[0].detach()
    return dense
