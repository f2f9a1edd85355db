"""Small trainings of a hypernetwork, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hyperdreambooth.files import load_tensors
from hyperdreambooth.hypernet.config import HypernetConfig

SMALL: dict[str, object] = {
    "width": 16, "layers": 1, "heads": 2, "batch": 4, "steps": 6, "warmup": 1, "save_every": 2,
    "log_every": 2, "validate_every": 3, "validation": 1, "draws": 1, "lr": 1e-2, "ema": 0.9,
}  # fmt: skip
DIMS: dict[str, object] = {"down_dim": 6, "up_dim": 4, "basis_seed": 7}


def settings(eye: Path, **fields: object) -> HypernetConfig:
    return HypernetConfig.model_validate({**SMALL, **DIMS, "encoder": str(eye), **fields})


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_tensors(out / "model.safetensors")[0]


def assert_same(one: Path, two: Path) -> None:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
