"""Every command on the micro base, as users meet them: photos → bank → hypernetwork → person → pictures."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from commands import QUICK, SMALL, error, hdb, photo, report, with_network
from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import load_base
from hyperdreambooth.files import load_tensors
from hyperdreambooth.lidb.bank import Bank

PICTURE = ["--prompt", "a [V] face", "--set", "draw_steps=2"]


def test_preoptimize_makes_a_bank_and_says_so(made: Path) -> None:
    assert len(Bank.open(made / "bank")) == 6
    entries = report(made / "bank")
    assert entries["identities"] == 6 and entries["config"]["steps"] == 2 and entries["seconds"]["total"] > 0


def test_train_makes_a_self_describing_folder(made: Path) -> None:
    assert (made / "hypernet" / "model.safetensors").is_file()
    assert report(made / "hypernet")["config"]["width"] == 8
    assert list((made / "hypernet" / "run" / "pictures").glob("*.png"))


def test_the_same_command_again_resumes(made: Path, micro_dir: Path, micro_photos: Path) -> None:
    on = ["--base", micro_dir, "--device", "cpu", "--steps", 2, *SMALL]
    hdb("preoptimize", micro_photos, "--out", made / "bank", *on, "--set", "identities_per_batch=4")
    line = error("preoptimize", micro_photos, "--out", made / "bank", *on, "--set", "lr=0.5")
    assert "lr" in line and "--out" in line


def test_predict_relax_finetune(made: Path, micro_dir: Path, micro_photos: Path, tmp_path: Path) -> None:
    prediction, relaxed, tuned = (
        made / "p.lidb.safetensors",
        tmp_path / "r.safetensors",
        tmp_path / "t.safetensors",
    )
    assert report(prediction)["rank"] == 1
    hdb("relax", prediction, "--rank", 3, "--out", relaxed, *with_network(made, micro_dir))
    assert report(relaxed)["rank"] == 3
    same = ["--rank", 3, "--steps", 2, "--format", "kohya", "--set", "batch=2"]
    hdb(
        "finetune",
        prediction,
        "--photo",
        photo(micro_photos),
        "--out",
        tuned,
        *same,
        *with_network(made, micro_dir),
    )
    assert any(name.startswith("lora_unet_") for name in load_tensors(tuned)[0])
    entries = json.loads(
        hdb("inspect", relaxed, "--json", "--against", tuned, *with_network(made, micro_dir)).stdout
    )
    assert entries["kind"] == "lora" and entries["rank"] == 3 and entries["fits"].startswith("yes")
    assert (
        entries["against"]["shared_sites"] == sum(entries["sites"].values())
        and entries["against"]["relative_distance"] > 0
    )
    again = json.loads(
        hdb("inspect", relaxed, "--json", "--against", prediction, *with_network(made, micro_dir)).stdout
    )
    assert again["against"]["relative_distance"] < 1e-5 and again["against"]["cosine"] == pytest.approx(1)


def test_personalize_writes_one_whole_folder(
    made: Path, micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "me"
    words = ["--prompt", "a [V] face", "--prompt", "a [V] face, smiling", "--rank", 2, "--steps", 2, *QUICK]
    done = hdb("personalize", micro_photos / "person-1", "--out", out, *words, *with_network(made, micro_dir))
    assert "identity   not scored: no other photo" in done.stdout
    assert "prompt     not scored: this base has no scorers" in done.stdout
    entries = report(out)
    assert {"load", "predict", "relax", "finetune", "generate", "total"} <= entries["seconds"].keys()
    nothing = {"base": None, "prediction": None, "finetuned": None}
    leak = {"finetuned": None}
    assert entries["scores"] == {"identity": nothing, "prompt": nothing, "leak": leak}
    assert entries["judge"]["name"] == "dlib" and "CC0" in entries["judge"]["licence"]
    assert {"lidb", "kohya", "diffusers", "picture"} <= entries["files"].keys()
    assert all((out / file).is_file() for file in entries["files"].values())
    assert (entries["steps"], entries["rank"], entries["trigger"]) == (2, 2, "sks")
    assert "expected a new or empty folder" in error(
        "personalize", photo(micro_photos), "--out", micro_photos, *with_network(made, micro_dir)
    )


# for the 16 tokens of the micro base
@pytest.mark.filterwarnings("ignore:1 of 1 captions are too long", "ignore:.*after the end of what is read")
def test_demo_draws_a_held_out_avatar(made: Path, micro_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    words = ["--set", "steps=1", "--set", 'prompts=["a [V] face", "a pencil sketch of a [V] face"]', *QUICK]
    result = hdb("demo", "--out", out, "--seed", 3, *words, *with_network(made, micro_dir))
    assert str(out / "picture.png") in result.stdout
    with Image.open(out / "picture.png") as picture:
        assert picture.width > 600
    assert report(out)["seed"] == 3 and report(out)["command"] == "demo"
    assert "seed" in error("demo", "--out", tmp_path / "no", "--seed", -1, *with_network(made, micro_dir))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("method", ["lidb", "lora"])
def test_dreambooth_from_scratch_with_class_images(
    method: str, micro_dir: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDB_CACHE", str(tmp_path / "shared"))
    words = ["--method", method, "--steps", 2, "--base", micro_dir, "--device", "cpu", "--set", "batch=1"]
    words += ["--set", "prior_weight=1", "--set", "prior_images=2", *SMALL, *PICTURE]
    hdb("dreambooth", micro_photos / "person-0", "--out", tmp_path / "run", *words)
    files = report(tmp_path / "run")["files"]
    assert ("lidb" in files) == (method == "lidb")
    assert len(list((tmp_path / "shared").glob("class/*/*.png"))) == 2


def test_dreambooth_of_all_weights_is_a_base_and_of_a_word_a_file(
    micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    words = ["--steps", 2, "--base", micro_dir, "--device", "cpu", "--set", "batch=1", *PICTURE]
    hdb("dreambooth", micro_photos / "person-0", "--method", "full", "--out", tmp_path / "full", *words)
    files = report(tmp_path / "full")["files"]
    assert files["pipeline"] == "pipeline" and "card" not in files  # which tells how to load a LoRA
    assert all((tmp_path / "full" / file).exists() for file in files.values())
    assert load_base(tmp_path / "full" / "pipeline", device="cpu").trigger == "sks"
    again = ["dreambooth", micro_photos / "person-0", "--method", "textual-inversion", *words]
    hdb(*again, "--out", tmp_path / "word")
    file = report(tmp_path / "word")["files"]["textual-inversion"]
    assert list(load_tensors(tmp_path / "word" / file)[0]) == ["<person>"]
    assert "method" in error(
        "dreambooth", micro_photos / "person-0", "--method", "x", "--out", tmp_path / "x"
    )
    (tmp_path / "mine" / "pipeline").mkdir(parents=True)
    assert "expected a new or empty folder" in error(*again, "--out", tmp_path / "mine")


def test_steps_auto_says_where_it_stopped_and_why(
    made: Path, micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    words = [
        "--steps",
        "auto",
        "--rank",
        2,
        "--set",
        "batch=1",
        "--set",
        "most=30",
        *with_network(made, micro_dir),
    ]
    out = tmp_path / "t.safetensors"
    prediction = made / "p.lidb.safetensors"
    printed = hdb("finetune", prediction, "--photo", photo(micro_photos), "--out", out, *words).stdout
    entries = report(out)
    assert (
        entries["steps"] in (0, 10, 20, 30)
        and entries["stopped"] in printed
        and entries["config"]["steps"] == "auto"
    )
    line = error("finetune", prediction, "--photo", photo(micro_photos), "--out", out, "--steps", "many")
    assert "steps" in line


def test_a_finetune_calls_the_person_as_its_file_does(
    made: Path, micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    words = ["finetune", made / "p.lidb.safetensors", "--photo", photo(micro_photos), "--steps", 2]
    words += ["--rank", 2, "--set", "batch=1", *with_network(made, micro_dir)]
    hdb(*words, "--out", one)
    hdb(*words, "--out", two, "--set", "trigger=another")
    trained, again = load_tensors(one)[0], load_tensors(two)[0]
    assert all(trained[name].equal(again[name]) for name in trained)
    assert report(two)["trigger"] == "sks"


def test_an_output_that_cannot_be_is_refused_before_the_work(
    micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    nowhere = ["--base", tmp_path / "nowhere"]  # would be the next error
    for name in ("checkpoint.lidb.safetensors", "file/p.safetensors"):
        assert name.split("/")[0] in error(
            "predict", photo(micro_photos), "--out", tmp_path / name, *nowhere, "--hypernet", tmp_path
        )
    weights = micro_dir / "vae" / "diffusion_pytorch_model.safetensors"  # a whole file, of whatever
    for words in (["generate", "--prompt", "x"], ["export", weights]):
        assert "another --out" in error(*words, "--out", tmp_path / "file", *nowhere)


def test_a_full_disk_leaves_no_part_of_a_set(
    made: Path, micro_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, out = Adapter.save, tmp_path / "out"

    def full(adapter: Adapter, path: Path, form: str, *rest: Any) -> None:
        if form == "diffusers":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(adapter, path, form, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Adapter, "save", full)
    words = ["export", made / "p.lidb.safetensors", "--out", out, *with_network(made, micro_dir)]
    assert "disk is full" in hdb(*words, code=1).stderr and not list(out.iterdir())
    monkeypatch.undo()
    hdb(*words)
    names = {"report.json", *report(out)["files"].values()}
    assert {file.name for file in out.iterdir()} == names and len(names) == 4


def test_bad_photos_are_one_line(made: Path, micro_dir: Path, micro_photos: Path, tmp_path: Path) -> None:
    network, out = with_network(made, micro_dir), ["--out", tmp_path / "p.lidb.safetensors"]
    (tmp_path / "empty").mkdir()
    torn = tmp_path / "torn.png"
    torn.write_bytes(photo(micro_photos).read_bytes()[:60])
    tiny = tmp_path / "tiny.png"
    Image.new("RGB", (8, 8)).save(tiny)
    for bad in (tmp_path / "none.jpg", tmp_path / "empty", torn, tiny):
        assert str(bad) in error("predict", bad, *out, *network)
    assert ".safetensors" in error("predict", photo(micro_photos), "--out", tmp_path / "p.png", *network)
    assert not (tmp_path / "p.lidb.safetensors").exists()
