"""Key names against lists made here from the published rules of kohya's and ComfyUI's loaders, not from ours.

kohya (sd-scripts, networks/lora.py): a module of the U-Net it trains is `lora_unet_` and its path, of a CLIP
text encoder `lora_te_` (`lora_te1_`, `lora_te2_` where there are two) and its path from `text_model`, dots
written as underscores; it trains diffusers' U-Net for SD 1.x and the original one for SDXL and Flux. ComfyUI
(comfy/lora.py): `lora_unet_` and the path in the original model, for every weight; for U-Nets also diffusers'
path; the same text encoder names. A module has `.lora_down.weight`, `.lora_up.weight` and `.alpha`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines
from hyperdreambooth.adapter import Adapter
from hyperdreambooth.apps.saving import save_forms
from hyperdreambooth.files import InputError
from hyperdreambooth.lora.formats.headers import LoraInfo
from hyperdreambooth.lora.formats.names import FLUX, SDXL, family_of, family_of_base, kohya_rows
from hyperdreambooth.lora.formats.read import read_lora
from hyperdreambooth.lora.formats.write import Form, write_lora
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.shapes import Factors, Site
from hyperdreambooth.sites import wearable

ATTENTION = [f"attn{a}_to_{part}" for a in (1, 2) for part in ("q", "k", "v", "out_0")]
TEXT = [f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")]

# where transformers stand → how many blocks each has, from the published configurations
DIFFUSERS: dict[str, dict[str, int]] = {
    "SD 1.5": {f"down_blocks_{b}_attentions_{k}": 1 for b in (0, 1, 2) for k in (0, 1)}
    | {"mid_block_attentions_0": 1}
    | {f"up_blocks_{b}_attentions_{k}": 1 for b in (1, 2, 3) for k in (0, 1, 2)},
    "SDXL": {f"down_blocks_{b}_attentions_{k}": depth for b, depth in ((1, 2), (2, 10)) for k in (0, 1)}
    | {"mid_block_attentions_0": 10}
    | {f"up_blocks_{b}_attentions_{k}": depth for b, depth in ((0, 10), (1, 2)) for k in (0, 1, 2)},
}
ORIGINAL: dict[str, dict[str, int]] = {
    "SD 1.5": {f"input_blocks_{b}_1": 1 for b in (1, 2, 4, 5, 7, 8)}
    | {"middle_block_1": 1}
    | {f"output_blocks_{b}_1": 1 for b in range(3, 12)},
    "SDXL": {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10}
    | {"middle_block_1": 10}
    | {f"output_blocks_{b}_1": 10 if b < 3 else 2 for b in range(6)},
}
ENCODERS = {"SD 1.5": {"lora_te": 12}, "SDXL": {"lora_te1": 12, "lora_te2": 32}}
FAMILY = {"SD 1.5": "sd1", "SDXL": "sdxl", "SD3": "sd3", "Flux": "flux"}
HALVES = ("lora_down.weight", "lora_up.weight", "alpha")


def unet(blocks: dict[str, int]) -> set[str]:
    return {
        f"lora_unet_{block}_transformer_blocks_{k}_{end}"
        for block, depth in blocks.items()
        for k in range(depth)
        for end in ATTENTION
    }


def text(encoders: dict[str, int]) -> set[str]:
    return {
        f"{prefix}_text_model_encoder_layers_{k}_{end}"
        for prefix, layers in encoders.items()
        for k in range(layers)
        for end in TEXT
    }


def info(base: str) -> LoraInfo:
    return LoraInfo("sks", base, 512, "Ana", family=FAMILY[base])


def full(base: str) -> tuple[Site, ...]:
    return pipelines.attention_sites(pipelines.parts(pipelines.FULL[base]()))


def zeros(sites: tuple[Site, ...]) -> Factors:
    return {s.name: (torch.zeros(1, 1, s.in_features), torch.zeros(1, s.out_features, 1)) for s in sites}


@pytest.mark.parametrize("base", pipelines.FULL)
def test_every_key_is_known_to_the_loaders_and_every_site_is_covered(base: str, tmp_path: Path) -> None:
    write_lora(
        tmp_path / "a.safetensors",
        zeros(full(base)),
        "kohya",
        LoraInfo("sks", base, 512, "Ana", family=FAMILY[base]),
    )
    keys = set(load_file(tmp_path / "a.safetensors"))
    kohya = unet((DIFFUSERS if base == "SD 1.5" else ORIGINAL)[base]) | text(ENCODERS[base])
    comfy = unet(DIFFUSERS[base]) | unet(ORIGINAL[base]) | text(ENCODERS[base])
    assert keys == {f"{module}.{half}" for module in kohya for half in HALVES}
    assert {key.partition(".")[0] for key in keys} <= comfy


@pytest.mark.parametrize("left_out", [r"attentions\.2", r"up_blocks\.1|down_blocks", r"(up|mid)_block"])
def test_a_choice_of_sites_is_named_as_all_are(left_out: str) -> None:
    """Which layer of the original model a block is follows from the base, not from what else is adapted."""
    sites = full("SDXL")
    whole, some = (
        kohya_rows(sites, SDXL),
        kohya_rows([s for s in sites if not re.search(left_out, s.name)], SDXL),
    )
    assert some == {site: slot for site, slot in whole.items() if site in some}


def test_a_choice_of_fluxs_sites_is_flux() -> None:
    sites = [Site("transformer.transformer_blocks.0.ff.net.0.proj", 3072, 12288)]
    assert family_of(sites) is FLUX
    assert kohya_rows(sites, FLUX)[sites[0].name].module == "lora_unet_double_blocks_0_img_mlp_0"


def test_a_text_encoders_projection_lies_outside_its_model(tmp_path: Path) -> None:
    """In transformers, old and new: `CLIPTextModelWithProjection.text_projection`, beside `text_model`."""
    projection = Site("text_encoder_2.text_projection", 8, 6)
    names: dict[Form, str] = {
        "diffusers": "text_encoder_2.text_projection.lora_A.weight",
        "kohya": "lora_te2_text_projection.lora_down.weight",
    }
    for form, name in names.items():
        file = tmp_path / f"{form}.safetensors"
        if form == "kohya":  # kohya's scripts look for attention and MLPs alone
            with pytest.warns(UserWarning, match=r"leave out the layer text_encoder_2\.text_projection"):
                write_lora(file, zeros((projection,)), form, info("SDXL"))
        else:
            write_lora(file, zeros((projection,)), form, info("SDXL"))
        assert name in load_file(file)


def test_a_rank_that_bfloat16_cannot_count_to_is_written(tmp_path: Path) -> None:
    site = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {site: (torch.ones(1, 387, 320), torch.ones(1, 320, 387))}
    write_lora(
        tmp_path / "a.safetensors",
        factors,
        "kohya",
        info("SD 1.5"),
        torch.bfloat16,
    )
    assert [t.item() for k, t in load_file(tmp_path / "a.safetensors").items() if "alpha" in k] == [387.0]


@pytest.mark.parametrize("base", pipelines.FULL)
def test_both_namings_of_a_unet_are_read(base: str, tmp_path: Path) -> None:
    sites = tuple(s for s in full(base) if s.component == "unet")
    by_name = {slot.module: site for site, slot in kohya_rows(sites, family_of_base(sites)).items()}
    assert len(by_name) == len(sites)
    for blocks in (DIFFUSERS[base], ORIGINAL[base]):
        state = {}
        for module in unet(blocks):
            site = next(s for s in sites if same(module, s.name, base))
            state[f"{module}.lora_down.weight"] = torch.ones(1, site.in_features)
            state[f"{module}.lora_up.weight"] = torch.ones(site.out_features, 1)
        save_file(state, tmp_path / "their.safetensors")
        assert read_lora(tmp_path / "their.safetensors", sites)[0].keys() == {s.name for s in sites}


def same(module: str, site: str, base: str) -> bool:
    """Whether a name of either list is this site, by the order of the lists."""
    block, _, rest = module.removeprefix("lora_unet_").partition("_transformer_blocks_")
    blocks = list(DIFFUSERS[base])
    if block not in blocks:
        block = blocks[list(ORIGINAL[base]).index(block)]
    return site.removeprefix("unet.").replace(".", "_") == f"{block}_transformer_blocks_{rest}"


def flux_keys() -> Iterator[str]:
    for stream in ("img", "txt"):
        yield from (
            f"lora_unet_double_blocks_{k}_{stream}_attn_{end}" for k in (0, 1) for end in ("qkv", "proj")
        )
    yield from (f"lora_unet_single_blocks_{k}_linear1" for k in (0, 1))


def sd3_keys() -> Iterator[str]:
    for block in ("x", "context"):
        yield from (
            f"lora_unet_joint_blocks_{k}_{block}_block_attn_{end}"
            for k in (0, 1)
            for end in ("qkv", "proj")
            if (block, k, end) != ("context", 1, "proj")  # the last block gives the text no output
        )


def test_the_original_form_is_the_denoisers_alone(tmp_path: Path) -> None:
    files = save_forms(adapter_of(CROSS_SDXL), tmp_path, "original")
    assert files == {"original": "person.original.safetensors"}
    (down, up) = load_file(tmp_path / files["original"])
    assert down == "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.lora_A.weight"
    assert up == down.replace("lora_A", "lora_B")
    projection = Site("text_encoder_2.text_projection", 8, 6)
    for site, family in ((projection, "sdxl"), (replace(CROSS_SDXL, in_features=768), "sd1")):
        with pytest.raises(InputError, match=f"the original form has no name for {site.name}; use the kohya"):
            adapter_of(site, family).save(tmp_path / "no.safetensors", "original")
    assert not (tmp_path / "no.safetensors").exists()


CROSS_SDXL = Site("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 2048, 1280)


def adapter_of(site: Site, family: str = "sdxl") -> Adapter:
    return Adapter(zeros((site,)), "sks", "", "", family=family)


@pytest.mark.parametrize(("base", "keys"), [("Flux", flux_keys), ("SD3", sd3_keys)])
def test_fused_forms_are_block_diagonal(base: str, keys: Any, tmp_path: Path) -> None:
    pipe = pipelines.FAMILIES[base]()
    sites = tuple(s for s in pipelines.attention_sites(pipelines.parts(pipe)) if s.component == "transformer")
    factors = {s.name: (torch.randn(1, 2, s.in_features), torch.randn(1, s.out_features, 2)) for s in sites}
    write_lora(tmp_path / "a.safetensors", factors, "kohya", info(base))
    state = load_file(tmp_path / "a.safetensors")
    assert {key.partition(".")[0] for key in state} == set(keys())
    fused = next(key for key in state if "qkv" in key and "lora_up" in key)
    up, hidden = state[fused], len(state[fused]) // 3
    assert up.shape[1] == 6 and state[fused.replace("lora_up.weight", "alpha")] == 6
    for k in range(3):
        rows = up[k * hidden : (k + 1) * hidden]
        assert (
            rows[:, 2 * k : 2 * k + 2].all() and not rows[:, : 2 * k].any() and not rows[:, 2 * k + 2 :].any()
        )


@pytest.mark.parametrize("base", ["Flux", "SD3"])
@pytest.mark.parametrize("start", ["lora_unet_", "diffusion_model.", ""])
def test_dense_fused_layers_of_others_are_split(base: str, start: str, tmp_path: Path) -> None:
    pipe = pipelines.FAMILIES[base]()
    layers = wearable(pipelines.parts(pipe))
    block = "double_blocks.1.img_attn.qkv" if base == "Flux" else "joint_blocks.1.x_block.attn.qkv"
    name = start + (block.replace(".", "_") if start.endswith("_") else block)
    width = next(s.in_features for s in layers if s.name == "transformer.transformer_blocks.1.attn.to_q")
    down, up = torch.randn(4, width), torch.randn(3 * width, 4)
    path = tmp_path / "their.safetensors"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    got, _ = read_lora(path, layers)
    assert sorted(got) == [f"transformer.transformer_blocks.1.attn.to_{letter}" for letter in "kqv"]
    pairs = [got[f"transformer.transformer_blocks.1.attn.to_{letter}"] for letter in "qkv"]
    together = torch.cat([up_[0] @ down_[0] for down_, up_ in pairs])
    torch.testing.assert_close(together, up @ down)


def test_rows_of_a_fused_layer_that_nobody_has_are_refused(tmp_path: Path) -> None:
    pipe = pipelines.flux()
    layers = pipelines.attention_sites(pipelines.parts(pipe))
    down, up = torch.randn(4, 32), torch.randn(7 * 32, 4)
    path = tmp_path / "their.safetensors"
    save_file(
        {
            "lora_unet_single_blocks_0_linear1.lora_down.weight": down,
            "lora_unet_single_blocks_0_linear1.lora_up.weight": up,
        },
        path,
    )
    with pytest.raises(InputError, match="rows that no layer"):
        read_lora(path, layers)
    assert len(read_lora(path, wearable(pipelines.parts(pipe)))[0]) == 4


def test_a_style_lora_of_another_tool_is_worn(tmp_path: Path) -> None:
    """kohya's default also trains feed-forward layers and the 1×1 convolutions around transformers."""
    import micro

    pipe = micro.pipeline()
    components = pipelines.parts(pipe)
    block = "down_blocks.1.attentions.0"
    state, wanted = {}, {}
    for inner in (
        "proj_in",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.attn1.to_q",
        "proj_out",
    ):
        weight = pipe.unet.get_submodule(f"{block}.{inner}").weight
        down, up = torch.randn(2, *weight.shape[1:]) / 4, torch.randn(len(weight), 2, *weight.shape[2:]) / 4
        name = f"lora_unet_{block}.{inner}".replace(".", "_")
        state |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(1.0),
        }
        wanted[f"{block}.{inner}"] = (up.flatten(1) @ down.flatten(1) / 2).view(weight.shape)
    save_file(state, tmp_path / "style.safetensors")
    factors, _ = read_lora(tmp_path / "style.safetensors", wearable(components))
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    bare = pipelines.picture(pipe)
    with wear(components, factors) as worn:
        live = pipelines.picture(pipe)
        two = {name: (down.repeat(2, 1, 1), up.repeat(2, 1, 1)) for name, (down, up) in factors.items()}
        with pytest.raises(ValueError, match="a convolution wears one identity"):
            worn.set(two)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        for name, delta in wanted.items():
            pipe.unet.get_submodule(name).weight.add_(delta)
    torch.testing.assert_close(pipelines.picture(pipe), live, rtol=0, atol=1e-5)
    assert (live - bare).abs().max() > 1e-3
