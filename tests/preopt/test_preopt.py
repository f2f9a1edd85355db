"""Many identities in one step must be what each would be alone, and a kill must not change a bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperdreambooth.base import denoise
from hyperdreambooth.base.denoise import Key, add_noise, draw_of, sample_noise
from hyperdreambooth.base.load import Base
from hyperdreambooth.config import load_config
from hyperdreambooth.faces.dataset import Photo, read_faces
from hyperdreambooth.faces.image import open_photo, to_pixels
from hyperdreambooth.files import InputError, load_tensors
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.weights import delta_products
from hyperdreambooth.preopt import bank_training
from hyperdreambooth.preopt.bank_training import PreoptConfig, Stage, preoptimize, prepare, train_group
from hyperdreambooth.runs import rng
from hyperdreambooth.training import loop
from hyperdreambooth.training.samples import Samples
from hyperdreambooth.training.shots import Shots, person_key, shots_of
from hyperdreambooth.training.step import Inputs

SMALL: dict[str, Any] = {
    "down_dim": 8,
    "up_dim": 6,
    "steps": 3,
    "lr": 5e-3,
    "warmup": 2,
    "identities_per_batch": 2,
}
People = list[list[Shots]]


def config(**fields: Any) -> PreoptConfig:
    return PreoptConfig(**{**SMALL, **fields})


def crowd(base: Base, photos: Path, settings: PreoptConfig) -> tuple[Stage, People]:
    people: list[tuple[Photo, ...]] = [*read_faces(photos).values()]
    return prepare(base, settings), shots_of(base, people, settings)[0]


def alone(stage: Stage, people: People) -> Tensor:
    return torch.cat([train_group(stage, [person])[0] for person in people])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"batch": 2, "rank": 2, "background": 0.2},
        {"text_encoder": False, "size_weight": 0.1, "photo_order": "turns"},
    ],
)
def test_together_is_alone_whatever_the_composition(
    micro_base: Base, micro_photos: Path, fields: dict[str, Any]
) -> None:
    stage, people = crowd(micro_base, micro_photos, config(steps=20, **fields))
    people = people[:5]
    together, outcome = train_group(stage, people)
    assert together.shape == (5, stage.layout.size)
    assert outcome.history.shape == (20, 5)
    assert (together - alone(stage, people)).abs().max() <= 1e-5
    order = [3, 0, 4]  # other company, other places
    shuffled, _ = train_group(stage, [people[k] for k in order])
    assert (together[order] - shuffled).abs().max() <= 1e-5
    moved = (together - stage.start).norm(dim=1)
    assert moved.min() > 0.01
    assert torch.cdist(together, together).fill_diagonal_(torch.inf).min() > 0.01


@pytest.mark.slow
def test_together_is_alone_after_a_hundred_steps(micro_base: Base, micro_photos: Path) -> None:
    stage, people = crowd(micro_base, micro_photos, config(steps=100, warmup=10))
    together, _ = train_group(stage, people)
    assert (together - alone(stage, people)).abs().max() <= 1e-5


def test_a_step_is_plain_adam_on_the_written_loss(micro_base: Base, micro_photos: Path) -> None:
    """An oracle that wears nothing: ΔW is added to the weights, as in the paper's equations."""
    settings = config(steps=2, warmup=0, clip=1e-3, batch=2, timestep_bias=2, size_weight=3.0)
    stage, people = crowd(micro_base, micro_photos, settings)
    (person,) = people[1]
    numbers = stage.start[None].clone().requires_grad_()
    adam = torch.optim.Adam([numbers], lr=settings.lr)
    for step in range(2):
        adam.param_groups[0]["lr"] = settings.lr * (1.0, 0.5)[step]
        away = (numbers - stage.start).square().mean()
        loss = naive_loss(stage, person, numbers, step) + 3 * away
        numbers.grad = torch.autograd.grad(loss, numbers)[0]
        assert numbers.grad.norm() > settings.clip
        torch.nn.utils.clip_grad_norm_([numbers], settings.clip)
        adam.step()
    got, _ = train_group(stage, [[person]])
    assert (got - numbers.detach()).abs().max() < 1e-4 * settings.lr / 5e-3


def naive_loss(stage: Stage, person: Shots, numbers: Tensor, step: int) -> Tensor:
    base, seed = stage.base, stage.config.seed
    deltas = {
        name: stage.basis.up[name] @ product[0] @ stage.basis.down[name]
        for name, product in delta_products(stage.layout, numbers).items()
    }
    generator = rng(seed, person.person, step, "photo")
    order = torch.randperm(len(person.captions), generator=generator).tolist()
    losses: list[Tensor] = []
    for k in range(2):
        latents, prompt = person.latents[order[k]][None], person.captions[order[k]]
        key, bias = (seed, person.person, step, k), stage.config.timestep_bias
        noise, timestep = sample_noise(base, tuple(latents.shape[1:]), *key, bias=bias)
        hidden = wearing(base.pipe.text_encoder, "text_encoder", deltas, base.tokenize([prompt]))[0]
        noisy = add_noise(latents, draw_of(base, noise[None], timestep[None]))
        answer = wearing(base.pipe.unet, "unet", deltas, noisy, timestep[None], encoder_hidden_states=hidden)[
            0
        ]
        losses.append((answer - noise).square().mean())
    return (losses[0] + losses[1]) / 2


def wearing(module: torch.nn.Module, part: str, deltas: dict[str, Tensor], *args: Any, **more: Any) -> Any:
    from hyperdreambooth.shapes import canonical

    weights = {
        f"{path}.weight": layer.weight + deltas[name]
        for path, layer in module.named_modules()
        if (name := canonical(part, path)) in deltas and isinstance(layer, torch.nn.Linear)
    }
    assert weights
    return torch.func.functional_call(module, weights, args, more)


def test_one_person_is_learnt_and_the_base_is_left_alone(
    micro_base: Base, micro_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(base: Base, shape: tuple[int, ...], keys: list[Key], *_: object) -> tuple[Tensor, Tensor]:
        """One timestep and one noise for each person, so that the loss itself must fall."""
        noise = torch.stack([torch.randn(shape, generator=rng(0, key[1])) for key in keys])
        return noise, torch.full((len(keys),), 300)

    monkeypatch.setattr(denoise, "_sampled", fixed)
    before = {name: p.clone() for name, p in micro_base.components["unet"].state_dict().items()}
    stage, people = crowd(micro_base, micro_photos, config(steps=60, lr=3e-2))
    _, outcome = train_group(stage, people[:2])
    assert (outcome.history[-5:].mean(0) < 0.9 * outcome.history[:5].mean(0)).all()
    after = micro_base.components["unet"].state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_who_a_person_is_depends_on_the_photos_alone(micro_photos: Path, tmp_path: Path) -> None:
    photos = read_faces(micro_photos)["person-0"]
    copy = [
        replace(photo, path=shutil.copy(photo.path, tmp_path / f"{k}.png"), identity="x")
        for k, photo in enumerate(reversed(photos))
    ]
    assert person_key(photos) == person_key(copy)
    assert person_key(photos) != person_key(photos[:2]) != person_key(photos[1:])


def figures(bank: Bank, name: str) -> Tensor:
    shards = sorted((bank.folder / "shards").iterdir())
    return torch.cat([load_tensors(shard)[0][f"figure.{name}"] for shard in shards])


def test_bank_says_how_it_was_made_and_resumes(
    micro_base: Base, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, photos = tmp_path / "bank", shutil.copytree(micro_photos, tmp_path / "photos")
    bank = preoptimize(micro_base, photos, str(out), config())
    assert bank.identities == [f"person-{k}" for k in range(6)]
    assert bank.manifest["base_fingerprint"] == micro_base.fingerprint
    assert bank.manifest["config"]["steps"] == 3
    assert bank.manifest["basis_source"] == "seed:0"
    stage = prepare(micro_base, config())
    assert bank.manifest["site_fingerprint"] == stage.layout.fingerprint
    assert torch.equal(bank.start, stage.start)
    assert len(figures(bank, "last_loss")) == 6
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all({"first_loss", "last_loss", "seconds"} <= line.keys() for line in lines)
    assert not (out / "groups").exists()

    shutil.copytree(photos / "person-0", photos / "aaron")  # a new person joins a finished bank
    calls: list[list[str]] = []
    real = bank_training.train_group

    def spy(stage: Stage, people: People, *rest: Any, **options: Any) -> Any:
        calls.append([groups[0].person for groups in people])
        return real(stage, people, *rest, **options)

    monkeypatch.setattr(bank_training, "train_group", spy)
    monkeypatch.setattr(Base, "encode_images", None)  # those very photos are in the cache
    grown = preoptimize(micro_base, photos, out, config())
    assert calls == [[person_key(read_faces(photos)["aaron"])]]
    assert torch.equal(grown.numbers(bank.identities), bank.numbers())
    # the same photos make the same person, whatever the name
    assert (grown.numbers(["aaron"]) - grown.numbers(["person-0"])).abs().max() <= 1e-5


def test_adapting_the_unet_alone_encodes_each_prompt_once(
    micro_base: Base, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, people = crowd(micro_base, micro_photos, config(text_encoder=False))
    assert {site.component for site in stage.layout.sites} == {"unet"}
    encoded: list[int] = []
    real = Base.encode_prompts

    def spy(self: Base, tokens: Tensor, *frozen: Any) -> dict[str, Tensor]:
        encoded.append(len(tokens))
        return real(self, tokens, *frozen)

    monkeypatch.setattr(Base, "encode_prompts", spy)
    numbers, _ = train_group(stage, people)
    assert encoded == [2]  # two different captions
    for _ in range(2):  # and once for all groups that share a cache
        cached, _ = train_group(stage, people, cache=tmp_path)
        assert encoded == [2, 2] and torch.equal(cached, numbers)


def test_captions_have_the_bases_words_and_without_one_are_the_prompt(
    micro_base: Base, micro_photos: Path, tmp_path: Path
) -> None:
    photos = shutil.copytree(micro_photos, tmp_path / "photos")
    (photos / "person-0" / "0.txt").write_text("a [V] {class_word}, smiling")
    (photos / "person-0" / "1.txt").unlink()
    people = [*read_faces(photos).values()]
    shots, _ = shots_of(micro_base, people, config(), cache=tmp_path / "cache")
    assert shots[0][0].captions[:2] == ("a sks face, smiling", "a sks face")
    direct = micro_base.encode_images(to_pixels(open_photo(photos / "person-0" / "1.png"), 32)[None])
    assert torch.allclose(shots[0][0].latents[1], direct[0], atol=1e-5)


def test_a_bank_takes_what_the_loop_takes(
    micro_base: Base, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, class images and `auto` steps; people are judged by the photo that is left out."""
    monkeypatch.setenv("HDB_CACHE", str(tmp_path / "home"))
    settings = config(steps="auto", most=10, background=0.2, prior_weight=0.5, prior_images=2)
    seen: list[Samples] = []
    real = loop.step_inputs

    def spy(base: Base, samples: Samples, *rest: Any) -> Inputs:
        seen.append(samples)
        return real(base, samples, *rest)

    monkeypatch.setattr(loop, "step_inputs", spy)
    bank = preoptimize(micro_base, micro_photos, tmp_path / "bank", settings)
    assert len(bank) == 6
    trained = [samples for samples in seen if samples.each == 2]
    judged = [samples for samples in seen if samples.each == 1]
    assert trained and all(len(samples.captions) == 2 * 2 + 2 for samples in trained)
    assert judged and all(len(samples.captions) == 2 for samples in judged)
    assert all(samples.masks is not None for samples in trained)


def test_bf16_trains_float32_numbers(micro_base: Base, micro_photos: Path) -> None:
    stage, people = crowd(micro_base, micro_photos, config(precision="bf16"))
    numbers, outcome = train_group(stage, people)
    assert numbers.dtype == outcome.history.dtype == torch.float32
    exact, _ = train_group(prepare(micro_base, config()), people)
    assert not torch.equal(numbers, exact)
    assert (numbers - exact).abs().max() < 0.05


def test_refusals(micro_base: Base, micro_photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "bank"
    with pytest.raises(InputError, match="no such photo or folder"):
        preoptimize(micro_base, tmp_path / "nobody", out, config())
    assert not out.exists()
    preoptimize(micro_base, micro_photos, out, config(steps=1))
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"config\.lr.*0\.005.*0\.5"):
        preoptimize(micro_base, micro_photos, out, config(steps=1, lr=0.5))
    with pytest.raises(InputError, match='class_word was "face", now "dog"'):
        preoptimize(micro_base.with_words("sks", "dog"), micro_photos, out, config(steps=1))
    with pytest.raises(InputError, match="base_fingerprint"):
        preoptimize(replace(micro_base, fingerprint="f" * 16), micro_photos, out, config(steps=1))
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("steps", [3, 30])  # with 30 the loop stops by itself
def test_a_person_whose_training_diverges_is_named(
    micro_base: Base, micro_photos: Path, tmp_path: Path, steps: int
) -> None:
    with pytest.raises(InputError, match=r"person-0.*lower the learning rate"):
        preoptimize(micro_base, micro_photos, tmp_path / "bank", config(lr=1e30, warmup=0, steps=steps))
    assert len(Bank.open(tmp_path / "bank")) == 0


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["steps=0"], "steps"),
        (["stepz=1"], "stepz"),
        (["rank=64"], "rank 64 needs"),
        (["precision=fp8"], "precision"),
    ],
)
def test_config_errors_are_one_line(sets: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_config(PreoptConfig, None, sets)
    assert "\n" not in str(caught.value)


def test_a_killed_group_goes_on_from_its_checkpoint(
    micro_base: Base, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(steps=7, save_every=3, identities_per_batch=6)
    whole = preoptimize(micro_base, micro_photos, tmp_path / "whole", settings)
    steps: list[int] = []
    real = loop.step_inputs

    def spy(*args: Any) -> Inputs:
        steps.append(args[-1])
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "step_inputs", spy)
    with pytest.raises(KeyboardInterrupt):
        preoptimize(micro_base, micro_photos, tmp_path / "killed", settings)
    killed = preoptimize(micro_base, micro_photos, tmp_path / "killed", settings)
    assert steps == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert torch.equal(whole.numbers(), killed.numbers())
    assert torch.equal(figures(whole, "first_loss"), figures(killed, "first_loss"))


def test_the_checkpoint_of_other_people_is_not_taken(
    micro_base: Base, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a group was appended and before its checkpoint was gone, then other photos come."""
    photos, settings = shutil.copytree(micro_photos, tmp_path / "photos"), config(identities_per_batch=6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bank, "append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        preoptimize(micro_base, photos, tmp_path / "bank", settings)
    assert len([*(tmp_path / "bank" / "groups").iterdir()]) == 1
    shutil.copy(photos / "person-1" / "0.png", photos / "person-0" / "0.png")
    bank = preoptimize(micro_base, photos, tmp_path / "bank", settings)
    fresh = preoptimize(micro_base, photos, tmp_path / "fresh", settings)
    assert torch.equal(bank.numbers(), fresh.numbers())
    assert not (tmp_path / "bank" / "groups").exists()
