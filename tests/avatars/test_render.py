"""The avatar renderer: deterministic, and every trait and every context value shows."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from hyperdreambooth.avatars.draw.people import (
    ATTRIBUTES,
    CATEGORICAL,
    CHOICES,
    CONTINUOUS,
    SPLITS,
    Context,
    Identity,
    context,
    identity,
    plain_context,
)
from hyperdreambooth.avatars.draw.render import SIZE, draw

POSE = {"shift_x": 8.0, "shift_y": 8.0, "turn": 1.0, "tilt": 12.0}
PERSON = Identity(
    0,
    dict.fromkeys(CONTINUOUS, 0.5),
    {name: values[0] for name, values in CATEGORICAL.items()} | {"hair_style": "short"},
)


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two pictures, in 0..255."""
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


def changed(a: Image.Image, b: Image.Image) -> int:
    """How many pixels differ clearly."""
    gap = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max(axis=2)
    return int((gap > 12).sum())


def test_the_same_seeds_give_the_same_bytes() -> None:
    for seed in range(4):
        assert identity(seed) == identity(seed)
        assert context(seed) == context(seed)
        assert plain_context(seed) == plain_context(seed)
        once, again = (draw(identity(seed), context(seed)).tobytes() for _ in range(2))
        assert once == again


def test_people_differ() -> None:
    pictures = [draw(identity(seed), Context()) for seed in range(12)]
    for i, one in enumerate(pictures):
        assert all(difference(one, other) > 3.0 for other in pictures[:i])


def test_people_of_every_split_have_every_trait() -> None:
    for seeds in SPLITS.values():
        person = identity(seeds[7])
        assert tuple(person.traits) == CONTINUOUS
        assert all(0.0 <= value <= 1.0 for value in person.traits.values())
        assert set(person.kinds) == set(CATEGORICAL)
        assert all(person.kinds[name] in values for name, values in CATEGORICAL.items())


def test_every_kind_occurs() -> None:
    people = [identity(seed) for seed in range(400)]
    for name, values in CATEGORICAL.items():
        assert {person.kinds[name] for person in people} == set(values)


def test_splits_are_disjoint() -> None:
    spans = sorted(SPLITS.values(), key=lambda seeds: seeds.start)
    assert set(SPLITS) == {"base", "train", "val", "test"}
    assert all(one.stop <= other.start for one, other in pairwise(spans))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_every_trait_shows(name: str) -> None:
    ends = [draw(replace(PERSON, traits=PERSON.traits | {name: end}), Context()) for end in (0.0, 1.0)]
    assert changed(*ends) >= 20
    between = draw(replace(PERSON, traits=PERSON.traits | {name: 0.6}), Context())
    assert difference(ends[0], between) > 0.0


@pytest.mark.parametrize("name", CATEGORICAL)
def test_every_kind_shows(name: str) -> None:
    people = [replace(PERSON, kinds=PERSON.kinds | {name: value}) for value in CATEGORICAL[name]]
    pictures = [draw(person, Context()) for person in people]
    for i, one in enumerate(pictures):
        assert all(difference(one, other) > 0.02 for other in pictures[:i])


@pytest.mark.parametrize("group", ATTRIBUTES)
def test_every_context_value_shows(group: str) -> None:
    pictures = [draw(PERSON, replace(Context(), **{group: value})) for value in ATTRIBUTES[group]]
    for i, one in enumerate(pictures):
        assert all(difference(one, other) > 0.2 for other in pictures[:i])


@pytest.mark.parametrize("style", CHOICES["style"])
def test_a_person_stays_tellable_in_every_style(style: str) -> None:
    one, other = (draw(identity(seed), Context(style=style)) for seed in (0, 1))
    assert difference(one, other) > 3.0


@pytest.mark.parametrize("field", [*POSE, "scale", "shirt", "scene"])
def test_every_pose_number_shows(field: str) -> None:
    value = POSE.get(field, 0.9)
    assert difference(draw(PERSON, Context()), draw(PERSON, replace(Context(), **{field: value}))) > 0.05


@pytest.mark.parametrize("size", [64, 128, 200])
def test_size(size: int) -> None:
    picture = draw(PERSON, Context(style="watercolour"), size)
    assert (picture.mode, picture.size) == ("RGB", (size, size))
    # A picture of another size is the same picture.
    small = picture.resize((32, 32), Image.Resampling.BOX)
    plain = draw(PERSON, Context(style="watercolour")).resize((32, 32), Image.Resampling.BOX)
    assert difference(small, plain) < 8.0
    assert SIZE == 128


def test_contexts_are_spread_as_meant() -> None:
    drawn = [context(seed) for seed in range(1500)]
    share = {group: np.mean([getattr(c, group) == CHOICES[group][0] for c in drawn]) for group in CHOICES}
    assert 0.45 < share["style"] < 0.55
    assert all(0.57 < share[group] < 0.70 for group in ("headwear", "eyewear", "neckwear"))
    for group in ("expression", "background"):
        counts = [sum(getattr(c, group) == value for c in drawn) for value in CHOICES[group]]
        assert min(counts) > 0.6 * max(counts)
    assert all(abs(getattr(c, name)) <= span for c in drawn for name, span in POSE.items())
    assert all(0.9 <= c.scale <= 1.1 for c in drawn)


def test_plain_contexts_hide_nothing() -> None:
    for seed in range(100):
        c = plain_context(seed)
        assert (c.headwear, c.eyewear, c.neckwear, c.style) == ("none", "none", "none", "photo")
        assert c.expression in ("neutral", "smiling")
        assert abs(c.turn) < 0.5 and abs(c.tilt) < 5.0
