"""Builds the embedded world from seeds, stage by stage, with the figures that describe it.

Every stage is a resumable run folder under `out/`, and a finished stage is not done again. `pack` copies what
ships (float16, shards of at most 15 MB) into one folder, with figures and logs beside the weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from hyperdreambooth.avatars.build import STAGES, diffusion, measure
from hyperdreambooth.avatars.build.autoencoder import psnr, train_vae, train_wide_vae
from hyperdreambooth.avatars.build.decoder import train_decoder
from hyperdreambooth.avatars.build.fit import StageConfig
from hyperdreambooth.avatars.build.pictures import Pictures, pictures
from hyperdreambooth.avatars.build.readers import train_attributes, train_encoder, train_identity
from hyperdreambooth.avatars.build.selfsup import strong, train_selfsup
from hyperdreambooth.avatars.build.untyped import diffusers, transformers
from hyperdreambooth.avatars.draw.people import ATTRIBUTES
from hyperdreambooth.files import InputError, read_json, whole_folder, write_json
from hyperdreambooth.runs import environment


class BuildConfig(BaseModel):
    """The config of `hdb avatars build`. Its defaults make a world like the shipped one.

    The shipped base learned most of what it knows with another noise schedule (docs/LOG.md).

    Attributes:
        vae: trains the VAE with half of its channels.
        wide: doubles the VAE's channels.
        encoder: the hypernetwork's image encoder, with which the base is aligned, too.
        base: trains UNet and text encoder.
        shapes: trains them further, mostly at noisy timesteps.
        decoder: the VAE's decoder learns to mend what the base draws.
        unlabelled: an image encoder that nobody tells what is on a picture, to compare with `encoder`.
        judged_people: validation people that the figures are measured on.
    """

    model_config = ConfigDict(extra="forbid")
    vae: StageConfig = StageConfig(steps=8000, batch=16, lr=2e-3, people=2000)
    wide: StageConfig = StageConfig(steps=10600, batch=16, lr=1.5e-3, people=2000, seed=1)
    base: StageConfig = StageConfig(steps=16000, batch=64, lr=1.5e-3, people=8000)
    shapes: StageConfig = StageConfig(steps=9600, batch=64, lr=1e-3, people=8000, seed=1)
    decoder: StageConfig = StageConfig(steps=6000, batch=8, lr=1e-3, people=8000)
    identity: StageConfig = StageConfig(steps=1400, batch=64, lr=2e-3, ema=0.99)
    attributes: StageConfig = StageConfig(steps=2200, batch=64, lr=2e-3, ema=0.99)
    encoder: StageConfig = StageConfig(steps=5000, batch=64, lr=1e-3, ema=0.99, people=16000, each=2)
    unlabelled: StageConfig = StageConfig(steps=3000, batch=64, lr=1e-3, ema=0.99, people=8000)
    judged_people: int = 200


def build(stage: str, out: Path, config: BuildConfig, device: str = "cpu") -> dict[str, Any]:
    """Runs one stage, or all of them in order.

    Args:
        stage: one of `STAGES`, or `all`.
        out: working folder: pictures, run folders, finished models.

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
            made = getattr(_Stages(out, config, device), name)()
            write_json(done, {**made, "made_by": environment()})
        figures[name] = read_json(done)
        print(f"{name}: {json.dumps({k: v for k, v in figures[name].items() if k != 'made_by'})}", flush=True)
    return figures


@dataclass(frozen=True)
class _Stages:
    """The stages, each a method of its name that returns its figures, in one working folder."""

    out: Path
    config: BuildConfig
    device: str

    def vae(self) -> dict[str, Any]:
        return self._save_vae("vae", train_vae(*self._training("vae")))

    def wide(self) -> dict[str, Any]:
        return self._save_vae("wide", train_wide_vae(self._load_vae("vae"), *self._training("wide")))

    def base(self) -> dict[str, Any]:
        pipe = diffusion.assemble(self._load_vae("wide"), self.config.base.seed)
        diffusion.train_base(pipe, self._load_encoder(), *self._training("base"))
        return self._save_base("base", pipe)

    def shapes(self) -> dict[str, Any]:
        pipe = diffusion.assemble(self._load_vae("wide"), self.config.shapes.seed)
        for part in ("unet", "text_encoder"):
            network = getattr(pipe, part)
            network.load_state_dict(type(network).from_pretrained(self._built("base") / part).state_dict())
        diffusion.train_shapes(pipe, *self._training("shapes"))
        return self._save_base("shapes", pipe)

    def decoder(self) -> dict[str, Any]:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(self._built("shapes"))
        pipe.to(self.device, torch.float32)
        pipe.vae.requires_grad_(False).eval()
        train_decoder(pipe, self._load_encoder(), *self._training("decoder"))
        figures = {"psnr_db": self._psnr(pipe.vae)}
        return {**figures, **self._save_base("decoder", pipe)}

    def scorers(self) -> dict[str, Any]:
        validation = self._validation()
        identity = train_identity(*self._training("identity", album=True))
        people = measure.identity_figures(identity, validation, self.device)
        identity.config.calibration = {"same": people["same"], "stranger": people["stranger"]}
        reader = train_attributes(*self._training("attributes", album=True))
        reader.config.phrases = {
            f"{g}:{v}": phrase for g, values in ATTRIBUTES.items() for v, phrase in values.items() if phrase
        }
        read = measure.attribute_figures(reader, validation, self.device)
        _save(self.out / "scorers" / "identity", identity.cpu().half().save_pretrained)
        _save(self.out / "scorers" / "attributes", reader.cpu().half().save_pretrained)
        return {"identity": people, "attributes": read}

    def encoder(self) -> dict[str, Any]:
        encoder = train_encoder(*self._training("encoder", album=True))
        figures = measure.encoder_figures(encoder, self._validation(album=True), self.device)
        _save(self.out / "encoder", encoder.resnet.cpu().half().save_pretrained)
        return figures

    def unlabelled(self) -> dict[str, Any]:
        drawn, config, folder, device = self._training("unlabelled")
        # each picture on its own: that some show the same person would be a label
        encoder = train_selfsup(replace(drawn, each=1), config, folder, device, strong)
        _save(self.out / "unlabelled", encoder.cpu().half().save_pretrained)
        return {"parameters": _size(encoder)}

    def _training(self, name: str, album: bool = False) -> tuple[Pictures, StageConfig, Path, str]:
        """Returns what a training takes: pictures, config, run folder, device.

        The pictures are all in contexts, to learn to draw, or with `album` half plain, to learn people.
        """
        config: StageConfig = getattr(self.config, name)
        drawn = pictures("base", config.people, config.each, self.out / "pictures", album)
        return drawn, config, self.out / "runs" / name, self.device

    def _validation(self, album: bool = False) -> Pictures:
        return pictures("val", self.config.judged_people, 4, self.out / "pictures", album)

    def _built(self, name: str) -> Path:
        if not (folder := self.out / name).is_dir():
            stage = name.split("/")[0]
            raise InputError(
                f"{folder}: expected the model of the stage {stage}; run the stage {stage} first"
            )
        return folder

    def _load_vae(self, name: str) -> Any:
        vae = diffusers.AutoencoderKL.from_pretrained(self._built(name))
        return vae.requires_grad_(False).to(self.device).eval()

    def _load_encoder(self) -> Any:
        encoder = transformers.ResNetModel.from_pretrained(self._built("encoder")).float()
        return encoder.requires_grad_(False).to(self.device).eval()

    def _save_base(self, stage: str, pipe: Any) -> dict[str, Any]:
        sizes = {"unet": _size(pipe.unet), "text_encoder": _size(pipe.text_encoder)}
        pipe.to("cpu", torch.float16)
        _save(self.out / stage, lambda folder: _write_pipeline(pipe, folder))
        return {"parameters": sizes}

    def _save_vae(self, stage: str, vae: Any) -> dict[str, Any]:
        _save(self.out / stage, vae.save_pretrained)
        return {"psnr_db": self._psnr(vae), "parameters": _size(vae)}

    def _psnr(self, vae: Any) -> float:
        return round(psnr(vae, self._validation(), self.device), 2)


def _write_pipeline(pipe: Any, folder: Path) -> None:
    pipe.save_pretrained(folder, max_shard_size="15MB")
    write_json(
        folder / "hyperdreambooth.json", {"trigger": diffusion.TRIGGER, "class_word": diffusion.CLASS_WORD}
    )
    # stored in float16, used in float32: transformers would load it in float16 beside a float32 UNet
    text = folder / "text_encoder" / "config.json"
    write_json(text, {**read_json(text), "dtype": "float32"})
    for config in ("model_index.json", "vae/config.json", "unet/config.json"):
        _remove_key(folder / config, "_name_or_path")  # a folder on the builder's disk
    # its default, -Infinity, is not valid JSON
    _remove_key(folder / "scheduler" / "scheduler_config.json", "lambda_min_clipped")


def _remove_key(config: Path, name: str) -> None:
    write_json(config, {key: value for key, value in read_json(config).items() if key != name})


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _save(folder: Path, write: Callable[[Path], Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as part:
        write(part)


def pack(out: Path, pack_folder: Path) -> None:
    """Copies base and scorers, and figures and logs, from the working folder into `base/` and `logs/`."""
    with whole_folder(pack_folder / "base") as part:
        shutil.copytree(out / "decoder", part, dirs_exist_ok=True)
        shutil.copytree(out / "scorers", part / "scorers")
    with whole_folder(pack_folder / "logs") as part:
        for run in sorted((out / "runs").iterdir()):
            shutil.copy(run / "log.jsonl", part / f"{run.name}.jsonl")
        for name in STAGES:
            shutil.copy(out / f"{name}.json", part / f"{name}.json")
