"""Every command on the micro base, as users meet them: photos → bank → hypernetwork → person → pictures."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import ResNetConfig, ResNetModel
from typer.testing import CliRunner, Result

from hyperdreambooth.adapter import Adapter, load_adapter
from hyperdreambooth.apps.cli import app
from hyperdreambooth.base.load import load_base
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lora.formats.read import read_lora
from hyperdreambooth.lora.inject import wear, wearable
from hyperdreambooth.lora.relax import scaled
from hyperdreambooth.runs import load_tensors

SMALL = ["--set", "down_dim=4", "--set", "up_dim=3"]
QUICK = ["--set", "draw_steps=2", "--set", "batch=2"]


def hdb(*words: object, code: int = 0) -> Result:
    """Runs a command and insists on its exit code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def error(*words: object) -> str:
    """The one line that bad input gets."""
    lines = hdb(*words, code=2).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def report(out: Path) -> dict[str, Any]:
    """The report beside a file, or in a folder."""
    file = out / "report.json" if out.is_dir() else out.with_name(f"{out.name}.report.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, micro_dir: Path, micro_photos: Path) -> Path:
    """A bank and a hypernetwork on the micro base, made by the commands."""
    home = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    shape = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(shape).save_pretrained(home / "encoder")
    on = ["--base", micro_dir, "--device", "cpu", "--steps", 2]
    hdb("preoptimize", micro_photos, "--out", home / "bank", *on, *SMALL, "--set", "identities_per_batch=4")
    words = [
        "--set",
        f"encoder={home / 'encoder'}",
        "--set",
        "width=8",
        "--set",
        "heads=2",
        "--set",
        "batch=2",
    ]
    words += ["--set", "validation=1", "--set", "draws=1", *SMALL]
    hdb("train", micro_photos, "--out", home / "hypernet", "--bank", home / "bank", *on, *words)
    hdb("predict", photo(micro_photos), "--out", home / "p.lidb.safetensors", *with_network(home, micro_dir))
    return home


def photo(micro_photos: Path) -> Path:
    return micro_photos / "person-0" / "0.png"


def with_network(made: Path, micro_dir: Path) -> list[object]:
    return ["--base", micro_dir, "--device", "cpu", "--hypernet", made / "hypernet"]


def test_preoptimize_makes_a_bank_and_says_so(made: Path) -> None:
    assert len(Bank.open(made / "bank")) == 6
    told = report(made / "bank")
    assert told["identities"] == 6 and told["config"]["steps"] == 2 and told["seconds"]["total"] > 0


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
    told = json.loads(
        hdb("inspect", relaxed, "--json", "--against", tuned, *with_network(made, micro_dir)).stdout
    )
    assert told["kind"] == "lora" and told["rank"] == 3 and told["fits"].startswith("yes")
    assert (
        told["against"]["shared_sites"] == sum(told["sites"].values())
        and told["against"]["relative_distance"] > 0
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
    assert "identity   not judged: this base brings no scorers" in done.stdout
    told = report(out)
    assert {"load", "predict", "relax", "finetune", "generate", "total"} <= told["seconds"].keys()
    nothing = {"base": None, "prediction": None, "finetuned": None}
    assert told["scores"] == {"identity": nothing, "prompt": nothing}
    assert {"lidb", "kohya", "diffusers", "picture"} <= told["files"].keys()
    assert all((out / file).is_file() for file in told["files"].values())
    assert (told["steps"], told["rank"], told["trigger"]) == (2, 2, "sks")
    assert "expected a new or empty folder" in error(
        "personalize", photo(micro_photos), "--out", micro_photos, *with_network(made, micro_dir)
    )


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


def test_generate_wears_several_adapters(made: Path, micro_dir: Path, tmp_path: Path) -> None:
    one = ["--adapter", made / "p.lidb.safetensors"]
    words = [
        "--prompt",
        "a [V] face",
        "--set",
        "steps=2",
        "--set",
        "images=2",
        *with_network(made, micro_dir),
    ]
    hdb("generate", "--out", tmp_path / "pictures", *one, *one, "--weight", 0.5, "--weight", 0.25, *words)
    files = report(tmp_path / "pictures")["files"]
    assert files == ["000-0.png", "000-1.png"]
    first, second = (np.asarray(Image.open(tmp_path / "pictures" / file)) for file in files)
    assert (first != second).any()
    assert "--weight" in error("generate", "--out", tmp_path / "no", *one, *one, "--weight", 0.5, *words)


def test_export_of_a_bank_and_of_a_file(made: Path, micro_dir: Path, tmp_path: Path) -> None:
    network = with_network(made, micro_dir)
    hdb("export", made / "bank", "--identity", "person-2", "--out", tmp_path / "two", *network)
    assert {"lidb", "kohya", "diffusers"} == report(tmp_path / "two")["files"].keys()
    hdb("export", made / "p.lidb.safetensors", "--format", "kohya", "--out", tmp_path / "one", *network)
    assert [file.name for file in tmp_path.glob("one/*.safetensors")] == ["person.safetensors"]
    assert "person-2" in error(
        "export", made / "bank", "--identity", "person-22", "--out", tmp_path / "no", *network
    )
    assert "--identity" in error("export", made / "bank", "--out", tmp_path / "no", *network)
    assert not (tmp_path / "no").exists()


def test_a_merged_pipeline_is_a_base_that_draws_the_person(
    made: Path, micro_dir: Path, tmp_path: Path
) -> None:
    network, file = with_network(made, micro_dir), made / "p.lidb.safetensors"
    hdb("export", file, "--format", "merged", "--out", tmp_path / "out", *network)
    words = ["--prompt", "a [V] face", "--set", "steps=2"]
    hdb("generate", "--out", tmp_path / "worn", "--adapter", file, *words, *network)
    merged = ["--base", tmp_path / "out" / "merged", "--device", "cpu"]
    hdb("generate", "--out", tmp_path / "merged", *words, *merged)
    one, other = (np.asarray(Image.open(tmp_path / k / "000-0.png"), int) for k in ("worn", "merged"))
    assert np.abs(one - other).max() <= 1


def test_inspect_tells_what_a_strangers_file_is(made: Path, micro_dir: Path, tmp_path: Path) -> None:
    network, out = with_network(made, micro_dir), tmp_path / "out"
    hdb("export", made / "p.lidb.safetensors", "--out", out, *network)
    for form, file in report(out)["files"].items():
        told = json.loads(hdb("inspect", out / file, "--json", *network).stdout)
        assert told["format"] == form and told["fits"].startswith("yes") and told["trigger"] == "sks"
        assert (
            len(told["norms"]) == sum(told["sites"].values()) and told["bytes"] == (out / file).stat().st_size
        )
        norm = sum(value**2 for name, value in told["norms"].items() if name.startswith("unet.")) ** 0.5
        assert norm == pytest.approx(told["delta_norm"]["unet"], rel=1e-4)
    wide = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(3, 640)}
    wide |= {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(640, 3)}
    wide |= {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.5)}
    save_file(wide, tmp_path / "sd.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    told = json.loads(hdb("inspect", tmp_path / "sd.safetensors", "--json", *network).stdout)
    assert told["fits"].startswith("no: unet.mid_block") and "norms" not in told
    assert (told["format"], told["base"]) == ("kohya", "sdxl_base_v1-0")
    assert (told["ranks"], told["alphas"], told["layers"]) == ([3], [1.5], {"lora_unet": 1})
    words = ["--against", made / "p.lidb.safetensors"]
    lines = hdb("inspect", out / "person.safetensors", *words, *network).stdout
    assert "ss_network_dim" in lines and "attn1.to_q" in lines and "against cosine" in lines
    wide["lora_unet_mid_block_attentions_0_proj_in.alpha"] *= float("nan")
    save_file(wide, tmp_path / "sd.safetensors")
    assert "NaN" in error("inspect", tmp_path / "sd.safetensors", *network)


def test_number_formats_of_files(made: Path, micro_dir: Path, tmp_path: Path) -> None:
    network = with_network(made, micro_dir)
    for form in ("kohya", "lidb"):
        words = ["--format", form, "--dtype", "float16", "--out", tmp_path / form]
        hdb("export", made / "p.lidb.safetensors", *words, *network)
        (file,) = (tmp_path / form).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_tensors(file)[0].values()} == {torch.float16}
    words = ["--format", "merged", "--dtype", "bfloat16", "--out", tmp_path]
    hdb("export", made / "p.lidb.safetensors", *words, *network)
    (file,) = (tmp_path / "merged" / "unet").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_tensors(file)[0].values()} == {torch.bfloat16}
    words = ["--format", "lidb", "--dtype", "bfloat16", "--out", tmp_path / "no"]
    assert "float32 or float16" in error("export", made / "p.lidb.safetensors", *words, *network)


def test_a_person_and_a_style_become_one_file_that_diffusers_loads(
    made: Path, micro_dir: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    import pipelines

    network, style = with_network(made, micro_dir), tmp_path / "style.safetensors"
    block = "lora_unet_mid_block_attentions_0"
    state: dict[str, torch.Tensor] = {}
    for inner, shape in (("proj_in", (1, 1)), ("transformer_blocks_0_attn1_to_q", ())):
        state[f"{block}_{inner}.lora_down.weight"] = torch.randn(2, 32, *shape) / 4
        state[f"{block}_{inner}.lora_up.weight"] = torch.randn(32, 2, *shape) / 4
    save_file(state, style)
    both = [made / "p.lidb.safetensors", style, "--weight", 1, "--weight", 0.5]
    pipe = StableDiffusionPipeline.from_pretrained(micro_dir)
    pictures = []
    for form in ("diffusers", "kohya"):
        out = tmp_path / f"{form}.safetensors"
        result = hdb("merge", *both, "--format", form, "--out", out, *network)
        assert "rank 3, relative error 0" in result.stdout and report(out)["relative_error"] == 0
        pipe.load_lora_weights(str(tmp_path), weight_name=out.name)
        pictures.append(pipelines.picture(pipe))
        pipe.unload_lora_weights()
    base = load_base(micro_dir, device="cpu")
    person = load_adapter(made / "p.lidb.safetensors", base.sites, base.fingerprint)
    theirs, _ = read_lora(style, wearable(base.components))
    with wear(base.components, person.factors), wear(base.components, scaled(theirs, 0.5), name="style"):
        live = pipelines.picture(base.pipe)
    for picture in pictures:
        torch.testing.assert_close(picture, live, rtol=0, atol=1e-5)
    words = [word for k, word in enumerate(both) for word in (("--adapter", word) if k < 2 else (word,))]
    hdb(
        "generate",
        "--prompt",
        "a [V] face",
        "--set",
        "steps=1",
        "--out",
        tmp_path / "pictures",
        *words,
        *network,
    )
    hdb("merge", *both, "--rank", 1, "--out", tmp_path / "near.safetensors", *network)
    assert 0 < report(tmp_path / "near.safetensors")["relative_error"] < 1
    assert "--weight" in error("merge", *both[:-2], "--out", tmp_path / "no.safetensors", *network)


@pytest.mark.parametrize("method", ["lidb", "lora"])
def test_dreambooth_from_scratch_with_class_images(
    method: str, micro_dir: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDB_CACHE", str(tmp_path / "shared"))
    words = ["--method", method, "--steps", 2, "--base", micro_dir, "--device", "cpu", "--set", "batch=1"]
    words += ["--set", "prior_weight=1", "--set", "prior_images=2", *SMALL]
    hdb("dreambooth", micro_photos / "person-0", "--out", tmp_path / "run", *words)
    files = report(tmp_path / "run")["files"]
    assert ("lidb" in files) == (method == "lidb")
    assert len(list((tmp_path / "shared").glob("class/*/*.png"))) == 2


def test_dreambooth_of_all_weights_is_a_base_and_of_a_word_a_file(
    micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    words = ["--steps", 2, "--base", micro_dir, "--device", "cpu", "--set", "batch=1"]
    hdb("dreambooth", micro_photos / "person-0", "--method", "full", "--out", tmp_path / "full", *words)
    assert report(tmp_path / "full")["files"] == {"pipeline": "pipeline"}
    assert load_base(tmp_path / "full" / "pipeline", device="cpu").trigger == "sks"
    again = ["dreambooth", micro_photos / "person-0", "--method", "textual-inversion", *words]
    hdb(*again, "--out", tmp_path / "word")
    (file,) = report(tmp_path / "word")["files"].values()
    assert list(load_tensors(tmp_path / "word" / file)[0]) == ["<person>"]
    assert "method" in error(
        "dreambooth", micro_photos / "person-0", "--method", "x", "--out", tmp_path / "x"
    )


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
    said = hdb("finetune", prediction, "--photo", photo(micro_photos), "--out", out, *words).stdout
    told = report(out)
    assert told["steps"] in (0, 10, 20, 30) and told["stopped"] in said and told["config"]["steps"] == "auto"
    line = error("finetune", prediction, "--photo", photo(micro_photos), "--out", out, "--steps", "many")
    assert "steps" in line


def test_a_lidb_of_another_base_is_described_but_never_worn(
    made: Path, micro_dir: Path, tmp_path: Path
) -> None:
    import micro

    other = micro.pipeline()
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    file, on = made / "p.lidb.safetensors", ["--base", tmp_path / "other", "--device", "cpu"]
    told = json.loads(hdb("inspect", file, "--json", *on).stdout)
    assert told["fits"].startswith("no") and told["base_fingerprint"] in told["fits"]
    assert told["base_fingerprint"] in error(
        "generate", "--prompt", "a [V] face", "--adapter", file, "--out", tmp_path / "x", *on
    )


def test_a_lora_of_another_base_is_described_but_never_worn(
    made: Path, micro_dir: Path, tmp_path: Path
) -> None:
    import micro

    network, file = with_network(made, micro_dir), tmp_path / "r.safetensors"
    hdb("relax", made / "p.lidb.safetensors", "--out", file, *network)
    other = micro.pipeline()
    with torch.no_grad():
        other.unet.conv_in.bias.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    on = ["--base", tmp_path / "other", "--device", "cpu"]
    told = json.loads(hdb("inspect", file, "--json", *on).stdout)
    assert told["fits"].startswith(f"no: made for base {told['base_fingerprint']}") and "norms" not in told
    words = ["--prompt", "a [V] face", "--adapter", file, "--out", tmp_path / "x"]
    assert told["base_fingerprint"] in error("generate", *words, *on)


def test_a_damaged_lidb_is_an_error_whatever_its_base(made: Path, micro_dir: Path, tmp_path: Path) -> None:
    tensors, header = load_tensors(made / "p.lidb.safetensors")
    torn = tmp_path / "torn.lidb.safetensors"
    save_file(
        {name: tensor * float("nan") for name, tensor in tensors.items()},
        torn,
        {**header, "base_fingerprint": "f" * 16},
    )
    assert "NaN" in error("inspect", torn, "--base", micro_dir, "--device", "cpu")


def test_a_huge_adapter_is_told_in_plain_json(made: Path, micro_dir: Path, tmp_path: Path) -> None:
    network, file = with_network(made, micro_dir), tmp_path / "huge.safetensors"
    hdb("merge", made / "p.lidb.safetensors", "--weight", 1e30, "--out", file, *network)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads(hdb("inspect", file, "--json", "--against", file, *network).stdout, parse_constant=refuse)
    assert "--weight" in error(
        "merge", file, "--weight", "nan", "--out", tmp_path / "no.safetensors", *network
    )


def test_an_output_that_cannot_be_is_refused_before_the_work(micro_photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = ["--base", tmp_path / "nowhere"]  # would be the next error
    for name in ("checkpoint.lidb.safetensors", "file/p.safetensors"):
        assert name.split("/")[0] in error(
            "predict", photo(micro_photos), "--out", tmp_path / name, *nowhere, "--hypernet", tmp_path
        )
    for words in (["generate", "--prompt", "x"], ["export", tmp_path / "a"]):
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
