"""LoRA files: what others load from ours, and what we load from others'."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperdreambooth.files import InputError
from hyperdreambooth.lora.formats import write
from hyperdreambooth.lora.formats.headers import LoraInfo
from hyperdreambooth.lora.formats.read import read_lora
from hyperdreambooth.lora.formats.write import write_lora
from hyperdreambooth.shapes import Factors, Site

SITES = (
    Site("text_encoder.encoder.layers.0.self_attn.out_proj", 5, 6),
    Site("text_encoder.encoder.layers.0.self_attn.q_proj", 6, 5),
    Site("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", 8, 4),
    Site("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 7, 8),
)
TEXT, OUT = SITES[1].name, SITES[2].name
FORMS: tuple[Literal["diffusers", "kohya"], ...] = ("diffusers", "kohya")
INFO = LoraInfo("sks", "micro", 32, "Ana", family="sd1")
State = dict[str, Tensor]


def random_factors(sites: tuple[Site, ...], rank: int = 2, scale: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(0)
    return {
        s.name: (
            torch.randn(1, rank, s.in_features, generator=generator) / s.in_features**0.5,
            torch.randn(1, s.out_features, rank, generator=generator) * scale,
        )
        for s in sites
    }


def same_delta(got: Factors, wanted: Factors, scale: float = 1.0) -> None:
    assert got.keys() == wanted.keys()
    for site, (down, up) in wanted.items():
        torch.testing.assert_close(got[site][1] @ got[site][0], scale * (up @ down), rtol=1e-5, atol=1e-5)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_read_back(tmp_path: Path, form: Literal["diffusers", "kohya"], dtype: torch.dtype) -> None:
    factors = random_factors(SITES)
    write_lora(tmp_path / "ana.safetensors", factors, form, INFO, dtype)
    got, _ = read_lora(tmp_path / "ana.safetensors", SITES)
    rounded = {s: (down.to(dtype).float(), up.to(dtype).float()) for s, (down, up) in factors.items()}
    same_delta(got, rounded)
    assert list(tmp_path.iterdir()) == [tmp_path / "ana.safetensors"]


def test_names_and_header_of_the_diffusers_form(tmp_path: Path) -> None:
    path = tmp_path / "ana.safetensors"
    write_lora(path, random_factors(SITES), "diffusers", INFO)
    keys = load_file(path).keys()
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert f"{OUT}.lora_B.weight" in keys
    metadata = json.loads(header(path)["lora_adapter_metadata"])
    assert {key.partition(".")[2] for key in metadata} == {"r", "lora_alpha", "target_modules"}
    assert metadata["unet.r"] == metadata["unet.lora_alpha"] == 2


def test_names_and_header_of_the_kohya_form(tmp_path: Path) -> None:
    path = tmp_path / "ana.safetensors"
    factors = random_factors(SITES)
    factors[TEXT] = tuple(f[:, :1] if f.shape[1] == 2 else f[..., :1] for f in factors[TEXT])  # type: ignore[assignment]
    write_lora(path, factors, "kohya", INFO)
    tensors, metadata = load_file(path), header(path)
    out = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert {
        f"{m}.{half}" for m in (out, text) for half in ("lora_down.weight", "lora_up.weight", "alpha")
    } <= set(tensors)
    assert all(t.ndim == 0 and t == 2 for key, t in tensors.items() if key.endswith(".alpha"))
    assert all(len(t) == 2 for key, t in tensors.items() if "lora_down" in key)  # one rank, zero-padded
    same_delta(read_lora(path, SITES)[0], factors)
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_output_name"] == "ana"
    assert (metadata["ss_v2"], metadata["ss_base_model_version"]) == ("False", "sd_v1")
    assert metadata["ss_network_dim"] == "2" and float(metadata["ss_network_alpha"]) == 2
    assert "sks" in json.loads(metadata["ss_tag_frequency"])["person"]
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.trigger_phrase"] == "sks" and metadata["modelspec.resolution"] == "32x32"
    assert re.fullmatch("0x[0-9a-f]{64}", metadata["modelspec.hash_sha256"])


def kohya(
    factors: Factors, te: str = "lora_te_", model: str = "text_model_", alpha: float | None = 1.0
) -> State:
    state: State = {}
    for site, (down, up) in factors.items():
        part, _, inner = site.partition(".")
        name = ("lora_unet_" if part == "unet" else te + model) + inner.replace(".", "_")
        state |= {f"{name}.lora_down.weight": down[0], f"{name}.lora_up.weight": up[0]}
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def dotted(
    factors: Factors, start: str = "", model: str = "", halves: tuple[str, str] = ("lora_A", "lora_B")
) -> State:
    state: State = {}
    for site, (down, up) in factors.items():
        part, _, inner = site.partition(".")
        name = start + part + "." + (model if part == "text_encoder" else "") + inner
        state |= {f"{name}.{halves[0]}.weight": down[0], f"{name}.{halves[1]}.weight": up[0]}
    return state


def before_peft(factors: Factors) -> State:
    """diffusers' attention processors, before it used PEFT."""
    state = dotted(factors, model="text_model.", halves=("lora_linear_layer.down", "lora_linear_layer.up"))
    return {
        re.sub(r"\.to_(q|k|v|out)(?:\.0)?\.lora_linear_layer", r".processor.to_\1_lora", key): tensor
        for key, tensor in state.items()
    }


def componentless(factors: Factors) -> State:
    return {
        key.replace("unet.", "base_model.model."): t for key, t in dotted(factors).items() if "unet." in key
    }


@pytest.mark.parametrize(
    ("spell", "scale"),
    [
        (kohya, 0.5),
        (lambda f: kohya(f, alpha=None), 1.0),
        (lambda f: kohya(f, te="lora_te1_"), 0.5),
        (lambda f: kohya(f, te="lora_te1_", model=""), 0.5),
        (lambda f: kohya(f, model=""), 0.5),
        (dotted, 1.0),
        (lambda f: dotted(f, model="text_model."), 1.0),
        (lambda f: dotted(f, halves=("lora_A.default", "lora_B.default")), 1.0),
        (lambda f: dotted(f, halves=("base_layer.lora_A.person", "base_layer.lora_B.person")), 1.0),
        (lambda f: dotted(f, start="base_model.model."), 1.0),
        (lambda f: dotted(f, halves=("lora.down", "lora.up")), 1.0),
        (lambda f: dotted(f, start="_orig_mod.module."), 1.0),
        (lambda f: dotted(f, model="module.text_model."), 1.0),
        (before_peft, 1.0),
        (lambda f: {key: t.half().contiguous() for key, t in dotted(f).items()}, 1.0),
    ],
)
def test_every_spelling_is_read(tmp_path: Path, spell: Callable[[Factors], State], scale: float) -> None:
    factors = {s: (d.half().float(), u.half().float()) for s, (d, u) in random_factors(SITES).items()}
    save_file(spell(factors), tmp_path / "their.safetensors")
    got, _ = read_lora(tmp_path / "their.safetensors", SITES)
    same_delta(got, factors, scale)
    assert all(f.dtype == torch.float32 and len(f) == 1 for pair in got.values() for f in pair)


def test_alpha_of_the_header_is_honoured(tmp_path: Path) -> None:
    factors, path = random_factors(SITES), tmp_path / "their.safetensors"
    config: dict[str, Any] = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}
    config |= {"text_encoder.lora_alpha": 6, "text_encoder.use_rslora": True}
    save_file(dotted(factors), path, metadata={"lora_adapter_metadata": json.dumps(config)})
    got, metadata = read_lora(path, SITES)
    for site, scale in ((OUT, 4.0), (SITES[3].name, 0.5), (TEXT, 6 / 2**0.5)):
        same_delta({site: got[site]}, {site: factors[site]}, scale)
    assert json.loads(metadata["lora_adapter_metadata"]) == config


def test_a_peft_folder(tmp_path: Path) -> None:
    factors, path = random_factors(SITES[2:]), tmp_path / "adapter_model.safetensors"
    save_file(componentless(factors), path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    same_delta(read_lora(path, SITES)[0], factors, 3.0)


def test_mixed_ranks_stay_as_they_are(tmp_path: Path) -> None:
    factors = random_factors(SITES[:2]) | random_factors(SITES[2:], rank=3)
    save_file(kohya(factors, alpha=None), tmp_path / "their.safetensors")
    got, _ = read_lora(tmp_path / "their.safetensors", SITES)
    same_delta(got, factors)
    assert [down.shape[1] for down, _ in got.values()] == [
        2,
        2,
        3,
        3,
    ]  # a dense one would swell all


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=len(SITES), max_size=len(SITES)),
    st.sampled_from(FORMS),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_whatever_the_ranks_it_comes_back(
    ranks: list[int], form: Literal["diffusers", "kohya"], dtype: torch.dtype
) -> None:
    factors = {s.name: random_factors((s,), r)[s.name] for s, r in zip(SITES, ranks, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ana.safetensors"
        write_lora(path, factors, form, INFO, dtype)
        got, metadata = read_lora(path, SITES)
        content = path.read_bytes()
    same_delta(got, {s: (down.to(dtype).float(), up.to(dtype).float()) for s, (down, up) in factors.items()})
    assert {down.shape[1] for down, _ in got.values()} == {max(ranks)}
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert (
        metadata["modelspec.hash_sha256"] == f"0x{digest}"
        and metadata.get("sshs_model_hash", digest) == digest
    )


@pytest.mark.parametrize(
    ("site", "version", "architecture", "v2"),
    [
        ("unet.a.attn2.to_k:768", "sd_v1", "stable-diffusion-v1/lora", "False"),
        ("unet.a.attn2.to_k:1024", "sd_v2_v", "stable-diffusion-v2-768-v/lora", "True"),
        (
            "unet.mid_block.attentions.0.attn2.to_k:2048",
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base/lora",
            "False",
        ),
        ("transformer.transformer_blocks.0.attn.to_q:1536", "sd3_m", "stable-diffusion-3-m/lora", "False"),
        ("transformer.single_transformer_blocks.0.attn.to_q:3072", "flux1", "flux-1-dev/lora", "False"),
        ("transformer.layers.0.attention.to_q:3840", "z_image", "Z-Image/lora", "False"),
        ("transformer.transformer_blocks.0.attn.to_q:4096", "flux_2", "Flux.2/lora", "False"),
        ("transformer.transformer_blocks.0.img_mlp.net.2:3072", "qwen_image", "Qwen-Image/lora", "False"),
        ("transformer.transformer_blocks.0.attn.to_gate:6144", "krea2", "Krea-2/lora", "False"),
    ],
)
def test_headers_name_the_family(tmp_path: Path, site: str, version: str, architecture: str, v2: str) -> None:
    name, _, width = site.partition(":")
    path, info = tmp_path / "ana.safetensors", LoraInfo("sks", "base", 768, "Ana", 40)
    write_lora(path, random_factors((Site(name, int(width), int(width)),)), "kohya", info)
    metadata = header(path)
    assert (metadata["ss_base_model_version"], metadata["modelspec.architecture"], metadata["ss_v2"]) == (
        version,
        architecture,
        v2,
    )
    required = ("sai_model_spec", "architecture", "implementation", "title", "resolution", "date")
    assert all(metadata[f"modelspec.{field}"] for field in required)
    assert metadata["ss_steps"] == "40" and metadata["ss_resolution"] == "(768, 768)"


def without(state: State, ending: str) -> State:
    doomed = next(key for key in state if key.endswith(ending))
    return {key: t for key, t in state.items() if key != doomed}


def with_nan(state: State) -> State:
    return {key: t.clone().fill_(torch.nan) for key, t in state.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: (
                s
                | {"unet.conv_in.lora_A.weight": torch.zeros(2, 3)}
                | {"unet.conv_in.lora_B.weight": torch.zeros(3, 2)}
            ),
            "fit no layer of this base: unet.conv_in",
        ),
        (
            lambda s: s | {f"{OUT}.dora_scale": torch.zeros(3)},
            "is a DoRA, whose ΔW depends on the base's weights",
        ),
        (lambda s: s | {f"{OUT}.lora_B.bias": torch.zeros(4)}, r"holds changes of biases.*lora_B\.bias"),
        (lambda s: s | {f"unet.x{k}.weight": torch.zeros(2, 3) for k in range(9)}, "and 4 more"),
        (lambda s: without(s, "lora_B.weight"), "only its down matrix"),
        (lambda s: without(s, "lora_A.weight"), "only its up matrix"),
        (lambda s: s | {f"{OUT}.lora_A.weight": torch.zeros(2, 9)}, r"expected down \(r, 8\).*another base"),
        (
            lambda s: s | {f"{OUT}.lora_B.weight": torch.zeros(4, 3)},
            r"expected down \(r, i\) and up \(o, r\), got \(2, 8\) and \(4, 3\)",
        ),
        (lambda s: s | {f"{OUT}.lora_A.weight": torch.zeros(2, 8, 3, 3)}, r"got \(2, 8, 3, 3\)"),
        (
            lambda s: (
                s | {f"{OUT}.lora_A.weight": torch.zeros(0, 8), f"{OUT}.lora_B.weight": torch.zeros(4, 0)}
            ),
            "got",
        ),
        (lambda s: s | {f"{OUT}.lora_A.other.weight": torch.zeros(2, 8)}, "two down matrices"),
        (with_nan, "NaN"),
        (lambda s: {f"{OUT}.alpha": torch.tensor(1.0)}, "expected a LoRA"),
    ],
)
def test_damage_is_one_clear_line(tmp_path: Path, damage: Callable[[State], State], message: str) -> None:
    path = tmp_path / "their.safetensors"
    save_file(damage(dotted(random_factors(SITES))), path)
    with pytest.raises(InputError, match=message) as error:
        read_lora(path, SITES)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "expected an object"),
        ('{"unet.lora_alpha": "much"}', "no usable number"),
        ('{"unet.alpha_pattern": [1]}', "no usable number"),
    ],
)
def test_a_broken_header(tmp_path: Path, field: str, message: str) -> None:
    path = tmp_path / "their.safetensors"
    save_file(dotted(random_factors(SITES)), path, metadata={"lora_adapter_metadata": field})
    with pytest.raises(InputError, match=message):
        read_lora(path, SITES)


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "ana.safetensors"
    write_lora(path, random_factors(SITES), "kohya", INFO)
    path.write_bytes(path.read_bytes()[:-20])
    for name in ("ana.safetensors", "nobody.safetensors"):
        with pytest.raises(InputError, match=name):
            read_lora(tmp_path / name, SITES)


def test_what_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = random_factors(SITES)
    for name in ("ana-checkpoint.safetensors", "ana.bin"):
        with pytest.raises(InputError, match=r"ends in \.safetensors, without checkpoint"):
            write_lora(tmp_path / name, factors, "diffusers", INFO)
    huge = random_factors(SITES, scale=1e12)  # 1e6 fits, shared between up and down
    with pytest.raises(InputError, match=r"infinite numbers in torch\.float16"):
        write_lora(tmp_path / "ana.safetensors", huge, "kohya", INFO, torch.float16)
    two = {s: (d.repeat(2, 1, 1), u.repeat(2, 1, 1)) for s, (d, u) in factors.items()}
    with pytest.raises(ValueError, match="one identity, not 2"):
        write_lora(tmp_path / "ana.safetensors", two, "kohya", INFO)
    with pytest.raises(ValueError, match="no name for transformer"):
        write_lora(
            tmp_path / "ana.safetensors", random_factors((Site("transformer.q", 3, 3),)), "kohya", INFO
        )
    monkeypatch.setattr(
        write, "read_lora", lambda *_: ({s: (d, u * 1.01) for s, (d, u) in factors.items()}, {})
    )
    with pytest.raises(RuntimeError, match="relative error"):
        write_lora(tmp_path / "ana.safetensors", factors, "diffusers", INFO)
    monkeypatch.setattr(write, "read_lora", lambda *_: ({}, {}))
    with pytest.raises(RuntimeError, match="wrote 4 sites, read back 0"):
        write_lora(tmp_path / "ana.safetensors", factors, "diffusers", INFO)
    assert list(tmp_path.iterdir()) == []
