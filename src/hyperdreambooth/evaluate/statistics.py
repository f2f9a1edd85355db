"""Means over people with the bootstrap's 95 % interval, and differences person by person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch

from hyperdreambooth.runs import rng

DRAWS = 2000
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


# percentile bootstrap (Efron, 1979) over people, not over pictures: one person's pictures are not independent
def interval(values: Sequence[float]) -> Interval | None:
    """Computes the mean of one value a person and its 95 % interval; None if there are no values."""
    if not values:
        return None
    people = torch.tensor(values, dtype=torch.float64)
    mean = round(float(people.mean()), PLACES)
    if len(values) < 2:
        return {"n": 1, "mean": mean, "low": None, "high": None}
    means = people[resamples(len(values))].mean(1).sort().values
    tail = DRAWS // 40
    low, high = (round(float(means[k]), PLACES) for k in (tail, DRAWS - 1 - tail))
    return {"n": len(values), "mean": mean, "low": low, "high": high}


def paired(one: Mapping[str, float], other: Mapping[str, float]) -> Interval | None:
    """Computes the mean difference `one - other` of two methods over the people who are in both."""
    return interval([one[name] - other[name] for name in sorted(one.keys() & other.keys())])
