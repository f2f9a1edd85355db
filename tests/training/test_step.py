"""The step as a static function: against the loop written out, replayed, poisoned, warm, and refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphs import RecordedGraph
from hyperdreambooth import captured
from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.denoise import denoise_loss, sample_noises
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo, read_person
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig
from hyperdreambooth.finetune.dreambooth import dreambooth
from hyperdreambooth.finetune.fast import finetune_adapter, finetune_adapters
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import fresh, padded, relax
from hyperdreambooth.preopt.bank_training import prepare, train_group
from hyperdreambooth.preopt.config import PreoptConfig
from hyperdreambooth.shapes import Factors
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.samples import Samples
from hyperdreambooth.training.shots import Shots, shots_of
from hyperdreambooth.training.trainable import pairs
from hyperdreambooth.training.warm import Warm


@pytest.fixture
def people(micro_photos: Path) -> list[tuple[Photo, ...]]:
    return [read_person(micro_photos / f"person-{k}") for k in range(3)]


def a_prediction(base: Base, seed: int = 0) -> Adapter:
    """A rank-1 LoRA that visibly changes the base."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: (down, torch.randn(up.shape, generator=generator))
        for name, (down, up) in fresh(base.sites, 1, seed).items()
    }
    return Adapter(made, "sks", base.fingerprint, base.source)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Makes the CPU record and replay as a GPU does; the graphs that were made."""
    made: list[RecordedGraph] = []

    def graph(device: torch.device) -> RecordedGraph:
        made.append(RecordedGraph(device))
        return made[-1]

    monkeypatch.setitem(captured.GRAPHS, "cpu", graph)
    return made


def written_out(base: Base, starts: Factors, shots: list[Shots], config: TrainConfig) -> list[Tensor]:
    """Every factor after a training that is written out: one leaf a factor, Adam, a rate in Python."""
    rank = next(iter(starts.values()))[0].shape[1]
    leaves = {
        site: (down.clone().requires_grad_(), up.clone().requires_grad_())
        for site, (down, up) in starts.items()
    }
    flat = [leaf for pair in leaves.values() for leaf in pair]
    assert rank
    optimizer = torch.optim.Adam(flat, lr=1.0, fused=True)
    samples = Samples([shots], config)
    with wear(base.components, starts) as worn:
        for step in range(config.last):
            rise = min((step + 1) / config.warmup, 1) if step < config.warmup else 1
            after = max(step - config.warmup, 0) / max(1, config.last - config.warmup)
            fall = 0.5 * (1 + math.cos(math.pi * after))
            optimizer.param_groups[0]["lr"] = config.lr * rise * (1 if step < config.warmup else fall)
            worn.set(leaves, samples.each)
            rows = samples.rows(step)
            tokens = base.tokenize([samples.captions[row] for row in rows])
            noise, times = sample_noises(base, (4, 8, 8), samples.keys(step), config.timestep_bias)
            mask = None if samples.masks is None else samples.masks[rows]
            losses = denoise_loss(
                base, samples.latents[rows], base.encode_prompts(tokens), noise, times, mask, config.weighting
            )
            optimizer.zero_grad()
            ((losses * samples.weights[rows]).sum() / config.batch).backward()
            torch.nn.utils.clip_grad_norm_(flat, config.clip)
            optimizer.step()
    return [leaf.detach() for leaf in flat]


def flat(adapter: Adapter) -> Tensor:
    return torch.cat([part.flatten() for _, pair in sorted(adapter.factors.items()) for part in pair])


CONFIG = FinetuneConfig(
    steps=25, rank=2, batch=2, lr=3e-3, warmup=3, schedule="cosine", background=0.3, weighting="debiased",
    timestep_bias=2, precision="float32",
)  # fmt: skip


def test_the_loop_is_adam_written_out(micro_base: Base, people: list[tuple[Photo, ...]]) -> None:
    """Up to the order of sums, as the loop encodes one caption once and keeps all factors in one leaf."""
    prediction = a_prediction(micro_base)
    made = finetune_adapter(micro_base, prediction, people[0], CONFIG)
    shots, _ = shots_of(micro_base, [people[0]], CONFIG)
    expected = written_out(micro_base, relax(prediction.factors, 2, 0), shots[0], CONFIG)
    got = [factor for pair in made.factors.values() for factor in pair]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_factors_of_several_people_are_cut_from_one_leaf(micro_base: Base) -> None:
    """Values and gradients, bit by bit, also where gradients come transposed from a batched product."""
    starts = [fresh(micro_base.sites, 3, k) for k in range(2)]
    made = pairs(padded(starts), micro_base.device)
    leaf, place = made.leaves["factors"], 0
    inputs = {site.name: torch.randn(2, 5, site.in_features) for site in micro_base.sites}
    total = torch.zeros(())
    for site, (down, up) in made.to_factors(made.leaves, torch.float32).items():
        assert torch.equal(down, torch.cat([one[site][0] for one in starts]))
        assert torch.equal(up, torch.cat([one[site][1] for one in starts]))
        total = total + torch.bmm(inputs[site], down.mT).square().sum()
    total.backward()
    assert leaf.grad is not None
    for site, (down, up) in padded(starts).items():
        alone = down.clone().requires_grad_()
        torch.bmm(inputs[site], alone.mT).square().sum().backward()
        assert alone.grad is not None
        end = place + down[0].numel()
        assert torch.equal(leaf.grad[:, place:end], alone.grad.flatten(1))
        assert not leaf.grad[:, end : end + up[0].numel()].any()
        place = end + up[0].numel()


def side_by_side(base: Base, people: list[tuple[Photo, ...]]) -> Tensor:
    config = CONFIG.model_copy(update={"way": "side_by_side", "size_weight": 0.1, "photo_order": "shuffled"})
    made = finetune_adapters(base, [a_prediction(base, k) for k in range(2)], people[:2], config)
    return torch.cat([flat(one) for one in made])


def lidb(base: Base, people: list[tuple[Photo, ...]]) -> Tensor:
    config = PreoptConfig(steps=12, down_dim=8, up_dim=6, lr=5e-3, warmup=2, precision="bf16")
    return train_group(prepare(base, config), shots_of(base, people, config)[0])[0]


def with_class_images(base: Base, people: list[tuple[Photo, ...]]) -> Tensor:
    config = DreamboothConfig(
        method="lora", steps="auto", most=20, rank=2, prior_weight=0.5, prior_images=2, background=0.5
    )
    made = dreambooth(base, people[0], config=config)
    assert isinstance(made, Adapter)
    return flat(made)


def with_answers(base: Base, people: list[tuple[Photo, ...]]) -> Tensor:
    config = CONFIG.model_copy(update={"class_weight": 2.0, "steps": 9})
    made = finetune_adapters(base, [a_prediction(base, k) for k in range(2)], people[:2], config)
    return torch.cat([flat(one) for one in made])


def whole(base: Base, people: list[tuple[Photo, ...]]) -> Tensor:
    made: Any = dreambooth(base, people[0], config=DreamboothConfig(method="full", steps=6, batch=1))
    return torch.cat([weight.flatten() for _, weight in sorted(made.weights.items())])


def word(base: Base, people: list[tuple[Photo, ...]]) -> Tensor:
    config = DreamboothConfig(method="textual-inversion", steps=12, batch=2)
    made: Any = dreambooth(base, people[0], config=config)
    return made.vector


TRAININGS: list[Callable[[Base, list[tuple[Photo, ...]]], Tensor]] = [
    lambda base, people: flat(finetune_adapter(base, a_prediction(base), people[0], CONFIG)),
    side_by_side, lidb, with_class_images, with_answers, whole, word,
]  # fmt: skip
NAMES = ["finetune", "side by side", "lidb in bf16", "class images and auto", "answers", "full", "word"]


@pytest.mark.parametrize("training", TRAININGS, ids=NAMES)
def test_a_replayed_step_is_the_plain_one_to_the_bit(
    training: Callable[[Base, list[tuple[Photo, ...]]], Tensor],
    micro_base: Base, people: list[tuple[Photo, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Replaying calls the recorded operators on the recorded memory, so all that a step reads lies there.

    Between two steps this memory is poisoned, which must change nothing.
    """
    monkeypatch.setenv("HDB_CACHE", str(tmp_path))
    plain = training(micro_base, people)
    made: list[RecordedGraph] = []
    fill = captured._Shape.fill

    def poisoned(self: Any, tensors: list[Tensor]) -> None:
        for tensor in self.tensors:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        fill(self, tensors)

    def graph(device: torch.device) -> RecordedGraph:
        made.append(RecordedGraph(device))
        return made[-1]

    monkeypatch.setattr(captured._Shape, "fill", poisoned)
    monkeypatch.setitem(captured.GRAPHS, "cpu", graph)
    assert torch.equal(training(micro_base, people), plain)
    assert sum(one.replays for one in made) >= 4


def test_the_next_person_is_copied_into_the_same_step(
    micro_base: Base, people: list[tuple[Photo, ...]], graphs: list[RecordedGraph]
) -> None:
    """Two people with other photos in one warm step are each as alone; another shape gets another step."""
    warm = Warm()
    for way in ("complement", "side_by_side"):
        config = CONFIG.model_copy(update={"way": way, "batch": 1, "steps": 8})
        graphs.clear()
        warmly = [
            finetune_adapters(micro_base, [a_prediction(micro_base, k)], [people[k]], config, warm=warm)[0]
            for k in range(2)
        ]
        assert len(graphs) == 1 and graphs[0].replays == 6 + 8
        for k in range(2):
            alone = finetune_adapter(micro_base, a_prediction(micro_base, k), people[k], config)
            assert torch.equal(flat(warmly[k]), flat(alone))


def test_where_a_step_cannot_be_recorded_it_is_taken_as_it_is(
    micro_base: Base, people: list[tuple[Photo, ...]], graphs: list[RecordedGraph]
) -> None:
    config = CONFIG.model_copy(update={"steps": 6})
    plain = finetune_adapter(micro_base, a_prediction(micro_base), people[0], config)

    class Curious(torch.nn.Module):
        """Reads a number back to the host, which a recording cannot."""

        def forward(self, x: Tensor) -> Tensor:
            return x if x.detach().sum().item() < 1e9 else -x

    graphs.clear()
    unet: Any = micro_base.denoiser
    unet.conv_in = torch.nn.Sequential(unet.conv_in, Curious())
    with pytest.warns(UserWarning, match="not captured") as caught:
        made = finetune_adapter(micro_base, a_prediction(micro_base), people[0], config)
    assert len(caught) == 1
    assert torch.equal(flat(made), flat(plain)) and not any(one.replays for one in graphs)


def test_checkpointing_is_not_recorded(
    micro_base: Base, people: list[tuple[Photo, ...]], graphs: list[RecordedGraph],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It reads the state of the random numbers, which a GPU refuses while it records."""
    config = CONFIG.model_copy(update={"steps": 6, "checkpointing": True})
    plain = finetune_adapter(micro_base, a_prediction(micro_base), people[0], config)
    record = RecordedGraph.record

    def refused() -> Tensor:
        raise RuntimeError("Cannot call current_seed during CUDA graph capture")

    def recording(self: RecordedGraph, call: Callable[[], Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "get_rng_state", refused)
            return record(self, call)

    monkeypatch.setattr(RecordedGraph, "record", recording)
    graphs.clear()
    with pytest.warns(UserWarning, match="not captured .* current_seed") as caught:
        made = finetune_adapter(micro_base, a_prediction(micro_base), people[0], config)
    assert len(caught) == 1 and not any(one.replays for one in graphs)
    assert torch.equal(flat(made), flat(plain))


def test_a_resumed_training_is_recorded_anew(
    micro_base: Base, people: list[tuple[Photo, ...]], graphs: list[RecordedGraph], tmp_path: Path
) -> None:
    config, warm = CONFIG.model_copy(update={"steps": 9, "save_every": 3}), Warm()
    start = a_prediction(micro_base)
    expected = finetune_adapter(micro_base, start, people[0], config)

    def stop(step: int, loss: float) -> bool:
        return step < 6

    options: dict[str, Any] = {"out": tmp_path / "run", "warm": warm}
    finetune_adapters(micro_base, [start], [people[0]], config, callback=stop, **options)
    resumed = finetune_adapters(micro_base, [start], [people[0]], config, **options)[0]
    assert torch.equal(flat(resumed), flat(expected))
    assert replace(resumed, factors={}).metadata["steps"] == "9"
