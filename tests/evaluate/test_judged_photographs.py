"""Photographs: who is judged by an encoder of real faces, and LoRA files of anybody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import ImageEnhance, ImageOps
from safetensors.torch import load_file, save_file

import micro
import pipelines
from commands import hdb, report
from hyperdreambooth.base.load import Base
from shared import needs_photos, portraits

QUICK = ["--set", "draw_steps=1", "--set", 'prompts=["a photo of a [V] {class_word}"]', "--device", "cpu"]


@needs_photos
def test_photographs_are_judged_offline_and_the_report_names_the_judge(
    micro_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dlib")
    # a random autoencoder leaves no face: here it leaves the photo as it is
    monkeypatch.setattr(Base, "encode_images", lambda self, pixels: pixels)
    monkeypatch.setattr(Base, "decode_latents", lambda self, latents: latents)
    for name, photo in zip("ab", portraits(2), strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        darker = ImageEnhance.Brightness(photo).enhance(0.8)
        for number, one in enumerate((photo, ImageOps.mirror(photo), darker, photo.crop((9, 9, 250, 250)))):
            one.save(tmp_path / "photos" / name / f"{number}.png")
    rows = '["another-photo", "somebody-else", "base"]'
    words = ["--set", f"rows={rows}", "--set", "resolution=256", "--seed", 5, "--seed", 6, *QUICK]
    done = hdb("evaluate", tmp_path / "photos", "--base", micro_dir, "--out", tmp_path / "out", *words)
    entries = report(tmp_path / "out")
    assert entries["seeds"] == [5, 6]
    assert (entries["judge"]["name"], entries["scorers"]["base"]) == ("dlib", None)
    scores = {name: row["scores"] for name, row in entries["rows"].items()}
    same, stranger = (scores[name]["identity"]["mean"] for name in ("another-photo", "somebody-else"))
    assert same > 0.95 > 0.6 > stranger
    assert scores["another-photo"]["sim_target"]["mean"] > scores["somebody-else"]["sim_target"]["mean"]
    assert -1 <= scores["another-photo"]["copy_paste"]["mean"] <= 1
    assert scores["base"]["identity"] is None  # noise
    assert "base: 4 of 4 pictures have no identity score: no face is found" in done.stdout
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(word in table for word in ("CC0-1.0", "examples/johns", "Sim(Ref)", "copy_paste"))


def kohya(state: dict[str, torch.Tensor], out: Path) -> None:
    """Writes a UNet's LoRA as kohya's scripts name it, without any metadata."""
    found: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        path, _, end = key.removeprefix("unet.").rpartition(".lora_")
        name = f"lora_unet_{path.replace('.', '_')}"
        side = "lora_down" if end.startswith("A") else "lora_up"
        found |= {f"{name}.{side}.weight": tensor, f"{name}.alpha": torch.tensor(2.0)}
    save_file(found, out)


def evaluated(file: Path, base: Path, photos: Path, out: Path) -> dict[str, Any]:
    words = ["--adapter", file, "--identity", "person-2", "--base", base, "--set", "resolution=32"]
    hdb("evaluate", photos, "--out", out, *words, *QUICK)
    entries = report(out)
    assert list(entries["rows"]) == ["another-photo", "somebody-else", "base", "adapter"]
    assert not (out / "steps.svg").exists()  # nothing was trained
    return entries


@pytest.mark.parametrize("make", [micro.pipeline, pipelines.sdxl, pipelines.sd3, pipelines.flux])
def test_anybody_s_lora_is_evaluated_without_a_hypernetwork(
    make: Callable[[], Any], micro_photos: Path, tmp_path: Path
) -> None:
    pipe, base = make(), tmp_path / "base"
    pipe.save_pretrained(base)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    torch.manual_seed(0)
    getattr(pipe, part).add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(getattr(pipe, part))}
    type(pipe).save_lora_weights(tmp_path, **layers)  # diffusers' own file
    file = tmp_path / "pytorch_lora_weights.safetensors"
    people = evaluated(file, base, micro_photos, tmp_path / "out")["people"]
    assert people["adapter"]["pose_copied"] != people["base"]["pose_copied"]
    if make is micro.pipeline:
        kohya(load_file(file), tmp_path / "kohya.safetensors")
        again = evaluated(tmp_path / "kohya.safetensors", base, micro_photos, tmp_path / "again")
        assert again["people"]["adapter"] == people["adapter"]
