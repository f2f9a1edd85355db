"""Means over people with the bootstrap's 95 % interval, and differences person by person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import TypedDict

import torch

from hyperdreambooth.runs import rng

DRAWS = 2000
_TAIL = 0.025  # of the resampled means, on either side of the interval
_NOTHING = 1e-20  # a sum of squares below this is rounding: all people have one value
_EXACT = 12  # decimal places up to which means are told apart
_NORMAL = NormalDist()
PLACES = 5  # decimal places of every figure in a report


class Interval(TypedDict):
    """A mean over `n` people and its 95 % interval, which is null for fewer than two people."""

    n: int
    mean: float
    low: float | None
    high: float | None


def resamples(n: int) -> torch.Tensor:
    """Draws `n` people with replacement, `(DRAWS, n)`; the same draws for every score."""
    return torch.randint(n, (DRAWS, n), generator=rng("bootstrap", n))


# bias-corrected and accelerated bootstrap, BCa (Efron, J. Am. Stat. Assoc. 82, 1987, sections 2 and 4), which
# few and lopsided values need; over people, not over pictures: one person's pictures are not independent
def interval(values: Sequence[float]) -> Interval | None:
    """Computes the mean of one value a person and its 95 % interval; None if there are no values."""
    if not values:
        return None
    people = torch.tensor(values, dtype=torch.float64)
    mean = people.mean()
    if len(values) < 2:
        return {"n": 1, "mean": round(float(mean), PLACES), "low": None, "high": None}
    means = people[resamples(len(values))].mean(1)
    levels = torch.tensor(_levels(people, means), dtype=torch.float64)
    low, high = (round(value, PLACES) for value in means.quantile(levels).tolist())
    return {"n": len(values), "mean": round(float(mean), PLACES), "low": low, "high": high}


def _levels(people: torch.Tensor, means: torch.Tensor) -> tuple[float, float]:
    """Returns the shares of the resampled means that lie below the interval's two ends."""
    off = people - people.mean()
    if not bool(off.square().sum() > _NOTHING):
        return _TAIL, 1 - _TAIL
    below = float(
        (1 - (means - people.mean()).round(decimals=_EXACT).sign()).mean() / 2
    )  # half of equal ones
    bias = _NORMAL.inv_cdf(min(max(below, 1 / DRAWS), 1 - 1 / DRAWS))
    skew = float(off.pow(3).sum() / (6 * off.square().sum() ** 1.5))
    ends = (bias + _NORMAL.inv_cdf(level) for level in (_TAIL, 1 - _TAIL))
    low, high = (_NORMAL.cdf(bias + end / (1 - skew * end)) for end in ends)
    return low, high


def paired(one: Mapping[str, float], other: Mapping[str, float]) -> Interval | None:
    """Computes the mean difference `one - other` of two methods over the people who are in both."""
    return interval([one[name] - other[name] for name in sorted(one.keys() & other.keys())])
