"""What many people will cost: counted arithmetic, whole groups, and the table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import eyes
import pipelines
from hyperdreambooth.apps.cli import app
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.memory import skeleton
from hyperdreambooth.plan import (
    RATES,
    PlanConfig,
    Speed,
    kind_of,
    measure,
    parse_gpus,
    photo_flops,
    sample_flops,
    stages,
    step_seconds,
    total,
)
from hyperdreambooth.preopt.config import PreoptConfig

EXACT = Speed(
    {"train": 1.0}, {"preoptimize": 10.0, "train": 100.0, "photo": 0.5, "validation": 2.0}, "made up"
)


def convolutions(network: nn.Module, pixels: torch.Tensor) -> float:
    """The TFLOP of a network's convolutions and linear layers, from their shapes."""
    done: list[int] = []

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            each = module.weight[0].numel()
            done.append(2 * each * output.numel())

    handles = [module.register_forward_hook(count) for module in network.modules()]
    with torch.no_grad():
        network(pixels)
    for handle in handles:
        handle.remove()
    return sum(done) / 1e12


def test_a_photo_costs_the_products_of_its_encoder(micro_dir: Path) -> None:
    real, bare = load_base(micro_dir, device="cpu"), skeleton(micro_dir)
    side = real.resolution
    products = convolutions(real.pipe.vae.encoder, torch.zeros(1, 3, side, side))
    products += convolutions(real.pipe.vae.quant_conv, real.pipe.vae.encoder(torch.zeros(1, 3, side, side)))
    assert photo_flops(bare) == pytest.approx(products)  # this encoder has no attention


def test_a_step_costs_forward_and_backward(micro_dir: Path) -> None:
    bare = skeleton(micro_dir)
    with_text, without = sample_flops(bare, True), sample_flops(bare, False)
    assert 0 < without < with_text
    again = skeleton(micro_dir, resolution=2 * bare.resolution)
    assert 3 < sample_flops(again, False) / without < 8  # four times the pixels, attention grows faster


def test_a_step_costs_what_its_layers_multiply_and_again_what_is_computed_again(micro_dir: Path) -> None:
    """Against the products of the layers, counted by hooks; what attention adds is small here."""
    base, counted = skeleton(micro_dir), list[float]()

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        counted.append(2 * output.numel() * weight[0].numel() / 1e12)

    for part in base.components.values():
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(count)
    plain = sample_flops(base, True)
    forward = sum(counted)
    assert plain == pytest.approx(2 * forward, rel=0.05)  # backward costs as much: weights get no gradient
    again = sample_flops(base, True, checkpointing=True) - plain
    assert again == pytest.approx(sum(counted) - 2 * forward, rel=0.1)  # what ran in the backward pass
    config = HypernetConfig(checkpointing=True)
    assert step_seconds(base, config, EXACT, 7) == pytest.approx(7 * (plain + again))
    # a quarter of the samples once more with the class, after a forward pass of the bare base
    held = HypernetConfig(checkpointing=True, class_weight=0.1)
    assert step_seconds(base, held, EXACT, 8) == pytest.approx(11 * (plain + again))


@pytest.mark.parametrize("name", ["Z-Image", "Qwen-Image", "Krea 2"])
def test_a_step_is_counted_where_captions_have_masks(name: str, tmp_path: Path) -> None:
    """Masks are made from tokens, which are on the CPU although the skeleton is not."""
    pipelines.FAMILIES[name]().save_pretrained(tmp_path)
    base = skeleton(tmp_path, resolution=32)
    assert 0 < sample_flops(base, True) < sample_flops(base, True, checkpointing=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"), ("NVIDIA GeForce RTX 4090", "RTX4090"), ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None), ("NVIDIA GH200 480GB", None), ("", None),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_the_name_of_its_driver(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def doctor(*words: object) -> list[str]:
    done = CliRunner().invoke(app, ["doctor", "--task", "train", *map(str, words)])
    assert done.exit_code == 0, done.output
    return [line for line in done.stdout.splitlines() if line.startswith("train ")]


def test_doctor_asks_the_plan_for_the_time_on_a_gpu_and_guesses_none_for_a_cpu(
    micro_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["--base", micro_dir, "--set", "checkpointing=true", "--set", "batch=5", "--set", "photos=3"]
    steps = round(9000 * RATES["H200"].flops["train"] / sample_flops(skeleton(micro_dir), True, True) / 15)
    on_gpu = doctor(*words, "--device", "cuda", "--set", f"steps={steps}")[-1]
    assert f"{steps} steps of 5 take about 2 h 30 min on one H200 (" in on_gpu
    assert RATES["H200"].source in on_gpu
    on_cpu = doctor(*words, "--device", "cpu")[-1]
    assert "`hdb plan` measures" in on_cpu and "H200" not in on_cpu


@pytest.mark.parametrize(("gpus", "rounds"), [("1xH100", 4), ("2xH100", 2), ("3xH100", 2), ("4xH100", 1)])
def test_whole_groups_are_handed_out(micro_dir: Path, gpus: str, rounds: int) -> None:
    bare = skeleton(micro_dir)
    own = PreoptConfig(identities_per_batch=8, steps=5, batch=2)
    config = PlanConfig(people=26, photos=3, gpus=gpus, preoptimize=own)
    _, bank, _ = stages(bare, config, EXACT)
    group = 10.0 + 5 * 8 * 2 * sample_flops(bare, True)
    assert bank.seconds == pytest.approx(rounds * group)
    assert bank.gpu_hours == pytest.approx(int(gpus[0]) * rounds * group / 3600)
    assert bank.work == "4 groups of 8"


def test_a_training_shares_its_batch_and_encodes_every_photo_once(micro_dir: Path) -> None:
    bare = skeleton(micro_dir)
    own = HypernetConfig(steps=100, batch=8, photos=2, validate_every=40, validation=4, encoder="none/none")
    alone = stages(bare, PlanConfig(people=10, photos=3, train=own, gpus="H100"), EXACT)[2]
    steps = 100 * 16 * sample_flops(bare, True)
    assert alone.seconds == pytest.approx(100 + 30 * 0.5 + steps + 2 * 2.0)
    slow = Speed({"train": 1e-3}, EXACT.fixed, "made up")  # arithmetic outweighs the exchange
    one, four = (
        stages(bare, PlanConfig(people=10, photos=3, train=own, gpus=gpus), slow)[2]
        for gpus in ("H100", "4xH100")
    )
    assert four.seconds < one.seconds and four.gpu_hours > one.gpu_hours


def test_all_is_the_sum(micro_dir: Path) -> None:
    rows = stages(skeleton(micro_dir), PlanConfig(people=64, gpus="2xA100"), RATES["A100"])
    every = total(rows)
    assert every.seconds == sum(row.seconds for row in rows)
    assert every.memory == max(row.memory for row in rows) and rows[0].gpu_hours == 0


def test_measured_here(micro_dir: Path, tmp_path: Path) -> None:
    eye = eyes.resnet(tmp_path / "eye")
    own = HypernetConfig(width=16, layers=1, heads=2, batch=2, steps=50, encoder=str(eye), warmup=1)
    bank = PreoptConfig(identities_per_batch=3, steps=20)
    config = PlanConfig(people=6, photos=2, preoptimize=bank, train=own)
    speed = measure(load_base(micro_dir, device="cpu"), skeleton(micro_dir), config)
    assert all(math.isfinite(value) and value > 0 for value in speed.flops.values())
    assert speed.fixed.keys() == {"preoptimize", "train", "photo", "validation"}
    assert all(row.seconds > 0 for row in stages(skeleton(micro_dir), config, speed, cores=2))


@pytest.mark.parametrize(
    ("text", "found"), [("8xH100", (8, "H100")), ("a100", (1, "A100")), ("here", (1, "here"))]
)
def test_gpus_are_a_count_and_a_kind(text: str, found: tuple[int, str]) -> None:
    assert parse_gpus(text) == found


@pytest.mark.parametrize("text", ["8xH1", "0xH100", "xH100", "-1xH100", ""])
def test_other_gpus_are_refused_in_one_line(text: str) -> None:
    done = CliRunner().invoke(app, ["plan", "--gpus", text, "--config", "avatars"])
    assert done.exit_code == 2 and "expected a count and one of H200" in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match="such as 8xH100"):
        parse_gpus(text)


def test_the_table_has_a_price_where_one_is_given() -> None:
    words = ["plan", "--people", "100", "--gpus", "8xH100", "--config", "avatars"]
    without, with_price = (CliRunner().invoke(app, [*words, *more]).stdout for more in ([], ["--price", "2"]))
    assert "price" not in without and "price" in with_price.splitlines()[0]
    assert [line.split()[0] for line in without.splitlines()[:5]] == [
        "stage", "prepare", "preoptimize", "train", "all",
    ]  # fmt: skip
    assert "speed: 32 samples a step of SD 1.5 on an H200" in without


@pytest.mark.parametrize(("more", "format"), [([], "bfloat16"), (["--set", "dtype=float32"], "float32")])
def test_gpus_that_are_not_here_compute_in_bfloat16(
    more: list[str], format: str, micro_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dtype = "auto"`, the default, has to stand for a number format."""
    asked: list[str] = []

    def spy(source: str, dtype: str, **options: Any) -> Base:
        asked.append(dtype)
        return skeleton(source, dtype, **options)

    monkeypatch.setattr("hyperdreambooth.memory.skeleton", spy)
    words = ["plan", "--people", "100", "--gpus", "8xH100", "--base", str(micro_dir), *more]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and asked == [format]
