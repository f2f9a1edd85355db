"""On a GPU every stage computes what it computes on the CPU: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eyes
from hyperdreambooth.adapter import Adapter
from hyperdreambooth.avatars.build.fit import StageConfig, Tensors, batches
from hyperdreambooth.avatars.build.stages import BuildConfig, build
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.faces.dataset import read_faces, read_person
from hyperdreambooth.files import load_tensors
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.finetune.fast import finetune_adapter
from hyperdreambooth.generate import generate_images
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.train import train_hypernet
from hyperdreambooth.lora.relax import fresh
from hyperdreambooth.preopt.bank_training import PreoptConfig, prepare, train_group
from hyperdreambooth.runs import rng
from hyperdreambooth.training.shots import shots_of

pytestmark = pytest.mark.gpu
# float32 on both: what is left is the order of sums, over ten optimiser steps
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-3}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture
def bases(micro_dir: Path) -> dict[str, Base]:
    return {device: load_base(micro_dir, device=device, dtype="float32") for device in ("cpu", "cuda")}


def assert_close(made: dict[str, dict[str, torch.Tensor]]) -> None:
    assert made["cpu"].keys() == made["cuda"].keys()
    for name, tensor in made["cpu"].items():
        torch.testing.assert_close(made["cuda"][name].cpu(), tensor, **CLOSE)


def test_the_same_base(bases: dict[str, Base]) -> None:
    assert bases["cpu"].fingerprint == bases["cuda"].fingerprint


def test_a_finetune_and_its_pictures(bases: dict[str, Base], micro_photos: Path) -> None:
    photos, config = (
        read_person([micro_photos / "person-0"]),
        FinetuneConfig(steps=10, lr=3e-3, batch=2, precision="float32"),
    )
    people = {
        device: finetune_adapter(
            base, Adapter(fresh(base.sites, 4), "sks", base.fingerprint, "micro"), photos, config
        )
        for device, base in bases.items()
    }
    assert_close({d: {k: (up @ down)[0] for k, (down, up) in p.factors.items()} for d, p in people.items()})
    drawn = {
        device: np.asarray(
            generate_images(base, ["a photo of a [V] face"], people[device], steps=5)[0], np.float32
        )
        for device, base in bases.items()
    }
    assert np.abs(drawn["cpu"] - drawn["cuda"]).mean() < 1
    bare = np.asarray(generate_images(bases["cuda"], ["a photo of a [V] face"], steps=5)[0], np.float32)
    assert np.abs(drawn["cuda"] - bare).mean() > 1


def test_people_pre_optimised_together(bases: dict[str, Base], micro_photos: Path, tmp_path: Path) -> None:
    settings = PreoptConfig(down_dim=8, up_dim=6, steps=10, lr=5e-3, warmup=2, precision="float32")
    numbers: dict[str, dict[str, torch.Tensor]] = {}
    for device, base in bases.items():
        stage = prepare(base, settings)
        people, _ = shots_of(base, [*read_faces(micro_photos).values()], settings, cache=tmp_path / device)
        numbers[device] = {"numbers": train_group(stage, people)[0]}
    assert_close(numbers)


@pytest.mark.parametrize("learned", [False, True])
def test_a_hypernetwork(bases: dict[str, Base], micro_photos: Path, tmp_path: Path, learned: bool) -> None:
    config = HypernetConfig.model_validate(
        {
            "width": 16, "layers": 1, "heads": 2, "batch": 4, "steps": 6, "warmup": 1, "validation": 1,
            "draws": 1, "down_dim": 6, "up_dim": 4, "encoder": str(eyes.resnet(tmp_path / "eye")),
            "learn_basis": learned, "precision": "float32",
        }
    )  # fmt: skip
    for device, base in bases.items():
        train_hypernet(base, micro_photos, tmp_path / device, config)
    assert_close({device: load_tensors(tmp_path / device / "model.safetensors")[0] for device in bases})


def test_a_stage_of_the_world_is_fed_the_same_batches() -> None:
    def batch_of(step: int) -> Tensors:
        return {"noise": torch.randn(4, generator=rng("fed", step)), "step": torch.tensor(step)}

    fed = {device: list(batches(batch_of, 3, 40, device)) for device in ("cpu", "cuda")}
    assert [int(batch["step"]) for batch in fed["cuda"]] == list(range(3, 40))
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(fed["cpu"], fed["cuda"], strict=True))


def test_the_world_is_built(tmp_path: Path) -> None:
    tiny = StageConfig(steps=4, batch=8, people=4, each=4)
    fields = BuildConfig.model_fields.items()
    stages = {name: tiny for name, field in fields if field.annotation is StageConfig}
    config = BuildConfig.model_validate({**stages, "judged_people": 4})
    figures = build("all", tmp_path, config, "cuda")
    assert figures["vae"]["psnr_db"] > 0
    assert load_tensors(tmp_path / "encoder" / "model.safetensors")[0]
