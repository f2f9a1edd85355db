"""Loading: every form a base comes in, what is refused at once, sites and sizes by config."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil

import micro
import pipelines
from hyperdreambooth.base import load, text
from hyperdreambooth.base.device import pick_device
from hyperdreambooth.base.load import FAMILIES, Base, load_base, plain_attention
from hyperdreambooth.base.open import open_skeleton
from hyperdreambooth.files import InputError, load_tensors, save_tensors


def original(pipe: Any) -> dict[str, torch.Tensor]:
    """The weights of a micro U-Net pipeline by their names in the original model's own checkpoints."""
    made: dict[str, torch.Tensor] = {}
    places = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2", "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1", "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1", "up_blocks.0.upsamplers.0": "output_blocks.1.2",
        "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
    }  # fmt: skip
    inside = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    for name, tensor in pipe.unet.state_dict().items():
        place = next(p for p in sorted(places, key=len, reverse=True) if name.startswith(f"{p}."))
        rest = name[len(place) + 1 :]
        if ".resnets." in place or place.startswith("mid_block.resnets"):
            head, _, tail = rest.partition(".")
            rest = f"{inside[head]}.{tail}"
        made[f"model.diffusion_model.{places[place]}.{rest}"] = tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        made[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.contiguous() for name, tensor in (made | _autoencoder(pipe.vae)).items()}


def _autoencoder(vae: Any) -> dict[str, torch.Tensor]:
    """The same of its autoencoder, whose decoder's levels count the other way; it has no attention."""
    made: dict[str, torch.Tensor] = {}
    levels = len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name
        )
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        made[f"first_stage_model.{name}"] = tensor
    return made


def test_a_single_file_is_the_same_base(micro_dir: Path, tmp_path: Path) -> None:
    save_file(original(micro.pipeline()), tmp_path / "whole.safetensors")
    one = load_base(tmp_path / "whole.safetensors", "cpu", base_config=str(micro_dir), offline=True)
    folder = load_base(micro_dir, "cpu")
    assert (one.fingerprint, one.sites, one.trigger) == (folder.fingerprint, folder.sites, "sks")
    pixels = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(one.encode_images(pixels), folder.encode_images(pixels))


def test_variants_and_parts_that_are_left_out(tmp_path: Path) -> None:
    pipe = pipelines.sd3_with_t5()
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    whole = load_base(tmp_path, "cpu", "float16", variant="fp16", resolution=32)
    assert "text_encoder_3" in whole.parts and whole.dtype == torch.float16
    left = ("text_encoder_3", "tokenizer_3")
    small = load_base(tmp_path, "cpu", "float16", variant="fp16", resolution=32, leave_out=left)
    assert "text_encoder_3" not in small.parts and small.fingerprint == whole.fingerprint
    assert small.encode_prompts(small.tokenize(["a [V] face"]))["hidden"][:, 32:].abs().sum() == 0


def test_another_family_a_pickle_and_nothing_are_one_line_each(micro_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    pickled = tmp_path / "pickled"
    StableDiffusionPipeline.from_pretrained(micro_dir).save_pretrained(pickled, safe_serialization=False)
    for place, told in (
        (other, "expected one of .*, got KandinskyPipeline"), (tmp_path / "model.ckpt", "safetensors"),
        (pickled, "loaded"), ("nobody/nothing", "not on this machine"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told) as caught:
            load_base(place, "cpu", offline=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["text_encoder/model", "vae/diffusion_pytorch_model"])
def test_a_base_whose_copying_was_cut_short_is_one_line(micro_dir: Path, tmp_path: Path, part: str) -> None:
    torn, lacking = tmp_path / "torn", tmp_path / "lacking"
    for place in (torn, lacking):
        shutil.copytree(micro_dir, place)
    file = torn / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    tensors, _ = load_tensors(lacking / "unet" / "diffusion_pytorch_model.safetensors")
    tensors.pop("conv_in.weight")
    save_tensors(lacking / "unet" / "diffusion_pytorch_model.safetensors", tensors)
    for place in (torn, lacking):
        with pytest.raises(InputError, match=f"base {place}: ") as caught:
            load_base(place, "cpu")
        assert "\n" not in str(caught.value)


def test_a_number_format_is_one_of_three(micro_dir: Path) -> None:
    with pytest.raises(
        InputError, match="dtype: expected auto or one of float32, bfloat16, float16, got fp16"
    ):
        load_base(micro_dir, "cpu", "fp16")
    assert load_base(micro_dir, "cpu", torch.bfloat16).dtype == torch.bfloat16


def test_of_single_files_only_safetensors_are_opened(micro_dir: Path, tmp_path: Path) -> None:
    torch.save(original(micro.pipeline()), tmp_path / "whole.ckpt")
    for config in (None, str(micro_dir)):
        with pytest.raises(InputError, match="pickles are never opened"):
            load_base(tmp_path / "whole.ckpt", "cpu", base_config=config, offline=True)
        with pytest.raises(InputError, match="pickles are never opened"):
            open_skeleton(str(tmp_path / "whole.ckpt"), tuple(FAMILIES), base_config=config)


def test_a_single_file_has_a_skeleton_by_the_configs_of_its_like(micro_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "whole.safetensors"
    save_file(original(micro.pipeline()), file)
    thin = Base.from_pipeline(open_skeleton(str(file), tuple(FAMILIES), base_config=str(micro_dir)), "x")
    assert thin.sites == load_base(micro_dir, "cpu").sites and thin.device.type == "meta"
    with pytest.raises(InputError, match="hub cannot be reached; set base_config to a pipeline folder"):
        open_skeleton(str(file), tuple(FAMILIES))
    with pytest.raises(InputError, match="hub cannot be reached; set base_config to a pipeline folder"):
        load_base(file, "cpu", offline=True)


def test_a_skeleton_has_the_parts_that_belong_to_pipelines_alone(tmp_path: Path) -> None:
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config=tower, vision_config={**tower, "image_size": 8, "patch_size": 4})
    pipe = micro.pipeline()
    checker = StableDiffusionSafetyChecker(config)
    pipe.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessorPil())
    pipe.save_pretrained(tmp_path)
    thin = open_skeleton(str(tmp_path), tuple(FAMILIES))
    assert sum(p.numel() for p in thin.safety_checker.parameters()) == sum(
        p.numel() for p in checker.parameters()
    )
    assert open_skeleton(str(tmp_path), tuple(FAMILIES), leave_out=["safety_checker"]).safety_checker is None


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("model_index.json", "{}", r"model_index\.json: expected a table with _class_name"),
        ("model_index.json", "[]", r"model_index\.json: expected a table with _class_name"),
        ("hyperdreambooth.json", "[]", r'hyperdreambooth\.json: expected \{"trigger"'),
        ("hyperdreambooth.json", '{"resolution": "large"}', r"got \{'resolution': 'large'\}"),
    ],
)
def test_odd_notes_of_a_base_are_one_line(tmp_path: Path, file: str, content: str, told: str) -> None:
    micro.pipeline().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=told):
        load_base(tmp_path, "cpu")


def test_only_what_no_base_needs_can_be_left_out(micro_dir: Path) -> None:
    assert load_base(micro_dir, "cpu", leave_out=("safety_checker", "image_encoder")).sites
    for name in ("unet", "text_encoder", "safty_checker"):
        with pytest.raises(InputError, match=f"leave_out: expected any of safety_checker, .*, got {name}"):
            load_base(micro_dir, "cpu", leave_out=(name,))
    with pytest.raises(InputError, match="leave out both"):
        load_base(micro_dir, "cpu", leave_out=("tokenizer_3",))


def test_a_device_that_is_not_here_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "open_pipeline", lambda *_: pytest.fail("the base was loaded"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "cuda:0", "mps", "bogus", "cpu:1"):
        with pytest.raises(InputError, match=rf"one of those here \(cpu\), got {device}$"):
            load_base(None, device)
    assert pick_device().type == pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "3")  # as accelerate and torchrun tell each process
    assert pick_device() == pick_device("cuda") == torch.device("cuda", 1)
    with pytest.raises(InputError, match=r"\(cuda, cpu\), got cuda:2"):
        pick_device("cuda:2")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_base_is_the_same_base_in_half_precision(dtype: str, micro_dir: Path, tmp_path: Path) -> None:
    half = load_base(micro_dir, "cpu", dtype)
    assert half.dtype == getattr(torch, dtype)
    assert half.fingerprint == load_base(micro_dir, "cpu").fingerprint
    micro.pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.fp16-0*.safetensors"))) > 1
    assert load_base(tmp_path, "cpu", dtype, variant="fp16").fingerprint == half.fingerprint


def test_patterns_add_feed_forward_layers_and_leave_out_the_text_encoder(micro_dir: Path) -> None:
    plain = load_base(micro_dir, "cpu")
    more = load_base(micro_dir, "cpu", add_sites=r"\.ff\.net", skip_sites="^text_encoder")
    attention = {s for s in plain.sites if s.component == "unet"}
    added = set(more.sites) - attention
    assert attention < set(more.sites)
    assert len(added) == 2 * 4 and all(".ff.net." in site.name for site in added)
    for options in ({"add_sites": "("}, {"add_sites": "nowhere"}, {"skip_sites": "."}):
        with pytest.raises(InputError, match="sites"):
            load_base(micro_dir, "cpu", **options)  # type: ignore[arg-type]


def test_trigger_class_word_and_resolution_come_from_the_user_then_the_folder(micro_dir: Path) -> None:
    assert load_base(micro_dir, "cpu").prompt("a [V]") == "a sks"
    base = load_base(micro_dir, "cpu", trigger="zwx", class_word="man", resolution=64)
    assert (base.prompt("a [V]"), base.class_word, base.resolution) == ("a zwx", "man", 64)
    with pytest.raises(InputError, match="multiple of 8"):
        load_base(micro_dir, "cpu", resolution=33)


def test_small_maps_on_a_cpu_take_plain_attention(micro_dir: Path) -> None:
    small = load_base(micro_dir, "cpu").pipe.unet
    assert {type(each) for each in small.attn_processors.values()} == {AttnProcessor}
    large = micro.pipeline()
    large.unet.register_to_config(sample_size=64)
    plain_attention(Base.from_pipeline(large, "large"))
    assert {type(each) for each in large.unet.attn_processors.values()} == {AttnProcessor2_0}


def read_by_t5(pipe: Any, *prompts: str) -> torch.Tensor:
    """What Flux's T5 makes of prompts."""
    return text.frozen_states(pipe, "text_encoder_2", text.token_numbers(pipe.tokenizer_2, [*prompts], 8))


def test_a_frozen_reader_reads_a_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.flux()
    seen: list[int] = []
    pipe.text_encoder_2.register_forward_pre_hook(lambda _, words: seen.append(len(words[0])))
    states = read_by_t5(pipe, "ab", "c", "ab")
    torch.testing.assert_close(states, read_by_t5(pipe, "ab", "c", "ab"))
    alone = pipe.text_encoder_2(text.token_numbers(pipe.tokenizer_2, ["c"], 8))[0]
    torch.testing.assert_close(states[1], alone[0])
    assert seen == [2, 1]
    monkeypatch.setattr(text, "REMEMBERED", 1)
    assert len(read_by_t5(pipe, "ab", "c", "ab")) == 3
    read_by_t5(pipe, "ab", "c", "ab")
    assert seen[2:] == [1]  # the younger one was still known


def test_what_was_read_follows_an_encoder_that_moves() -> None:
    """The meta device stands for an accelerator, where some texts were read and others not yet."""
    pipe = pipelines.flux()
    read_by_t5(pipe, "ab")
    pipe.text_encoder_2.to("meta")
    assert read_by_t5(pipe, "ab", "c").device.type == "meta"


@pytest.mark.parametrize("name", pipelines.FAMILIES)
def test_a_skeleton_has_the_same_sites_and_no_weights(name: str, tmp_path: Path) -> None:
    pipelines.FAMILIES[name]().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    skeleton = Base.from_pipeline(open_skeleton(str(tmp_path), tuple(FAMILIES)), "x", resolution=32)
    assert skeleton.device.type == "meta"
    assert skeleton.sites == Base.from_pipeline(pipelines.FAMILIES[name](), "x", resolution=32).sites
