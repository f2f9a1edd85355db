"""The measures and colours of one head, from traits and expression, in units of a 128-pixel frame."""

import math
from copy import copy
from dataclasses import dataclass

import numpy as np

from hyperdreambooth.avatars.draw.pen import Colour, Points, curve, lerp, mirrored, mix, ramp
from hyperdreambooth.avatars.draw.people import Context, Identity
from hyperdreambooth.avatars.draw.skew import EVEN, Skew

TOP = -37.0

_SKIN: tuple[Colour, ...] = (
    (255, 226, 206), (247, 207, 177), (231, 180, 142), (204, 146, 104), (163, 107, 72), (118, 75, 52),
    (82, 52, 40),
)  # fmt: skip
_ASH: tuple[Colour, ...] = (
    (26, 24, 30), (52, 43, 40), (92, 74, 62), (146, 122, 94), (198, 174, 132), (236, 218, 176),
)  # fmt: skip
_GINGER: tuple[Colour, ...] = (
    (34, 18, 16), (78, 34, 20), (128, 54, 24), (176, 80, 32), (214, 116, 52), (238, 168, 92),
)  # fmt: skip
_TINTS: dict[str, tuple[Colour, ...]] = {
    "grey": ((92, 94, 100), (170, 172, 178), (236, 236, 238)),
    "blue": ((22, 52, 128), (40, 112, 196), (110, 182, 236)),
    "pink": ((150, 26, 96), (226, 76, 144), (250, 160, 196)),
    "green": ((14, 84, 66), (34, 148, 102), (120, 210, 150)),
}
_EYES: tuple[Colour, ...] = (
    (58, 34, 22), (112, 66, 30), (150, 112, 44), (84, 142, 72), (60, 140, 160), (62, 120, 200),
    (140, 158, 178),
)  # fmt: skip
_LIPS: tuple[Colour, ...] = ((176, 112, 96), (206, 92, 92), (198, 52, 76), (130, 34, 66))


@dataclass(frozen=True)
class Mood:
    """The effect of an expression; positive numbers lift brows and corners of the mouth."""

    smile: float = 0.0
    open: float = 0.0
    width: float = 1.0
    lids: tuple[float, float] = (1.0, 1.0)
    raise_brow: float = 0.0
    frown: float = 0.0
    smirk: float = 0.0


MOODS: dict[str, Mood] = {
    "neutral": Mood(smile=0.0),
    "smiling": Mood(smile=0.85, open=0.28, width=1.12, lids=(0.88, 0.88), raise_brow=0.6),
    "laughing": Mood(smile=1.0, open=1.0, width=1.12, lids=(0.42, 0.42), raise_brow=1.8),
    "sad": Mood(smile=-1.15, width=0.95, lids=(0.66, 0.66), raise_brow=0.8, frown=-1.5),
    "surprised": Mood(open=1.0, width=0.55, lids=(1.32, 1.32), raise_brow=4.2),
    "angry": Mood(smile=-0.55, open=0.42, width=1.05, lids=(0.7, 0.7), raise_brow=-1.8, frown=1.5),
    "winking": Mood(smile=0.7, width=1.0, lids=(1.0, 0.0), raise_brow=0.8, smirk=0.8),
}


def skin_colour(traits: dict[str, float]) -> Colour:
    """Returns the colour of the skin: from light to deep, rosier or more golden."""
    base = ramp(_SKIN, traits["skin_tone"])
    warmth = traits["skin_warmth"] - 0.5
    # Gains, not offsets: the same offset would turn deep skin green or red.
    gains = (0.0, 0.03, -0.16) if warmth > 0 else (0.03, -0.055, 0.01)
    amount = 2.0 * abs(warmth)
    return tuple(min(255, int(part * (1.0 + amount * gain))) for part, gain in zip(base, gains, strict=True))


def hair_colour(traits: dict[str, float], kinds: dict[str, str]) -> Colour:
    """Returns the colour of the hair: from black to blond and from ash to ginger, or grey, or dyed."""
    light = traits["hair_lightness"]
    if kinds["hair_tint"] != "natural":
        return ramp(_TINTS[kinds["hair_tint"]], light)
    # Dark hair is the most common, so colours change slowly at the dark end of the ramp.
    place = light**1.25
    return mix(ramp(_ASH, place), ramp(_GINGER, place), traits["hair_hue"])


def _outline(traits: dict[str, float], width: float, chin_y: float) -> Points:
    """Returns the outline of the face: skull, cheeks, jaw and chin."""
    jaw = width * lerp(0.60, 0.90, traits["jaw"])
    chin = lerp(5.0, 12.5, traits["chin"])
    right = [
        (0.0, TOP), (width * 0.62, TOP + 4.5), (width * 0.95, TOP + 17), (width, -4.0), (width * 0.965, 8.0),
        (jaw, chin_y * 0.66), (chin, chin_y - 2.2), (0.0, chin_y),
    ]  # fmt: skip
    return curve(mirrored(right))


class FaceShape:
    """The measures of a person's head in a context, in units of a 128-pixel frame, and its colours."""

    def __init__(self, person: Identity, context: Context, skew: Skew = EVEN) -> None:
        t, self.skew = person.traits, skew
        self.kinds, self.traits, self.mood = person.kinds, t, MOODS[context.expression]
        self.half_width, self.chin_y = lerp(23.0, 31.0, t["face_width"]), lerp(29.5, 40.0, t["face_length"])
        self.outline = _outline(t, self.half_width, self.chin_y)
        self.eye_x = lerp(0.38, 0.54, t["eye_spacing"]) * lerp(26.0, self.half_width, 0.6)
        self.eye_y, self.eye_rx = lerp(-5.0, -2.5, t["face_length"]), lerp(4.6, 7.4, t["eye_size"])
        self.nose_y = self.eye_y + lerp(11.0, 17.5, t["nose_length"])
        self.mouth_y = self.nose_y + (self.chin_y - self.nose_y) * 0.43
        self.volume = lerp(2.0, 7.5, t["hair_volume"])
        self.skin, self.hair = skin_colour(t), hair_colour(t, person.kinds)
        self.shadow = mix(self.skin, (70, 14, 30), lerp(0.22, 0.42, t["skin_tone"]))
        self.hair_dark = mix(self.hair, (16, 8, 24), 0.38)
        self.hair_light = mix(self.hair, (255, 240, 220), 0.28)
        self.iris = ramp(_EYES, t["eye_hue"])
        self.lips = mix(ramp(_LIPS, t["lip_colour"]), self.skin, lerp(0.30, 0.12, t["lip_colour"]))

    def on(self, side: int) -> "FaceShape":
        """Returns the measures of the left (-1) or right (1) half of the face, whose `skew` is its own."""
        half, k = copy(self), self.skew if side == self.skew.side else EVEN
        half.skew, half.eye_x, half.eye_y = k, self.eye_x + k.eye_x, self.eye_y + k.eye_y
        half.eye_rx = self.eye_rx * math.exp(k.eye_size)
        half.iris = ramp(_EYES, self.traits["eye_hue"] + k.eye_hue)
        half.traits = self.traits | {"eye_tilt": self.traits["eye_tilt"] + k.eye_tilt}
        return half

    def width_at(self, y: float) -> float:
        """Returns half the width of the face at a height."""
        right = self.outline[self.outline[:, 0] >= 0]
        order = np.argsort(right[:, 1])
        return float(np.interp(y, right[order, 1], right[order, 0]))
