"""Looks at a training: when, what they choose, and that they change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hyperdreambooth.base.load import Base
from hyperdreambooth.finetune.config import DreamboothConfig
from hyperdreambooth.finetune.dreambooth import dreambooth
from hyperdreambooth.generate import generate_images
from hyperdreambooth.training import loop
from hyperdreambooth.training.looks import Look, Looks, look_steps
from hyperdreambooth.training.step import Inputs, step_inputs


@pytest.mark.parametrize(
    ("last", "steps"),
    [(40, (0, 10, 25, 40)), (400, (0, 100, 250, 400)), (2, (0, 1, 2)), (1, (0, 1)), (0, (0,))],
)
def test_looks_are_spread_over_the_training(last: int, steps: tuple[int, ...]) -> None:
    assert look_steps(last) == steps


@pytest.mark.parametrize(
    ("scores", "choose", "steps", "leaf"),
    [
        ([0.1, 0.9, 0.5], True, 2, 2.0),
        ([0.1, 0.5, 0.9], True, 4, 4.0),
        ([0.9, 0.9, 0.9], True, 0, 0.0),  # the earliest of equal ones
        ([0.1, 0.9, 0.5], False, 4, 4.0),
        ([None, None, None], True, 4, 4.0),
        ([None, 0.2, 0.1], True, 2, 2.0),
    ],
)
def test_the_best_look_is_kept(scores: list[float | None], choose: bool, steps: int, leaf: float) -> None:
    leaves, put = {"a": torch.zeros(1, 1)}, list[float]()
    by_step: dict[int, float | None] = dict(zip((0, 2, 4), scores, strict=True))
    look = Look((0, 2, 4), lambda step: by_step[step], choose)
    looks = Looks(leaves, look, lambda: put.append(float(leaves["a"])))
    for step in range(5):
        assert not looks.done(step)
        if step < 4:
            leaves["a"].fill_(step + 1)
    looks.done(4)  # a second call looks no more
    looks.put_back()
    assert put == [0.0, 2.0, 4.0] and looks.steps(4) == [steps] and float(leaves["a"]) == leaf
    again = Looks({"a": torch.zeros(1, 1)}, look, lambda: None)
    again.load(looks.state())
    again.put_back()
    assert again.reasons() == looks.reasons() and again.steps(4) == [steps]
    assert not (choose and any(scores)) or float(again.leaves["a"]) == leaf
    assert bool(looks.reasons()[0]) == (looks.chosen is not None)


@pytest.mark.parametrize("method", ["lora", "lidb", "textual-inversion", "full"])
def test_looking_changes_nothing_and_shows_the_person_of_that_step(
    method: str, micro_base: Base, micro_photos: Path, tmp_path: Path
) -> None:
    photo = micro_photos / "person-0" / "0.png"
    config = DreamboothConfig(method=method, steps=3, lr=0.02, batch=1)
    shown = list[bytes]()

    def score(step: int) -> None:
        shown.append(generate_images(micro_base, "a photo of a [V] face", steps=2)[0].tobytes())

    plain = dreambooth(micro_base, photo, config=config)
    seen = dreambooth(micro_base, photo, config=config, look=Look((0, 3), score))
    for name, tensor in tensors(plain).items():
        assert torch.equal(tensor, tensors(seen)[name])
    first, last = shown
    if method == "lora":  # which changes nothing at its start
        assert generate_images(micro_base, "a photo of a [V] face", steps=2)[0].tobytes() == first
    assert first != last


def tensors(person: Any) -> dict[str, torch.Tensor]:
    """What was trained, by name."""
    factors = getattr(person, "factors", None)
    if factors is not None:
        return {f"{site}.{end}": pair[end] for site, pair in factors.items() for end in (0, 1)}
    return getattr(person, "weights", None) or {"word": person.vector}


def test_a_resumed_training_looks_only_at_what_it_has_not_seen(
    micro_base: Base, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo, looked = micro_photos / "person-0" / "0.png", list[int]()
    config = DreamboothConfig(method="lora", steps=6, lr=0.02, batch=1, save_every=2)
    look = Look((0, 2, 6), lambda step: looked.append(step) or -abs(step - 2), choose=True)
    whole = dreambooth(micro_base, photo, config=config, look=look)
    assert whole.metadata["steps"] == "2" and "best of 3 looks" in whole.metadata["stopped"]

    def killed(*args: Any) -> Inputs:
        if args[-1] == 5:
            raise KeyboardInterrupt
        return step_inputs(*args)

    looked.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "step_inputs", killed)
        dreambooth(micro_base, photo, tmp_path / "run", config, look=look)
    again = dreambooth(micro_base, photo, tmp_path / "run", config, look=look)
    assert looked == [0, 2, 6]
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, tensors(again)[name])
