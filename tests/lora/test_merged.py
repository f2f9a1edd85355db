"""An adapter folded into a pipeline: saved exactly, or not at all; the live base is as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import micro
import pipelines
from hyperdreambooth.files import InputError
from hyperdreambooth.lora.formats.merged import merged_into, save_merged
from hyperdreambooth.shapes import Factors


def person(components: dict[str, Any], scale: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(0)
    return {
        s.name: (
            torch.randn(1, 2, s.in_features, generator=generator) * scale,
            torch.randn(1, s.out_features, 2, generator=generator),
        )
        for s in pipelines.attention_sites(components)
    }


def weights(components: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{part}.{k}": t.clone() for part, m in components.items() for k, t in m.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_sum_is_rounded_once_and_taken_off_bit_for_bit(dtype: torch.dtype) -> None:
    components = pipelines.parts(micro.pipeline().to(dtype=dtype))
    factors, before = person(components), weights(components)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = factors[name]
    with merged_into(components, factors) as live:
        wanted = before[f"{name}.weight"].double() + (up[0] @ down[0]).double()
        torch.testing.assert_close(live[name].double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
    after = weights(components)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = micro.pipeline()
    components, out = pipelines.parts(pipe), tmp_path / "out"
    before = weights(components)
    save_merged(out, pipe, components, person(components), {"trigger": "sks"})
    assert json.loads((out / "hyperdreambooth.json").read_text()) == {"trigger": "sks"}
    with pytest.raises(InputError, match=r"too large .*--dtype float32"):
        half = micro.pipeline().to(dtype=torch.float16)
        save_merged(tmp_path / "half", half, pipelines.parts(half), person(pipelines.parts(half), 1e6))
    two = {
        name: (down.repeat(2, 1, 1), up.repeat(2, 1, 1)) for name, (down, up) in person(components).items()
    }
    with pytest.raises(ValueError, match="one identity, not 2"):
        save_merged(tmp_path / "two", pipe, components, two)
    with pytest.raises(ValueError, match=r"no layer unet\.nowhere"):
        save_merged(tmp_path / "stray", pipe, components, {"unet.nowhere": (torch.zeros(1, 1, 2),) * 2})
    saved = type(pipe).save_pretrained

    def spoil(self: Any, folder: Path) -> None:
        saved(micro.pipeline(), folder)  # the base without the person

    monkeypatch.setattr(type(pipe), "save_pretrained", spoil)
    with pytest.raises(RuntimeError, match="read back as another weight"):
        save_merged(tmp_path / "spoiled", pipe, components, person(components))
    monkeypatch.setattr(type(pipe), "save_pretrained", lambda *_: None)
    with pytest.raises(RuntimeError, match="is in none of its files"):
        save_merged(tmp_path / "nothing", pipe, components, person(components))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    after = weights(components)
    assert all(torch.equal(before[key], after[key]) for key in before)
