"""Identities, which captions never name, and contexts, which they do; both come from seeds."""

from dataclasses import dataclass

import numpy as np

_MILLION = 1_000_000
SPLITS = {
    name: range(k * _MILLION, (k + 1) * _MILLION) for k, name in enumerate(("base", "train", "val", "test"))
}

CONTINUOUS: tuple[str, ...] = (
    "skin_tone", "skin_warmth", "blush", "face_width", "face_length", "jaw", "chin", "eye_spacing",
    "eye_size", "eye_tilt", "eye_hue", "brow_height", "brow_thickness", "brow_tilt", "nose_width",
    "nose_length", "mouth_width", "lip_fullness", "lip_colour", "ear_size", "hair_lightness", "hair_hue",
    "hair_length", "hair_volume",
)  # fmt: skip

CATEGORICAL: dict[str, tuple[str, ...]] = {
    "hair_style": (
        "bald", "buzz", "short", "side_part", "quiff", "curly", "afro", "bob", "long", "bun", "locs",
    ),
    "hair_tint": ("natural", "grey", "blue", "pink", "green"),
    "beard": ("none", "stubble", "moustache", "goatee", "full"),
    "lashes": ("plain", "long"),
    "freckles": ("none", "some", "many"),
    "mole": ("none", "left", "right", "chin"),
    "glasses": ("none", "round", "square"),
    "earrings": ("none", "stud", "hoop"),
}  # fmt: skip

_WEIGHTS: dict[str, tuple[float, ...]] = {
    "hair_style": (0.05, 0.07, 0.11, 0.11, 0.10, 0.10, 0.09, 0.11, 0.11, 0.07, 0.08),
    "hair_tint": (0.78, 0.10, 0.04, 0.04, 0.04),
    "freckles": (0.66, 0.17, 0.17),
    "mole": (0.64, 0.12, 0.12, 0.12),
    "glasses": (0.70, 0.15, 0.15),
    "earrings": (0.66, 0.17, 0.17),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "expression": ("neutral", "smiling", "laughing", "sad", "surprised", "angry", "winking"),
    "headwear": ("none", "cap", "top hat", "crown", "beanie", "headphones"),
    "eyewear": ("none", "sunglasses"),
    "neckwear": ("none", "scarf", "bow tie"),
    "background": ("studio", "beach", "forest", "city", "night sky", "snow", "living room", "brick wall"),
    "style": ("photo", "pencil sketch", "watercolour", "pixel art", "neon"),
    "light": ("normal", "warm", "cool", "dark"),
}

_FIRST_SHARE = {"headwear": 0.62, "eyewear": 0.65, "neckwear": 0.62, "style": 0.5, "light": 0.55}

MOST_PHOTOS = 1000  # of one person


@dataclass(frozen=True)
class Identity:
    """One person: continuous traits in [0, 1], and kinds, the value of each categorical trait."""

    seed: int
    traits: dict[str, float]
    kinds: dict[str, str]


@dataclass(frozen=True)
class Context:
    """Everything about a picture that is not the person.

    `shirt` (a hue) and `scene` (the layout of the background) lie in [0, 1] and are not named in captions.
    Shifts are in pixels of a 128-pixel frame, `turn` lies in [-1, 1], `tilt` is in degrees.
    """

    expression: str = "neutral"
    headwear: str = "none"
    eyewear: str = "none"
    neckwear: str = "none"
    background: str = "studio"
    style: str = "photo"
    light: str = "normal"
    shift_x: float = 0.0
    shift_y: float = 0.0
    turn: float = 0.0
    tilt: float = 0.0
    scale: float = 1.0
    shirt: float = 0.6
    scene: float = 0.0


def _pick(rng: np.random.Generator, values: tuple[str, ...], weights: tuple[float, ...] | None = None) -> str:
    """Chooses one of the values, uniformly or by weight."""
    return values[int(rng.choice(len(values), p=weights))]


def _lean_weights(lean: float) -> dict[str, tuple[float, ...]]:
    """Returns weights of beards and lashes by one number, so that few faces have a beard and long lashes."""
    beard = (0.30, 0.20, 0.14, 0.16, 0.20) if lean < 0.5 else (0.97, 0.01, 0.01, 0.005, 0.005)
    lashes = (0.95, 0.05) if lean < 0.5 else (0.25, 0.75)
    return {"beard": beard, "lashes": lashes}


def identity(seed: int) -> Identity:
    """Returns the person of a seed; the same on every machine."""
    rng = np.random.default_rng([seed, 1])
    traits = {name: float(value) for name, value in zip(CONTINUOUS, rng.random(len(CONTINUOUS)), strict=True)}
    weights = _WEIGHTS | _lean_weights(rng.random())
    kinds = {name: _pick(rng, values, weights[name]) for name, values in CATEGORICAL.items()}
    return Identity(seed, traits, kinds)


def _choose(rng: np.random.Generator, group: str) -> str:
    """Chooses a value of a context group; the first value has its own share in some groups."""
    values, share = CHOICES[group], _FIRST_SHARE.get(group)
    if share is None:
        return _pick(rng, values)
    others = len(values) - 1
    return _pick(rng, values, (share, *[(1.0 - share) / others] * others))


def _pose(rng: np.random.Generator, amount: float) -> dict[str, float]:
    """Draws a pose within `amount` (0 to 1) of the whole range."""
    spans = {"shift_x": 5.0, "shift_y": 4.0, "turn": 1.0, "tilt": 8.0, "scale": 0.06}
    pose = {name: float(rng.uniform(-span, span)) * amount for name, span in spans.items()}
    return pose | {"scale": 1.0 + pose["scale"], "shirt": float(rng.random()), "scene": float(rng.random())}


def context(seed: int) -> Context:
    """Returns a random context: half are photos, and each accessory is absent in 62 to 65 %."""
    rng = np.random.default_rng([seed, 2])
    chosen = {group: _choose(rng, group) for group in CHOICES}
    return Context(**chosen, **_pose(rng, 1.0))  # pyright: ignore[reportArgumentType]


def plain_context(seed: int) -> Context:
    """Returns a context for reference photos: no accessory, neutral or smiling, nearly frontal, not dark."""
    rng = np.random.default_rng([seed, 3])
    chosen = {
        "expression": _pick(rng, ("neutral", "smiling")),
        "background": _choose(rng, "background"),
        "light": _pick(rng, ("normal", "warm", "cool"), (0.7, 0.15, 0.15)),
    }
    return Context(**chosen, **_pose(rng, 0.35))  # pyright: ignore[reportArgumentType]


def photo_context(person: int, number: int, seed: int = 0, album: bool = True) -> Context:
    """Returns the context of a person's photo `number`.

    An album has a plain photo every second time, from photo 0 on, because accessories hide the person.
    """
    drawn_from = (seed << 40) + person * MOST_PHOTOS + number
    return plain_context(drawn_from) if album and number % 2 == 0 else context(drawn_from)
