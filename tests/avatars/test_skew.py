"""Skewed faces: drawn like even ones, and different only where the face is."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from hyperdreambooth.avatars.build.looks import render
from hyperdreambooth.avatars.draw.people import (
    CATEGORICAL,
    CONTINUOUS,
    Context,
    Identity,
    identity,
    photo_context,
)
from hyperdreambooth.avatars.draw.render import draw
from hyperdreambooth.avatars.draw.skew import PARTS, Skew, random_skew, skewed_parts

AMOUNT = {
    "eye_size": 0.3,
    "eye_tilt": 0.9,
    "eye_hue": 0.4,
    "lens_wide": 0.3,
    "lens_high": 0.3,
    "lens_gap": 0.15,
}
WAYS = [field.name for field in fields(Skew) if field.name != "side"]
KINDS = {name: values[0] for name, values in CATEGORICAL.items()} | {"hair_style": "quiff"}
PERSON = Identity(0, dict.fromkeys(CONTINUOUS, 0.5), KINDS)


@pytest.mark.parametrize("side", [-1, 1])
def test_no_skew_gives_the_renderers_bytes(side: int) -> None:
    for seed in range(12):
        person, scene = identity(seed), photo_context(seed, 1)
        assert draw(person, scene, skew=Skew(side)).tobytes() == draw(person, scene).tobytes()


@pytest.mark.parametrize("glasses", ["none", "round", "square", "sunglasses"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", [-1, 1])
def test_every_way_shows_and_leaves_all_but_the_face_alone(way: str, side: int, glasses: str) -> None:
    dark = glasses == "sunglasses"
    person = replace(PERSON, kinds=KINDS | {"glasses": "none" if dark else glasses})
    scene = Context(eyewear="sunglasses" if dark else "none")
    skewed = draw(person, scene, skew=Skew(side, **{way: AMOUNT.get(way, 3.0)}))
    changed = (np.asarray(draw(person, scene)) != np.asarray(skewed)).any(axis=2)
    if (glasses == "none" and way.startswith("lens")) or (dark and way == "lens_gap"):
        assert not changed.any()
        return
    if dark and way.startswith("eye"):  # mostly hidden
        return
    assert changed.sum() >= 8
    down, across = changed.nonzero()
    assert down.min() >= 40 and down.max() <= 108 and across.min() >= 28 and across.max() <= 100
    one_half = not way.startswith(("nose", "mouth"))
    assert not one_half or (across.mean() > 64) == (side > 0)


def test_a_skew_moves_the_parts_that_it_names() -> None:
    words = {"eyes": "eye_", "brows": "brow_", "nose": "nose", "mouth": "mouth", "glasses": "lens_"}
    for seed in range(300):
        person, scene = identity(seed), photo_context(seed, 0, album=False)
        parts = skewed_parts(person, scene)
        assert 1 <= len(parts) <= 3 and set(parts) <= set(PARTS)
        skew = random_skew(person, scene)
        moved = {
            part
            for part, word in words.items()
            for way in WAYS
            if way.startswith(word) and getattr(skew, way)
        }
        assert moved == set(parts) and skew == random_skew(person, scene)
        if scene.eyewear == "sunglasses":
            assert not {"eyes", "brows"} & moved and not skew.lens_gap
        if scene.expression == "winking":
            assert skew.side == -1 and not skew.mouth_slant


def test_later_attempts_move_more() -> None:
    scene = photo_context(3, 0, album=False)
    first, fourth = (
        np.mean([abs(random_skew(identity(seed), scene, attempt).nose) for seed in range(200)])
        for attempt in (0, 3)
    )
    assert fourth > 1.4 * first > 0


def test_a_skewed_picture_always_shows_it() -> None:
    for seed in range(40):
        person, scene = identity(seed), photo_context(seed, 0, album=False)
        even, skewed = render((person, scene, False)), render((person, scene, True))
        assert even.tobytes() == draw(person, scene).tobytes()
        gap = np.abs(np.asarray(even, dtype=int) - np.asarray(skewed, dtype=int)).max(axis=2)
        assert (gap > 24).sum() >= 20
