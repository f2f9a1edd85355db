"""The training of the embedded world: resumed = uninterrupted, recorded = plain, pictures are read once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphs import RecordedGraph
from hyperdreambooth import captured
from hyperdreambooth.avatars.build.fit import StageConfig, Tensors, fit, read_all
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.avatars.draw.people import context, identity
from hyperdreambooth.runs import rng

CONFIG = StageConfig(steps=12, batch=4, precision="float32", checkpoint_every=5)


def trained(folder: Path, stop: int | None = None) -> dict[str, Tensor]:
    """Trains a small network, and ends after `stop` batches as if it were killed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 1))

    def batch_of(step: int) -> Tensors:
        if step == stop:
            raise KeyboardInterrupt
        numbers = torch.randn(4, 3, generator=rng("numbers", step))
        return {"numbers": numbers, "late": torch.tensor(float(step >= 6))}

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        error = (model(batch["numbers"]) - batch["numbers"].sum(1, keepdim=True)).square().mean()
        return {"loss": error * (1 + batch["late"]), "error": error}

    fit("small", model, batch_of, loss_of, CONFIG, folder, "cpu")
    return model.state_dict()


def test_a_resumed_training_is_an_uninterrupted_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", stop=7)
    resumed, whole = trained(tmp_path / "killed"), trained(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_a_recorded_step_is_a_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(tmp_path / "plain")
    made: list[RecordedGraph] = []

    def graph(device: torch.device) -> RecordedGraph:
        made.append(RecordedGraph(device))
        return made[-1]

    monkeypatch.setitem(captured.GRAPHS, "cpu", graph)
    recorded = trained(tmp_path / "recorded")
    assert [one.replays for one in made] == [CONFIG.steps - captured.WARM_UP]
    assert all(torch.equal(value, plain[name]) for name, value in recorded.items())
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", stop=7)
    resumed = trained(tmp_path / "killed")
    assert all(torch.equal(value, plain[name]) for name, value in resumed.items())


def test_pictures_are_read_once_and_in_float32_on_a_cpu(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    pictures = Pictures([pixels], [identity(k) for k in range(3)], [context(k) for k in range(3)], each=1)
    read: list[bool] = []

    def mean(pixels: Tensor) -> Tensor:
        read.append(torch.is_autocast_enabled("cpu"))
        return pixels.mean(dim=(2, 3))

    made = read_all(pictures, mean, tmp_path / "means.safetensors", "cpu")
    again = read_all(pictures, mean, tmp_path / "means.safetensors", "cpu")  # from the file
    assert read == [False] and torch.equal(made, again)
    expected = pictures.batch(torch.arange(3)).mean(dim=(2, 3))
    torch.testing.assert_close(made.float(), expected, rtol=0, atol=1e-3)
