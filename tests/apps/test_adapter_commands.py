"""Commands on existing adapters: generate, export, merge, inspect; and adapters of another base."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from commands import error, hdb, report, with_network
from hyperdreambooth.adapter import load_adapter
from hyperdreambooth.base.load import EMBEDDED, load_base
from hyperdreambooth.files import load_tensors
from hyperdreambooth.lora.formats.read import read_lora
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import scaled
from hyperdreambooth.sites import wearable


@pytest.mark.filterwarnings("ignore:adapters of two people")  # twice the same one
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


def test_inspect_shows_what_a_strangers_file_is(made: Path, micro_dir: Path, tmp_path: Path) -> None:
    network, out = with_network(made, micro_dir), tmp_path / "out"
    hdb("export", made / "p.lidb.safetensors", "--out", out, *network)
    for form, file in report(out)["files"].items():
        entries = json.loads(hdb("inspect", out / file, "--json", *network).stdout)
        assert entries["format"] == form and entries["fits"].startswith("yes") and entries["trigger"] == "sks"
        assert (
            len(entries["norms"]) == sum(entries["sites"].values())
            and entries["bytes"] == (out / file).stat().st_size
        )
        norm = sum(value**2 for name, value in entries["norms"].items() if name.startswith("unet.")) ** 0.5
        assert norm == pytest.approx(entries["delta_norm"]["unet"], rel=1e-4)
    wide = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(3, 640)}
    wide |= {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(640, 3)}
    wide |= {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.5)}
    save_file(wide, tmp_path / "sd.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    entries = json.loads(hdb("inspect", tmp_path / "sd.safetensors", "--json", *network).stdout)
    assert entries["fits"].startswith("no: unet.mid_block") and "norms" not in entries
    assert (entries["format"], entries["base"]) == ("kohya", "sdxl_base_v1-0")
    assert (entries["ranks"], entries["alphas"], entries["layers"]) == ([3], [1.5], {"lora_unet": 1})
    words = ["--against", made / "p.lidb.safetensors"]
    lines = hdb("inspect", out / "person.safetensors", *words, *network).stdout
    assert "ss_network_dim" in lines and "attn1.to_q" in lines and "against cosine" in lines
    wide["lora_unet_mid_block_attentions_0_proj_in.alpha"] *= float("nan")
    save_file(wide, tmp_path / "sd.safetensors")
    assert "NaN" in error("inspect", tmp_path / "sd.safetensors", *network)


def test_a_lora_is_inspected_without_any_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's file, which our reader refuses, and whose base would take seconds."""
    monkeypatch.setitem(sys.modules, "hyperdreambooth.apps.loading", None)  # importing it now fails
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    shapes = {"a": (1280, 2), "b": (2, 768)}
    loha = {f"{stem}.hada_w{k}_{half}": torch.ones(shape) for k in "12" for half, shape in shapes.items()}
    save_file(loha, tmp_path / "loha.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    entries = json.loads(hdb("inspect", tmp_path / "loha.safetensors", "--json").stdout)
    assert (entries["family"], entries["kinds"]) == ("SD 1.5", {"loha": 1})
    assert entries["fits"] == "not checked; name a base with --base"
    loaded = {tool: reading["loaded"] for tool, reading in entries["tools"].items()}
    assert loaded == {"ComfyUI": 1, "A1111": 1, "Forge": 1, "diffusers": 0, "kohya": 0}
    text = hdb("inspect", tmp_path / "loha.safetensors").stdout
    assert "the header names SDXL, but the layers are those of SD 1.5" in text
    assert "  diffusers                refused: it cannot rename" in text


def test_number_formats_of_files(made: Path, micro_dir: Path, tmp_path: Path) -> None:
    network = with_network(made, micro_dir)
    for form in ("kohya", "lidb"):
        words = ["--format", form, "--dtype", "float16", "--out", tmp_path / form]
        hdb("export", made / "p.lidb.safetensors", *words, *network)
        (file,) = (tmp_path / form).glob("*.safetensors")
        weights = {name: t for name, t in load_tensors(file)[0].items() if not name.endswith(".alpha")}
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
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
    person = load_adapter(made / "p.lidb.safetensors", base)
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
    entries = json.loads(hdb("inspect", file, "--json", *on).stdout)
    assert entries["fits"].startswith("no") and entries["base_fingerprint"] in entries["fits"]
    assert entries["base_fingerprint"] in error(
        "generate", "--prompt", "a [V] face", "--adapter", file, "--out", tmp_path / "x", *on
    )


def test_a_lora_of_another_checkpoint_of_the_family_is_worn_with_a_warning(
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
    entries = json.loads(hdb("inspect", file, "--json", *on).stdout)
    assert entries["fits"].startswith("yes: ") and "norms" in entries
    assert f"made for base {entries['base_fingerprint']}" in entries["fits"]
    words = ["--prompt", "a [V] face", "--adapter", file, "--out", tmp_path / "x"]
    with pytest.warns(UserWarning, match=entries["base_fingerprint"]):
        hdb("generate", *words, *on, "--set", "steps=1")


def test_a_damaged_lidb_is_an_error_whatever_its_base(made: Path, micro_dir: Path, tmp_path: Path) -> None:
    tensors, header = load_tensors(made / "p.lidb.safetensors")
    torn = tmp_path / "torn.lidb.safetensors"
    save_file(
        {name: tensor * float("nan") for name, tensor in tensors.items()},
        torn,
        {**header, "base_fingerprint": "f" * 16},
    )
    assert "NaN" in error("inspect", torn, "--base", micro_dir, "--device", "cpu")


def test_a_huge_adapter_becomes_plain_json(made: Path, micro_dir: Path, tmp_path: Path) -> None:
    network, file = with_network(made, micro_dir), tmp_path / "huge.safetensors"
    hdb("merge", made / "p.lidb.safetensors", "--weight", 1e30, "--out", file, *network)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads(hdb("inspect", file, "--json", "--against", file, *network).stdout, parse_constant=refuse)
    assert "--weight" in error(
        "merge", file, "--weight", "nan", "--out", tmp_path / "no.safetensors", *network
    )


WEIGHTS = str(EMBEDDED / "vae" / "diffusion_pytorch_model.safetensors")  # a whole file, of whatever


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "none.safetensors"),
        ("inspect", WEIGHTS, "--against", "none.safetensors"),
        ("relax", "none.safetensors", "--out", "a.safetensors"),
        ("finetune", "none.safetensors", "--photo", __file__, "--out", "a.safetensors"),
        ("export", "none.safetensors", "--out", "out"),
        ("merge", WEIGHTS, "none.safetensors", "--out", "a.safetensors"),
        ("generate", "--prompt", "a face", "--adapter", "none.safetensors", "--out", "out"),
    ],
)
def test_a_missing_file_is_an_error_before_the_base_is_loaded(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "none.safetensors: no such file" in error(*words, "--base", "nowhere")


def test_what_another_command_made_is_not_written_over(made: Path, tmp_path: Path) -> None:
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "report.json").write_text('{"command": "personalize"}')
    (tmp_path / "mine" / "merged").mkdir(parents=True)
    for out, found in (
        (tmp_path / "me", "a result of personalize"),
        (tmp_path / "mine", "a pipeline from else"),
    ):
        assert f"a result of export, found {found}" in error(
            "export", made / "p.lidb.safetensors", "--out", out
        )
    for words in (("generate", "--prompt", "a face"), ("evaluate", "faces")):
        assert "found a result of personalize" in error(*words, "--out", tmp_path / "me")
