"""LoRA files with odd parts: what cannot be right is refused in one line, by the reader and by `inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hyperdreambooth.files import InputError
from hyperdreambooth.lora.formats.describe import describe
from hyperdreambooth.lora.formats.read import read_lora
from hyperdreambooth.shapes import Site

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
SITES = (Site(LAYER, 16, 16), Site(CONV, 144, 16))
DOWN, UP = torch.ones(2, 16), torch.ones(16, 2)
LORA = {"lora_down.weight": DOWN, "lora_up.weight": UP}
HADA = {
    f"hada_w{n}_{half}": torch.ones(*shape)
    for n in (1, 2)
    for half, shape in (("a", (16, 2)), ("b", (2, 16)))
}
LOKR = {"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(4, 1), "lokr_w2_b": torch.ones(1, 4)}


def written(folder: Path, parts: dict[str, Tensor], layer: str = LAYER, **header: object) -> Path:
    """A file of one layer."""
    file = folder / "x.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps(header)} if header else None
    save_file({f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()}, file, metadata)
    return file


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({**LORA, "diff": torch.ones(16, 16)}, "besides a LoRA"),
        ({**LORA, **HADA}, "besides a LoRA"),
        ({**HADA, "lora_mid.weight": torch.ones(2, 2, 1, 1)}, "besides a LoHa"),
        ({**HADA, **LOKR}, "besides a LoHa"),
        ({**LOKR, "lokr_w1_a": torch.ones(4, 1)}, "no whole LoKr"),
        ({"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(4, 1)}, "no whole LoKr"),
    ],
)
def test_no_part_is_dropped_without_a_word(parts: dict[str, Tensor], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        read_lora(written(tmp_path, parts), SITES)


@pytest.mark.parametrize("kernel", [(1, 9), (4, 4)])
def test_a_kernel_that_no_base_has_is_refused(kernel: tuple[int, int], tmp_path: Path) -> None:
    inputs = 144 // (kernel[0] * kernel[1])
    file = written(tmp_path, {"diff": torch.ones(16, inputs, *kernel)}, CONV)
    with pytest.raises(InputError, match=f"got {kernel[0]}×{kernel[1]}"):
        read_lora(file, SITES)


def test_a_dora_needs_its_magnitudes(tmp_path: Path) -> None:
    file = written(
        tmp_path, {"lora_A.weight": DOWN, "lora_B.weight": UP}, **{"unet.use_dora": True, "unet.r": 2}
    )
    with pytest.raises(InputError, match="use_dora is true, but the file has no magnitudes"):
        read_lora(file, SITES)


def test_a_dora_that_only_rescales_is_not_called_inert(tmp_path: Path) -> None:
    file = written(tmp_path, {**LORA, "lora_up.weight": UP * 0, "dora_scale": torch.ones(16, 1)})
    assert not any(line.startswith("inert") for line in describe(file)["warnings"])


@pytest.mark.parametrize("pattern", [".*.*.*.*x", "(a|.|..)*x", "([a-z0-9_.]+)+!", "(.*)*x"])
def test_a_pattern_of_a_stranger_cannot_hang(pattern: str, tmp_path: Path) -> None:
    """A search that goes back without end would never return; inspect then takes strength 1."""
    parts = {"lora_A.weight": DOWN, "lora_B.weight": UP}
    file = written(tmp_path, parts, **{"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 1}})
    with pytest.raises(InputError, match="has the pattern"):
        read_lora(file, SITES)
    assert describe(file)["tools"]


@pytest.mark.parametrize(
    "parts",
    [
        {**LORA, "alpha": torch.ones(0)},
        {"lora_down.weight": torch.ones(16), "lora_up.weight": UP},
        {"lora_down.weight": torch.ones(0, 16), "lora_up.weight": torch.ones(16, 0)},
        {"lora_down.weight": torch.ones(1, *[1] * 20), "lora_up.weight": UP},
        {**HADA, "hada_w1_b": torch.tensor(1.0)},
        {"lora_A.bias": torch.ones(2), "lora_B.bias": torch.ones(16)},
    ],
)
def test_what_no_lora_has_is_one_line(parts: dict[str, Tensor], tmp_path: Path) -> None:
    file = written(tmp_path, parts)
    for read in (describe, lambda path: read_lora(path, SITES)):
        with pytest.raises(InputError) as caught:
            read(file)
        assert "\n" not in str(caught.value)
