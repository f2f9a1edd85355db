"""Means over people, how far to trust them: the bootstrap's 95 % interval, differences person by person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch

from hyperdreambooth.runs import rng

DRAWS = 2000
PLACES = 5  # of every figure in a report


class Interval(TypedDict):
    """A mean over `n` people; the 95 % interval of it is null for fewer than two."""

    n: int
    mean: float
    low: float | None
    high: float | None


def resamples(n: int) -> torch.Tensor:
    """Which of `n` people each draw takes, with replacement, `(DRAWS, n)`: the same for every score."""
    return torch.randint(n, (DRAWS, n), generator=rng("bootstrap", n))


# percentile bootstrap (Efron, 1979): people are drawn with replacement, not pictures, which share a person
def interval(values: Sequence[float]) -> Interval | None:
    """The mean over people and its 95 % interval; None for nobody.

    Args:
        values: one a person.
    """
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
    """The mean difference `one - other` over the people who have both, with its interval.

    Args:
        one: person → value.
        other: the same of another method.
    """
    return interval([one[name] - other[name] for name in sorted(one.keys() & other.keys())])
