"""The loop beside its parts: whose noise is whose, whose gradient is clipped, and who may end a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.denoise import denoise_loss, sample_noise, sample_noises
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo, read_person
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.finetune.fast import finetune_adapter, finetune_adapters
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import fresh
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.samples import Samples
from hyperdreambooth.training.shots import Shots, photo_shots
from hyperdreambooth.training.step import clip_people
from steps import losses_of


@pytest.fixture
def person(micro_photos: Path) -> tuple[Photo, ...]:
    return read_person([micro_photos / "person-0"])


@pytest.fixture
def prediction(micro_base: Base) -> Adapter:
    """A rank-1 LoRA that visibly changes the base."""
    generator = torch.Generator().manual_seed(0)
    made = {
        name: (down, torch.randn(up.shape, generator=generator))
        for name, (down, up) in fresh(micro_base.sites, 1).items()
    }
    return Adapter(made, "sks", micro_base.fingerprint, micro_base.source)


def test_each_persons_gradient_is_clipped_by_its_own_norm() -> None:
    leaves = [torch.zeros(2, 3, 4), torch.zeros(2, 5)]
    for leaf in leaves:
        leaf.grad = torch.randn_like(leaf)
        leaf.grad[1] *= 1e-3
    before = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    clip_people(leaves, 0.5, 2)
    ours = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert torch.cat([g[0].flatten() for g in ours]).norm() == pytest.approx(0.5)
    assert all(torch.equal(g[1], old[1]) for g, old in zip(ours, before, strict=True))


@pytest.mark.parametrize("prior", [False, True])
def test_step_loss_is_the_weighted_mean_of_single_samples(
    micro_base: Base, prediction: Adapter, person: tuple[Photo, ...], prior: bool
) -> None:
    config = TrainConfig(batch=2, seed=5, timestep_bias=2)
    groups = [photo_shots(micro_base, person, "a [V] {class_word}", background=0.2)]
    if prior:
        groups.append(Shots(torch.randn(3, *groups[0].latents.shape[1:]), ("a face",) * 3, weight=0.25))
    samples, expected = Samples([groups], config), torch.zeros(())
    with torch.no_grad(), wear(micro_base.components, prediction.factors):
        encode = Conditioner(micro_base, samples.captions, text_worn=True)
        (got,) = losses_of(micro_base, samples, encode, config, 4)
        for place in range(2 * len(groups)):
            shots, index = groups[place // 2], (8 + place % 2) % 3
            shape = tuple(shots.latents.shape[1:])
            noise, timestep = sample_noise(micro_base, shape, 5, groups[0].person, 4, place, bias=2)
            conditioning = micro_base.encode_prompts(micro_base.tokenize([shots.captions[index]]))
            mask = None if shots.masks is None else shots.masks[[index]]
            one = (conditioning, noise[None], timestep[None], mask)
            loss = denoise_loss(micro_base, shots.latents[[index]], *one)
            expected += shots.weight * loss[0] / 2
    torch.testing.assert_close(got, expected)


def test_everybody_has_noise_of_their_own_whatever_the_batch(
    micro_base: Base, micro_photos: Path, prediction: Adapter
) -> None:
    """Two people share no draw of a step, and a person's draws are those of a batch of one."""
    photos = [read_person(micro_photos / f"person-{k}") for k in range(3)]
    prior = Shots(torch.randn(3, 4, 8, 8), ("a face",) * 3, weight=0.25)
    groups = [[photo_shots(micro_base, one, "a [V] {class_word}"), prior] for one in photos]
    config = TrainConfig(batch=2, seed=5)
    together = Samples(groups, config)
    for step in (0, 7, -1):
        keys = together.keys(step)
        assert len(set(keys)) == 3 * 4
        noise, _ = sample_noises(micro_base, (4, 8, 8), keys)
        assert torch.pdist(noise.flatten(1)).min() > 1
        for k, own in enumerate(groups):
            assert Samples([own], config).keys(step) == keys[4 * k : 4 * k + 4]
    with torch.no_grad(), wear(micro_base.components, prediction.factors):
        encode = Conditioner(micro_base, together.captions, text_worn=True)
        losses = losses_of(micro_base, together, encode, config, 3)
        for k, own in enumerate(groups):
            alone = losses_of(micro_base, Samples([own], config), encode, config, 3)
            torch.testing.assert_close(losses[k], alone[0])


def test_photos_take_turns_or_are_shuffled_for_each_person(micro_base: Base, micro_photos: Path) -> None:
    people = [read_person(micro_photos / f"person-{k}") for k in range(2)]
    groups = [[photo_shots(micro_base, one, "a [V]")] for one in people]
    turns = Samples(groups, TrainConfig(batch=2))
    assert [turns.rows(step) for step in (0, 1, -1)] == [[0, 1, 3, 4], [2, 0, 5, 3], [1, 2, 4, 5]]
    shuffled = Samples(groups, TrainConfig(batch=3, photo_order="shuffled"))
    orders = [shuffled.rows(step) for step in range(20)]
    assert all(sorted(order[:3]) == [0, 1, 2] and sorted(order[3:]) == [3, 4, 5] for order in orders)
    assert len({tuple(order[:3]) for order in orders}) == 6
    assert any([row + 3 for row in order[:3]] != order[3:] for order in orders)


def test_a_person_with_one_caption_is_encoded_once_a_step(
    micro_base: Base, prediction: Adapter, person: tuple[Photo, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    real = Base.encode_prompts

    def spy(self: Base, tokens: Tensor, *frozen: Any) -> dict[str, Tensor]:
        encoded.append(len(tokens))
        return real(self, tokens, *frozen)

    monkeypatch.setattr(Base, "encode_prompts", spy)
    config = FinetuneConfig(steps=1, batch=4, rank=2)
    finetune_adapters(micro_base, [prediction] * 2, [person[0], person[1]], config)
    finetune_adapters(micro_base, [prediction] * 2, [person[:2], person[1]], config)  # two captions and one
    finetune_adapter(micro_base, prediction, person, config)  # three photos, two captions
    assert encoded == [2, 8, len({photo.caption for photo in person})]


def test_a_callback_sees_every_step_and_ends_the_training(
    micro_base: Base, prediction: Adapter, person: tuple[Photo, ...], tmp_path: Path
) -> None:
    seen: list[tuple[int, float]] = []

    def callback(step: int, loss: float) -> bool | None:
        seen.append((step, loss))
        return False if step == 3 else None

    config = FinetuneConfig(steps=9, rank=2)
    made = finetune_adapter(micro_base, prediction, person, config, out=tmp_path / "run", callback=callback)
    assert [step for step, _ in seen] == [1, 2, 3] and made.metadata["steps"] == "3"
    assert "callback" in made.metadata["stopped"]
    three = finetune_adapter(micro_base, prediction, person, FinetuneConfig(steps=3, rank=2))
    assert all(torch.equal(pair[1], three.factors[name][1]) for name, pair in made.factors.items())
    whole = finetune_adapter(micro_base, prediction, person, config, out=tmp_path / "run")  # goes on
    again = finetune_adapter(micro_base, prediction, person, config)
    assert all(torch.equal(pair[1], again.factors[name][1]) for name, pair in whole.factors.items())
    assert "stopped" not in whole.metadata
