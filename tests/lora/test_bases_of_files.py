"""Which base a file is for: families of few layers, text encoders alone, and names of the original models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_krea2_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import pipelines
from hyperdreambooth.adapter import Adapter, load_adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.generate import wearing
from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import Lidb, save_lidb
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.lora.formats.headers import LoraInfo
from hyperdreambooth.lora.formats.names import FAMILIES, family_of, kohya_rows
from hyperdreambooth.lora.formats.read import read_lora
from hyperdreambooth.lora.formats.write import check_form, write_lora
from hyperdreambooth.lora.relax import fresh, relative_distance
from hyperdreambooth.shapes import Site
from hyperdreambooth.sites import wearable

SELF = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CLIP = "text_encoder.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("sites", "fitting"),
    [
        ([(CROSS, 768)], "sd1"),
        ([(CROSS, 1024)], "sd2"),
        ([(CROSS, 2048)], "sdxl"),
        ([(CLIP, 1024)], "sd2"),
        ([("unet.mid_block.attentions.0.transformer_blocks.3.attn1.to_q", 1280)], "sdxl"),
        ([("transformer.single_transformer_blocks.0.attn.to_q", 9)], "flux"),
        ([("transformer.transformer_blocks.0.attn.to_q", 1536)], "sd3"),
        ([("transformer.transformer_blocks.0.attn2.to_q", 9)], "sd3"),
        ([(CLIP, 768), (SELF, 1280), (CROSS, 2048)], "sdxl"),
        ([("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", 4096)], "flux"),
        ([("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", 4096)], "sd3"),
        ([(CLIP, 768)], "sd1, sdxl, sd3, flux"),
        ([(SELF, 1280)], "sd1, sd2, sdxl"),
        ([(CLIP, 768), (SELF, 1280)], "sd1, sdxl"),
        ([("text_encoder_2.encoder.layers.0.self_attn.q_proj", 1280)], "sdxl, sd3"),
        ([("transformer.transformer_blocks.0.attn.to_q", 9)], "sd3, flux, flux2, qwenimage, krea2"),
        ([("transformer.transformer_blocks.0.attn.to_q", 3072)], "flux, flux2, qwenimage"),
        ([("transformer.transformer_blocks.0.attn.to_q", 6144)], "flux2, krea2"),
        ([("transformer.transformer_blocks.0.attn.add_q_proj", 4096)], "flux2"),
        ([("transformer.transformer_blocks.0.ff.net.2", 12288)], "flux"),
        ([("transformer.single_transformer_blocks.0.attn.to_out", 9)], "flux2"),
        ([("transformer.transformer_blocks.0.attn.to_gate", 9)], "krea2"),
        ([("transformer.transformer_blocks.0.txt_mlp.net.2", 9)], "qwenimage"),
        ([("transformer.layers.0.attention.to_q", 9)], "zimage"),
    ],
)
def test_layers_of_several_families_are_a_question(sites: list[tuple[str, int]], fitting: str) -> None:
    layers = [Site(name, width, width) for name, width in sites]
    if "," not in fitting:
        assert family_of(layers).name == fitting
        return
    with pytest.raises(InputError, match=rf"these families of bases: {fitting}; name the base .*--base"):
        family_of(layers)
    for name in fitting.split(", "):
        assert family_of(layers, name) is FAMILIES[name]


def of_pair(site: Site, rank: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, site.in_features), torch.randn(site.out_features, rank)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_foreign_lora_of_one_text_encoder_keeps_the_family_of_its_base(part: str, tmp_path: Path) -> None:
    base = Base.from_pipeline(pipelines.sdxl(), "micro")
    site = next(site for site in base.sites if site.name == f"{part}.encoder.layers.0.self_attn.q_proj")
    down, up = of_pair(site)
    folder = tmp_path / "any"  # PEFT's own names have no component: the shapes decide
    folder.mkdir()
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, folder / "their.safetensors")
    adapter = load_adapter(folder / "their.safetensors", base)
    assert list(adapter.factors) == [site.name]
    adapter.save(tmp_path / "out.safetensors", "kohya")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
        number = 2 if part == "text_encoder_2" else 1
        assert all(key.startswith(f"lora_te{number}_") for key in file.keys())  # noqa: SIM118 - no mapping


def test_sites_that_were_skipped_do_not_change_the_family(tmp_path: Path) -> None:
    base = Base.from_pipeline(pipelines.sdxl(), "micro", skip_sites=r"^unet|^text_encoder_2")
    Adapter.made_on(base, fresh(base.sites, 2)).save(tmp_path / "ana.safetensors", "kohya")
    assert all(key.startswith("lora_te1_") for key in load_file(tmp_path / "ana.safetensors"))


def test_two_encoders_alike_are_told_apart_by_the_folder(tmp_path: Path) -> None:
    layers = [
        Site(f"{part}.encoder.layers.0.self_attn.q_proj", 8, 8) for part in ("text_encoder", "text_encoder_2")
    ]
    down, up = of_pair(layers[0])
    state = {
        f"encoder.layers.0.self_attn.q_proj.lora_{half}.weight": t for half, t in (("A", down), ("B", up))
    }
    save_file(state, tmp_path / "their.safetensors")
    with pytest.raises(InputError, match="fit text_encoder and text_encoder_2 alike; put it into a folder"):
        read_lora(tmp_path / "their.safetensors", layers)
    (tmp_path / "text_encoder_2").mkdir()
    save_file(state, tmp_path / "text_encoder_2" / "their.safetensors")
    assert list(read_lora(tmp_path / "text_encoder_2" / "their.safetensors", layers)[0]) == [layers[1].name]


class Checkpoint(dict[str, Tensor]):
    """A checkpoint of ΔW: what is not changed is anything at all."""

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key, torch.zeros(6, 2))

    def get(self, key: str, *default: Any) -> Tensor:
        return super().get(key, torch.zeros(6, 2))


def of_unet(checkpoint: Checkpoint, pipe: Any) -> dict[str, Tensor]:
    config = {"layers_per_block": 1, "class_embed_type": None, "addition_embed_type": "text_time"}
    biases = {key.replace(".weight", ".bias"): torch.zeros(2) for key in checkpoint}
    norm = {f"out.0.{end}": torch.zeros(2) for end in ("weight", "bias")}
    whole = {f"model.diffusion_model.{key}": t for key, t in (biases | norm | checkpoint).items()}
    return convert_ldm_unet_checkpoint(whole, config)


def of_sd3(checkpoint: Checkpoint, pipe: Any) -> dict[str, Tensor]:
    return convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)


def of_flux(checkpoint: Checkpoint, pipe: Any) -> dict[str, Tensor]:
    few = {
        k: t for k, t in checkpoint.items() if not k.startswith("single_blocks.")
    }  # of the real width only
    few |= {f"single_blocks.0.linear1.{end}": torch.zeros(3 * 3072 + 12288, 2) for end in ("weight", "bias")}
    return convert_flux_transformer_checkpoint_to_diffusers(Checkpoint(few))


CONVERTERS: dict[str, tuple[Callable[[Checkpoint, Any], dict[str, Tensor]], str]] = {
    "SDXL": (of_unet, "sdxl"),
    "SD3": (of_sd3, "sd3"),
    "Flux": (of_flux, "flux"),
    "Z-Image": (lambda made, _: convert_z_image_transformer_checkpoint_to_diffusers(made), "zimage"),
    "FLUX.2 klein": (lambda made, _: convert_flux2_transformer_checkpoint_to_diffusers(made), "flux2"),
    "Krea 2": (lambda made, _: convert_krea2_transformer_checkpoint_to_diffusers(made), "krea2"),
}


@pytest.mark.parametrize("base", CONVERTERS)
def test_every_layer_has_the_original_models_name_and_row_order(base: str, tmp_path: Path) -> None:
    """Read from kohya's names, ΔW is what diffusers' own converter of checkpoints makes of it."""
    pipe, (convert, family) = pipelines.FAMILIES[base](), CONVERTERS[base]
    layers = [s for s in wearable(pipelines.parts(pipe)) if s.component in ("unet", "transformer")]
    state, checkpoint = dict[str, Tensor](), Checkpoint()
    modules: dict[str, Any] = {
        s.name: pipe.components[s.component].get_submodule(s.name.partition(".")[2]) for s in layers
    }
    for site in layers:
        rows = kohya_rows(layers, FAMILIES[family])[site.name]
        shape = (rows.total, *modules[site.name].weight.shape[1:])
        if f"{rows.module}.diff" not in state:
            state[f"{rows.module}.diff"] = torch.randn(shape)
    original = {module: name for name, module in dotted(layers, family).items()}
    for key, delta in state.items():
        checkpoint[f"{original[key.removesuffix('.diff')]}.weight"] = delta.clone()
    save_file(state, tmp_path / "their.safetensors")
    got, _ = read_lora(tmp_path / "their.safetensors", layers)
    wanted, compared = convert(checkpoint, pipe), 0
    for site in layers:
        delta = wanted.get(site.name.partition(".")[2] + ".weight", torch.zeros(2, 2))
        if tuple(delta.shape) == tuple(modules[site.name].weight.shape):
            down, up = got[site.name]
            torch.testing.assert_close(up[0] @ down[0], delta.flatten(1))
            compared += 1
        else:
            assert base == "Flux" and ".single_" in site.name, site.name
    assert compared == len([s for s in layers if base != "Flux" or ".single_" not in s.name])


def dotted(layers: list[Site], family: str) -> dict[str, str]:
    """The original model's own name → kohya's, by our table."""
    from hyperdreambooth.lora.formats.original import original_rows, per_block

    names: dict[str, str] = {}
    for site in layers:
        wanted = kohya_rows(layers, FAMILIES[family])[site.name].module
        for _, rows in original_rows(site, per_block(layers)):
            if "lora_unet_" + rows.module.replace(".", "_") == wanted:
                names[rows.module] = wanted
    return names


@pytest.mark.parametrize("base", pipelines.FAMILIES)
def test_every_linear_layer_can_be_trained_and_written_in_kohyas_form(base: str, tmp_path: Path) -> None:
    """SD 3's modulations among them, whose halves change places on the way, and back."""
    family = pipelines.FAMILY_NAMES[base]
    layers = wearable(pipelines.parts(pipelines.FAMILIES[base]()))
    factors = {s.name: tuple(half[None] for half in of_pair(s)) for s in layers}
    path, info = tmp_path / "a.safetensors", LoraInfo("sks", base, 32, "Ana", family=family)
    with (
        pytest.warns(UserWarning, match="leave out the layer")
        if base.startswith("SD")
        else pytest.MonkeyPatch.context()
    ):
        write_lora(path, factors, "kohya", info)
    got, _ = read_lora(path, layers)
    assert got.keys() == factors.keys()
    assert all(relative_distance(factors[name], got[name]) < 1e-6 for name in got)


def test_a_layer_without_a_name_is_refused_before_the_training() -> None:
    with pytest.raises(
        InputError, match=r"the kohya form has no name for transformer\.new; use the diffusers"
    ):
        check_form([Site("transformer.new", 4, 4)], "kohya", "sd3")
    check_form([Site("transformer.new", 4, 4)], "diffusers", "sd3")


@pytest.mark.parametrize(
    "prefix", ["lora_te3_", "lora_te2_", "text_encoders.t5xxl.transformer.", "text_encoder_2."]
)
def test_a_lora_of_t5_is_worn(prefix: str, tmp_path: Path) -> None:
    base = Base.from_pipeline(pipelines.flux(), "micro")
    inner = "encoder.block.0.layer.0.SelfAttention.q"
    layer: Any = base.pipe.text_encoder_2.get_submodule(inner)
    down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    name = prefix + (inner if prefix.endswith(".") else inner.replace(".", "_"))
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "t5.safetensors")
    adapter = load_adapter(tmp_path / "t5.safetensors", base)
    x, before = torch.randn(1, 3, layer.in_features), layer.weight.clone()
    with wearing(base, adapter), torch.no_grad():
        worn = base.pipe.text_encoder_2.get_submodule(inner)(x)
    torch.testing.assert_close(worn, x @ (before + up @ down).T, rtol=1e-4, atol=1e-5)
    assert base.pipe.text_encoder_2.get_submodule(inner) is layer and torch.equal(layer.weight, before)


INFO = LoraInfo("sks", "micro", 32, "Ana", family="sd1")


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_float16_keeps_what_is_small(size: float, form: Any, tmp_path: Path) -> None:
    """A rank of 128 and alpha 1, folded: `up` is below what float16 counts from."""
    wanted = {SELF: (torch.randn(1, 128, 192), torch.randn(1, 192, 128) * size / 128)}
    write_lora(tmp_path / "a.safetensors", wanted, form, INFO, torch.float16)
    got, _ = read_lora(tmp_path / "a.safetensors", [Site(SELF, 192, 192)])
    assert relative_distance(wanted[SELF], got[SELF]) < 5e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_number_format_that_loses_too_much_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """Two slots that nearly cancel: what is left is about as small as the rounding."""
    down, up = torch.randn(1, 1, 64), torch.randn(1, 64, 1)
    near = {SELF: (torch.cat([down, down + 1e-4 * torch.randn(1, 1, 64)], 1), torch.cat([up, -up], 2))}
    with pytest.raises(InputError, match=r"its ΔW loses .*% in b?float16, expected at most .*; use float32"):
        write_lora(tmp_path / "a.safetensors", near, "diffusers", INFO, dtype)
    assert not list(tmp_path.iterdir())
    write_lora(tmp_path / "a.safetensors", near, "diffusers", INFO)


def test_a_lidb_in_float16_keeps_what_is_small_or_says_so(tmp_path: Path) -> None:
    sites = (Site(SELF, 16, 16),)
    layout, basis = Layout(sites, 1, 8, 8), seeded_basis(sites, 8, 8, 0)
    row = torch.randn(layout.size)
    for size, whole in ((1.0, True), (1e-7, False)):
        lidb = Lidb(row * size, layout, "seed:0", basis_fingerprint(basis), "0" * 16, "sks", "b")
        if whole:
            save_lidb(tmp_path / "a.lidb.safetensors", lidb, torch.float16)
        else:
            with pytest.raises(InputError, match=r"lose .*% in float16"):
                save_lidb(tmp_path / "b.lidb.safetensors", lidb, torch.float16)
    assert [file.name for file in tmp_path.iterdir()] == ["a.lidb.safetensors"]
