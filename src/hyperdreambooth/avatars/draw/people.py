"""Identities, which captions never name, and contexts, which they do; both come from seeds."""

from dataclasses import dataclass

import numpy as np

_STARTS = {"base": 0, "train": 1_000_000, "val": 2_000_000, "test": 3_000_000}
SPLITS = {name: range(start, start + 1_000_000) for name, start in _STARTS.items()}

CONTINUOUS: tuple[str, ...] = (
    "skin_tone", "skin_warmth", "blush", "face_width", "face_length", "jaw", "chin", "eye_spacing",
    "eye_size", "eye_tilt", "eye_hue", "brow_height", "brow_thickness", "brow_tilt", "nose_width",
    "nose_length", "mouth_width", "lip_fullness", "lip_colour", "ear_size", "hair_lightness", "hair_hue",
    "hair_length", "hair_volume",
)  # fmt: skip

_SHARES: dict[str, dict[str, float]] = {
    "hair_style": {
        "bald": 0.05, "buzz": 0.07, "short": 0.11, "side_part": 0.11, "quiff": 0.10, "curly": 0.10,
        "afro": 0.09, "bob": 0.11, "long": 0.11, "bun": 0.07, "locs": 0.08,
    },
    "hair_tint": {"natural": 0.78, "grey": 0.10, "blue": 0.04, "pink": 0.04, "green": 0.04},
    "beard": {"none": 0.30, "stubble": 0.20, "moustache": 0.14, "goatee": 0.16, "full": 0.20},
    "lashes": {"plain": 0.95, "long": 0.05},
    "freckles": {"none": 0.66, "some": 0.17, "many": 0.17},
    "mole": {"none": 0.64, "left": 0.12, "right": 0.12, "chin": 0.12},
    "glasses": {"none": 0.70, "round": 0.15, "square": 0.15},
    "earrings": {"none": 0.66, "stud": 0.17, "hoop": 0.17},
}  # fmt: skip
CATEGORICAL = {name: tuple(shares) for name, shares in _SHARES.items()}
# of half of the people, so that few faces have a beard and long lashes
_SMOOTH = {"beard": (0.97, 0.01, 0.01, 0.005, 0.005), "lashes": (0.25, 0.75)}

ATTRIBUTES: dict[str, dict[str, str]] = {
    "style": {
        "photo": "a photo of",
        "pencil sketch": "a pencil sketch of",
        "watercolour": "a watercolour painting of",
        "pixel art": "a pixel art picture of",
        "neon": "a neon drawing of",
    },
    "expression": {
        "neutral": "with a neutral face",
        **{mood: mood for mood in ("smiling", "laughing", "sad", "surprised", "angry", "winking")},
    },
    "headwear": {
        "none": "",
        "cap": "wearing a red cap",
        "top hat": "wearing a black top hat",
        "crown": "wearing a golden crown",
        "beanie": "wearing a green beanie",
        "headphones": "wearing headphones",
    },
    "eyewear": {"none": "", "sunglasses": "wearing sunglasses"},
    "neckwear": {"none": "", "scarf": "wearing a red scarf", "bow tie": "wearing a blue bow tie"},
    "background": {
        "studio": "in a grey studio",
        "beach": "on a beach",
        "forest": "in a forest",
        "city": "in a city",
        "night sky": "under a starry night sky",
        "snow": "in the snow",
        "living room": "in a living room",
        "brick wall": "in front of a brick wall",
    },
    "light": {"normal": "", "warm": "in warm light", "cool": "in cool light", "dark": "in dim light"},
}
"""Group → value of a context → its phrase in a caption."""

_DRAWN = ("expression", "headwear", "eyewear", "neckwear", "background", "style", "light")
CHOICES = {group: tuple(ATTRIBUTES[group]) for group in _DRAWN}  # in the order in which they are drawn

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


def identity(seed: int) -> Identity:
    """Returns the person of a seed; the same on every machine."""
    rng = np.random.default_rng([seed, 1])
    traits = {name: float(value) for name, value in zip(CONTINUOUS, rng.random(len(CONTINUOUS)), strict=True)}
    other = {} if rng.random() < 0.5 else _SMOOTH
    weights = {name: other.get(name, tuple(shares.values())) for name, shares in _SHARES.items()}
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
