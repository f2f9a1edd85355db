"""MultiID-Bench's scores against arithmetic on the circle and on random directions."""

from __future__ import annotations

from math import acos, cos, sin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import normalize

from hyperdreambooth.evaluate.face_encoders import Calibration
from hyperdreambooth.evaluate.judge import Judge, copy_paste


def at(*angles: float) -> torch.Tensor:
    """Returns the directions of angles in the plane, `(m, 2)`."""
    return torch.tensor([[cos(angle), sin(angle)] for angle in angles])


@pytest.mark.parametrize(
    ("generated", "expected"),
    [(0.0, 1.0), (0.8, -1.0), (0.4, 0.0), (0.2, 0.5), (-0.3, 1.0), (1.1, -1.0)],
)
def test_copy_paste_is_one_at_the_reference_and_minus_one_at_the_target(
    generated: float, expected: float
) -> None:
    found = copy_paste(at(generated), targets=at(0.8), reference=at(0.0)[0])
    assert found.tolist() == [pytest.approx(expected, abs=1e-5)]


def test_copy_paste_is_the_mean_over_the_targets() -> None:
    both = copy_paste(at(0.1, 0.5), at(0.8, -0.6), at(0.0)[0])
    alone = [copy_paste(at(0.1, 0.5), at(target), at(0.0)[0]) for target in (0.8, -0.6)]
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)


@given(st.integers(0, 10_000), st.sampled_from([1.0, 1e-2, 1e-5, 0.0]))
@settings(max_examples=40, deadline=None)
def test_copy_paste_stays_between_its_bounds_even_if_target_and_reference_are_one_photo(
    seed: int, apart: float
) -> None:
    draws = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    reference = normalize(draws[0], dim=0)
    targets = normalize(reference + apart * draws[1:2], dim=1)
    found = copy_paste(normalize(draws[2:], dim=1), targets, reference)
    assert found.isfinite().all() and (found.abs() <= 1 + 1e-6).all()


def test_every_score_of_a_picture_against_plain_arithmetic() -> None:
    vectors = normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(3)), dim=1)
    pictures = [Image.new("L", (1, 1), k) for k in range(6)]

    def embed(some: object) -> torch.Tensor:
        return vectors[[picture.getpixel((0, 0)) for picture in some]]

    judge = Judge("a test", "none", embed, Calibration(same=0.6, stranger=-0.1))
    found = judge.likeness(pictures[:3], pictures[3], pictures[4:])
    angle = np.vectorize(lambda cosine: acos(max(-1.0, min(1.0, cosine))))
    unit = vectors.double().numpy()
    for k in range(3):
        to_targets, to_reference = unit[k] @ unit[4:].T, unit[k] @ unit[3]
        assert found["sim_target"][k] == pytest.approx(to_targets.mean(), abs=1e-5)
        assert found["sim_reference"][k] == pytest.approx(to_reference, abs=1e-5)
        assert found["identity"][k] == pytest.approx((to_targets.mean() + 0.1) / 0.7, abs=1e-5)
        expected = (angle(to_targets) - angle(to_reference)) / angle(unit[3] @ unit[4:].T)
        assert found["copy_paste"][k] == pytest.approx(expected.mean(), abs=1e-4)
    assert judge.likeness(pictures[:3], pictures[3], []).keys() == {"sim_reference"}
