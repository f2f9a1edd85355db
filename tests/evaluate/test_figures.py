"""Intervals, differences and pixel measures against naive loops and numpy."""

from __future__ import annotations

from statistics import NormalDist, fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperdreambooth.evaluate.likeness import (
    SIDE,
    background_copied,
    copied,
    diversity,
    pose_copied,
    thumbnails,
)
from hyperdreambooth.evaluate.meter import measured
from hyperdreambooth.evaluate.report import cell, short
from hyperdreambooth.evaluate.statistics import DRAWS, interval, paired, resamples


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=12).filter(lambda values: np.std(values) > 1e-3))
@settings(max_examples=20, deadline=None)
def test_the_interval_is_that_of_a_naive_bca(values: list[float]) -> None:
    n, normal = len(values), NormalDist()
    center = fmean(values)
    means = [fmean(values[person] for person in draw) for draw in resamples(n).tolist()]
    below = fmean(1.0 if mean < center - 1e-12 else 0.5 if mean < center + 1e-12 else 0.0 for mean in means)
    bias = normal.inv_cdf(min(max(below, 1 / DRAWS), 1 - 1 / DRAWS))
    left_out = [fmean(values[:k] + values[k + 1 :]) for k in range(n)]
    jack = [fmean(left_out) - mean for mean in left_out]
    skew = sum(d**3 for d in jack) / (6 * sum(d**2 for d in jack) ** 1.5)
    found = interval(values)
    assert found is not None and found["n"] == n and found["mean"] == pytest.approx(center, abs=1e-5)
    for end, level in ((found["low"], 0.025), (found["high"], 0.975)):
        z = bias + normal.inv_cdf(level)
        share = normal.cdf(bias + z / (1 - skew * z))
        near = [np.quantile(means, max(0, min(1, share + off))) for off in (-1 / DRAWS, 1 / DRAWS)]
        assert end is not None and near[0] - 2e-5 <= end <= near[1] + 2e-5
    assert DRAWS == 2000


@pytest.mark.parametrize(("value", "n"), [(0.0, 2), (0.1, 8), (1.0, 64)])
def test_people_with_one_value_have_an_interval_without_width(value: float, n: int) -> None:
    assert interval([value] * n) == {"n": n, "mean": value, "low": value, "high": value}


def test_resamples_take_everybody_equally_often() -> None:
    counts = torch.bincount(resamples(5).flatten(), minlength=5).double()
    assert resamples(5).shape == (DRAWS, 5) and torch.equal(resamples(5), resamples(5))
    assert (counts / counts.sum() - 0.2).abs().max() < 0.02


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        found = interval(rng.normal(0.3, 1.0, 40).tolist())
        assert found is not None and found["low"] is not None and found["high"] is not None
        hits += found["low"] <= 0.3 <= found["high"]
    assert 175 <= hits <= 198


def test_few_people_have_no_interval() -> None:
    assert interval([]) is None
    assert interval([0.25]) == {"n": 1, "mean": 0.25, "low": None, "high": None}
    assert cell(interval([0.25])) == ".250" and cell(None) == "–"


def test_differences_are_taken_person_by_person() -> None:
    one, other = {"a": 1.0, "b": 2.0, "c": 9.0}, {"b": 1.5, "a": 0.75, "z": 0.0}
    assert paired(one, other) == interval([0.25, 0.5])
    same = paired(one, one)
    assert same is not None and (same["low"], same["high"]) == (0.0, 0.0)
    assert paired(one, {"z": 1.0}) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4531, ".453"), (-0.02, "-.020"), (1.25, "1.250"), (0.9999, "1.000"), (-0.0004, ".000")],
)
def test_figures_are_written_as_in_the_paper(value: float, text: str) -> None:
    assert short(value) == text


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)) for _ in range(count)]


def test_diversity_is_the_mean_difference_of_every_two() -> None:
    images = pictures(4)
    small = thumbnails(images).numpy()
    apart = [np.abs(small[a] - small[b]).mean() / 2 for a in range(4) for b in range(a)]
    assert diversity(images) == pytest.approx(float(np.mean(apart)), abs=1e-5)
    assert diversity(images[:1]) is None and diversity([images[0]] * 3) == pytest.approx(0, abs=1e-6)
    black, white = Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), "white")
    assert diversity([black, white]) == pytest.approx(1)


def test_copied_is_pearsons_correlation_of_the_places_that_count() -> None:
    reference, *images = pictures(3, seed=1)
    where = torch.zeros(SIDE, SIDE)
    where[:10, 5:30] = 1
    grey = thumbnails([reference, *images]).mean(1)[:, :10, 5:30].flatten(1).numpy()
    for found, one in zip(copied(images, reference, where), grey[1:], strict=True):
        assert found == pytest.approx(float(np.corrcoef(grey[0], one)[0, 1]), abs=1e-5)


def test_the_photo_itself_is_copied_whole_and_its_background_alone_is_told_apart() -> None:
    photo, other = pictures(2, seed=2)
    assert pose_copied([photo], photo) == pytest.approx([1.0])
    assert background_copied([photo], photo) == pytest.approx([1.0])
    pasted = thumbnails([photo, other])
    from hyperdreambooth.faces.image import to_image
    from hyperdreambooth.faces.landmarks import face_oval

    oval = face_oval(SIDE, SIDE)
    mixed = to_image(oval * pasted[1] + (1 - oval) * pasted[0])
    assert background_copied([mixed], photo)[0] > 0.9 > 0.4 > pose_copied([mixed], photo)[0]
    assert copied([Image.new("RGB", (32, 32))], photo, oval) == pytest.approx([0.0], abs=1e-6)


def test_the_meter_sees_what_a_block_held() -> None:
    with measured(torch.device("cpu")) as small:
        pass
    with measured(torch.device("cpu")) as large:
        held = torch.ones(64, 2**20)
        del held
    if small.megabytes is None or large.megabytes is None:
        pytest.skip("this system does not report the peak memory of a block")
    assert 200 < large.megabytes - small.megabytes < 400
    assert large.seconds > 0
