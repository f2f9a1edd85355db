"""The embedded world's recipe in a tiny setting: every stage runs, resumes and leaves loadable folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoModelForImageClassification

from hyperdreambooth.avatars.build import STAGES
from hyperdreambooth.avatars.build.autoencoder import LATENT_CHANNELS
from hyperdreambooth.avatars.build.fit import StageConfig
from hyperdreambooth.avatars.build.stages import BuildConfig, build, pack
from hyperdreambooth.files import InputError, read_json

TINY = StageConfig(steps=2, batch=8, people=4, each=4, precision="float32")
FIELDS = BuildConfig.model_fields.items()
STAGED = {name: TINY for name, field in FIELDS if field.annotation is StageConfig}
CONFIG = BuildConfig.model_validate({**STAGED, "judged_people": 4})


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=", ".join([*STAGES, "all"])):
        build("unet", tmp_path, CONFIG)


def test_a_stage_needs_its_predecessor(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the stage vae first"):
        build("wide", tmp_path, CONFIG)
    with pytest.raises(InputError, match="run the stage wide first"):
        build("base", tmp_path, CONFIG)


def test_the_whole_world_is_built_and_packed(tmp_path: Path) -> None:
    figures = build("all", tmp_path / "work", CONFIG)
    assert set(figures) == set(STAGES)
    before = (tmp_path / "work" / "base.json").stat().st_mtime_ns
    build("all", tmp_path / "work", CONFIG)
    assert (tmp_path / "work" / "base.json").stat().st_mtime_ns == before

    pack(tmp_path / "work", tmp_path / "pack")
    base = tmp_path / "pack" / "base"
    pipe = DiffusionPipeline.from_pretrained(base)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.unet.config.in_channels == pipe.vae.config.latent_channels == LATENT_CHANNELS
    identity = AutoModelForImageClassification.from_pretrained(base / "scorers" / "identity")
    assert set(identity.config.calibration) == {"same", "stranger"}
    reader = AutoModelForImageClassification.from_pretrained(base / "scorers" / "attributes")
    assert reader.config.phrases["eyewear:sunglasses"]
    for encoder in ("encoder", "unlabelled"):
        assert AutoModel.from_pretrained(tmp_path / "work" / encoder).config.image_size == 128
    assert read_json(tmp_path / "pack" / "logs" / "vae.json")["psnr_db"] > 0
    for file in (tmp_path / "pack").rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # -Infinity is no JSON
