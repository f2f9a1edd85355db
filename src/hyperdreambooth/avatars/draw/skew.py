"""Deliberately skewed faces: two halves that differ, features off the axis, broken glasses.

They teach a reader how even a face is. Only measures change: a skewed face is drawn by the same strokes as an
even one, so nothing but its shape gives it away.
"""

from dataclasses import dataclass

import numpy as np

from hyperdreambooth.avatars.draw.pen import lerp
from hyperdreambooth.avatars.draw.people import Context, Identity


@dataclass(frozen=True)
class Skew:
    """How far a face is from even, in units of a 128-pixel frame; every number is 0 in an even face.

    Attributes:
        side: the half of the face that departs from the other: -1 on the left of the picture, 1 on the right.
        eye_x, eye_y: how much further out, and lower, its eye is.
        eye_size, lens_wide, lens_high: natural logarithms of how much larger its eye or glass is.
        eye_tilt, eye_hue: how much its eye's traits differ.
        brow_y, brow_tilt: how much lower its brow is, and how much lower the brow's inner end.
        lens_x, lens_y: how much further out, and lower, its glass is.
        lens_gap: the share of its rim that is missing at the top, or if negative at the bottom.
        nose, mouth: how far they are to the right of the axis.
        mouth_slant: how much lower the mouth's right corner is than its middle.
    """

    side: int = 1
    eye_x: float = 0.0
    eye_y: float = 0.0
    eye_size: float = 0.0
    eye_tilt: float = 0.0
    eye_hue: float = 0.0
    brow_y: float = 0.0
    brow_tilt: float = 0.0
    lens_x: float = 0.0
    lens_y: float = 0.0
    lens_wide: float = 0.0
    lens_high: float = 0.0
    lens_gap: float = 0.0
    nose: float = 0.0
    mouth: float = 0.0
    mouth_slant: float = 0.0


EVEN = Skew()

# Part of the face → the numbers that skew it, from the smallest that shows at 128 pixels to a large one.
_WAYS: dict[str, dict[str, tuple[float, float]]] = {
    "eyes": {
        "eye_x": (2.5, 5.0), "eye_y": (2.5, 5.5), "eye_size": (0.3, 0.6), "eye_tilt": (0.9, 1.6),
        "eye_hue": (0.4, 0.65),
    },
    "brows": {"brow_y": (3.0, 6.0), "brow_tilt": (3.0, 5.5)},
    "nose": {"nose": (4.0, 8.0)},  # a turned head moves the nose by up to 1.8 more than the eyes
    "mouth": {"mouth": (3.5, 8.0), "mouth_slant": (2.5, 5.0)},
    "glasses": {
        "lens_x": (3.0, 6.0), "lens_y": (3.0, 6.0), "lens_wide": (0.3, 0.55), "lens_high": (0.3, 0.55),
        "lens_gap": (0.15, 0.3),
    },
}  # fmt: skip
PARTS = tuple(_WAYS)
_FRINGES = ("bob", "long", "short", "side_part")  # these may hide a brow
_PIXEL_ART = 1.6  # a cell of pixel art is four pixels wide and swallows what is smaller


def skewed_parts(person: Identity, context: Context) -> tuple[str, ...]:
    """Returns the one to three parts of a person's face that are skewed, in any order; all of them show."""
    rng = np.random.default_rng([person.seed, 5])
    count = int(rng.choice(3, p=(0.5, 0.3, 0.2))) + 1
    return tuple(rng.permutation(_shown(person, context))[:count].tolist())


def _shown(person: Identity, context: Context) -> list[str]:
    """Returns the parts that nothing hides; sunglasses hide eyes and brows, and are glasses themselves."""
    dark = context.eyewear == "sunglasses"
    hidden = {
        "eyes": dark,
        "brows": dark or person.kinds["hair_style"] in _FRINGES,
        "glasses": not dark and person.kinds["glasses"] == "none",
    }
    return [part for part in PARTS if not hidden.get(part)]


def random_skew(person: Identity, context: Context, attempt: int = 0) -> Skew:
    """Returns a skew of `skewed_parts`, by small to large amounts; each attempt has larger ones."""
    rng = np.random.default_rng([person.seed, 6, attempt])
    strength = (_PIXEL_ART if context.style == "pixel art" else 1.0) * 1.2**attempt
    # The right eye winks, and a closed eye has few measures, so there the left half is skewed.
    side = -1 if context.expression == "winking" or rng.random() < 0.5 else 1
    moved: dict[str, float] = {}
    for part in skewed_parts(person, context):
        ways = [way for way in _WAYS[part] if not _senseless(way, context)]
        for way in rng.permutation(ways)[: 1 if rng.random() < 0.7 else 2].tolist():
            sign = 1.0 if rng.random() < 0.5 else -1.0
            moved[way] = sign * lerp(*_WAYS[part][way], float(rng.random())) * strength
    if "eye_hue" in moved:  # a ramp ends, so an eye's colour goes the way that has room
        moved["eye_hue"] = abs(moved["eye_hue"]) * (1.0 if person.traits["eye_hue"] < 0.5 else -1.0)
    return Skew(side, **moved)


def _senseless(way: str, context: Context) -> bool:
    """Returns whether a way to skew means nothing here: a wink slants the mouth, sunglasses have no rim."""
    if way == "mouth_slant":
        return context.expression == "winking"
    return way == "lens_gap" and context.eyewear == "sunglasses"
