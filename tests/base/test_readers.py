"""Frozen text encoders: read when texts are encoded, let go for a training, the same answers either way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
import qwens
from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.base.readers import awake, readers_of
from hyperdreambooth.faces.dataset import read_faces
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import DreamboothConfig
from hyperdreambooth.finetune.dreambooth import dreambooth
from hyperdreambooth.generate import generate_images
from hyperdreambooth.preopt.bank_training import PreoptConfig, preoptimize

CAPTIONS = ["a photo of a sks face", "a sks face, smiling", "a hat"]


# the text encoders of the other families wear adapters
LAZY: dict[str, Callable[[], Any]] = {
    "SD3": pipelines.sd3_with_t5, "Flux": pipelines.flux, "Z-Image": qwens.zimage,
    "FLUX.2 klein": qwens.klein, "Qwen-Image": qwens.qwenimage, "Krea 2": qwens.krea2,
}  # fmt: skip


@pytest.fixture(params=LAZY)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    LAZY[request.param]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def unreadable() -> Any:
    raise AssertionError("the text encoder was read")


def forbid_reading(base: Base) -> None:
    readers = readers_of(base.pipe)
    assert readers is not None and not awake(base.pipe)
    readers.load = unreadable


@pytest.mark.parametrize("offload", [False, True])
def test_a_reader_is_there_for_captions_and_pictures_only(
    folder: Path, micro_photos: Path, tmp_path: Path, offload: bool
) -> None:
    base = load_base(folder, "cpu", resolution=32, class_word="face", offload=offload)
    there: list[bool] = []
    photos = read_faces(micro_photos)["person-0"][:1]
    config = DreamboothConfig(method="lora", rank=2, steps=2)
    assert not awake(base.pipe)
    dreambooth(
        base, photos, tmp_path / "run", config, callback=lambda step, loss: there.append(awake(base.pipe))
    )
    assert there == [False, False] and not awake(base.pipe)
    with base.training(False):
        generate_images(base, ["a [V] face"], steps=1)
        assert not awake(base.pipe)
    generate_images(base, ["a [V] face"], steps=1)
    assert awake(base.pipe)


def test_captions_are_those_of_a_pipeline_in_memory(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, "cpu", resolution=32)
    pipe = type(base.pipe).from_pretrained(folder)
    memory = Base.from_pipeline(pipe, "x", resolution=32)
    for text_worn in {False, bool(base.family.TEXT_ENCODERS)}:
        theirs = Conditioner(memory, CAPTIONS, text_worn)(CAPTIONS)
        ours = Conditioner(base, CAPTIONS, text_worn)(CAPTIONS)
        assert not awake(base.pipe) and awake(memory.pipe)
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor)


def test_a_cache_of_captions_survives_a_restart(folder: Path, tmp_path: Path) -> None:
    first = Conditioner(load_base(folder, "cpu", resolution=32), CAPTIONS, False, tmp_path)(CAPTIONS)
    again = load_base(folder, "cpu", resolution=32)
    forbid_reading(again)
    kept = Conditioner(again, CAPTIONS[::-1], False, tmp_path)(CAPTIONS)
    for name, tensor in first.items():
        assert torch.equal(kept[name], tensor)


def test_people_are_pre_optimised_again_without_the_text_encoder(
    folder: Path, micro_photos: Path, tmp_path: Path
) -> None:
    config = PreoptConfig(down_dim=6, up_dim=4, steps=2, text_encoder=False)
    preoptimize(load_base(folder, "cpu", resolution=32), micro_photos, tmp_path / "bank", config)
    again = load_base(folder, "cpu", resolution=32)
    forbid_reading(again)
    shutil.copytree(tmp_path / "bank" / "cache", tmp_path / "another" / "cache")
    preoptimize(again, micro_photos, tmp_path / "another", config)
    assert not awake(again.pipe)


def test_a_pipeline_is_saved_whole(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, "cpu", resolution=32)
    tokens = base.tokenize(CAPTIONS)
    before = base.encode_prompts(tokens)
    with base.reading():
        assert awake(base.pipe)
    assert not awake(base.pipe)
    base.wake()
    base.pipe.save_pretrained(tmp_path / "copy")
    copy = load_base(tmp_path / "copy", "cpu", resolution=32)
    assert copy.parts == base.parts and copy.fingerprint == base.fingerprint
    for name, tensor in copy.encode_prompts(tokens).items():
        torch.testing.assert_close(tensor, before[name])


def test_a_reader_whose_files_are_missing_is_named_at_once(folder: Path) -> None:
    part = load_base(folder, "cpu", resolution=32).readers[0]
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match=f"found no .safetensors file of {part}; get the pipeline again"):
        load_base(folder, "cpu", resolution=32)
