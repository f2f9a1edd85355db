"""An interrupted training continues exactly; finished trainings and other trainings are recognised."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_train import assert_same, lines, settings

from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.hypernet import setup
from hyperdreambooth.hypernet import train as module
from hyperdreambooth.hypernet.predictor import load_hypernet, load_info
from hyperdreambooth.hypernet.train import train_hypernet


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ends the next training within the given step."""
    real = module.average

    def average(state: Any, config: Any, at: int) -> None:
        if at == step:
            raise Killed
        real(state, config, at)

    monkeypatch.setattr(module, "average", average)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"learn_basis": True},
        {"refinements": 1, "rank": 2, "text_encoder": False},
        {"photos": 2, "checkpointing": True},
    ],
    ids=["plain", "pro", "unet only", "checkpointing"],
)
def test_resumed_equals_uninterrupted_bit_by_bit(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, fields: dict[str, object]
) -> None:
    config = settings(eye, **fields)
    whole = train_hypernet(micro_base, micro_photos, tmp_path / "whole", config)
    for step in (1, 3, 5):
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, step)
            with pytest.raises(Killed):
                train_hypernet(micro_base, micro_photos, tmp_path / "h", config)
    train_hypernet(micro_base, micro_photos, tmp_path / "h", config)
    assert_same(tmp_path / "whole", tmp_path / "h")
    assert [line["step"] for line in lines(tmp_path / "h") if "loss" in line] == [2, 4, 6]
    assert whole.basis.source.startswith("hypernet:" if fields.get("learn_basis") else "seed:7")


def test_run_again_when_finished_trains_no_more(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_hypernet(micro_base, micro_photos, tmp_path / "h", settings(eye))
    monkeypatch.setattr(module, "step_loss", lambda *_: pytest.fail("trained again"))
    shutil.rmtree(tmp_path / "h" / "cache")
    monkeypatch.setattr(setup, "load_faces", lambda *_: pytest.fail("encoded photos again"))
    assert train_hypernet(micro_base, micro_photos, tmp_path / "h", settings(eye)).info.training["step"] == 6


def test_what_only_tells_may_change_when_finished(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    out, before = tmp_path / "h", settings(eye, steps=2)
    first = train_hypernet(micro_base, micro_photos, out, before)
    again = before.model_copy(update={"strength": 2.0, "finetune": {"lr": 0.5}})
    second = train_hypernet(micro_base, micro_photos, out, again)
    assert load_info(out) == second.info
    assert second.info.strength == 2 * first.info.strength and second.info.finetune == {"lr": 0.5}
    for name, tensor in first.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], tensor)


@pytest.mark.parametrize("saves", [2, 4])
def test_a_full_disk_at_the_last_step_loses_nothing(
    micro_base: Base,
    micro_photos: Path,
    eye: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saves: int,
) -> None:
    config, save = settings(eye, steps=4, save_every=saves), module.Predictor.save
    whole = train_hypernet(micro_base, micro_photos, tmp_path / "whole", config)

    def full(self: module.Predictor, *words: Any) -> None:
        if self.info.training["step"] == config.steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, *words)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(module.Predictor, "save", full)
        train_hypernet(micro_base, micro_photos, tmp_path / "h", config)
    done = train_hypernet(micro_base, micro_photos, tmp_path / "h", config)
    assert done.info.training["step"] == config.steps
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(done.network.state_dict()[name], tensor)


def test_a_folder_that_is_something_else_is_one_line(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    out = tmp_path / "h"
    train_hypernet(micro_base, micro_photos, out, settings(eye, steps=2))
    config = json.loads((out / "config.json").read_text())
    for damaged in ({**config, "encoder": {}}, {k: v for k, v in config.items() if k != "encoder"}):
        (out / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match=r"config\.json"):
            load_hypernet(out)
    (out / "config.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(InputError, match="does not say what it was trained for"):
        train_hypernet(micro_base, micro_photos, out, settings(eye, steps=2))


def test_out_of_time_stops_with_a_checkpoint_and_goes_on(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    out = tmp_path / "h"
    early = train_hypernet(micro_base, micro_photos, out, settings(eye, max_minutes=1e-9))
    assert early.info.training["step"] == 1
    assert (out / "run" / "checkpoint-1").is_dir()
    train_hypernet(micro_base, micro_photos, out, settings(eye))
    train_hypernet(micro_base, micro_photos, tmp_path / "whole", settings(eye))
    assert_same(tmp_path / "whole", out)


def test_another_config_is_refused_but_telling_may_change(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    train_hypernet(micro_base, micro_photos, tmp_path / "h", settings(eye, steps=2))
    train_hypernet(
        micro_base,
        micro_photos,
        tmp_path / "h",
        settings(eye, steps=2, log_every=1, max_minutes=9, finetune={"lr": 1e-2}),
    )
    with pytest.raises(InputError, match=r"lr was 0\.01, now 0\.02"):
        train_hypernet(micro_base, micro_photos, tmp_path / "h", settings(eye, steps=2, lr=0.02))
    renamed = micro_base.with_words("zwx", micro_base.class_word)
    with pytest.raises(InputError, match='trigger was "sks", now "zwx"'):
        train_hypernet(renamed, micro_photos, tmp_path / "h", settings(eye, steps=2))
