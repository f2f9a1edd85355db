"""What tools load of a file, by written rules: against diffusers itself; makes the table in docs/formats.md.

`HDB_WRITE_TABLE=1 pytest tests/lora/test_tools.py` writes the table anew. ComfyUI, Forge
and kohya's scripts cannot be run here: their rules were compared with the tools' code on these same files.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import later
import pytest
import spellings
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from edges import ODD
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from spellings import KOHYA, PEFT, Made, dotted, kohya, write
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import micro
import pipelines
import qwens
from hyperdreambooth.files import InputError
from hyperdreambooth.lora.formats.describe import describe
from hyperdreambooth.lora.formats.layers import family_in_layers, layers_of
from hyperdreambooth.lora.formats.tools import TOOLS

DOC = Path(__file__).parents[2] / "docs" / "formats.md"
FILES = {**spellings.FILES, **later.FILES}
BEGIN, END = "<!-- tools -->\n", "<!-- end of tools -->\n"


def text_of(family: str, file: str, folder: Path) -> dict[str, str]:
    made = FILES[family, file](folder)
    tools = describe(write(folder / "x.safetensors", made))["tools"]
    return {tool: tools[tool]["text"] if tools else "no rules" for tool in TOOLS}


def test_the_table_in_the_docs(tmp_path: Path) -> None:
    rows = [f"| base | file | {' | '.join(TOOLS)} |", "|---|---|" + "---|" * len(TOOLS)]
    for family, file in FILES:
        rows.append(f"| {family} | {file} | {' | '.join(text_of(family, file, tmp_path).values())} |")
    table = "\n".join([*rows, ""])
    before, _, rest = DOC.read_text(encoding="utf-8").partition(BEGIN)
    shown, _, after = rest.partition(END)
    if os.environ.get("HDB_WRITE_TABLE"):
        DOC.write_text(before + BEGIN + table + END + after, encoding="utf-8")
    else:
        assert shown == table
    assert len(FILES) >= 40


@pytest.mark.parametrize(("family", "file"), FILES)
def test_the_family_is_that_of_the_layers(family: str, file: str, tmp_path: Path) -> None:
    made = describe(write(tmp_path / "x.safetensors", FILES[family, file](tmp_path)))
    assert made["family"] == family
    assert not any("header names" in warning and "layers" in warning for warning in made["warnings"])


def _clip(width: int, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=width, intermediate_size=4 * width, num_attention_heads=2,
        num_hidden_layers=1, max_position_embeddings=16, projection_dim=width, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _sd(tokens: int) -> Any:
    """SD 1.5 or 2.1 at its real widths, without its weights."""
    pipe = micro.pipeline()
    with torch.device("meta"):
        pipe.unet = UNet2DConditionModel(cross_attention_dim=tokens, use_linear_projection=tokens > 768)
        pipe.text_encoder = _clip(tokens)
    return pipelines.weightless(pipe)


def _sdxl() -> Any:
    pipe = pipelines.full_sdxl()
    with torch.device("meta"):
        pipe.text_encoder, pipe.text_encoder_2 = _clip(768), _clip(1280, projected=True)
    return pipelines.weightless(pipe)


def _sd3() -> Any:
    pipe = pipelines.sd3()
    with torch.device("meta"):
        pipe.transformer = SD3Transformer2DModel(
            sample_size=16, num_layers=2, attention_head_dim=64, num_attention_heads=24,
            caption_projection_dim=1536,
        )  # fmt: skip
        pipe.text_encoder, pipe.text_encoder_2 = _clip(768, projected=True), _clip(1280, projected=True)
    return pipelines.weightless(pipe)


def _flux() -> Any:
    pipe = pipelines.flux()
    with torch.device("meta"):
        pipe.transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
        pipe.text_encoder = _clip(768)
    return pipelines.weightless(pipe)


def _later(family: str) -> Any:
    """One block of each kind at its real width; FLUX.2 is klein 9B."""
    makers: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "Z-Image": (qwens.zimage, lambda: ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1)),
        "FLUX.2": (
            qwens.klein,
            lambda: Flux2Transformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=32),
        ),
        "Qwen-Image": (qwens.qwenimage, lambda: QwenImageTransformer2DModel(num_layers=1)),
        "Krea 2": (qwens.krea2, lambda: Krea2Transformer2DModel(num_layers=1)),
    }
    pipe, make = makers[family][0](), makers[family][1]
    with torch.device("meta"):
        pipe.transformer = make()
    return pipelines.weightless(pipe)


PIPELINES: dict[str, Callable[[], Any]] = {
    "SD 1.5": lambda: _sd(768), "SD 2.1": lambda: _sd(1024), "SDXL": _sdxl, "SD3": _sd3, "Flux": _flux,
    **{family: partial(_later, family) for family in later.DIFFUSERS},
}  # fmt: skip


def in_diffusers(pipe: Any, path: Path) -> tuple[int, list[float]] | None:
    """Has plain diffusers load a file of ones: adapted layers and factors of ΔW; None if it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    except (ValueError, KeyError, RuntimeError, AssertionError):
        return None
    found: list[float] = []
    for part in pipelines.parts(pipe).values():
        for layer in part.modules():
            if isinstance(layer, LoraLayer):
                (name,) = layer.lora_A
                down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
                found.append(float(down.flatten()[0] * up.abs().max() * layer.scaling[name]))
            if isinstance(layer, LoKrLayer):
                (name,) = layer.lokr_w1
                found.append(float(layer.lokr_w1[name].detach().abs().max() * layer.scaling[name]))
    pipe.unload_lora_weights()
    return len(found), sorted({round(value, 6) for value in found})


def around(family: str, odd: spellings.State) -> Made:
    """A whole file with one odd layer more, because diffusers looks at the file first."""
    first = next(iter(odd))
    if first.startswith(("lora_transformer", "base_model", "transformer_blocks")) or (
        family == "SD 1.5" and "input_blocks" in first
    ):
        return odd, {}
    if first.endswith("lora_A.weight"):
        return dotted(family)[0] | odd, {}
    if first.startswith("transformer."):
        return odd, {}
    alpha = {first.replace(KOHYA[0], "alpha"): torch.tensor(float(spellings.RANK))}
    return kohya(family, float(spellings.RANK))[0] | odd | alpha, {}


def fused(path: Path) -> int:
    """How many more layers diffusers makes of those of a file: three of a qkv, four of Flux's `linear1`."""
    layers = [layer for layer in layers_of(spellings.entries(path))[0] if layer.down]
    extra = {"qkv": 2, "linear1": 0 if family_in_layers(layers) == "FLUX.2" else 3}
    return sum(
        extra.get(layer.flat.rpartition("_")[2], 0)
        for layer in layers
        if layer.naming == "flux" or (layer.naming == "zimage fused" and "lora_down" in layer.down)
    )


@pytest.mark.parametrize("family", PIPELINES)
def test_the_rules_of_diffusers_are_what_diffusers_does(family: str, tmp_path: Path) -> None:
    pipe = PIPELINES[family]()
    files = {file: FILES[base, file](tmp_path) for base, file in FILES if base == family}
    files |= {next(iter(odd)): around(family, odd) for odd in ODD.get(family, ())}
    for file, made in files.items():
        path = write(tmp_path / "x.safetensors", made)
        rule, got = describe(path)["tools"]["diffusers"], in_diffusers(pipe, path)
        if got is None or rule["refused"]:
            assert got is None and rule["refused"], (file, rule, got)
            continue
        more = fused(path) if rule["loaded"] else 0
        assert (rule["loaded"] + more, list(rule["strengths"])) == got, (file, rule, got)


def tools_of(
    state: spellings.State, tmp_path: Path, metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    return describe(write(tmp_path / "x.safetensors", (state, metadata or {})))["tools"]


def test_comfyui_and_forge_ignore_the_header_that_diffusers_reads(tmp_path: Path) -> None:
    state, metadata = spellings.with_header("Flux", 8)
    tools = tools_of(state, tmp_path, metadata)
    assert {tool: tools[tool]["strengths"] for tool in ("ComfyUI", "Forge", "diffusers")} == {
        "ComfyUI": (1.0,), "Forge": (1.0,), "diffusers": (2.0,)
    }  # fmt: skip


@pytest.mark.parametrize(("layers", "refused"), [(6, False), (7, True)])
def test_forge_takes_at_most_twelve_strange_keys(layers: int, refused: bool, tmp_path: Path) -> None:
    state, _ = kohya("SD 1.5")
    for number in range(layers):
        state |= spellings.pair(f"base_model.model.layer.{number}", 768, 768, PEFT)
    assert bool(tools_of(state, tmp_path)["Forge"]["refused"]) == refused


def test_a1111_wants_all_four_layers_of_an_attention_of_openclip(tmp_path: Path) -> None:
    state, _ = kohya("SDXL")
    whole = tools_of(state, tmp_path)["A1111"]
    part = {key: value for key, value in state.items() if "lora_te2_" not in key or "out_proj" not in key}
    assert (whole["ignored"], tools_of(part, tmp_path)["A1111"]["ignored"]) == (0, 3)


def test_a1111_loads_the_attention_of_sd3_if_nothing_has_an_alpha(tmp_path: Path) -> None:
    state, _ = dotted("SD3", text=False)
    assert tools_of(state, tmp_path)["A1111"]["loaded"] == 4
    state["transformer.alpha"] = torch.tensor(1.0)
    assert "alpha" in tools_of(state, tmp_path)["A1111"]["refused"]


def test_kohya_needs_alphas_for_transformers_only(tmp_path: Path) -> None:
    for family, refused in (("SDXL", False), ("SD3", True), ("Flux", True)):
        assert bool(tools_of(kohya(family, None)[0], tmp_path)["kohya"]["refused"]) == refused
    odd = {"lora_unet_time_embedding_linear_1": (320, 1280), "lora_te_text_projection": (768, 768)}
    state = kohya("SD 1.5")[0]
    for module, widths in odd.items():
        state |= spellings.pair(module, *widths, KOHYA)
    tools = tools_of(state, tmp_path)
    assert tools["kohya"]["ignored"] == 2 and tools["ComfyUI"]["ignored"] == 1


@pytest.mark.parametrize(
    ("module", "columns", "rows", "family"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 1024, 4096, "SD 2.1"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216, ""),  # Flux, or FLUX.2 klein 4B
        ("lora_unet_double_blocks_5_img_attn_qkv", 3072, 9216, "Flux"),
        ("lora_unet_double_blocks_5_img_attn_qkv", 4096, 12288, "FLUX.2"),
        ("lora_unet_double_blocks_5_txt_attn_qkv", 6144, 18432, "FLUX.2"),
        ("transformer.transformer_blocks.20.attn.to_q", 3072, 3072, "Qwen-Image"),
        ("transformer.transformer_blocks.3.attn.to_q", 6144, 6144, "Krea 2"),
        ("transformer.transformer_blocks.3.ff.net.0.proj", 3072, 12288, "Flux"),
        ("transformer.transformer_blocks.3.attn.to_q", 1536, 1536, "SD3"),
        ("lora_unet_single_blocks_0_linear1", 3072, 27648, "FLUX.2"),
        ("diffusion_model.layers.3.feed_forward.w1", 3840, 10240, "Z-Image"),
        ("diffusion_model.context_refiner.0.attention.qkv", 3840, 11520, "Z-Image"),
        ("transformer.text_fusion.refiner_blocks.0.attn.to_q", 2560, 2560, "Krea 2"),
        ("transformer.transformer_blocks.3.ff.down", 16384, 6144, "Krea 2"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", 640, 640, ""),
        ("something.else", 8, 8, ""),
    ],
)
def test_the_family_of_a_single_layer(
    module: str, columns: int, rows: int, family: str, tmp_path: Path
) -> None:
    state = spellings.pair(module, columns, rows, KOHYA)
    path = write(tmp_path / "x.safetensors", (state, {}))
    assert family_in_layers(layers_of(spellings.entries(path))[0]) == family


def warnings_of(made: Made, folder: Path) -> str:
    return "; ".join(describe(write(folder / "x.safetensors", made))["warnings"])


def test_inert_files_are_named(tmp_path: Path) -> None:
    state, _ = kohya("SD 1.5")
    header = {"modelspec.trigger_phrase": "sks", "ss_base_model_version": "sd_v1"}
    assert not warnings_of((state, header), tmp_path)
    ups = [key for key in state if "lora_up" in key]
    untrained = state | {key: torch.zeros_like(state[key]) for key in ups}
    assert "inert" in warnings_of((untrained, header), tmp_path)
    alphas = {key: torch.tensor(0.0) for key in state if key.endswith(".alpha")}
    assert "inert" in warnings_of((state | alphas, header), tmp_path)
    partly = state | {ups[0]: torch.zeros_like(state[ups[0]])}
    assert f"1 of {len(ups)} layers" in warnings_of((partly, header), tmp_path)
    lokr = spellings.lycoris("Flux")[0]
    flat = lokr | {key: torch.zeros_like(value) for key, value in lokr.items() if "lokr_w2_b" in key}
    assert "inert" in warnings_of((flat, {}), tmp_path)
    other = {**header, "ss_base_model_version": "sdxl_base_v1-0"}
    assert "SDXL, but the layers are those of SD 1.5" in warnings_of((state, other), tmp_path)
    assert "trigger" in warnings_of((state, {}), tmp_path)
    wrapped, _ = dotted("SDXL", "unet.wrapped.", text=False)
    assert "no known family" in warnings_of((wrapped, {}), tmp_path)
    assert "none of these tools" in warnings_of((wrapped, other), tmp_path)


def test_kohyas_captions_name_the_trigger(tmp_path: Path) -> None:
    header = {"ss_tag_frequency": '{"10_ana": {"sks person": 10, "smile": 4}}'}
    made = describe(write(tmp_path / "x.safetensors", (kohya("SD 1.5")[0], header)))
    assert made["trigger"] == "sks person"
    header = {"ss_tag_frequency": "[1, 2"}
    assert not describe(write(tmp_path / "x.safetensors", (kohya("SD 1.5")[0], header)))["trigger"]


def test_damaged_files_and_files_of_something_else_are_errors(tmp_path: Path) -> None:
    state, _ = kohya("SD 1.5")
    key = next(iter(state))
    for value in ("nan", "inf"):
        torn = state | {key: torch.full_like(state[key], float(value))}
        with pytest.raises(InputError, match="NaN"):
            describe(write(tmp_path / "x.safetensors", (torn, {})))
    with pytest.raises(InputError, match="expected a LoRA"):
        describe(write(tmp_path / "x.safetensors", ({"unet.conv_in.weight": torch.ones(4, 4)}, {})))
    half = {name: value for name, value in state.items() if name != key}
    assert "lack one of their matrices" in warnings_of((half, {}), tmp_path)
