"""What people pass as a base by mistake: recognised by its names, and the line says what to do with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel

import micro
import pipelines
import qwens
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.base.recognise import VARIANTS, check_base, only_variant
from hyperdreambooth.files import InputError, write_json


def tensors(path: Path, *names: str, shape: tuple[int, ...] = (2, 2), **metadata: str) -> None:
    save_file({name: torch.ones(shape) for name in names}, path, metadata=metadata or None)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)


FILES: dict[str, tuple[Any, str]] = {
    "peft.safetensors": (["unet.q.lora_A.weight"], "a LoRA; pass it as an adapter"),
    "kohya.safetensors": (["lora_unet_q.lora_down.weight", "lora_unet_q.alpha"], "a LoRA; pass it as"),
    "loha.safetensors": (["lora_unet_q.hada_w1_a"], "a LoRA; pass it as an adapter"),
    "lokr.safetensors": (["lycoris_q.lokr_w1"], "a LoRA; pass it as an adapter"),
    "control.safetensors": (["control_model.input_blocks.0.0.weight"], "a ControlNet; pass the whole"),
    "ip.safetensors": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter; pass"),
    "word.safetensors": (["emb_params"], "the embedding of a word; pass the whole"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_base_is_named(name: str, tmp_path: Path) -> None:
    names, words = FILES[name]
    tensors(tmp_path / name, *names)
    with pytest.raises(
        InputError, match=rf"^base .*{name}: expected a text-to-image pipeline, found {words}"
    ):
        check_base(tmp_path / name)
    with pytest.raises(InputError, match=words):  # at once, and offline
        load_base(tmp_path / name, "cpu")


def test_a_lidb_and_a_picture_are_named(tmp_path: Path) -> None:
    tensors(tmp_path / "p.safetensors", "numbers", lidb_format="1")
    picture(tmp_path / "ana.jpg")
    for name, words in (
        ("p.safetensors", "a LiDB; pass it as an adapter"),
        ("ana.jpg", "pass it as a photo"),
    ):
        with pytest.raises(InputError, match=words):
            check_base(tmp_path / name)


@pytest.mark.parametrize(("channels", "words"), [(9, "inpainting"), (8, "edits pictures"), (7, "upscaler")])
def test_a_u_net_that_takes_more_than_noise_is_refused(channels: int, words: str, tmp_path: Path) -> None:
    pipe = micro.pipeline()
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": channels})
    pipe.save_pretrained(tmp_path / "folder")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tensors(tmp_path / "file.safetensors", first, shape=(8, channels, 3, 3))
    for place in ("folder", "file.safetensors"):
        with pytest.raises(InputError, match=words) as caught:
            load_base(tmp_path / place, "cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=words):
        Base.from_pipeline(pipe, "in memory")


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_every_family_takes_the_channels_that_it_should(family: str, tmp_path: Path) -> None:
    pipelines.FAMILIES[family]().save_pretrained(tmp_path)
    check_base(tmp_path)


@pytest.mark.parametrize("make", [qwens.qwenimage, qwens.krea2, qwens.klein])
def test_a_transformer_that_takes_a_picture_as_well_is_refused(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    pipe = make()
    pipe.transformer.register_to_config(in_channels=2 * pipe.transformer.config.in_channels)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="takes 16 channels, found another kind of model, which takes 32"):
        check_base(tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_that_is_not_supported_is_named_with_one_that_is(name: str, tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {"_class_name": name})
    with pytest.raises(InputError, match=r"Krea2Pipeline, got .*; use (FLUX|Qwen|Flux2Klein)") as caught:
        load_base(tmp_path, "cpu")
    assert "\n" not in str(caught.value)


def folders(home: Path) -> dict[str, str]:
    """Makes one folder of each kind, and returns what is expected of its name."""
    micro.pipeline().unet.save_pretrained(home / "unet")
    ControlNetModel.from_unet(micro.unet()).save_pretrained(home / "controlnet")
    CLIPTextModel(micro.text_encoder(micro.tokenizer()).config).save_pretrained(home / "clip")
    (home / "empty").mkdir()
    (home / "lora").mkdir()
    tensors(home / "lora" / "pytorch_lora_weights.safetensors", "unet.q.lora_A.weight")
    (home / "loose").mkdir()
    tensors(home / "loose" / "model.safetensors", "a.b")
    picture(home / "photos" / "ana" / "0.png")
    write_json(home / "result" / "merged" / "model_index.json", {})
    write_json(home / "models--o--n" / "snapshots" / "abc" / "model_index.json", {})
    write_json(home / "hypernet" / "config.json", {"facts": {}, "network": {}})
    write_json(home / "bank" / "manifest.json", {})
    write_json(home / "modular" / "modular_model_index.json", {})
    tensors(home / "bank" / "start.safetensors", "start")
    return {
        "unet": "UNet2DConditionModel, one part", "controlnet": "ControlNetModel, one part",
        "clip": "a clip_text_model model of transformers", "empty": "an empty folder",
        "lora": "a folder with a LoRA; name the file in it", "loose": "pass one of them, such as .*model",
        "photos": "a folder of pictures; pass it as photos", "result": "pass .*merged$",
        "models--o--n": "cache of a pipeline; pass .*abc$", "hypernet": "pass it as --hypernet",
        "bank": "a bank; pass it to export", "modular": "a modular pipeline",
    }  # fmt: skip


def test_a_folder_that_is_no_base_is_named(tmp_path: Path) -> None:
    for name, words in folders(tmp_path).items():
        with pytest.raises(InputError, match=words):
            load_base(tmp_path / name, "cpu")


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_a_folder_of_one_variant_is_loaded(shards: dict[str, str], micro_dir: Path, tmp_path: Path) -> None:
    micro.pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16", **shards)
    assert only_variant(tmp_path) == "fp16" and only_variant(micro_dir) is None
    assert load_base(tmp_path, "cpu").dtype == torch.float32
    for dtype in ("float16", "bfloat16"):
        assert load_base(tmp_path, "cpu", dtype).fingerprint == load_base(micro_dir, "cpu", dtype).fingerprint
    shutil.copytree(micro_dir, tmp_path, dirs_exist_ok=True)  # both kinds: the plain files
    assert only_variant(tmp_path) is None


def test_nothing_heavy_is_imported_to_recognise() -> None:
    code = "import hyperdreambooth.base.recognise, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers"} & set(json.loads(done.stdout))
