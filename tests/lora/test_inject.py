"""Wearing: against dense weights, against one identity at a time, and in half precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import Tensor
from worn import (
    PROMPTS,
    close,
    fuse_by_hand,
    leaves,
    person,
    pictures,
    predict,
    random_factors,
    scaled,
)

from hyperdreambooth.base.load import Base
from hyperdreambooth.lora.inject import add_delta, routing, wear
from hyperdreambooth.shapes import Factors


@pytest.mark.parametrize("grad", [False, True])
def test_one_adapter_equals_dense_weights(micro_base: Base, grad: bool) -> None:
    factors = random_factors(micro_base, 1, 3, grad=grad)
    dense = fuse_by_hand(micro_base, factors)
    bare = predict(micro_base, PROMPTS[:2], 4)
    with wear(micro_base.components, factors):
        worn = predict(micro_base, PROMPTS[:2], 4)
    close(worn, predict(dense, PROMPTS[:2], 4))
    assert (worn - bare).abs().max() > 0.1 * bare.abs().max()
    assert worn.requires_grad is grad


@pytest.mark.parametrize(("rank", "images"), [(1, 1), (1, 2), (4, 3)])
def test_identities_together_equal_one_by_one(micro_base: Base, rank: int, images: int) -> None:
    factors, n = random_factors(micro_base, 3, rank, grad=True), 3
    together = predict_identities(micro_base, factors, images)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad((together * weights).sum(), leaves(factors))
    alone_gradients = [torch.zeros_like(g) for g in gradients]
    for k in range(n):
        own = slice(k * images, (k + 1) * images)
        single = {
            s: (d.detach().requires_grad_(), u.detach().requires_grad_())
            for s, (d, u) in person(factors, k).items()
        }
        alone = predict_identities(micro_base, single, images, own)
        close(together[own], alone)
        for total, g in zip(
            alone_gradients, torch.autograd.grad((alone * weights[own]).sum(), leaves(single)), strict=True
        ):
            total[k] = g[0]
    for got, wanted in zip(gradients, alone_gradients, strict=True):
        close(got, wanted, 1e-4)


def predict_identities(base: Base, factors: Factors, images: int, own: slice = slice(None)) -> Tensor:
    """Identity-major training batch through text encoder and denoiser; the noises `own` of it."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3 * images, 4, 8, 8, generator=generator)[own]
    steps = torch.randint(0, 1000, (3 * images,), generator=generator)[own]
    prompts = [PROMPTS[k % 2] for k in range(3 * images)][own]
    with wear(base.components, factors, images=images):
        return base.predict(noise, steps, base.encode_prompts(base.tokenize(prompts)))


@pytest.mark.parametrize("images", [1, 2])
def test_pipeline_with_guidance_and_images_a_prompt(micro_base: Base, images: int) -> None:
    factors = random_factors(micro_base, 3, 2)
    with torch.no_grad(), wear(micro_base.components, factors, images=images) as worn:
        together = pictures(micro_base.pipe, PROMPTS, images)
        for k, prompt in enumerate(PROMPTS):
            own = list(range(k * images, (k + 1) * images))
            worn.set(person(factors, k), images)
            close(together[own], pictures(micro_base.pipe, [prompt], images, own), 1e-4)


def test_gradient_checkpointing_changes_nothing(micro_base: Base) -> None:
    factors, unet = random_factors(micro_base, 2, 1, grad=True), micro_base.components["unet"]

    def gradients() -> tuple[Tensor, ...]:
        with wear(micro_base.components, factors):
            return torch.autograd.grad(predict(micro_base, PROMPTS[:2], 2).square().mean(), leaves(factors))

    plain = gradients()
    unet.train()
    unet.enable_gradient_checkpointing()  # type: ignore[operator]
    for got, wanted in zip(gradients(), plain, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("n", [1, 2])
def test_bfloat16_autocast(micro_base: Base, n: int) -> None:
    factors = scaled(random_factors(micro_base, n, 2), 0.2)
    factors = {s: (d.requires_grad_(), u.detach().requires_grad_()) for s, (d, u) in factors.items()}
    with wear(micro_base.components, factors):
        exact = predict(micro_base, PROMPTS[:2], 2)
        with torch.autocast("cpu", torch.bfloat16):
            rough = predict(micro_base, PROMPTS[:2], 2)
            rough.float().square().mean().backward()
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()
    assert all(f.grad is not None and f.grad.dtype == torch.float32 and f.grad.any() for f in leaves(factors))


@pytest.mark.parametrize("n", [1, 2])
def test_bfloat16_base(micro_base: Base, n: int) -> None:
    factors = scaled(random_factors(micro_base, n, 2), 0.2)
    with torch.no_grad(), wear(micro_base.components, factors):
        exact = pictures(micro_base.pipe, PROMPTS[:2])
    micro_base.pipe.to(torch.bfloat16)
    with torch.no_grad(), wear(micro_base.components, factors):
        layers = [m for m in micro_base.components["unet"].modules() if isinstance(m, LoraLayer)]
        assert all(layer.lora_A["person"].weight.dtype == torch.bfloat16 for layer in layers)
        assert (pictures(micro_base.pipe, PROMPTS[:2]) - exact).abs().mean() < 0.05


def test_swapping_reaches_gradients_and_needs_the_same_shape(micro_base: Base) -> None:
    factors = random_factors(micro_base, 2, 2, grad=True)
    with wear(micro_base.components, {s: (d.detach(), u.detach()) for s, (d, u) in factors.items()}) as worn:
        assert not predict(micro_base, PROMPTS[:2], 2).requires_grad
        worn.set(factors)
        predict(micro_base, PROMPTS[:2], 2).sum().backward()
        assert all(f.grad is not None and f.grad.any() for f in leaves(factors))
        with pytest.raises(ValueError, match="rank 3, expected rank 2"):
            worn.set(random_factors(micro_base, 2, 3))
        with pytest.raises(ValueError, match="other sites"):
            worn.set(dict(list(factors.items())[1:]))
        with pytest.raises(ValueError, match="cannot be divided among 2 identities"):
            predict(micro_base, PROMPTS[:1], 3)
        with pytest.raises(ValueError, match="only one can be fused"):
            micro_base.pipe.fuse_lora()
        worn.set(random_factors(micro_base, 1, 2))
        micro_base.pipe.fuse_lora()
        with pytest.raises(ValueError, match="unfuse it first"):
            worn.set(random_factors(micro_base, 1, 2))


def test_routing_follows_diffusers_order() -> None:
    assert [routing(b, 2, 3) for b in (6, 12, 2, 4)] == [3, 3, 1, 1]
    with pytest.raises(ValueError, match="5 samples cannot be divided among 2 identities x 3 images"):
        routing(5, 2, 3)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_add_delta_equals_a_loop(data: st.DataObject) -> None:
    n, images, repeats, rank = (data.draw(st.integers(1, 3)) for _ in range(4))
    i, o = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    middle = data.draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    b = n * images * repeats
    generator = torch.Generator().manual_seed(math.prod((n, images, rank, i, o)))
    x, result = (torch.randn(b, *middle, width, generator=generator) for width in (i, o))
    down, up = torch.randn(n, rank, i, generator=generator), torch.randn(n, o, rank, generator=generator)
    order = torch.arange(n).repeat_interleave(images).repeat(repeats)
    wanted = torch.stack([result[k] + x[k] @ (up[order[k]] @ down[order[k]]).T for k in range(b)])
    got = add_delta(result, x, down, up, images)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
