"""What ships: the avatars' pack is whole, small enough, loads in plain diffusers, and does the whole job."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from typer.testing import CliRunner

from hyperdreambooth.adapter import read_adapter
from hyperdreambooth.apps.cli import app
from hyperdreambooth.apps.person_folder import FILES
from hyperdreambooth.base.load import EMBEDDED, load_base
from hyperdreambooth.files import read_json
from hyperdreambooth.generate import generate_images
from hyperdreambooth.hypernet.predictor import load_hypernet
from hyperdreambooth.personalize import EMBEDDED_HYPERNET

PACK = EMBEDDED.parent
PROMPT = "a photo of a [V] face, wearing sunglasses, on a beach"


def test_the_pack_is_small_and_holds_no_pickles() -> None:
    files = [file for file in PACK.rglob("*") if file.is_file()]
    sizes = {file: file.stat().st_size for file in files}
    assert sum(sizes.values()) < 45e6
    assert max(sizes.values()) < 15 * 2**20
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jsonl", ".txt", ".md"}

    for file in files:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # Infinity is no JSON


def test_the_base_is_a_plain_pipeline() -> None:
    pipe = DiffusionPipeline.from_pretrained(EMBEDDED)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert pipe.tokenizer.tokenize("a sks face") == ["a</w>", "sks</w>", "face</w>"]
    assert pipe("a sks face", num_inference_steps=1).images[0].size == (128, 128)


def test_drawing_starts_from_noise_alone() -> None:
    """If training left a trace of the picture, the base would read brightness from it and find none here."""
    sampler = DiffusionPipeline.from_pretrained(EMBEDDED).scheduler
    sampler.set_timesteps(25)
    assert sampler.timesteps[0] == 999
    assert sampler.alphas_cumprod[-1].sqrt() < 1e-3


def test_the_hypernetwork_belongs_to_the_base() -> None:
    load_hypernet(EMBEDDED_HYPERNET).check_fits(load_base(device="cpu").fingerprint)


def test_figures_and_logs_lie_beside_the_weights() -> None:
    logs = {file.name for file in (PACK / "logs").iterdir()}
    assert {"vae.jsonl", "base.jsonl", "hypernet.jsonl", "vae.json", "scorers.json"} <= logs
    assert read_json(PACK / "logs" / "scorers.json")["identity"]["auc"] > 0.5


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hdb demo`, in its shortest form."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    words = [
        "demo",
        "--out",
        str(out),
        "--device",
        "cpu",
        "--seed",
        "5",
        "--set",
        "steps=4",
        "--set",
        "draw_steps=4",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (result.output, result.exception)
    return out


def test_the_demo_reports_what_it_promises(demo: Path) -> None:
    report = read_json(demo / "report.json")
    assert {"load", "predict", "relax", "finetune", "generate", "total"} <= report["seconds"].keys()
    for score in ("identity", "prompt"):
        assert report["scores"][score].keys() == {"base", "prediction", "finetuned"}
        assert all(isinstance(value, float) for value in report["scores"][score].values())
    assert isinstance(report["scores"]["leak"]["finetuned"], float)
    assert {"lidb", "kohya", "diffusers", "picture"} <= report["files"].keys()
    assert all((demo / file).is_file() for file in report["files"].values())
    assert (report["steps"], report["rank"], report["trigger"]) == (4, 4, "sks")


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_plain_diffusers_draws_what_the_live_model_draws(demo: Path, form: str) -> None:
    base = load_base(device="cpu")
    adapter = read_adapter(demo / FILES[form], base.sites, base.fingerprint)  # type: ignore[index]
    live = np.asarray(generate_images(base, [PROMPT], adapter, seed=3, steps=4)[0], dtype=float)
    bare = np.asarray(generate_images(base, [PROMPT], seed=3, steps=4)[0], dtype=float)

    plain = load_base(device="cpu")
    plain.pipe.load_lora_weights(demo, weight_name=FILES[form])  # type: ignore[index]
    theirs = np.asarray(generate_images(plain, [PROMPT], seed=3, steps=4)[0], dtype=float)
    assert np.abs(theirs - live).max() <= 1
    assert np.abs(theirs - bare).max() > 1
