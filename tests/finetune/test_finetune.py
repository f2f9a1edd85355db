"""One loop for the finetune and for DreamBooth: exact starts, live slots, resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.denoise import denoise_loss, sample_noise
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.faces.dataset import Photo, read_person
from hyperdreambooth.faces.landmarks import TEMPLATE
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig
from hyperdreambooth.finetune.dreambooth import dreambooth, dreambooth_many
from hyperdreambooth.finetune.fast import finetune_adapter, finetune_adapters
from hyperdreambooth.generate import generate_images
from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import fresh
from hyperdreambooth.shapes import Factors
from hyperdreambooth.sites import linear_sites, wearable
from hyperdreambooth.training import loop
from hyperdreambooth.training.loop import PATIENCE
from hyperdreambooth.training.shots import photo_shots
from hyperdreambooth.training.step import Inputs, step_inputs

FACE = tuple((32 * x, 32 * y) for x, y in TEMPLATE)


@pytest.fixture
def person(micro_photos: Path) -> tuple[Photo, ...]:
    return read_person([micro_photos / "person-0"])


@pytest.fixture
def prediction(micro_base: Base) -> Adapter:
    """A rank-1 LiDB that visibly changes the base."""
    layout, basis = Layout(micro_base.sites, 1, 8, 4), seeded_basis(micro_base.sites, 8, 4, 0)
    numbers = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    lidb = Lidb(
        numbers,
        layout,
        basis.source,
        basis_fingerprint(basis),
        micro_base.fingerprint,
        "sks",
        micro_base.source,
    )
    return Adapter.from_lidb(lidb, basis)


def delta(factors: Factors) -> dict[str, Tensor]:
    return {name: (up @ down)[0] for name, (down, up) in factors.items()}


def assert_same_delta(one: Factors, other: Factors, tolerance: float = 1e-5) -> None:
    for name, matrix in delta(one).items():
        torch.testing.assert_close(
            matrix, delta(other)[name], rtol=0, atol=tolerance * float(matrix.abs().max() + 1)
        )


def fixed_loss(base: Base, adapter: Adapter | None, photos: Sequence[Photo]) -> float:
    """The loss over noise that no training has drawn."""
    shots = photo_shots(base, photos, "a photo of a [V] {class_word}")
    drawn = [sample_noise(base, tuple(shots.latents.shape[1:]), "held out", k) for k in range(16)]
    noise, timesteps = torch.stack([n for n, _ in drawn]), torch.stack([t for _, t in drawn])
    latents = shots.latents[[k % len(shots.captions) for k in range(16)]]
    captions = [shots.captions[k % len(shots.captions)] for k in range(16)]
    with torch.no_grad():
        if adapter is None:
            return (
                denoise_loss(base, latents, base.encode_prompts(base.tokenize(captions)), noise, timesteps)
                .mean()
                .item()
            )
        with wear(base.components, adapter.factors):
            return (
                denoise_loss(base, latents, base.encode_prompts(base.tokenize(captions)), noise, timesteps)
                .mean()
                .item()
            )


@pytest.mark.parametrize("way", ["complement", "side_by_side"])
def test_no_steps_change_nothing(
    micro_base: Base, prediction: Adapter, person: tuple[Photo, ...], way: str
) -> None:
    config = FinetuneConfig(steps=0, rank=3, way=way)  # type: ignore[arg-type]
    relaxed = finetune_adapter(micro_base, prediction, person, config)
    assert relaxed.rank == 3
    assert relaxed.kind == "lora"
    assert_same_delta(prediction.factors, relaxed.factors)
    before, after = (
        generate_images(micro_base, ["a [V] face"], a, steps=2)[0] for a in (prediction, relaxed)
    )
    worst = torch.tensor([a - b for a, b in zip(before.tobytes(), after.tobytes(), strict=True)]).abs().max()
    assert worst <= 1


@pytest.mark.parametrize("way", ["complement", "side_by_side"])
def test_finetune_fits_the_photo_with_every_slot(
    micro_base: Base, prediction: Adapter, person: tuple[Photo, ...], way: str
) -> None:
    before = {name: p.clone() for name, p in micro_base.pipe.unet.state_dict().items()}
    config = FinetuneConfig(steps=25, lr=1e-2, rank=3, way=way)  # type: ignore[arg-type]
    tuned = finetune_adapter(micro_base, prediction, person[:1], config)
    assert fixed_loss(micro_base, tuned, person[:1]) < 0.97 * fixed_loss(micro_base, prediction, person[:1])
    for matrix in delta(tuned.factors).values():
        assert torch.linalg.matrix_rank(matrix, rtol=1e-5) == 3
    after = micro_base.pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for m in micro_base.components.values() for p in m.parameters())


@pytest.mark.parametrize("way", ["complement", "side_by_side"])
def test_many_finetuned_together_are_each_as_alone(
    micro_base: Base, prediction: Adapter, person: tuple[Photo, ...], way: str
) -> None:
    config = FinetuneConfig(steps=4, lr=1e-2, rank=3, batch=2, background=0.1, way=way)  # type: ignore[arg-type]
    halved = replace(prediction, factors={s: (down, up / 2) for s, (down, up) in prediction.factors.items()})
    adapters, photos = [prediction, halved], [person[:1], person[1:]]
    together = finetune_adapters(micro_base, adapters, photos, config)
    for adapter, mine, got in zip(adapters, photos, together, strict=True):
        alone = finetune_adapter(micro_base, adapter, mine, config)
        assert_same_delta(got.factors, alone.factors, 1e-4)  # Adam blows rounding up
        assert float(got.metadata["loss"]) == pytest.approx(float(alone.metadata["loss"]), abs=2e-4)
    strange = replace(halved, factors=dict(list(halved.factors.items())[1:]))
    with pytest.raises(InputError, match="same sites"):
        finetune_adapters(micro_base, [prediction, strange], photos, config)


@pytest.mark.parametrize("method", ["lidb", "lora"])
def test_many_trained_from_scratch_are_each_as_alone(
    micro_base: Base, person: tuple[Photo, ...], tmp_path: Path, method: str
) -> None:
    config = DreamboothConfig(method=method, steps=4, lr=1e-2, rank=2, batch=2, down_dim=6, up_dim=6)  # type: ignore[arg-type]
    photos = [person[:1], person[1:2], person[2:]]
    for k, one in enumerate(dreambooth_many(micro_base, photos, tmp_path / "together", config)):
        assert one.kind == method
        alone = dreambooth(micro_base, photos[k], tmp_path / f"{k}", config)
        assert_same_delta(one.factors, alone.factors, 1e-4)


def test_side_by_side_keeps_the_prediction_and_reports_what_truncation_loses(
    micro_base: Base, prediction: Adapter, person: tuple[Photo, ...]
) -> None:
    exact = finetune_adapter(
        micro_base, prediction, person[:1], FinetuneConfig(steps=3, rank=3, way="side_by_side")
    )
    down, _ = next(iter(exact.factors.values()))
    torch.testing.assert_close(down[:, :1], next(iter(prediction.factors.values()))[0])
    assert float(exact.metadata["truncation_error"]) == 0
    wide = FinetuneConfig(steps=3, rank=3, way="side_by_side", trained_rank=6, lr=1e-2)
    cut = finetune_adapter(micro_base, prediction, person[:1], wide)
    assert cut.rank == 3
    assert 0 < float(cut.metadata["truncation_error"]) < 1


@pytest.mark.parametrize("method", ["lidb", "lora"])
def test_dreambooth_fits_the_photo(
    micro_base: Base, person: tuple[Photo, ...], tmp_path: Path, method: str
) -> None:
    config = DreamboothConfig(method=method, steps=25, lr=2e-2, rank=1, down_dim=8, up_dim=8)  # type: ignore[arg-type]
    trained = dreambooth(micro_base, person[:1], tmp_path / "run", config)
    assert trained.kind == method
    assert fixed_loss(micro_base, trained, person[:1]) < 0.97 * fixed_loss(micro_base, None, person[:1])
    trained.save(tmp_path / "person.safetensors", "lidb" if method == "lidb" else "kohya")


@pytest.mark.parametrize("method", ["lidb", "lora"])
def test_killed_and_run_again_is_the_same_to_the_bit(
    micro_base: Base, person: tuple[Photo, ...], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DreamboothConfig(method=method, steps=7, save_every=2, down_dim=8, up_dim=8)  # type: ignore[arg-type]
    whole = dreambooth(micro_base, person, tmp_path / "whole", config)

    def killed(*args: Any) -> Inputs:
        if args[-1] == 5:
            raise KeyboardInterrupt
        return step_inputs(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "step_inputs", killed)
        dreambooth(micro_base, person, tmp_path / "killed", config)
    resumed = dreambooth(micro_base, person, tmp_path / "killed", config)
    again = dreambooth(micro_base, person, tmp_path / "killed", config)
    for name, pair in whole.factors.items():
        for end in (0, 1):
            assert torch.equal(pair[end], resumed.factors[name][end])
            assert torch.equal(pair[end], again.factors[name][end])
    logs = [(tmp_path / run / "log.jsonl").read_text().count("\n") for run in ("whole", "killed")]
    assert logs == [7, 7]


def test_a_run_of_another_config_or_other_photos_is_refused(
    micro_base: Base, person: tuple[Photo, ...], tmp_path: Path
) -> None:
    config = DreamboothConfig(steps=1, down_dim=4, up_dim=4)
    dreambooth(micro_base, person, tmp_path / "run", config)
    with pytest.raises(InputError, match="lr"):
        dreambooth(micro_base, person, tmp_path / "run", config.model_copy(update={"lr": 0.5}))
    with pytest.raises(InputError, match="photos"):
        dreambooth(micro_base, person[:1], tmp_path / "run", config)


def test_a_run_of_other_words_size_sites_or_start_is_refused(
    micro_base: Base, micro_dir: Path, prediction: Adapter, person: tuple[Photo, ...], tmp_path: Path
) -> None:
    one, config = person[0], DreamboothConfig(method="lora", steps=1, batch=1)
    dreambooth(micro_base, (one, person[1]), tmp_path / "run", config)
    dreambooth(micro_base, (person[1], one), tmp_path / "run", config)
    others: list[tuple[str, dict[str, Any]]] = [
        ("trigger", {"trigger": "zwx"}), ("class_word", {"class_word": "man"}),
        ("resolution", {"resolution": 64}), ("sites", {"skip_sites": "^text_encoder"}),
        ("sites", {"add_sites": r"ff\.net"}),
    ]  # fmt: skip
    for name, fields in others:
        with pytest.raises(InputError, match=rf"inputs\.{name} was "):
            dreambooth(load_base(micro_dir, "cpu", **fields), person[:2], tmp_path / "run", config)
    for name, photo in (
        ("captions", replace(one, caption="a hat")), ("landmarks", replace(one, landmarks=FACE)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"\(inputs\.{name} was "):
            dreambooth(micro_base, (photo, person[1]), tmp_path / "run", config)
    finetune_adapter(micro_base, prediction, person, FinetuneConfig(steps=1), out=tmp_path / "tuned")
    with pytest.raises(InputError, match=r"\(inputs\.adapters was "):
        finetune_adapter(
            micro_base, prediction.relax(2), person, FinetuneConfig(steps=1), out=tmp_path / "tuned"
        )


def test_lower_precision_trains_close_to_float32(
    micro_base: Base, prediction: Adapter, person: tuple[Photo, ...]
) -> None:
    full, half = (
        finetune_adapter(micro_base, prediction, person, FinetuneConfig(steps=2, precision=precision))
        for precision in ("float32", "bf16")
    )
    assert all(pair[0].dtype == torch.float32 for pair in half.factors.values())
    assert abs(float(full.metadata["loss"]) - float(half.metadata["loss"])) < 0.05


@pytest.mark.parametrize("steps", [3, "auto"])
def test_a_loss_that_is_no_number_ends_the_training(
    micro_base: Base, prediction: Adapter, person: tuple[Photo, ...], tmp_path: Path, steps: int | str
) -> None:
    torch.nn.init.constant_(micro_base.denoiser.conv_in.weight, torch.inf)  # as overflowing float16 does
    config = FinetuneConfig.model_validate({"steps": steps})
    with pytest.raises(InputError, match="the loss is nan at the end; lower lr"):
        finetune_adapter(micro_base, prediction, person, config)
    for _ in range(2):  # and again: a ruined run is not taken for a finished one
        with pytest.raises(InputError, match="the loss is nan at the end"):
            dreambooth(micro_base, person, tmp_path / "run", DreamboothConfig(method="lora", steps=2, rank=1))
    with pytest.raises(InputError, match="the loss is nan at the end"):  # and soon
        dreambooth(micro_base, person, tmp_path / "long", DreamboothConfig(method="lora", steps=1000, rank=1))
    assert len((tmp_path / "long" / "log.jsonl").read_text().splitlines()) == PATIENCE


def test_float16_trains_one_at_a_time(micro_base: Base, person: tuple[Photo, ...]) -> None:
    config = DreamboothConfig(method="lora", steps=1, rank=1, precision="fp16")
    with pytest.raises(InputError, match="float16 trains one person at a time"):
        dreambooth_many(micro_base, [person, person], None, config)


def test_layers_beyond_the_bases_own_sites_are_trained_and_convolutions_refused(
    micro_dir: Path, micro_base: Base, person: tuple[Photo, ...]
) -> None:
    more = load_base(micro_dir, "cpu", add_sites=r"\.ff\.net")
    adapter = Adapter(fresh(more.sites, 1), "sks", more.fingerprint, "micro")
    assert (
        finetune_adapter(micro_base, adapter, person, FinetuneConfig(steps=1)).factors.keys()
        == adapter.factors.keys()
    )
    everything = wearable(micro_base.components)
    assert set(linear_sites(micro_base.components)) < set(everything)
    other = Adapter(fresh(everything, 1), "sks", more.fingerprint, "micro")
    with pytest.raises(InputError, match=r"no linear layer unet.*without convolutions"):
        finetune_adapter(micro_base, other, person, FinetuneConfig(steps=1))


def test_what_does_not_fit_is_refused_in_one_line(
    micro_base: Base, prediction: Adapter, person: tuple[Photo, ...]
) -> None:
    foreign = replace(prediction, base_fingerprint="0" * 16)
    wide = prediction.relax(4)
    cases = [
        (foreign, FinetuneConfig(steps=0), "0000000000000000"),
        (wide, FinetuneConfig(steps=0, rank=2), "rank"),
        (wide, FinetuneConfig(steps=0, rank=4, way="side_by_side"), "leaves no room"),
    ]
    for adapter, config, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            finetune_adapter(micro_base, adapter, person, config)
        assert "\n" not in str(caught.value)


def test_a_relaxed_adapter_is_not_relaxed_again(
    micro_base: Base, prediction: Adapter, person: tuple[Photo, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA of the rank asked for is trained as it is, unless one of its slots is dead."""
    relaxed, config = prediction.relax(3), FinetuneConfig(steps=0, rank=3)
    kept = finetune_adapter(micro_base, relaxed, person, config)
    assert all(
        torch.equal(kept.factors[name][k], pair[k]) for name, pair in relaxed.factors.items() for k in (0, 1)
    )
    dead = {name: (down.clone(), up.clone()) for name, (down, up) in relaxed.factors.items()}
    down, up = dead[next(iter(dead))]
    down[:, 2], up[..., 2] = 0, 0
    revived = finetune_adapter(micro_base, replace(relaxed, factors=dead), person, config)
    assert_same_delta(revived.factors, relaxed.factors)
    for down, up in revived.factors.values():
        assert (down.any(2) | up.any(1)).all()


def test_photos_may_be_paths_pictures_or_both(
    micro_base: Base, prediction: Adapter, micro_photos: Path
) -> None:
    config, folder = FinetuneConfig(steps=1, rank=2), micro_photos / "person-0"
    for photos in (folder, str(folder / "0.png"), [folder / "0.png", read_person(folder)[1].open()]):
        assert finetune_adapter(micro_base, prediction, photos, config).metadata["steps"] == "1"
