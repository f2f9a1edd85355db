"""Several people in one picture: masks, predictions put together, and pictures against plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pipelines
from hyperdreambooth.adapter import Adapter
from hyperdreambooth.apps.cli import app
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.files import InputError
from hyperdreambooth.generate import wearing
from hyperdreambooth.regions import Region, draw_together, read_region, shares, together
from hyperdreambooth.runs import rng

WHOLE, LEFT, RIGHT = Region(0, 0, 1, 1), Region(0, 0, 0.5, 1), Region(0.5, 0, 1, 1)
PROMPT = "a photo of a [V] face"


def person(base: Base, seed: int, size: float = 0.5) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        site.name: (
            torch.randn(1, 2, site.in_features, generator=generator) * size,
            torch.randn(1, site.out_features, 2, generator=generator) * size,
        )
        for site in base.sites
    }
    return Adapter.made_on(base, factors)


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of any colour value, of 255."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (3, 3, 4, 4), (6, 16, 3)])
def test_each_cell_is_predicted_by_the_person_who_is_there(shape: tuple[int, ...]) -> None:
    top = Region(0, 0, 0.5, 0.5)
    predicted = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = together(predicted, [top, RIGHT])
    tokens = len(shape) == 3
    square = (lambda t: t.mT.unflatten(-1, (4, 4))) if tokens else (lambda t: t)
    for half in range(len(predicted) // 3):
        bare, ana, ben = square(predicted[3 * half : 3 * half + 3])
        naive = bare.clone()
        naive[:, :2, :2], naive[:, :, 2:] = ana[:, :2, :2], ben[:, :, 2:]
        for sample in square(made[3 * half : 3 * half + 3]):
            torch.testing.assert_close(sample, naive)


def test_where_regions_overlap_they_share() -> None:
    parts = shares([LEFT, Region(0, 0, 1, 0.5)], 4)
    torch.testing.assert_close(parts.sum(0), torch.ones(4, 4))
    assert parts[:, 0, 0].tolist() == [0, 0.5, 0.5] and parts[:, 3, 3].tolist() == [1, 0, 0]
    assert Region(0.99, 0.99, 1, 1).mask(4).sum() == 1  # however small, somebody is there


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_a_person_who_has_the_whole_picture_is_drawn_as_alone(
    family: str, guidance: float, tmp_path: Path
) -> None:
    pipelines.FAMILIES[family]().save_pretrained(tmp_path)
    base = load_base(tmp_path, device="cpu", resolution=64)
    ana, ben = person(base, 1), person(base, 2)
    settings: dict[str, Any] = {"steps": 2, "guidance": guidance}

    def alone(adapter: Adapter) -> Image.Image:
        with wearing(base, adapter):
            prompt = [PROMPT.replace("[V]", base.trigger)]
            return base.draw(prompt, None, [rng(3, "regions", PROMPT)], side=base.resolution, **settings)[0]

    whole = draw_together(base, PROMPT, [(ana, WHOLE)], seed=3, **settings)
    assert apart(whole, alone(ana)) <= 1 and apart(whole, alone(ben)) > 5
    both = draw_together(base, PROMPT, [(ana, LEFT), (ben, RIGHT)], seed=3, **settings)
    assert apart(both, alone(ana)) > 5 and apart(both, alone(ben)) > 5
    same = draw_together(base, PROMPT, [(ben, LEFT), (ben, RIGHT)], seed=3, **settings)
    assert apart(same, alone(ben)) <= 1


def test_the_base_is_as_before_even_after_an_error(micro_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: p.clone() for name, p in micro_base.denoiser.state_dict().items()}
    draw_together(micro_base, PROMPT, [(person(micro_base, 1), LEFT)], steps=1)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(micro_base.pipe), "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        draw_together(micro_base, PROMPT, [(person(micro_base, 1), LEFT)], steps=1)
    after = micro_base.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not micro_base.denoiser._forward_hooks


@pytest.mark.parametrize("text", ["", "0,0,1", "a,b,c,d", "0,0,0,1", "0.5,0,0.2,1", "-1,0,1,1", "0,0,nan,1"])
def test_a_bad_region_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"region: expected left,top,right,bottom") as caught:
        read_region(text)
    assert "\n" not in str(caught.value)


def test_the_command_draws_two_people_and_warns_where_they_blend(
    micro_base: Base, micro_dir: Path, tmp_path: Path
) -> None:
    for number in (1, 2):
        person(micro_base, number).save(tmp_path / f"{number}.safetensors")
    words = ["generate", "--base", str(micro_dir), "--device", "cpu", "--prompt", PROMPT, "--set", "steps=1"]
    words += ["--adapter", str(tmp_path / "1.safetensors"), "--adapter", str(tmp_path / "2.safetensors")]
    regions = ["--region", "0,0,0.5,1", "--region", "0.5,0,1,1"]
    done = CliRunner().invoke(app, [*words, *regions, "--set", "images=2", "--out", str(tmp_path / "both")])
    assert done.exit_code == 0, done.output
    drawn = [Image.open(tmp_path / "both" / f"000-{k}.png") for k in (0, 1)]
    assert apart(*drawn) > 5
    with pytest.warns(UserWarning, match="one blended face; pass --region"):
        CliRunner().invoke(app, [*words, "--out", str(tmp_path / "blend")])
    refused = CliRunner().invoke(app, [*words, *regions[:2], "--out", str(tmp_path / "one")])
    assert refused.exit_code == 2 and "one for each of 2 adapters" in refused.output
