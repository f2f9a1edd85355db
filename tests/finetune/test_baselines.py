"""What is trained besides adapters, and when a training stops by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from hyperdreambooth.base.denoise import denoise_loss, sample_noise
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.faces.dataset import Photo, read_person
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import DreamboothConfig
from hyperdreambooth.finetune.dreambooth import dreambooth, dreambooth_many
from hyperdreambooth.finetune.whole import Whole
from hyperdreambooth.finetune.word import TOKEN, Word
from hyperdreambooth.generate import generate_images
from hyperdreambooth.training import loop
from hyperdreambooth.training.plateau import EVERY, SHARE, WINDOW, Plateau
from hyperdreambooth.training.samples import Samples
from hyperdreambooth.training.shots import photo_shots, shots_of
from hyperdreambooth.training.step import Inputs, step_inputs
from steps import losses_of


@pytest.fixture
def person(micro_photos: Path) -> tuple[Photo, ...]:
    return read_person([micro_photos / "person-0"])


def weights(base: Base) -> dict[str, Tensor]:
    return {f"{k}.{n}": p.clone() for k, m in base.components.items() for n, p in m.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def loss(base: Base, photos: tuple[Photo, ...]) -> float:
    """On noise that no training has drawn."""
    shots = photo_shots(base, photos, "a photo of a [V] {class_word}")
    drawn = [sample_noise(base, tuple(shots.latents.shape[1:]), "held out", k) for k in range(16)]
    noise, timesteps = torch.stack([n for n, _ in drawn]), torch.stack([t for _, t in drawn])
    picks = [k % len(shots.captions) for k in range(16)]
    read = base.encode_prompts(base.tokenize([shots.captions[k] for k in picks]))
    return denoise_loss(base, shots.latents[picks], read, noise, timesteps).mean().item()


def test_what_is_not_said_is_as_the_method_wants_it() -> None:
    full, lora = DreamboothConfig(method="full"), DreamboothConfig(method="lora", lr=2e-4)
    assert (full.steps, full.lr, full.batch) == (1200, 5e-6, 1)
    assert (lora.rank, lora.lr) == (4, 2e-4)
    assert DreamboothConfig() == DreamboothConfig(method="lidb", steps=400, lr=1e-3, batch=4)


@pytest.mark.parametrize("text_encoder", [True, False])
def test_full_dreambooth_fits_the_photo_and_gives_the_base_back(
    micro_base: Base, person: tuple[Photo, ...], tmp_path: Path, text_encoder: bool
) -> None:
    before, bare = weights(micro_base), loss(micro_base, person[:1])
    config = DreamboothConfig(method="full", steps=25, lr=3e-3, text_encoder=text_encoder)
    made = dreambooth(micro_base, person[:1], None, config)
    assert isinstance(made, Whole) and made.metadata["steps"] == "25"
    assert same(before, weights(micro_base)) and loss(micro_base, person[:1]) == bare
    parts = {name.split(".")[0] for name in made.weights}
    assert parts == ({"unet", "text_encoder"} if text_encoder else {"unet"})
    with made.worn(micro_base):
        tuned, picture = loss(micro_base, person[:1]), generate_images(micro_base, ["a [V] face"], steps=2)[0]
    assert tuned < 0.9 * bare
    assert same(before, weights(micro_base))
    made.save(tmp_path / "pipeline", micro_base)
    reloaded = load_base(tmp_path / "pipeline", device="cpu")
    assert loss(reloaded, person[:1]) == pytest.approx(tuned, abs=1e-6)
    assert (reloaded.trigger, reloaded.class_word) == ("sks", "face")
    again = generate_images(reloaded, ["a [V] face"], steps=2)[0]
    assert np.abs(np.asarray(again, int) - np.asarray(picture, int)).max() <= 1


def test_a_full_step_is_plain_torch(micro_base: Base, person: tuple[Photo, ...]) -> None:
    """Two steps of the loop against Adam and clipping written out over the same losses."""
    config = DreamboothConfig(method="full", steps=2, lr=1e-3, batch=2, clip=0.05)
    made = dreambooth(micro_base, person[:1], None, config)
    assert isinstance(made, Whole)
    groups, _ = shots_of(micro_base, [person[:1]], config)
    samples = Samples(groups, config)
    encode = loop.Conditioner(micro_base, samples.captions, text_worn=True)
    named = {f"{k}.{n}": p for k, m in micro_base.components.items() for n, p in m.named_parameters()}
    for parameter in named.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(named.values(), lr=1e-3)
    for step in range(2):
        losses_of(micro_base, samples, encode, config, step).sum().backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in named.items():
        torch.testing.assert_close(made.weights[name], parameter.detach(), atol=2e-5, rtol=0)


def test_full_dreambooth_needs_float32_and_one_person(micro_dir: Path, person: tuple[Photo, ...]) -> None:
    half = load_base(micro_dir, device="cpu", dtype="bfloat16")
    with pytest.raises(InputError, match="float32"):
        dreambooth(half, person[:1], None, DreamboothConfig(method="full", steps=1))
    with pytest.raises(ValueError, match="one person"):
        base = load_base(micro_dir, device="cpu")
        dreambooth_many(base, [person, person], None, DreamboothConfig(method="full", steps=1))


def test_a_word_loads_in_plain_diffusers_and_draws_the_same(
    micro_base: Base, micro_dir: Path, person: tuple[Photo, ...], tmp_path: Path
) -> None:
    before = weights(micro_base)
    config = DreamboothConfig(method="textual-inversion", steps=20, lr=0.2)
    word = dreambooth(micro_base, person[:1], tmp_path / "run", config)
    assert isinstance(word, Word) and word.vector.shape == (16,) and same(before, weights(micro_base))
    bare = loss(micro_base, person[:1])
    with word.worn(micro_base):
        assert loss(micro_base, person[:1]) < bare
        ours = generate_images(micro_base, ["a photo of a [V] face, smiling"], seed=3, steps=2)[0]
    word.save(tmp_path / "learned_embeds.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(micro_dir)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    other = replace(load_base(micro_dir, device="cpu"), pipe=pipe, trigger=TOKEN)
    theirs = generate_images(other, ["a photo of a [V] face, smiling"], seed=3, steps=2)[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    without = generate_images(micro_base, ["a photo of a [V] face, smiling"], seed=3, steps=2)[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(without, int)).max() > 1


def test_many_words_together_are_each_as_alone(micro_base: Base, person: tuple[Photo, ...]) -> None:
    config = DreamboothConfig(method="textual-inversion", steps=4, lr=0.05, batch=2)
    photos = [person[:1], person[1:2]]
    for mine, one in zip(photos, dreambooth_many(micro_base, photos, None, config), strict=True):
        alone = dreambooth(micro_base, mine, None, config)
        assert isinstance(one, Word) and isinstance(alone, Word)
        torch.testing.assert_close(one.vector, alone.vector, atol=1e-4, rtol=0)


def test_a_trigger_of_several_tokens_is_refused(micro_base: Base, person: tuple[Photo, ...]) -> None:
    unheard = micro_base.with_words("unheard", "face")
    with pytest.raises(InputError, match="one token"):
        dreambooth(unheard, person, None, DreamboothConfig(method="textual-inversion", steps=1))


def test_a_rank_that_no_file_can_have_is_refused_before_the_run(
    micro_base: Base, person: tuple[Photo, ...], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="rank 5000: expected 1 to"):
        dreambooth(micro_base, person, tmp_path / "run", DreamboothConfig(method="lora", rank=5000))
    assert not (tmp_path / "run").exists()


def watch(curves: list[list[float]]) -> tuple[Plateau, int]:
    """A plateau watching given losses, and the step at which all were done; leaves hold the step."""
    leaves = {"at": torch.zeros(len(curves), 1)}
    looks: Iterator[list[float]] = iter(map(list, zip(*curves, strict=True)))
    plateau = Plateau(leaves, len(curves), lambda: torch.tensor(next(looks)))
    for step in range(EVERY * len(curves[0])):
        if plateau.done(step):
            return plateau, step
        leaves["at"].fill_(step + 1)
    return plateau, -1


def test_auto_stops_where_a_synthetic_loss_levels_out() -> None:
    level = [1.0, 0.75, 0.5, 0.25, *[0.0] * 6]
    plateau, stopped = watch([level])
    assert stopped == (4 + WINDOW) * EVERY and plateau.at.tolist() == [4 * EVERY]
    assert f"{stopped}" in plateau.reasons()[0]
    plateau.put_back()
    assert plateau.leaves["at"].tolist() == [[4.0 * EVERY]]


def test_auto_judges_each_person_alone_and_keeps_the_best() -> None:
    early = [1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]
    late = [1.0, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6]
    plateau, stopped = watch([early, late])
    assert plateau.stopped.tolist() == [3 * EVERY, 6 * EVERY] and stopped == 6 * EVERY
    plateau.put_back()
    assert plateau.leaves["at"].flatten().tolist() == [EVERY, 4 * EVERY]
    for curve, at in ((early, 3), (late, 6)):
        alone, stopped = watch([curve])
        assert stopped == at * EVERY and len(alone.looks) == at + 1


def test_auto_goes_on_while_it_falls_and_stops_what_never_falls() -> None:
    plateau, stopped = watch([[1 / (1 + k) for k in range(4)]])
    assert stopped == -1 and "still falling" in plateau.reasons()[0]
    plateau, stopped = watch([[1.0 + k for k in range(4)]])
    assert stopped == WINDOW * EVERY and plateau.at.tolist() == [0]
    assert SHARE < 0.5


def test_steps_auto_of_a_real_training(
    micro_base: Base, person: tuple[Photo, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DreamboothConfig(steps="auto", most=60, lr=0.05, down_dim=8, up_dim=8, save_every=7)
    groups, judged = shots_of(micro_base, [person], config)
    left_out = photo_shots(micro_base, person[-1:], "a").latents
    torch.testing.assert_close(judged[0][0].latents, left_out, atol=1e-5, rtol=0)
    assert len(groups[0][0].captions) == len(person) - 1
    whole = dreambooth(micro_base, person, tmp_path / "whole", config)
    assert whole.metadata["stopped"]
    steps = int(whole.metadata["steps"])
    assert steps % EVERY == 0 and steps <= 60

    def killed(*args: Any) -> Inputs:
        if args[-1] == 12:
            raise KeyboardInterrupt
        return step_inputs(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "step_inputs", killed)
        dreambooth(micro_base, person, tmp_path / "killed", config)
    resumed = dreambooth(micro_base, person, tmp_path / "killed", config)
    assert resumed.metadata["steps"] == whole.metadata["steps"]
    for name, pair in whole.factors.items():  # type: ignore[union-attr]
        assert all(torch.equal(pair[end], resumed.factors[name][end]) for end in (0, 1))  # type: ignore[union-attr]
