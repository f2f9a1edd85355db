"""The networks that judge looks: their pictures, their views, and trainings that go on where they stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from hyperdreambooth.avatars.build.autoencoder import new_vae, through
from hyperdreambooth.avatars.build.fit import StageConfig
from hyperdreambooth.avatars.build.looks import (
    LABELS,
    faces,
    is_soft,
    read_evenness,
    render,
    targets,
    train_evenness,
)
from hyperdreambooth.avatars.build.pictures import Pictures, from_bytes, to_bytes
from hyperdreambooth.avatars.build.selfsup import features, gentle, strong, train_selfsup
from hyperdreambooth.avatars.draw.skew import skewed_parts
from hyperdreambooth.runs import rng

TINY = StageConfig(steps=4, batch=8, people=5, each=2, precision="float32", checkpoint_every=2)
TRAININGS = pytest.mark.parametrize("train", [train_evenness, train_selfsup])


@pytest.fixture(scope="module")
def vae() -> Any:
    return new_vae(0).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, vae: Any) -> Pictures:
    return faces("base", 5, tmp_path_factory.mktemp("pictures"), vae, "cpu")


@dataclass
class Torn(Pictures):
    """Pictures that can be read a few times only."""

    left: int = 3

    def batch(self, rows: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk was unplugged")
        return super().batch(rows)


def test_everybody_has_an_even_and_a_skewed_picture(shown: Pictures, vae: Any) -> None:
    assert len(shown) == 10 and shown.each == 2
    assert is_soft(torch.arange(10)).nonzero().flatten().tolist() == [0, 1, 6, 7]
    for row in range(10):
        who, scene = shown.identities[row], shown.contexts[row]
        plain = np.array(render((who, scene, row % 2)))[None]
        expected = to_bytes(through(vae, from_bytes(plain))) if row in (0, 1, 6, 7) else plain
        found = to_bytes(shown.batch(torch.tensor([row])))
        assert np.abs(found.astype(int) - expected).max() <= (row in (0, 1, 6, 7))  # rounded once more


def test_a_larger_set_begins_with_the_smaller(tmp_path: Path, vae: Any, shown: Pictures) -> None:
    few = faces("base", 2, tmp_path, vae, "cpu").batch(torch.arange(4))
    many = faces("base", 5, tmp_path, vae, "cpu").batch(torch.arange(10))
    assert torch.equal(many[:4], few)
    assert torch.equal(many, shown.batch(torch.arange(10)))


def test_the_truth_about_a_face(shown: Pictures) -> None:
    truth = targets(shown)
    assert truth.shape == (10, len(LABELS))
    assert truth[:, 0].tolist() == [1.0, 0.0] * 5
    for row in range(10):
        parts = set(skewed_parts(shown.identities[row], shown.contexts[row])) if row % 2 else set[str]()
        named = {
            label.removeprefix("skewed:") for label, true in zip(LABELS, truth[row], strict=True) if true
        }
        assert named - {"even"} == parts


@TRAININGS
def test_an_interrupted_training_ends_like_another(
    train: Callable[..., Any], tmp_path: Path, shown: Pictures
) -> None:
    expected = train(shown, TINY, tmp_path / "whole", "cpu").state_dict()
    torn = Torn(shown.pixels, shown.identities, shown.contexts, shown.each)
    with pytest.raises(OSError, match="unplugged"):
        train(torn, TINY, tmp_path / "torn", "cpu")
    found = train(shown, TINY, tmp_path / "torn", "cpu").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_reader_says_how_likely_each_label_is(tmp_path: Path, shown: Pictures) -> None:
    reader = train_evenness(shown, TINY, tmp_path, "cpu")
    with torch.no_grad():
        read = read_evenness(reader, shown.batch(torch.arange(6)))
    assert read.shape == (6, len(LABELS)) and ((read > 0) & (read < 1)).all()


def test_views_are_made_as_asked(tmp_path: Path, shown: Pictures) -> None:
    asked: list[tuple[int, ...]] = []

    def same(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        asked.append(tuple(pixels.shape))
        return pixels

    encoder = train_selfsup(shown, TINY, tmp_path, "cpu", same)
    assert asked == [(8, 3, 128, 128)] * 8  # two views in each of four steps
    with torch.no_grad():
        assert features(encoder, shown.batch(torch.arange(3))).shape == (3, 160)


def test_a_gentle_view_keeps_every_edge() -> None:
    pixels = torch.rand(6, 3, 32, 32, generator=rng("pixels")) * 2 - 1
    views = gentle(pixels, rng("views"))
    assert views.shape == pixels.shape and not torch.equal(views, pixels)
    assert torch.equal(views, gentle(pixels, rng("views")))
    # A view has the values of its picture: elsewhere, and brighter or darker, but none between two of them.
    for view, picture in zip(views.flatten(2), pixels.flatten(2), strict=True):
        old, new = picture.sort().values, view.sort().values
        gain = (new[:, -1] - new[:, 0]) / (old[:, -1] - old[:, 0])
        torch.testing.assert_close(new, new[:, :1] + gain[:, None] * (old - old[:, :1]), atol=1e-5, rtol=0)
        assert ((gain >= 0.85) & (gain <= 1.15)).all()


def test_a_strong_view_is_a_part_of_the_picture_again_and_again() -> None:
    pixels = torch.rand(6, 3, 32, 32, generator=rng("pixels")) * 2 - 1
    views = strong(pixels, rng("views"))
    assert views.shape == (6, 3, 24, 24) and views.isfinite().all()
    assert torch.equal(views, strong(pixels, rng("views")))
    assert (views - interpolate(pixels, 24)).abs().mean() > 0.1
