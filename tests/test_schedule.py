"""The learning rates of every training here, beside the formula written out."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperdreambooth.schedule import learning_rate


@given(steps=st.integers(1, 500), warmup=st.integers(0, 50), peak=st.floats(1e-6, 1.0))
@settings(max_examples=50, deadline=None)
def test_rates_rise_in_a_line_and_fall_as_half_a_cosine(steps: int, warmup: int, peak: float) -> None:
    rates = [learning_rate(peak, step, steps, warmup=warmup) for step in range(steps)]
    assert all(0 < rate <= peak for rate in rates)
    assert all(a <= b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    for step, rate in enumerate(rates[warmup:], warmup):
        share = (step - warmup) / (steps - warmup)
        assert rate == pytest.approx(peak * (1 + math.cos(math.pi * share)) / 2)


def test_a_constant_rate_warms_up_too() -> None:
    rates = [learning_rate(2.0, step, 6, warmup=4, shape="constant") for step in range(6)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
