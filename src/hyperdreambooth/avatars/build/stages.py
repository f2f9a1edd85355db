"""Builds the embedded world from seeds, stage by stage, with the figures that describe it.

Every stage is a resumable run folder under `out/`, and a finished stage is not done again. `pack` copies what
ships (float16, shards of at most 15 MB) into one folder, with figures and logs beside the weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from hyperdreambooth.avatars.build import STAGES, measure
from hyperdreambooth.avatars.build.autoencoder import psnr, train_vae, train_wide_vae
from hyperdreambooth.avatars.build.diffusion import (
    CLASS_WORD,
    TRIGGER,
    assemble,
    plain_attention,
    train_base,
    widen_base,
)
from hyperdreambooth.avatars.build.fit import StageConfig
from hyperdreambooth.avatars.build.pictures import Pictures, pictures
from hyperdreambooth.avatars.build.readers import train_attributes, train_encoder, train_identity
from hyperdreambooth.avatars.build.untyped import diffusers
from hyperdreambooth.avatars.captions import ATTRIBUTES
from hyperdreambooth.files import InputError, read_json, whole_folder, write_json
from hyperdreambooth.runs import environment

SHARD = "15MB"


class BuildConfig(BaseModel):
    """The config of `hdb avatars build`; its defaults made the shipped world.

    Attributes:
        vae: trains the VAE with half of its channels.
        base: trains UNet and text encoder on them.
        faces: goes on with the base, with more weight on the middle of a picture.
        wide: doubles the VAE's channels.
        details: goes on with the base on all channels, in the way of `faces`.
        focus: how much more the middle of a picture counts in `faces` and `details`.
        identity: trains the identity scorer.
        attributes: trains the attribute reader.
        encoder: trains the hypernetwork's encoder.
        judged_people: validation people that the figures are measured on.
    """

    model_config = ConfigDict(extra="forbid")
    vae: StageConfig = StageConfig(steps=8000, batch=16, lr=2e-3, people=2000)
    base: StageConfig = StageConfig(steps=3800, batch=64, lr=1.5e-3, ema=0.998, people=8000)
    faces: StageConfig = StageConfig(steps=2700, batch=64, lr=1e-3, people=8000, seed=1)
    wide: StageConfig = StageConfig(steps=10600, batch=16, lr=1.5e-3, people=2000, seed=1)
    details: StageConfig = StageConfig(steps=4500, batch=64, lr=1e-3, people=4000, seed=2)
    focus: float = 8.0
    identity: StageConfig = StageConfig(steps=1400, batch=64, lr=2e-3, ema=0.99)
    attributes: StageConfig = StageConfig(steps=2200, batch=64, lr=2e-3, ema=0.99)
    encoder: StageConfig = StageConfig(steps=5000, batch=64, lr=1e-3, ema=0.99, people=16000, each=2)
    judged_people: int = 200


def build(stage: str, out: Path, config: BuildConfig, device: str = "cpu") -> dict[str, Any]:
    """Runs one stage, or all of them in order.

    Args:
        stage: one of `STAGES`, or `all`.
        out: working folder: pictures, run folders, finished models.
        config: steps and sizes.
        device: torch device.

    Returns:
        Stage → its figures.

    Raises:
        InputError: an unknown stage, or one whose predecessor has not been built.
    """
    if stage not in (*STAGES, "all"):
        raise InputError(f"stage: expected one of {', '.join((*STAGES, 'all'))}, got {stage!r}")
    figures: dict[str, Any] = {}
    for name in STAGES if stage == "all" else (stage,):
        done = out / f"{name}.json"
        if not done.is_file():
            write_json(done, {**_RUNNERS[name](out, config, device), "made_by": environment()})
        figures[name] = read_json(done)
        print(f"{name}: {json.dumps({k: v for k, v in figures[name].items() if k != 'made_by'})}", flush=True)
    return figures


def _training(out: Path, config: StageConfig, album: bool = False) -> Pictures:
    """Returns training pictures: all in contexts, to learn to draw, or half plain, to learn people."""
    return pictures("base", config.people, config.each, out / "pictures", album=album)


def _validation(out: Path, config: BuildConfig, album: bool = False) -> Pictures:
    return pictures("val", config.judged_people, 4, out / "pictures", album=album)


def _vae(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    vae = train_vae(_training(out, config.vae), config.vae, out / "runs" / "vae", device)
    return _save_vae(vae, "vae", out, config, device)


def _wide(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    vae, drawn = _load_vae(out, "faces/vae", device), _training(out, config.wide)
    wide = train_wide_vae(vae, drawn, config.wide, out / "runs" / "wide", device)
    return _save_vae(wide, "wide", out, config, device)


def _save_vae(vae: Any, stage: str, out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    _save(out / stage, vae.save_pretrained)
    return {"psnr_db": round(psnr(vae, _validation(out, config), device), 2), "parameters": _size(vae)}


def _load_vae(out: Path, folder: str, device: str) -> Any:
    _check_built(out / folder, folder.split("/")[0])
    return diffusers.AutoencoderKL.from_pretrained(out / folder).requires_grad_(False).to(device).eval()


def _load_base(out: Path, stage: str, device: str) -> Any:
    _check_built(out / stage, stage)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(out / stage).to(device)
    plain_attention(pipe.unet)
    return pipe


def _check_built(folder: Path, stage: str) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the model of the stage {stage}; run the stage {stage} first")


def _base(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    pipe = assemble(_load_vae(out, "vae", device), config.base.seed)
    return _train_pipeline(pipe, "base", None, out, config, device)


def _faces(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    return _train_pipeline(_load_base(out, "base", device), "faces", config.focus, out, config, device)


def _details(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    pipe = widen_base(_load_base(out, "faces", device), _load_vae(out, "wide", device))
    return _train_pipeline(pipe, "details", config.focus, out, config, device)


def _train_pipeline(
    pipe: Any, stage: str, focus: float | None, out: Path, config: BuildConfig, device: str
) -> dict[str, Any]:
    settings: StageConfig = getattr(config, stage)
    train_base(pipe, _training(out, settings), settings, out / "runs" / stage, device, focus)
    sizes = {"unet": _size(pipe.unet), "text_encoder": _size(pipe.text_encoder)}
    pipe.to("cpu", torch.float16)
    _save(out / stage, lambda folder: _write_pipeline(pipe, folder))
    return {"parameters": sizes}


def _write_pipeline(pipe: Any, folder: Path) -> None:
    pipe.save_pretrained(folder, max_shard_size=SHARD)
    write_json(folder / "hyperdreambooth.json", {"trigger": TRIGGER, "class_word": CLASS_WORD})
    # stored in float16, used in float32: transformers would load it in float16 beside a float32 UNet
    text = folder / "text_encoder" / "config.json"
    write_json(text, {**read_json(text), "dtype": "float32"})
    for config in ("model_index.json", "vae/config.json", "unet/config.json"):
        _remove_key(folder / config, "_name_or_path")  # a folder on the builder's disk
    # its default, -Infinity, is not valid JSON
    _remove_key(folder / "scheduler" / "scheduler_config.json", "lambda_min_clipped")


def _remove_key(config: Path, name: str) -> None:
    write_json(config, {key: value for key, value in read_json(config).items() if key != name})


def _scorers(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    validation, runs = _validation(out, config), out / "runs"
    drawn = _training(out, config.identity, album=True)
    identity = train_identity(drawn, config.identity, runs / "identity", device)
    people = measure.identity_figures(identity, validation, device)
    identity.config.calibration = {"same": people["same"], "stranger": people["stranger"]}
    drawn = _training(out, config.attributes, album=True)
    reader = train_attributes(drawn, config.attributes, runs / "attributes", device)
    reader.config.phrases = {
        f"{g}:{v}": phrase for g, values in ATTRIBUTES.items() for v, phrase in values.items() if phrase
    }
    figures = {"identity": people, "attributes": measure.attribute_figures(reader, validation, device)}
    _save(out / "scorers" / "identity", identity.cpu().half().save_pretrained)
    _save(out / "scorers" / "attributes", reader.cpu().half().save_pretrained)
    return figures


def _encoder(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    drawn = _training(out, config.encoder, album=True)
    encoder = train_encoder(drawn, config.encoder, out / "runs" / "encoder", device)
    figures = measure.encoder_figures(encoder, _validation(out, config, album=True), device)
    _save(out / "encoder", encoder.resnet.cpu().half().save_pretrained)
    return figures


_RUNNERS: dict[str, Callable[[Path, BuildConfig, str], dict[str, Any]]] = dict(
    zip(STAGES, (_vae, _base, _faces, _wide, _details, _scorers, _encoder), strict=True)
)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _save(folder: Path, write: Callable[[Path], Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as part:
        write(part)


def pack(out: Path, pack_folder: Path) -> None:
    """Copies the finished base, its scorers, figures and logs into the folder that ships.

    Args:
        out: working folder of `build`.
        pack_folder: receives `base/` (with `base/scorers/`) and `logs/`.
    """
    with whole_folder(pack_folder / "base") as part:
        shutil.copytree(out / "details", part, dirs_exist_ok=True)
        shutil.copytree(out / "scorers", part / "scorers")
    with whole_folder(pack_folder / "logs") as part:
        for run in sorted((out / "runs").iterdir()):
            shutil.copy(run / "log.jsonl", part / f"{run.name}.jsonl")
        for name in STAGES:
            shutil.copy(out / f"{name}.json", part / f"{name}.json")
