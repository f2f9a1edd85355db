"""Files of the trainers of Z-Image, FLUX.2, Qwen-Image and Krea 2, read by ours, against their arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from later import DIFFUSERS, FILES, PARTS, sites
from spellings import Made, State, write
from torch import Tensor

from hyperdreambooth.lora.formats.read import read_lora
from hyperdreambooth.shapes import Site

SMALLER = 32  # times than the real widths


def smaller(family: str) -> list[Site]:
    return [Site(s.name, s.in_features // SMALLER, s.out_features // SMALLER) for s in sites(family)]


def filled(made: Made) -> Made:
    """The same file at smaller widths, of random numbers; alphas stay."""
    torch.manual_seed(0)
    state: State = {}
    for key, tensor in made[0].items():
        shape = [side // SMALLER if side > 64 else side for side in tensor.shape]
        state[key] = tensor if key.endswith(".alpha") else torch.randn(shape) / 8
    return state, made[1]


def changes(made: Made) -> Iterator[tuple[str, Tensor]]:
    """Each module of a file without its prefix, and its ΔW by the formulas of LoRA and LoKr."""
    state, metadata = made
    pattern = r"(.+)\.(?:lora_(?:A|down)(?:\.default)?\.weight|lokr_w1)"
    for key in state:
        if not (found := re.fullmatch(pattern, key)):
            continue
        module = found[1]
        if "lokr" in key:
            down, rank = state[f"{module}.lokr_w2_b"], len(state[f"{module}.lokr_w2_b"])
            delta = torch.kron(state[key], state[f"{module}.lokr_w2_a"] @ down)
        else:
            up = key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
            delta, rank = state[up] @ state[key], len(state[key])
        alpha = float(state.get(f"{module}.alpha", torch.tensor(8.0 if _tells(metadata) else rank)))
        prefix = r"^(lora_unet_|lycoris_|diffusion_model\.|transformer\.|base_model\.model\.)"
        yield re.sub(prefix, "", module).replace(".", "_"), delta * alpha / rank


def _tells(metadata: dict[str, str]) -> bool:
    """Whether it is SimpleTuner's header, with alpha 8; ours has the rank."""
    return '"transformer.lora_alpha": 8' in metadata.get("lora_adapter_metadata", "")


def placed(family: str, made: Made) -> State:
    """Site → ΔW, where fused layers are cut into their parts."""
    rows = {name: size[1] // SMALLER for name, size in DIFFUSERS[family].items()}
    parts = {name.replace(".", "_"): (name,) for name in rows}
    parts |= {name.replace(".", "_"): of for name, of in PARTS[family].items()}
    parts["transformer_blocks_0_attn_to_qkv"] = tuple(
        f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"
    )
    found: State = {}
    for module, delta in changes(made):
        own = parts[module]
        for name, part in zip(own, delta.split([rows[one] for one in own]), strict=True):
            found[f"transformer.{name}"] = part
    return found


@pytest.mark.parametrize(("family", "file"), FILES)
def test_every_spelling_is_read_with_the_same_change(family: str, file: str, tmp_path: Path) -> None:
    made = filled(FILES[family, file](tmp_path))
    got, _ = read_lora(write(tmp_path / "x.safetensors", made), smaller(family))
    wanted = placed(family, made)
    assert got.keys() == wanted.keys()
    for site, (down, up) in got.items():
        torch.testing.assert_close(up[0] @ down[0], wanted[site], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "file"), FILES)
def test_ranks_may_differ_and_layers_may_be_missing(family: str, file: str, tmp_path: Path) -> None:
    """Every other layer of a file, and of these every third with half of its rank."""
    state, metadata = filled(FILES[family, file](tmp_path))
    modules = sorted({re.sub(r"\.(lora_|lokr_|alpha).*", "", key) for key in state})[::2]
    kept: State = {}
    for key, tensor in state.items():
        module = re.sub(r"\.(lora_|lokr_|alpha).*", "", key)
        if module not in modules:
            continue
        half = modules.index(module) % 3 == 0 and not metadata and not key.endswith(("alpha", "lokr_w1"))
        first = key.endswith(("lora_A.weight", "lora_down.weight", "lokr_w2_b", "lora_A.default.weight"))
        kept[key] = tensor if not half else tensor[:2] if first else tensor[:, :2]
    made = kept, metadata
    got, _ = read_lora(write(tmp_path / "x.safetensors", made), smaller(family))
    wanted = placed(family, made)
    assert got.keys() == wanted.keys()
    for site, (down, up) in got.items():
        torch.testing.assert_close(up[0] @ down[0], wanted[site], rtol=1e-4, atol=1e-5)
