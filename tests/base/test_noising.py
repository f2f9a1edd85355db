"""Flow matching beside the scheduler's own arithmetic, and draws that are functions of their key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import pipelines
from hyperdreambooth.base.denoise import add_noise, draw_of, loss_weights, sample_noise, target
from hyperdreambooth.base.load import Base
from hyperdreambooth.base.noising import Diffusion, Flow
from hyperdreambooth.files import InputError

SHIFTS: dict[str, dict[str, Any]] = {"fixed": {"shift": 3.0}, "growing": {"use_dynamic_shifting": True}}


@pytest.fixture(scope="module")
def flow() -> Base:
    return Base.from_pipeline(pipelines.flux(), "flow", resolution=32)


def test_noise_is_what_the_flow_scheduler_adds(flow: Base) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = scheduler.timesteps[[0, 400, 999]]
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    noisy = add_noise(latents, draw_of(flow, noise, times))
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, times, noise))


def test_min_snr_weighs_a_flow_by_the_error_of_the_clean_picture(flow: Base) -> None:
    times = torch.tensor([100.0, 500.0, 900.0])
    latents, noise, wrong = (torch.randn(3, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    sigma = (times / 1000).view(-1, 1, 1, 1).double()
    draw = draw_of(flow, noise, times.double())
    clean = add_noise(latents, draw) - sigma * (target(flow, latents, draw) + wrong)
    error = (clean - latents).square().mean((1, 2, 3))
    snr = ((1 - sigma) / sigma).square().flatten()
    expected = error * snr.clamp(max=5.0) / wrong.square().mean((1, 2, 3))
    torch.testing.assert_close(loss_weights(flow, times, "min_snr").double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SHIFTS)
@pytest.mark.parametrize("logit_normal", [True, False])
def test_half_of_the_draws_lie_below_the_schedulers_own_middle(kind: str, logit_normal: bool) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**SHIFTS[kind])
    generator, tokens = torch.Generator().manual_seed(0), 1024
    draws = torch.stack(
        [Flow(logit_normal).sample_timestep(scheduler, generator, tokens) for _ in range(2000)]
    )
    middle = torch.tensor([0.5])
    if kind == "growing":
        slope = (1.15 - 0.5) / (4096 - 256)
        middle = scheduler.time_shift(0.5 + slope * (tokens - 256), 1.0, middle)
    else:
        middle = 3 * middle / (1 + 2 * middle)
        assert scheduler.sigmas.sub(middle).abs().min() < 1e-3
    assert draws.min() > 0 and draws.max() <= 1000
    assert (draws / 1000).median().item() == pytest.approx(middle.item(), abs=0.03)
    few = (draws < 60).float().mean()  # a uniform draw is often nearly clean, a logit-normal one seldom
    assert few < 0.01 if logit_normal else few > 0.015


def test_a_flows_draw_is_a_function_of_its_key(flow: Base) -> None:
    a, b, c = (sample_noise(flow, (4, 8, 8), 0, who, 5) for who in ("ana", "ana", "bob"))
    assert torch.equal(a[0], b[0]) and a[1] == b[1] and a[1].dtype == torch.float32
    assert not torch.equal(a[0], c[0]) and a[1] != c[1]


@pytest.mark.parametrize("family", ["micro_base", "flow"])
def test_a_bias_takes_the_noisiest_of_so_many_timesteps(family: str, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(family)
    plain, biased = (
        torch.stack([sample_noise(base, (4, 8, 8), "bias", k, bias=bias)[1] for k in range(400)])
        for bias in (1, 3)
    )
    assert (biased >= plain).all()  # the first of the three is the plain draw
    # half of the maxima of three draws lie below the place where .5^(1/3) of the single draws do
    below = (plain < biased.median()).float().mean()
    assert below.item() == pytest.approx(0.5 ** (1 / 3), abs=0.06)


def test_a_scheduler_of_another_kind_is_refused() -> None:
    for noising, scheduler in (
        (Diffusion(), FlowMatchEulerDiscreteScheduler()),
        (Diffusion(), DDIMScheduler(prediction_type="sample")),
        (Flow(True), DDIMScheduler()),
    ):
        with pytest.raises(InputError, match="expected") as caught:
            noising.check(scheduler)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "flow"])
def test_what_a_prediction_sees_is_the_inverse_of_its_target(flow: Base, predicts: str) -> None:
    scheduler: Any = flow.pipe.scheduler
    noising: Any = flow.family.NOISING
    if predicts != "flow":
        scheduler, noising = DDIMScheduler(prediction_type=predicts), Diffusion()
    times = noising.at(scheduler, torch.tensor([1.0, 0.7, 0.31, 0.1]))
    assert times.tolist() == [999 if predicts != "flow" else 1000, 700, 310, 100]
    signal, sigma = (level.view(-1, 1, 1, 1).double() for level in noising.levels(scheduler, times))
    latents, noise = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64).unbind()
    prediction = noising.target(scheduler, latents, noise, signal, sigma)
    seen = noising.seen(scheduler, signal * latents + sigma * noise, prediction, signal, sigma)
    for ours, theirs in zip(seen, (latents, noise), strict=True):
        torch.testing.assert_close(ours, theirs)
