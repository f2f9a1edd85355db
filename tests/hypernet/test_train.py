"""The loop on the micro base: learns who is who; its variants are the same loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_train import assert_same, lines, settings, weights

import eyes
from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.generate import generate_images
from hyperdreambooth.hypernet import train as module
from hyperdreambooth.hypernet.predictor import load_hypernet, load_info
from hyperdreambooth.hypernet.train import train_hypernet
from hyperdreambooth.hypernet.validate import tell_apart
from hyperdreambooth.lidb.basis import seeded_basis
from hyperdreambooth.shapes import Factors


def colours(pixels: torch.Tensor) -> torch.Tensor:
    """Stands for the VAE: an 8×8 thumbnail, and its brightness."""
    small = torch.nn.functional.adaptive_avg_pool2d(pixels, 8)
    return torch.cat([small, small.mean(1, keepdim=True)], dim=1)


def people(base: Base, factors: Factors) -> list[Adapter]:
    """Every identity of some factors as an adapter."""
    count = len(next(iter(factors.values()))[0])
    alone = [{name: (d[k : k + 1], u[k : k + 1]) for name, (d, u) in factors.items()} for k in range(count)]
    return [Adapter(one, base.trigger, base.fingerprint, base.source) for one in alone]


def test_the_folder_the_log_and_the_base(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "hyperdreambooth")
    before = {name: p.clone() for name, p in micro_base.components["unet"].state_dict().items()}
    config = settings(eye, finetune={"lr": 0.5, "steps": 7})
    predictor = train_hypernet(micro_base, micro_photos, tmp_path / "h", config)
    assert load_info(tmp_path / "h") == predictor.info
    assert predictor.info.finetune == {"lr": 0.5, "steps": 7}
    assert "`lr 0.5`, `steps 7`" in (tmp_path / "h" / "README.md").read_text()
    after = micro_base.components["unet"].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert predictor.info.training["step"] == 6
    assert (predictor.info.trigger, predictor.info.resolution) == ("sks", 32)
    assert sorted(path.name for path in (tmp_path / "h").iterdir()) == [
        "README.md", "cache", "config.json", "encoder", "model.safetensors", "run",
    ]  # fmt: skip
    assert not list((tmp_path / "h" / "run").glob("checkpoint-*"))
    log = lines(tmp_path / "h")
    assert [line["step"] for line in log if "loss" in line] == [2, 4, 6]
    judged = [line for line in log if line.get("kind") == "validation"]
    assert [line["step"] for line in judged] == [3, 6]
    assert {"own", "mean", "shuffled", "apart", "spread"} <= judged[0].keys()
    assert " apart " in caplog.text


def test_learns_who_is_who(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = tmp_path / "three"
    three.mkdir()
    for name in ("person-0", "person-1", "person-2"):
        (three / name).symlink_to(micro_photos / name)
    # knowing a face helps random weights only where it is itself part of the target: v = √ᾱ ε - σ x
    micro_base.pipe.scheduler.register_to_config(prediction_type="v_prediction")
    # and differs from person to person, which a random VAE's latents hardly do
    monkeypatch.setattr(Base, "encode_images", lambda _, pixels: colours(pixels))
    config = settings(
        eye, steps=150, batch=6, validation=0, gamma=0.0, spread=0.3, log_every=25, lr=1e-2, draws=4
    )
    figures: list[dict[str, float]] = []
    real = module.train

    def train(training: module.Training, state: module.State, worn: Any, *rest: Any) -> None:
        real(training, state, worn, *rest)
        config = training.config
        arguments: Any = (training.faces, training.trained, state.ema, worn, config, config.batch)
        figures.append(tell_apart(training.base, *arguments))

    monkeypatch.setattr(module, "train", train)
    train_hypernet(micro_base, three, tmp_path / "h", config)
    losses = [line["loss"] for line in lines(tmp_path / "h") if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    assert figures[0]["own"] < figures[0]["mean"] - 0.02
    assert figures[0]["apart"] > 0.01


def test_a_bank_teaches_its_people_without_running_the_base(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("person-0", "person-1", "person-2", "person-3", "somebody else")
    bank = eyes.bank(micro_base, tmp_path / "bank", names)
    monkeypatch.setattr(module, "person_losses", lambda *_: pytest.fail("the base was run"))
    config = settings(eye, alpha=0.0, beta=1.0, gamma=0.0, steps=150, validation=0, log_every=50, lr=1e-2)
    predictor = train_hypernet(micro_base, micro_photos, tmp_path / "h", config, tmp_path / "bank")
    losses = [line["weights"] for line in lines(tmp_path / "h") if "weights" in line]
    assert losses[-1] < 0.3 < losses[0]
    known = bank.numbers(names)
    torch.testing.assert_close(predictor.network.mean, known.mean(0))
    sites = (known - known.mean(0)).split(bank.layout.sizes, dim=1)
    spread = torch.cat([each.square().mean().sqrt().expand(each.shape[1]) for each in sites])
    torch.testing.assert_close(predictor.network.spread, spread)
    assert predictor.basis.source == "seed:7"


def test_learned_bases_move_and_come_back_from_the_folder(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    eyes.bank(micro_base, tmp_path / "bank", ("person-0", "person-1"))
    config = settings(eye, learn_basis=True, basis_lr=1e-2)
    predictor = train_hypernet(micro_base, micro_photos, tmp_path / "h", config, tmp_path / "bank")
    seeded, name = seeded_basis(micro_base.sites, 6, 4, 7), micro_base.sites[0].name
    assert not torch.allclose(predictor.basis.up[name], seeded.up[name], atol=1e-3)
    assert torch.equal(predictor.basis.up[name], load_hypernet(tmp_path / "h").basis.up[name])
    assert "weights" not in lines(tmp_path / "h")[0]


def test_accumulated_parts_equal_one_batch(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    eyes.bank(micro_base, tmp_path / "bank", ("person-0", "person-1", "person-2"))
    for name, parts in (("one", 1), ("two", 2)):
        config = settings(eye, accumulation=parts, beta=0.5, lr=1e-3)
        train_hypernet(micro_base, micro_photos, tmp_path / name, config, tmp_path / "bank")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)


def test_bf16_trains_and_leaves_no_precision_behind(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    for name, precision in (("a", "bf16"), ("b", "float32")):
        train_hypernet(micro_base, micro_photos, tmp_path / name, settings(eye, precision=precision, steps=2))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(tensor.dtype == torch.float32 for tensor in a.values())
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_begins_with_the_weights_of_another_training(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    first = train_hypernet(micro_base, micro_photos, tmp_path / "a", settings(eye, steps=2))
    fields: dict[str, object] = {
        "start_from": str(tmp_path / "a"),
        "lr": 1e-12,
        "steps": 1,
        "weight_decay": 0.0,
    }
    second = train_hypernet(micro_base, micro_photos, tmp_path / "b", settings(eye, **fields))
    next_base = replace(micro_base, fingerprint="0123456789abcdef")  # of the same layers
    third = train_hypernet(next_base, micro_photos, tmp_path / "next", settings(eye, **fields))
    assert third.info.base_fingerprint == next_base.fingerprint != second.info.base_fingerprint
    pixels = torch.rand(2, 3, 32, 32)
    for other in (second, third):
        torch.testing.assert_close(other.predict(pixels), first.predict(pixels))
    cards = [(tmp_path / name / "README.md").read_text() for name in ("a", "b")]
    assert "| 2 steps |" in cards[0] and "| 1 steps, after those of another network |" in cards[1]
    with pytest.raises(InputError, match=r"start_from.*network shape"):
        train_hypernet(
            micro_base, micro_photos, tmp_path / "c", settings(eye, width=8, start_from=str(tmp_path / "a"))
        )


def test_validation_pictures_are_drawn_with_each_persons_prediction_alone(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    drawn: list[Factors] = []

    def sample(prompts: Sequence[str], factors: Factors) -> list[Image.Image]:
        drawn.append(factors)
        beside = generate_images(micro_base, prompts, people(micro_base, factors), steps=2, guidance=1.0)
        worn_twice.append(beside)
        return beside

    def score(
        images: Sequence[Image.Image], prompts: Sequence[str], others: Sequence[Sequence[Path]]
    ) -> Mapping[str, float]:
        assert len(images) == len(prompts) == len(others) == 1
        assert len(others[0]) == 2
        return {"identity": 0.5}

    worn_twice: list[list[Image.Image]] = []
    out = tmp_path / "h"
    train_hypernet(micro_base, micro_photos, out, settings(eye), sample=sample, score=score)
    scored = [line for line in lines(out) if line.get("kind") == "pictures"]
    assert [(line["step"], line["identity"]) for line in scored] == [(3, 0.5), (6, 0.5)]
    with Image.open(out / "run" / "pictures" / "step-0000006.png") as picture:
        assert picture.size == (32, 64)
    (person,) = people(micro_base, drawn[-1])
    alone = generate_images(micro_base, "a photo of a [V] face", person, steps=2, guidance=1.0)
    assert alone[0].tobytes() == worn_twice[-1][0].tobytes()
    train_hypernet(micro_base, micro_photos, tmp_path / "silent", settings(eye))
    assert_same(out, tmp_path / "silent")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"precision": "fp16"}, "fp16 needs CUDA"),
        ({"batch": 2, "accumulation": 3}, "at least 3"),
        ({"encoder": "/no/such/encoder"}, "encoder /no/such"),
        ({"optimizer": "adamw8bit"}, "needs bitsandbytes, which is not installed"),
    ],
)
def test_impossible_settings_are_one_line(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        train_hypernet(micro_base, micro_photos, tmp_path / "h", settings(eye, **fields))


def test_a_bank_must_fit(micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path) -> None:
    eyes.bank(micro_base, tmp_path / "foreign", ("person-0",), fingerprint="0123456789abcdef")
    with pytest.raises(InputError, match=f"{micro_base.fingerprint}.*0123456789abcdef"):
        train_hypernet(micro_base, micro_photos, tmp_path / "h", settings(eye), tmp_path / "foreign")
    eyes.bank(micro_base, tmp_path / "bank", ("person-0",))
    with pytest.raises(InputError, match="rank is 1, the config has 2"):
        train_hypernet(micro_base, micro_photos, tmp_path / "h", settings(eye, rank=2), tmp_path / "bank")


def test_a_diverged_loss_stops_the_run(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.person_losses
    monkeypatch.setattr(module, "person_losses", lambda *args: real(*args) * float("nan"))
    with pytest.raises(InputError, match="the loss is nan at step 2"):
        train_hypernet(micro_base, micro_photos, tmp_path / "h", settings(eye))
    assert not (tmp_path / "h" / "config.json").exists()
