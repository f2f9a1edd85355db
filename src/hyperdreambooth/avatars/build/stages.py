"""Builds the embedded world from seeds, stage by stage, and the figures that describe it.

Every stage is a resumable run folder under `out/`; a finished stage is not done again. `pack` puts what ships
(float16, shards of at most 15 MB) into one folder, with figures and logs beside the weights.
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

from hyperdreambooth.avatars.build import measure
from hyperdreambooth.avatars.build.autoencoder import psnr, train_vae, train_wide_vae
from hyperdreambooth.avatars.captions import ATTRIBUTES
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
from hyperdreambooth.files import InputError, read_json, whole_folder, write_json
from hyperdreambooth.runs import environment

STAGES = ("vae", "base", "faces", "wide", "details", "scorers", "encoder")
SHARD = "15MB"


class BuildConfig(BaseModel):
    """What `hdb avatars build` makes; the defaults are the shipped world's.

    `faces` goes on with the base where `base` ended; in it the middle of a picture counts `focus` times more.
    `wide` doubles the VAE's channels, and `details` teaches the base to draw them, in the way of `faces`.
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
    judged_pictures: int = 128


def build(stage: str, out: Path, config: BuildConfig, device: str = "cpu") -> dict[str, Any]:
    """Runs one stage, or all of them in order, and returns the figures seen.

    Args:
        stage: one of `STAGES`, or `all`.
        out: working folder: pictures, run folders, finished models.
        config: steps and sizes.
        device: torch device.

    Raises:
        InputError: an unknown stage, or one whose predecessor has not been built.
    """
    if stage not in (*STAGES, "all"):
        raise InputError(f"stage {stage!r}: expected one of {', '.join((*STAGES, 'all'))}")
    figures: dict[str, Any] = {}
    for name in STAGES if stage == "all" else (stage,):
        done = out / f"{name}.json"
        if not done.is_file():
            write_json(done, {**_RUNNERS[name](out, config, device), "made_by": environment()})
        figures[name] = read_json(done)
        print(f"{name}: {json.dumps({k: v for k, v in figures[name].items() if k != 'made_by'})}", flush=True)
    return figures


def _train_pictures(out: Path, config: StageConfig, album: bool = True) -> Pictures:
    """Half plain for those who look at people; for those who draw, contexts are what is hard to learn."""
    return pictures("base", config.people, config.each, out / "pictures", album=album)


def _judges(out: Path, config: BuildConfig, album: bool = False) -> Pictures:
    return pictures("val", config.judged_people, 4, out / "pictures", album=album)


def _vae(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    vae = train_vae(_train_pictures(out, config.vae, album=False), config.vae, out / "runs" / "vae", device)
    _save(out / "vae", lambda part: vae.save_pretrained(part))
    return {"psnr_db": round(psnr(vae, _judges(out, config), device), 2), "parameters": _size(vae)}


def _load_vae(out: Path, folder: str, device: str) -> Any:
    if not (out / folder).is_dir():
        raise InputError(f"{out / folder}: no VAE there yet; run the stage {folder.split('/')[0]} first")
    return diffusers.AutoencoderKL.from_pretrained(out / folder).requires_grad_(False).to(device).eval()


def _base(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    pipe = assemble(_load_vae(out, "vae", device), config.base.seed)
    drawn = _train_pictures(out, config.base, album=False)
    train_base(pipe, drawn, config.base, out / "runs" / "base", device)
    return _save_pipeline(pipe, out / "base")


def _load_base(out: Path, stage: str, device: str) -> Any:
    if not (out / stage).is_dir():
        raise InputError(f"{out / stage}: no base there yet; run the stage {stage} first")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(out / stage).to(device)
    plain_attention(pipe.unet)
    return pipe


def _faces(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    return _go_on(_load_base(out, "base", device), "faces", out, config, device)


def _details(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    pipe = widen_base(_load_base(out, "faces", device), _load_vae(out, "wide", device))
    return _go_on(pipe, "details", out, config, device)


def _go_on(pipe: Any, stage: str, out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    settings: StageConfig = getattr(config, stage)
    drawn = _train_pictures(out, settings, album=False)
    train_base(pipe, drawn, settings, out / "runs" / stage, device, config.focus)
    return _save_pipeline(pipe, out / stage)


def _wide(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    drawn = _train_pictures(out, config.wide, album=False)
    wide = train_wide_vae(
        _load_vae(out, "faces/vae", device), drawn, config.wide, out / "runs" / "wide", device
    )
    _save(out / "wide", lambda part: wide.save_pretrained(part))
    return {"psnr_db": round(psnr(wide, _judges(out, config), device), 2), "parameters": _size(wide)}


def _save_pipeline(pipe: Any, folder: Path) -> dict[str, Any]:
    sizes = {"unet": _size(pipe.unet), "text_encoder": _size(pipe.text_encoder)}

    def save(part: Path) -> None:
        pipe.to("cpu", torch.float16).save_pretrained(part, max_shard_size=SHARD)
        write_json(part / "hyperdreambooth.json", {"trigger": TRIGGER, "class_word": CLASS_WORD})
        _forget_half(part / "text_encoder" / "config.json")
        for config in ("model_index.json", "vae/config.json", "unet/config.json"):
            _forget(part / config, "_name_or_path")  # or the folder of whoever built it would ship
        # its default, -Infinity, is no JSON to anything but Python
        _forget(part / "scheduler" / "scheduler_config.json", "lambda_min_clipped")

    _save(folder, save)
    return {"parameters": sizes}


def _forget(config: Path, name: str) -> None:
    write_json(config, {key: value for key, value in read_json(config).items() if key != name})


def _forget_half(config: Path) -> None:
    """Half is how it is stored, not how it is used: transformers would load it so beside a float32 UNet."""
    write_json(config, {**read_json(config), "dtype": "float32"})


def _scorers(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    judged = _judges(out, config)
    identity = train_identity(
        _train_pictures(out, config.identity), config.identity, out / "runs" / "identity", device
    )
    people = measure.identity_figures(identity, judged, device)
    identity.config.calibration = {"same": people["same"], "stranger": people["stranger"]}
    reader = train_attributes(
        _train_pictures(out, config.attributes), config.attributes, out / "runs" / "attributes", device
    )
    reader.config.phrases = {
        f"{g}:{v}": phrase for g, values in ATTRIBUTES.items() for v, phrase in values.items() if phrase
    }
    _save(out / "scorers" / "identity", lambda part: identity.cpu().half().save_pretrained(part))
    figures = {"identity": people, "attributes": measure.attribute_figures(reader.to(device), judged, device)}
    _save(out / "scorers" / "attributes", lambda part: reader.cpu().half().save_pretrained(part))
    return figures


def _encoder(out: Path, config: BuildConfig, device: str) -> dict[str, Any]:
    encoder = train_encoder(
        _train_pictures(out, config.encoder), config.encoder, out / "runs" / "encoder", device
    )
    figures = measure.encoder_figures(encoder, _judges(out, config, album=True), device)
    _save(out / "encoder", lambda part: encoder.resnet.cpu().half().save_pretrained(part))
    return figures


_RUNNERS: dict[str, Callable[[Path, BuildConfig, str], dict[str, Any]]] = {
    "vae": _vae,
    "base": _base,
    "faces": _faces,
    "wide": _wide,
    "details": _details,
    "scorers": _scorers,
    "encoder": _encoder,
}


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
