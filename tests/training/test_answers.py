"""Captions of the class are answered as the bare base answers them: against single samples, and off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.conditioning import Conditioner, class_caption
from hyperdreambooth.base.denoise import denoise_loss, draw_of, sample_noise, target
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo, read_person
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig
from hyperdreambooth.finetune.dreambooth import dreambooth
from hyperdreambooth.finetune.fast import finetune_adapter, finetune_adapters
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import fresh
from hyperdreambooth.preopt.bank_training import prepare, train_group
from hyperdreambooth.preopt.config import PreoptConfig
from hyperdreambooth.runs import rng
from hyperdreambooth.shapes import Factors
from hyperdreambooth.training.answers import ANSWERED, PATH, bare_answers
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.samples import Answers, Samples
from hyperdreambooth.training.shots import shots_of
from hyperdreambooth.training.step import step_inputs, step_losses

CONFIG = TrainConfig(batch=2, seed=5, weighting="debiased", background=0.3, class_weight=0.5, steps=4)


@pytest.fixture
def people(micro_photos: Path) -> list[tuple[Photo, ...]]:
    return [read_person(micro_photos / f"person-{k}") for k in range(3)]


def strong(base: Base, seed: int = 0) -> Factors:
    """A rank-1 LoRA that visibly changes the base."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (down, torch.randn(up.shape, generator=generator))
        for name, (down, up) in fresh(base.sites, 1, seed).items()
    }


def flat(adapter: Adapter) -> Tensor:
    return torch.cat([part.flatten() for _, pair in sorted(adapter.factors.items()) for part in pair])


def losses(
    base: Base, people: list[tuple[Photo, ...]], config: TrainConfig, worn: Factors, step: int = 1
) -> Tensor:
    """The losses `(n,)` of a step as the loop takes it, every person wearing the same."""
    samples = Samples(shots_of(base, people, config)[0], config)
    encode = Conditioner(base, samples.captions, text_worn=True)
    samples.answers = bare_answers(base, samples, encode, config)
    with torch.no_grad(), wear(base.components, worn):
        return step_losses(base, encode, config, step_inputs(base, samples, encode, config, step))


def answered(
    base: Base, people: list[tuple[Photo, ...]], config: TrainConfig
) -> tuple[Samples, Conditioner, Answers]:
    samples = Samples(shots_of(base, people, config)[0], config)
    encode = Conditioner(base, samples.captions, text_worn=True)
    answers = samples.answers = bare_answers(base, samples, encode, config)
    assert answers is not None
    return samples, encode, answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of a [V] {class_word}, smiling", "a photo of a face, smiling"),
        ("a photo of a sks face", "a photo of a face"),
        ("sks face on a beach", "face on a beach"),
        ("the face sks, smiling", "the face, smiling"),
        ("a photo of [V], smiling", "a photo of face, smiling"),
        ("[V]", "face"),
        ("two faces, sksy, and a hat", "two faces, sksy, and a hat"),
        ("a painting of a hat", "a painting of a hat"),
    ],
)
def test_a_class_caption_names_anybody(micro_base: Base, text: str, expected: str) -> None:
    assert class_caption(micro_base, text) == expected


def test_the_term_is_that_of_one_sample_by_the_bare_answer(
    micro_base: Base, people: list[tuple[Photo, ...]]
) -> None:
    worn, step, person = strong(micro_base), 1, people[0]
    (got,) = losses(micro_base, [person], CONFIG, worn, step)
    (without,) = losses(micro_base, [person], CONFIG.model_copy(update={"class_weight": 0.0}), worn, step)
    samples, _, answers = answered(micro_base, [person], CONFIG)
    caption = samples.captions[int(answers.rows[0, step])]
    latents, noise, time = (kind[:, step] for kind in (answers.latents, answers.noise, answers.timesteps))
    draw = draw_of(micro_base, noise, time, "debiased")
    noisy = draw.signal * latents + draw.sigma * noise

    def told() -> Tensor:
        tokens = micro_base.tokenize([caption])
        return micro_base.predict(noisy, time, micro_base.encode_prompts(tokens))

    with torch.no_grad():
        bare = told()
        with wear(micro_base.components, worn):
            expected = draw.weights[0] * (told() - bare).square().mean()
    assert "sks" not in caption and expected > 1e-4
    torch.testing.assert_close(got - without, 0.5 * expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_a_path_is_how_the_bare_base_denoises(
    micro_base: Base, people: list[tuple[Photo, ...]], predicts: str
) -> None:
    """From the noise of its key on, each place follows from the answer at the one before, as in DDIM."""
    micro_base.pipe.scheduler.register_to_config(prediction_type=predicts)
    config = CONFIG.model_copy(update={"steps": PATH})
    samples, _, answers = answered(micro_base, people[:2], config)
    for person in (0, 1):
        row = samples.class_row(person, 0)
        assert answers.rows[person].tolist() == [row] * PATH
        told = micro_base.encode_prompts(micro_base.tokenize([samples.captions[row]]))
        latents = samples.latents[[row]]
        noise = torch.randn(4, 8, 8, generator=rng(5, samples.names[person], "class", 0))[None]
        times, order = answers.timesteps[person].sort(descending=True)
        assert times[0] == 999 and (times.diff() < 0).all()
        for time, place in zip(times, order, strict=True):
            draw = draw_of(micro_base, noise, time[None])
            noisy = draw.signal * latents + draw.sigma * noise
            latents, noise = answers.latents[person, [place]], answers.noise[person, [place]]
            torch.testing.assert_close(
                draw.signal * latents + draw.sigma * noise, noisy, rtol=1e-4, atol=1e-4
            )
            bare = micro_base.predict(noisy, time[None], told)
            seen = draw_of(micro_base, noise, time[None])
            torch.testing.assert_close(target(micro_base, latents, seen), bare, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("worn", ["a fresh LoRA", "zero"])
def test_who_wears_nothing_answers_like_the_bare_base(
    micro_base: Base, people: list[tuple[Photo, ...]], worn: str
) -> None:
    factors = fresh(micro_base.sites, 2)
    if worn == "zero":
        factors = {name: (torch.zeros_like(down), up) for name, (down, up) in strong(micro_base).items()}
    heavy = CONFIG.model_copy(update={"class_weight": 1e3})
    plain = CONFIG.model_copy(update={"class_weight": 0.0})
    torch.testing.assert_close(
        losses(micro_base, people, heavy, factors), losses(micro_base, people, plain, factors),
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_the_photos_of_a_step_are_what_they_are_without_it(
    micro_base: Base, people: list[tuple[Photo, ...]]
) -> None:
    """Latents, noise, masks and weights, bit by bit; and off there is nothing besides them."""
    plain = CONFIG.model_copy(update={"class_weight": 0.0})
    without = Samples(shots_of(micro_base, people, plain)[0], plain)
    held, encode, _ = answered(micro_base, people, CONFIG)
    assert (without.each, without.answered, held.each, held.answered) == (2, 0, 3, 1)
    assert bare_answers(micro_base, without, encode, plain) is None
    for step in (0, 3):
        one = step_inputs(micro_base, without, encode, plain, step)
        two = step_inputs(micro_base, held, encode, CONFIG, step)

        def photos(inputs: Tensor) -> Tensor:
            return inputs.unflatten(0, (3, 3))[:, :2].flatten(0, 1)

        assert torch.equal(photos(two["latents"]), one["latents"])
        assert torch.equal(photos(two["mask"]), one["mask"])
        assert torch.equal(two["weights"][:, :2], one["weights"])
        assert all(torch.equal(photos(b), a) for a, b in zip(one["draw"], two["draw"], strict=True))


def test_answers_come_round_again_and_everybody_has_their_own(
    micro_base: Base, people: list[tuple[Photo, ...]]
) -> None:
    config = CONFIG.model_copy(update={"steps": ANSWERED + 3})
    samples, encode, answers = answered(micro_base, people, config)
    assert answers.latents.shape == (3, ANSWERED, 4, 8, 8)
    first, again = (step_inputs(micro_base, samples, encode, config, k) for k in (2, ANSWERED + 2))
    assert torch.equal(first["latents"][2::3], again["latents"][2::3])
    assert torch.equal(first["draw"].noise[2::3], again["draw"].noise[2::3])
    assert not torch.equal(first["draw"].noise[0], again["draw"].noise[0])
    assert len(set(answers.timesteps[:, 2].tolist())) == 3
    for k, person in enumerate(people):
        _, _, alone = answered(micro_base, [person], config)
        assert torch.equal(alone.timesteps[0], answers.timesteps[k])
        torch.testing.assert_close(alone.noise[0], answers.noise[k], rtol=1e-3, atol=1e-4)


def test_people_side_by_side_are_each_as_alone(micro_base: Base, people: list[tuple[Photo, ...]]) -> None:
    config = FinetuneConfig(steps=4, rank=2, batch=2, lr=3e-3, class_weight=2.0)
    start = [Adapter(strong(micro_base, k), "sks", micro_base.fingerprint, "micro") for k in range(3)]
    together = finetune_adapters(micro_base, start, people, config)
    for adapter, photos, made in zip(start, people, together, strict=True):
        alone = finetune_adapter(micro_base, adapter, photos, config)
        torch.testing.assert_close(flat(made), flat(alone), rtol=0, atol=2e-4)


def test_a_training_pulls_the_class_towards_the_bare_base(
    micro_base: Base, people: list[tuple[Photo, ...]]
) -> None:
    """On noise that no step has seen, and without holding the person back as a low rate would."""
    prediction = Adapter(strong(micro_base), "sks", micro_base.fingerprint, "micro")

    def away(worn: Factors) -> float:
        noise, time = zip(
            *(sample_noise(micro_base, (4, 8, 8), "held out", k) for k in range(8)), strict=True
        )
        tokens = micro_base.tokenize(["a photo of a face"] * 8)

        def told() -> Tensor:
            conditioning = micro_base.encode_prompts(tokens)
            return micro_base.predict(torch.stack(noise), torch.stack(time), conditioning)

        with torch.no_grad():
            bare = told()
            with wear(micro_base.components, worn):
                return float((told() - bare).square().mean())

    made = {}
    for weight in (0.0, 20.0):
        config = FinetuneConfig(steps=30, rank=2, batch=2, lr=1e-2, class_weight=weight)
        made[weight] = away(finetune_adapter(micro_base, prediction, people[0], config).factors)
    assert made[20.0] < 0.5 * made[0.0] and made[20.0] < away(prediction.factors)


@pytest.mark.parametrize("photo_order", ["turns", "shuffled"])
def test_a_resumed_training_is_an_uninterrupted_one(
    micro_base: Base, people: list[tuple[Photo, ...]], tmp_path: Path, photo_order: str
) -> None:
    config = FinetuneConfig(steps=6, rank=2, batch=1, lr=3e-3, class_weight=1.0, save_every=2)
    config = config.model_copy(update={"photo_order": photo_order})
    start = Adapter(strong(micro_base), "sks", micro_base.fingerprint, "micro")
    expected = finetune_adapter(micro_base, start, people[0], config)
    out: dict[str, Any] = {"out": tmp_path / "run"}
    finetune_adapter(micro_base, start, people[0], config, callback=lambda step, _: step < 4, **out)
    resumed = finetune_adapter(micro_base, start, people[0], config, **out)
    assert torch.equal(flat(resumed), flat(expected))


def test_every_training_takes_it(micro_base: Base, people: list[tuple[Photo, ...]]) -> None:
    """LiDB numbers, all weights and a word; of a word, which the class caption lacks, it asks nothing."""
    settings: dict[str, Any] = {"steps": 3, "batch": 2}
    bank = PreoptConfig(steps=3, down_dim=8, up_dim=6, lr=5e-2)
    made = {}
    for weight in (0.0, 5.0):
        config = bank.model_copy(update={"class_weight": weight})
        shots = shots_of(micro_base, people, config)[0]
        numbers, outcome = train_group(prepare(micro_base, config), shots)
        assert outcome.history.isfinite().all()
        full: Any = dreambooth(
            micro_base, people[0], config=DreamboothConfig(method="full", class_weight=weight, **settings)
        )
        word: Any = dreambooth(
            micro_base,
            people[0],
            config=DreamboothConfig(method="textual-inversion", class_weight=weight, **settings),
        )
        made[weight] = numbers, full.weights["unet.conv_in.weight"], word.vector
    assert not torch.equal(made[0.0][0], made[5.0][0]) and not torch.equal(made[0.0][1], made[5.0][1])
    torch.testing.assert_close(made[0.0][2], made[5.0][2])


def test_no_step_needs_no_answer(micro_base: Base, people: list[tuple[Photo, ...]]) -> None:
    start = Adapter(strong(micro_base), "sks", micro_base.fingerprint, "micro")
    config = FinetuneConfig(steps=0, rank=2, class_weight=1.0)
    made = finetune_adapter(micro_base, replace(start, metadata={}), people[0], config)
    for site, (down, up) in made.factors.items():
        torch.testing.assert_close(up @ down, start.factors[site][1] @ start.factors[site][0])


def test_a_loss_without_answers_is_the_plain_one(micro_base: Base) -> None:
    latents, noise = torch.randn(2, 2, 4, 8, 8).unbind()
    time = torch.tensor([200, 700])
    told = micro_base.encode_prompts(micro_base.tokenize(["a face"] * 2))
    draw = draw_of(micro_base, noise, time)
    answers = torch.randn(1, 4, 8, 8)
    wanted = target(micro_base, latents, draw, answers)
    assert torch.equal(wanted, torch.cat([noise[:1], answers]))
    error = (micro_base.predict(draw.signal * latents + draw.sigma * noise, time, told) - noise).square()
    torch.testing.assert_close(denoise_loss(micro_base, latents, told, noise, time), error.mean((1, 2, 3)))
