"""Examples that name nobody: answered like the bare base by a worn zero, and each as if alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_train import lines, settings, weights
from torch import Tensor

from hyperdreambooth.base.denoise import draw_of, sample_noise
from hyperdreambooth.base.load import Base
from hyperdreambooth.hypernet import train as module
from hyperdreambooth.hypernet.data import EVERY, anybody, collect, pick
from hyperdreambooth.hypernet.setup import Training
from hyperdreambooth.hypernet.train import train_hypernet, worn_losses
from hyperdreambooth.lora.inject import Worn
from hyperdreambooth.shapes import Factors

PEOPLE = 6


def predictions(base: Base, scale: float) -> Factors:
    generator = torch.Generator().manual_seed(0)
    return {
        site.name: (
            torch.randn(PEOPLE, 1, site.in_features, generator=generator) * scale,
            torch.randn(PEOPLE, site.out_features, 1, generator=generator) * scale,
        )
        for site in base.sites
    }


@pytest.fixture
def at_work(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Calls a function with what a training has at hand at its first step."""

    def at_work(look: Any, **fields: Any) -> None:
        def begin(training: Training, state: module.State, worn: Worn, first: int) -> None:
            with torch.no_grad():
                look(training, worn)

        monkeypatch.setattr(module, "train", begin)
        monkeypatch.setattr(module, "finished", lambda *_: False)
        monkeypatch.setattr(module, "load_hypernet", lambda *_: None)
        config = settings(eye, validation=0, class_weight=1.0, weighting="debiased", **fields)
        train_hypernet(micro_base, micro_photos, tmp_path / "h", config)

    return at_work


def batch_of(training: Training) -> tuple[list[Any], list[Any], Any]:
    config, pool = training.config, training.trained
    named = [pick(training.faces, pool, config.photos, 0, "train", 0, k) for k in range(PEOPLE)]
    unnamed = anybody(training.faces, pool, config.photos, 0, 0, range(PEOPLE))
    return named, unnamed, collect(training.base, training.faces, [*named, *unnamed])


@pytest.mark.parametrize("photos", [1, 2])
def test_each_example_is_as_alone(at_work: Any, photos: int) -> None:
    def look(training: Training, worn: Worn) -> None:
        base, faces, config = training.base, training.faces, training.config
        named, unnamed, batch = batch_of(training)
        assert len(unnamed) == 2 and len(batch.latents) == 8 * photos and len(batch.features) == PEOPLE
        factors = predictions(base, 0.5)
        got = worn_losses(training, worn, factors, batch, unnamed, 0)
        wearers = [*range(PEOPLE), 0, EVERY]
        for example, who, loss in zip([*named, *unnamed], wearers, got, strict=True):
            expected = torch.zeros(())
            for k, row in enumerate(example.targets):
                noise, time = sample_noise(base, (4, 8, 8), *example.key, "noise", k)
                draw = draw_of(base, noise[None], time[None], config.weighting)
                noisy = draw.signal * faces.latents[[row]] + draw.sigma * draw.noise
                caption = faces.captions[row]
                caption = caption if example.named else caption.replace("sks ", "")

                def told(
                    now: Factors, noisy: Tensor = noisy, caption: str = caption, draw: Any = draw
                ) -> Tensor:
                    worn.set(now)
                    return base.predict(noisy, draw.timesteps, base.encode_prompts(base.tokenize([caption])))

                wanted = (
                    draw.noise
                    if example.named
                    else told({n: (d[:1] * 0, u[:1] * 0) for n, (d, u) in factors.items()})
                )
                own = {name: (down[[who]], up[[who]]) for name, (down, up) in factors.items()}
                expected = expected + (draw.weights * (told(own) - wanted).square().mean((1, 2, 3)))[0]
            torch.testing.assert_close(loss, expected / photos, rtol=1e-3, atol=1e-5)

    at_work(look, photos=photos)


def test_a_worn_zero_answers_like_the_bare_base(at_work: Any) -> None:
    def look(training: Training, worn: Worn) -> None:
        _, unnamed, batch = batch_of(training)
        for scale, least, most in ((0.0, 0.0, 1e-9), (0.5, 1e-4, 1e9)):
            found = worn_losses(training, worn, predictions(training.base, scale), batch, unnamed, 0)
            assert all(least <= loss <= most for loss in found[PEOPLE:].tolist())

    at_work(look)


def test_the_parts_of_a_batch_ask_for_the_same_examples(at_work: Any) -> None:
    """Whatever part a place is in, it has the same example, worn by the person of that place."""

    def look(training: Training, worn: Worn) -> None:
        faces, pool = training.faces, training.trained
        whole = anybody(faces, pool, 1, 0, 3, range(16))
        for cut in (1, 4, 6, 11):
            parts = range(cut), range(cut, 16)
            assert [one for part in parts for one in anybody(faces, pool, 1, 0, 3, part)] == whole
            wearers = [place for part in parts for place in [*part][-part.start % EVERY :: EVERY]]
            assert wearers == [0, 4, 8, 12]
        assert {one.key for one in whole} == {(0, "class", 3, k) for k in (0, 4, 8, 12)}
        assert not any(one.named for one in whole)
        assert replace(whole[0], named=True) == pick(faces, pool, 1, 0, "class", 3, 0)

    at_work(look)


def test_accumulated_parts_with_classes_equal_one_batch(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    made = {}
    for parts in (1, 2):
        config = settings(eye, accumulation=parts, batch=6, class_weight=3.0, lr=1e-3, validation=0)
        train_hypernet(micro_base, micro_photos, tmp_path / str(parts), config)
        made[parts] = weights(tmp_path / str(parts))
        assert all(line["class"] >= 0 for line in lines(tmp_path / str(parts)) if "loss" in line)
    for name in made[1]:
        torch.testing.assert_close(made[1][name], made[2][name], rtol=1e-3, atol=1e-4, msg=name)


def test_off_nothing_is_asked_and_nothing_logged(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "sampled_answer", lambda *_: pytest.fail("the bare base was asked"))
    train_hypernet(micro_base, micro_photos, tmp_path / "h", settings(eye))
    assert not any("class" in line for line in lines(tmp_path / "h"))
