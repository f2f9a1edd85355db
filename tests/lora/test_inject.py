"""Wearing: against dense weights, against one identity at a time, and against the bare base afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hyperdreambooth.base.load import Base
from hyperdreambooth.lora.inject import add_delta, routing, wear
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
    dense = Base(copy.deepcopy(base.pipe), base.source, trigger=base.trigger, class_word=base.class_word)
    for part, module in dense.components.items():
        for path, layer in module.named_modules():
            site = canonical(part, path)
            if isinstance(layer, nn.Linear) and site in factors:
                down, up = factors[site]
                layer.weight.data += up[0].detach() @ down[0].detach()
    return dense


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


def state(base: Base) -> dict[str, Any]:
    return {
        part: (
            [(path, type(m), id(m)) for path, m in module.named_modules()],
            {key: value.clone() for key, value in module.state_dict().items()},
            sorted(set(module.__dict__) - {"lora_scale", "_safe_fusing"}),  # fuse_lora's own notes
            [(path, p.requires_grad, id(p)) for path, p in module.named_parameters()],
        )
        for part, module in base.components.items()
    }


def same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for part in a:
        assert a[part][0] == b[part][0] and a[part][2:] == b[part][2:]
        assert list(a[part][1]) == list(b[part][1])
        assert all(torch.equal(value, b[part][1][key]) for key, value in a[part][1].items())


@pytest.mark.parametrize("n", [1, 2])
def test_taking_off_restores_everything(micro_base: Base, n: int) -> None:
    micro_base.components["unet"].requires_grad_(True)
    before, image = state(micro_base), pictures(micro_base.pipe, PROMPTS[:2])
    random_state = torch.get_rng_state()
    with wear(micro_base.components, random_factors(micro_base, n, 2)) as worn:
        assert not torch.equal(pictures(micro_base.pipe, PROMPTS[:2]), image)
    worn.take_off()
    same_state(state(micro_base), before)
    assert torch.equal(pictures(micro_base.pipe, PROMPTS[:2]), image)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("first_off", ["person", "style"])
def test_two_adapters_together(micro_base: Base, first_off: str) -> None:
    people, style = random_factors(micro_base, 2, 1), random_factors(micro_base, 1, 3, seed=5)
    style = {site: pair for site, pair in style.items() if site.startswith("unet.")}
    both = {s: _sum(person(people, 1)[s], style.get(s)) for s in people}
    before = state(micro_base)
    dense = {
        "person": predict(fuse_by_hand(micro_base, person(people, 1)), [PROMPTS[1]], 1),
        "style": predict(fuse_by_hand(micro_base, style), [PROMPTS[1]], 1),
        "both": predict(fuse_by_hand(micro_base, both), [PROMPTS[1]], 1),
    }
    worn = {"person": wear(micro_base.components, person(people, 1))}
    worn["style"] = wear(micro_base.components, style, name="style")
    close(predict(micro_base, [PROMPTS[1]], 1), dense["both"])
    worn.pop(first_off).take_off()
    (left,) = worn
    close(predict(micro_base, [PROMPTS[1]], 1), dense[left])
    assert set(micro_base.pipe.get_list_adapters()["unet"]) == {left}
    worn[left].take_off()
    same_state(state(micro_base), before)


def _sum(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    return a if b is None else (torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 2))


def test_people_with_a_style(micro_base: Base) -> None:
    people, style = random_factors(micro_base, 2, 1), random_factors(micro_base, 1, 3, seed=5)
    with torch.no_grad(), wear(micro_base.components, style, name="style"):
        with wear(micro_base.components, people):
            together = pictures(micro_base.pipe, PROMPTS[:2])
        for k in range(2):
            with wear(micro_base.components, person(people, k)):
                close(together[k : k + 1], pictures(micro_base.pipe, [PROMPTS[k]], seeds=[k]), 1e-4)


def scaled(factors: Factors, scale: float) -> Factors:
    return {site: (down, up * scale) for site, (down, up) in factors.items()}


def test_diffusers_own_controls(micro_base: Base) -> None:
    factors, pipe = random_factors(micro_base, 1, 2), micro_base.pipe
    before, bare = state(micro_base), pictures(pipe, PROMPTS[:1])
    half = pictures(fuse_by_hand(micro_base, scaled(factors, 0.5)).pipe, PROMPTS[:1])
    full = pictures(fuse_by_hand(micro_base, factors).pipe, PROMPTS[:1])
    with wear(micro_base.components, factors):
        pipe.set_adapters("person", 0.5)
        close(pictures(pipe, PROMPTS[:1]), half, 1e-4)
        pipe.set_adapters("person", 1.0)
        pipe.disable_lora()
        assert torch.equal(pictures(pipe, PROMPTS[:1]), bare)
        pipe.enable_lora()
        close(pictures(pipe, PROMPTS[:1]), full, 1e-4)
        pipe.fuse_lora(safe_fusing=True)
        close(pictures(pipe, PROMPTS[:1]), full, 1e-4)
        pipe.unfuse_lora()
        close(pictures(pipe, PROMPTS[:1]), full, 1e-4)
        pipe.fuse_lora()
    same_state(state(micro_base), before)


def test_taking_one_of_two_fused_adapters_off(micro_base: Base) -> None:
    one, two = random_factors(micro_base, 1, 2), random_factors(micro_base, 1, 1, seed=5)
    before, alone = state(micro_base), predict(fuse_by_hand(micro_base, two), [PROMPTS[0]], 1)
    first = wear(micro_base.components, one)
    with wear(micro_base.components, two, name="style"):
        micro_base.pipe.fuse_lora()
        first.take_off()
        close(predict(micro_base, [PROMPTS[0]], 1), alone)
    same_state(state(micro_base), before)


def test_what_the_user_deleted_is_not_missed(micro_base: Base) -> None:
    before = state(micro_base)
    with wear(micro_base.components, random_factors(micro_base, 1, 2)):
        micro_base.pipe.delete_adapters("person")
    with wear(micro_base.components, random_factors(micro_base, 1, 2)):
        micro_base.pipe.unload_lora_weights()
    assert [m[0] for m in state(micro_base)["unet"][0]] == [m[0] for m in before["unet"][0]]


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
        with pytest.raises(ValueError, match="cannot be shared out to 2 identities"):
            predict(micro_base, PROMPTS[:1], 3)
        with pytest.raises(ValueError, match="only one can be fused"):
            micro_base.pipe.fuse_lora()
        worn.set(random_factors(micro_base, 1, 2))
        micro_base.pipe.fuse_lora()
        with pytest.raises(ValueError, match="unfuse it first"):
            worn.set(random_factors(micro_base, 1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {}, "one rank at one site or more"),
        (lambda f: f | {next(iter(f)): (torch.zeros(1, 5, 16), torch.zeros(1, 16, 5))}, "one rank"),
        (lambda f: f | {"unet.nowhere.to_q": next(iter(f.values()))}, "no linear layer unet.nowhere.to_q"),
        (lambda f: f | {"vae.to_q": next(iter(f.values()))}, "no linear layer vae.to_q"),
    ],
)
def test_what_cannot_be_worn_leaves_no_trace(
    micro_base: Base, change: Callable[[Factors], Factors], message: str
) -> None:
    before = state(micro_base)
    with pytest.raises(ValueError, match=message):
        wear(micro_base.components, change(random_factors(micro_base, 1, 2)))
    same_state(state(micro_base), before)


def test_names_and_shapes_that_do_not_fit(micro_base: Base) -> None:
    factors, before = random_factors(micro_base, 1, 2), state(micro_base)
    with (
        wear(micro_base.components, factors),
        pytest.raises(ValueError, match="already worn by text_encoder, unet"),
    ):
        wear(micro_base.components, factors)
    same_state(state(micro_base), before)
    site = next(iter(factors))
    with pytest.raises(RuntimeError):
        wear(micro_base.components, factors | {site: (torch.zeros(1, 2, 7), factors[site][1])})
    same_state(state(micro_base), before)


def test_routing_follows_diffusers_order() -> None:
    assert [routing(b, 2, 3) for b in (6, 12, 2, 4)] == [3, 3, 1, 1]
    with pytest.raises(ValueError, match="5 samples cannot be shared out to 2 identities x 3 images"):
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
