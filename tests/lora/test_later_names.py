"""Key names of Z-Image, FLUX.2, Qwen-Image and Krea 2 at published sizes, against what ComfyUI reads.

The lists are written here from ComfyUI's rules (`model_lora_keys_unet` in comfy/lora.py and the maps
`flux_to_diffusers`, `z_image_to_diffusers` and `krea2_to_diffusers` in comfy/utils.py, August 2026), not from
our tables: `lora_unet_` and `diffusion_model.` before the name of any weight of the original model,
`transformer.` before diffusers' name, which stands for a weight or for some of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import pipelines
from hyperdreambooth.base.load import FAMILIES
from hyperdreambooth.lora.formats.headers import LoraInfo
from hyperdreambooth.lora.formats.names import family_of_base
from hyperdreambooth.lora.formats.write import Form, write_lora
from hyperdreambooth.shapes import Site
from hyperdreambooth.sites import find_sites, wearable

Layer = tuple[str, int, int]
"""Name, outputs, inputs."""


def zimage() -> Iterator[tuple[Layer, list[Layer]]]:
    """Each weight of an attention, and what diffusers has for it."""
    w = 3840
    stacks = {"layers": 30, "noise_refiner": 2, "context_refiner": 2}
    for block in (f"{stack}.{k}.attention" for stack, depth in stacks.items() for k in range(depth)):
        yield (f"{block}.qkv", 3 * w, w), [(f"{block}.to_{letter}", w, w) for letter in "qkv"]
        yield (f"{block}.out", w, w), [(f"{block}.to_out.0", w, w)]


def flux2(w: int, doubles: int, singles: int) -> Iterator[tuple[Layer, list[Layer]]]:
    for k in range(doubles):
        own, theirs = f"double_blocks.{k}", f"transformer_blocks.{k}.attn"
        yield (f"{own}.img_attn.qkv", 3 * w, w), [(f"{theirs}.to_{letter}", w, w) for letter in "qkv"]
        yield (f"{own}.txt_attn.qkv", 3 * w, w), [(f"{theirs}.add_{letter}_proj", w, w) for letter in "qkv"]
        yield (f"{own}.img_attn.proj", w, w), [(f"{theirs}.to_out.0", w, w)]
        yield (f"{own}.txt_attn.proj", w, w), [(f"{theirs}.to_add_out", w, w)]
    for k in range(singles):
        own, theirs = f"single_blocks.{k}", f"single_transformer_blocks.{k}.attn"
        yield (f"{own}.linear1", 9 * w, w), [(f"{theirs}.to_qkv_mlp_proj", 9 * w, w)]
        yield (f"{own}.linear2", w, 4 * w), [(f"{theirs}.to_out", w, 4 * w)]


def qwenimage() -> Iterator[tuple[Layer, list[Layer]]]:
    ends = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for layer in ((f"transformer_blocks.{k}.attn.{end}", 3072, 3072) for k in range(60) for end in ends):
        yield layer, [layer]


def krea2() -> Iterator[tuple[Layer, list[Layer]]]:
    ends = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
    for k in range(28):
        for own, theirs in ends.items():
            o = 1536 if own in ("wk", "wv") else 6144
            yield (f"blocks.{k}.attn.{own}", o, 6144), [(f"transformer_blocks.{k}.attn.{theirs}", o, 6144)]


READ = {
    "Z-Image": list(zimage()),
    "FLUX.2 klein 4B": list(flux2(3072, 5, 20)),
    "FLUX.2 klein 9B": list(flux2(4096, 8, 24)),
    "Qwen-Image": list(qwenimage()),
    "Krea 2": list(krea2()),
}
PARAMETERS = {  # in thousand millions, as published
    "Z-Image": 6.15, "FLUX.2 klein 4B": 3.88, "FLUX.2 klein 9B": 9.08, "Qwen-Image": 20.4, "Krea 2": 12.8,
}  # fmt: skip


def names(base: str, form: Form) -> dict[str, tuple[int, int]]:
    """What ComfyUI reads of the attention in a form: module → outputs and inputs."""
    if form == "diffusers":
        return {f"transformer.{name}": (o, i) for _, parts in READ[base] for name, o, i in parts}
    if form == "original":
        return {f"diffusion_model.{name}": (o, i) for (name, o, i), _ in READ[base]}
    return {f"lora_unet_{name.replace('.', '_')}": (o, i) for (name, o, i), _ in READ[base]}


@pytest.fixture(scope="module", params=pipelines.LATER_FULL)
def full(request: pytest.FixtureRequest) -> tuple[str, tuple[Site, ...], str]:
    """Name, sites and LoRA family of a base at its published size."""
    pipe = pipelines.full_later(request.param)
    count = sum(weight.numel() for weight in pipe.transformer.parameters())
    assert count / 1e9 == pytest.approx(PARAMETERS[request.param], rel=0.005)
    parts = {"transformer": pipe.transformer}
    sites = find_sites(parts, FAMILIES[type(pipe).__name__].SITES)
    return request.param, sites, family_of_base(wearable(parts)).name


@pytest.mark.parametrize("form", ["kohya", "diffusers", "original"])
def test_every_key_is_read_by_comfyui_and_every_site_is_covered(
    full: tuple[str, tuple[Site, ...], str], form: Form, tmp_path: Path
) -> None:
    base, sites, family = full
    factors = {s.name: (torch.zeros(1, 1, s.in_features), torch.zeros(1, s.out_features, 1)) for s in sites}
    write_lora(tmp_path / "a.safetensors", factors, form, LoraInfo("sks", base, 1024, "Ana", family=family))
    down, up = ("lora_down", "lora_up") if form == "kohya" else ("lora_A", "lora_B")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        keys = list(file.keys())
        shapes = {key: file.get_slice(key).get_shape() for key in keys}
    ends = {f".{down}.weight", f".{up}.weight"} | ({".alpha"} if form == "kohya" else set())
    wanted = names(base, form)
    assert set(keys) == {name + end for name in wanted for end in ends}
    got = {name: (shapes[f"{name}.{up}.weight"][0], shapes[f"{name}.{down}.weight"][1]) for name in wanted}
    assert got == wanted
    assert sum(o for o, _ in wanted.values()) == sum(site.out_features for site in sites)


def test_the_numbers_of_sites(full: tuple[str, tuple[Site, ...], str]) -> None:
    base, sites, _ = full
    assert len(sites) == sum(len(parts) for _, parts in READ[base])
    counts = {"Z-Image": 136, "FLUX.2 klein 4B": 80, "FLUX.2 klein 9B": 112, "Qwen-Image": 480, "Krea 2": 140}
    assert len(sites) == counts[base]
