"""The parts of a face, one function each: neck, ears, head, cheeks, eyes, brows, nose, mouth, beard."""

import numpy as np

from hyperdreambooth.avatars.draw.pen import CIRCLE, Colour, Pen, Points, glaze, lerp, mirrored, mix
from hyperdreambooth.avatars.draw.shape import FaceShape

_X = np.linspace(-1.0, 1.0, 17)
_WHITE: Colour = (252, 250, 246)
_INK: Colour = (38, 24, 28)


def neck(pen: Pen, s: FaceShape) -> None:
    """Draws the neck, down to a round neckline, with the shadow of the head on it."""
    half = s.half_width * 0.47
    pen.blob(mirrored([(0, 12), (half, 14), (half, 34), (half + 2.5, 43), (half + 1, 49), (0, 53.5)]), s.skin)
    low = s.chin_y + 5.5
    shadow = mirrored([(0, 14), (half, 16), (half, low - 6), (half * 0.6, low - 0.5), (0, low + 0.8)])
    pen.blob(shadow, glaze(s.shadow, 0.6))


def ears(pen: Pen, s: FaceShape) -> None:
    """Draws both ears, with a shaded hollow."""
    behind, size = pen.at(-0.25), lerp(3.6, 8.4, s.traits["ear_size"])
    for side in (-1, 1):
        x, y = side * (s.half_width + size * 0.22), s.eye_y + 5.0
        behind.oval(x, y, size * 0.72, size, mix(s.skin, s.shadow, 0.12), side * 0.16)
        behind.oval(x + side * 0.4, y + 0.3, size * 0.38, size * 0.62, glaze(s.shadow, 0.55), side * 0.16)


def head(pen: Pen, s: FaceShape) -> None:
    """Draws the face itself, with soft shading away from the light at the upper left."""
    pen = pen.at(0.3)
    pen.polygon(s.outline, s.skin)
    inner = s.outline * (0.86, 1.0) + (-3.6 - s.half_width * 0.03, -1.5)
    right, left = s.outline[: len(s.outline) // 2 + 1], inner[: len(inner) // 2 + 1]
    # The shaded side is the strip between the outline and a copy of it moved toward the light.
    pen.polygon(np.concatenate([right[8:], left[8:][::-1]]), glaze(s.shadow, 0.22))
    light = mix(s.skin, (255, 246, 226), 0.6)
    pen.glow(-s.half_width * 0.28, -17, s.half_width * 0.5, 11, light, 0.36)
    pen.glow(0, s.chin_y - 4.5, 6, 3.6, light, 0.3)


def cheeks(pen: Pen, s: FaceShape) -> None:
    """Draws blush, freckles and moles."""
    pen = pen.at(0.8)
    y, x = s.nose_y - 0.5, s.half_width * 0.60
    flush = mix((240, 84, 84), s.shadow, s.traits["skin_tone"] * 0.45)
    for side in (-1, 1):
        pen.glow(side * x, y + 1, 7.5, 5.4, flush, lerp(0.03, 0.60, s.traits["blush"]))
        _freckles(pen, s, side * x * 0.86, y - 1)
    places = {"left": (-x * 1.02, y + 5), "right": (x * 1.02, y + 5), "chin": (5.2, s.chin_y - 5)}
    if s.kinds["mole"] != "none":
        pen.oval(*places[s.kinds["mole"]], 1.35, 1.35, mix(s.shadow, (30, 10, 10), 0.6))


def _freckles(pen: Pen, s: FaceShape, x: float, y: float) -> None:
    tone = mix(s.shadow, (120, 40, 10), 0.4)
    for i in range({"none": 0, "some": 5, "many": 11}[s.kinds["freckles"]]):
        # The golden angle spreads any number of dots evenly without a pattern.
        angle, radius = 2.4 * i, (i / 11) ** 0.5
        place = (x + 8 * radius * np.cos(angle), y + 5 * radius * np.sin(angle))
        pen.oval(*place, 0.85, 0.75, glaze(tone, 0.75))


def _eye_curves(s: FaceShape, side: int, lid: float) -> tuple[Points, Points, Points]:
    """Returns positions along an eye, and its upper and lower lid there, relative to its centre."""
    slope = -_X * side * lerp(-2.2, 2.4, s.traits["eye_tilt"]) * 0.8
    arch, height = (1 - _X**2) ** 0.72, s.eye_rx * 0.70
    return _X * s.eye_rx, slope - arch * height * lid, slope + (1 - _X**2) * height * 0.62 * min(lid, 1.1)


def eyes(pen: Pen, s: FaceShape) -> None:
    """Draws both eyes; a closed one is an arc."""
    pen = pen.at(1.0)
    for side, lid in zip((-1, 1), s.mood.lids, strict=True):
        half = s.on(side)
        x, upper, lower = _eye_curves(half, side, lid)
        centre = (side * half.eye_x, half.eye_y)
        if lid < 0.2:
            arc = np.stack([x, -(1 - _X**2) * half.eye_rx * 0.42 + 1.2], axis=1)[::4] + centre
            pen.stroke(arc, 2.1, _INK)
            continue
        _open_eye(pen, half, centre, x, upper, lower)
        _lids(pen, half, side, np.stack([x, upper], axis=1) + centre)


def _open_eye(
    pen: Pen, s: FaceShape, centre: tuple[float, float], x: Points, upper: Points, lower: Points
) -> None:
    """Draws white, iris, pupil and glint; the lids cut the round parts."""
    top, bottom = np.stack([x, upper], axis=1), np.stack([x, lower], axis=1)[::-1]
    pen.polygon(np.concatenate([top, bottom]) + centre, _WHITE)
    radius = s.eye_rx * 0.56
    for part, colour in ((1.0, mix(s.iris, _INK, 0.45)), (0.84, s.iris), (0.44, _INK)):
        disc = CIRCLE * radius * part - (0.0, 0.3)
        disc[:, 1] = np.clip(disc[:, 1], np.interp(disc[:, 0], x, upper), np.interp(disc[:, 0], x, lower))
        pen.polygon(disc + centre, colour)
    if upper.min() < -2.0:
        pen.oval(centre[0] - radius * 0.32, centre[1] - radius * 0.42, 0.95, 0.95, (255, 255, 255))


def _lids(pen: Pen, s: FaceShape, side: int, edge: Points) -> None:
    """Draws the dark upper lid, its crease, and long lashes."""
    long = s.kinds["lashes"] == "long"
    pen.stroke(edge[::4] - (0, 2.5), 0.9, glaze(s.shadow, 0.75))
    pen.stroke(edge[::4], 1.9 if long else 1.5, _INK, taper=0.3)
    if long:
        outer, step = (edge[-1], edge[-4]) if side > 0 else (edge[0], edge[3])
        for start, reach in ((outer, 2.9), (step, 2.2)):
            end = (start[0] + side * reach * 0.8, start[1] - reach * 0.75)
            pen.stroke([tuple(start), end], 1.4, _INK, taper=0.6)


def brows(pen: Pen, s: FaceShape) -> None:
    """Draws both eyebrows, which the expression moves."""
    pen = pen.at(1.0)
    height = s.eye_y - s.eye_rx * 0.7 - lerp(2.6, 6.4, s.traits["brow_height"]) - s.mood.raise_brow
    slope = lerp(-2.0, 0.9, s.traits["brow_tilt"]) + s.mood.frown * 2.6
    width, reach = lerp(1.4, 4.4, s.traits["brow_thickness"]), s.eye_rx * 1.12 + 1.2
    colour = mix(s.hair_dark, (40, 24, 22), 0.35)
    for side in (-1, 1):
        k = s.on(side).skew
        x, y, tilt = side * s.eye_x, height + k.brow_y, slope + k.brow_tilt
        inner, outer = (x - side * reach * 0.86, y + tilt + 0.8), (x + side * reach, y - tilt + 1.4)
        pen.stroke([inner, (x + side * 0.6, y - 0.9), outer], width, colour, taper=0.55)


def nose(pen: Pen, s: FaceShape) -> None:
    """Draws bridge, tip and nostrils as light and shade, without an outline."""
    pen, w, y = pen.at(1.35, s.skew.nose), lerp(3.0, 8.2, s.traits["nose_width"]), s.nose_y
    bridge = [(0.6, s.eye_y - 1), (2.2, y - 8), (w * 0.95, y - 1.6), (w * 0.8, y + 1.0), (0.4, y + 1.4)]
    pen.blob(bridge, glaze(s.shadow, 0.24))
    light = glaze(mix(s.skin, (255, 250, 236), 0.7), 0.42)
    pen.oval(-0.8, (s.eye_y + y) / 2 - 1, 1.3, (y - s.eye_y) * 0.36, light)
    tip = mirrored([(-w, y - 2.4), (-w * 0.98, y + 0.2), (-w * 0.45, y + 0.9), (0, y + 1.9)])
    pen.stroke(tip, 1.5, glaze(mix(s.shadow, _INK, 0.12), 0.85))


def mouth(pen: Pen, s: FaceShape) -> None:
    """Draws the lips and, if the mouth is open, teeth and tongue."""
    pen, mood = pen.at(1.0, s.skew.mouth), s.mood
    half = lerp(7.0, 12.5, s.traits["mouth_width"]) * mood.width
    full = lerp(0.9, 4.6, s.traits["lip_fullness"])
    bow = 1 - _X**2
    line = s.mouth_y + mood.smile * 5.2 * (0.42 - _X**2) - mood.open * 1.6 - mood.smirk * 3.6 * _X
    line = line + s.skew.mouth_slant * _X
    # Without a smile an open mouth is round: the upper lip arches too.
    line = line - mood.open * (1.0 - abs(mood.smile)) * 3.4 * bow**0.5
    gap = bow**0.5 * mood.open * min(9.5, (s.chin_y - s.mouth_y) * 0.62)
    upper = line - full * (bow**0.7 - 0.34 * np.exp(-((_X / 0.22) ** 2)))
    lower = line + gap + full * 1.2 * bow**0.8
    x = _X * half
    pen.polygon(_between(x, line + gap, lower), mix(s.lips, (255, 226, 216), 0.12))
    pen.polygon(_between(x, upper, line), mix(s.lips, s.shadow, 0.28))
    if mood.open:
        _open_mouth(pen, x, line, gap)
    else:
        pen.stroke(np.stack([x, line], axis=1)[::4], 1.3, mix(s.shadow, _INK, 0.6), taper=0.25)


def _between(x: Points, top: Points, bottom: Points) -> Points:
    """Returns the outline of the area between two curves over the same positions."""
    return np.concatenate([np.stack([x, top], axis=1), np.stack([x, bottom], axis=1)[::-1]])


def _open_mouth(pen: Pen, x: Points, line: Points, gap: Points) -> None:
    pen.polygon(_between(x, line, line + gap), (92, 20, 32))
    wide, deep = float(x.max()), float(gap.max())
    if deep > 5 and wide > 6.5:
        shown = np.maximum(line + gap * 0.62, line)
        pen.polygon(_between(x * 0.62, shown, line + gap), (222, 96, 100))
    if wide > 6.5:
        pen.polygon(_between(x * 0.93, line, line + np.minimum(gap * 0.86, 3.2)), _WHITE)


def beard(pen: Pen, s: FaceShape) -> None:
    """Draws stubble, a moustache, a goatee or a full beard; comes before the mouth."""
    kind, pen = s.kinds["beard"], pen.at(0.75)
    colour = mix(s.hair, s.hair_dark, 0.5)
    if kind == "stubble":
        _jaw_beard(pen.at(0.45), s, glaze(colour, 0.42), 0.0)
    if kind == "full":
        _jaw_beard(pen.at(0.45), s, colour, 4.5)
    if kind == "goatee":
        y, chin = s.mouth_y, s.chin_y
        right = [(0, y + 3.6), (6.5, y + 3.2), (8.6, chin - 5), (6, chin + 2.5), (0, chin + 5)]
        pen.blob(mirrored(right), colour)
    if kind in ("moustache", "goatee", "full"):
        _moustache(pen.at(1.0), s, colour if kind != "full" else mix(colour, s.hair_dark, 0.35))


def _jaw_beard(pen: Pen, s: FaceShape, colour: Colour, extra: float) -> None:
    """Draws hair along the jaw, from ear to ear, `extra` beyond the face's edge at the chin."""
    heights = np.linspace(s.eye_y + 8, s.chin_y - 1.5, 7)
    edge = [(s.width_at(y) + extra * 0.12 + extra * 0.5 * i / 6, y) for i, y in enumerate(heights)]
    w, y = s.half_width, s.mouth_y
    tops = [(4.0, s.nose_y + 4.5), (w * 0.52, y - 2.5), (w * 0.78, y - 6)]
    right = [(0.0, s.nose_y + 4.2), *tops, *edge, (5, s.chin_y + extra), (0.0, s.chin_y + extra)]
    pen.blob(mirrored(right), colour)


def _moustache(pen: Pen, s: FaceShape, colour: Colour) -> None:
    half = lerp(7.0, 12.0, s.traits["mouth_width"]) + 1.5
    # On a short face nose and lips nearly touch; the moustache then lies over the upper lip.
    top, low = s.nose_y + 2.6, max(s.mouth_y - 0.6, s.nose_y + 5.2)
    right = [(0, top + 0.4), (half * 0.5, top), (half, low + 1.4), (half * 0.5, low + 0.4), (0, low)]
    pen.blob(mirrored(right), colour)
