"""Clothes and accessories: shirt, neckwear, headwear, glasses, earrings."""

import math
from itertools import pairwise

import numpy as np

from hyperdreambooth.avatars.draw.pen import Colour, Pen, glaze, hsv, lerp, mirrored, mix
from hyperdreambooth.avatars.draw.shape import TOP, FaceShape

_GOLD: Colour = (240, 186, 58)
_BLACK: Colour = (34, 34, 44)


def shirt(pen: Pen, hue: float) -> None:
    """Draws shoulders in a shirt; its colour belongs to the picture, not to the person."""
    colour = hsv(hue, 0.42, 0.80)
    pen.blob(mirrored([(0, 40), (16, 42), (34, 48), (47, 58), (52, 74), (54, 100), (0, 110)]), colour)
    dark = mix(colour, (20, 14, 50), 0.35)
    for side in (-1, 1):
        pen.stroke([(side * 35, 84), (side * 34, 70), (side * 37, 62)], 1.8, glaze(dark, 0.8))
    pen.stroke([(-15.5, 43), (-10, 52), (0, 55.5), (10, 52), (15.5, 43)], 3.2, dark, taper=0.2)


def neckwear(pen: Pen, s: FaceShape, kind: str) -> None:
    """Draws a scarf, a bow tie or nothing."""
    if kind == "scarf":
        _scarf(pen, s)
    elif kind == "bow tie":
        _bow_tie(pen)


def _scarf(pen: Pen, s: FaceShape) -> None:
    red, dark, y = (206, 54, 62), (150, 28, 48), min(s.chin_y, 37)
    pen.blob([(6, 46), (18, 46), (22, 82), (8, 84)], dark)
    pen.polygon([(8.5, 74), (20.5, 73), (20.8, 77), (8.3, 78)], (250, 226, 196))
    pen.blob(mirrored([(0, y - 3), (19, y - 2), (24, y + 7), (18, y + 16), (0, y + 18.5)]), red)
    for lift in (4.5, 10.0):
        pen.stroke([(-21, y + lift - 3), (0, y + lift + 2), (21, y + lift - 3)], 1.6, dark)


def _bow_tie(pen: Pen) -> None:
    blue, dark = (44, 70, 170), (24, 34, 104)
    for side in (-1, 1):
        pen.polygon([(side * 1, 48), (side * 14, 41.5), (side * 15, 56.5), (side * 1, 51)], blue)
        pen.stroke([(side * 3, 49), (side * 9, 47.4)], 1.3, dark)
    pen.oval(0, 49.4, 3.6, 4.0, dark)


def glasses(pen: Pen, s: FaceShape) -> None:
    """Draws the person's own glasses."""
    pen, kind = pen.at(1.0), s.kinds["glasses"]
    if kind == "none":
        return
    colour: Colour = (206, 150, 52) if kind == "round" else (36, 32, 46)
    half = min(s.eye_rx + 3.4, s.eye_x - 1.2)
    rim = _ring if kind == "round" else _frame
    for side in (-1, 1):
        k, level = s.on(side).skew, s.eye_y + 0.4
        x, y = side * (s.eye_x + k.lens_x), level + k.lens_y
        wide, high = half * math.exp(k.lens_wide), half * math.exp(k.lens_high)
        pen.oval(x, y, wide, high * 0.86, (255, 255, 255, 34))
        rim(pen, (x, y), (wide, high), k.lens_gap, colour)
        temple = [(x + side * wide, y - 1), (side * (s.half_width + 0.5), level - 2)]
        pen.stroke(temple, 1.5, colour, taper=0)
    bridge = [(half - s.eye_x, s.eye_y - 0.6), (0, s.eye_y - 1.8), (s.eye_x - half, s.eye_y - 0.6)]
    pen.stroke(bridge, 1.5, colour, taper=0)


def _ring(
    pen: Pen, place: tuple[float, float], half: tuple[float, float], gap: float, colour: Colour
) -> None:
    """Draws a round rim, `half` as wide and high, without the share `gap` (`Skew.lens_gap`)."""
    if not gap:
        return pen.ring(*place, *half, 1.5, colour)
    missing, middle = math.pi * abs(gap), math.copysign(math.pi / 2, -gap)
    turns = np.linspace(middle + missing, middle + 2 * math.pi - missing, 24)
    arc = np.stack([np.cos(turns), np.sin(turns)], axis=1) * half + place
    pen.stroke(arc, 1.5, colour, taper=0)


def _frame(
    pen: Pen, place: tuple[float, float], half: tuple[float, float], gap: float, colour: Colour
) -> None:
    """Draws a square rim; one with a gap lacks its upper or lower side."""
    (x, y), (wide, high) = place, half
    corners = [(-1, -0.8), (1, -0.8), (1, 0.62), (0.84, 0.82), (-0.84, 0.82), (-1, 0.62), (-1, -0.8)]
    sides = list(pairwise((x + a * wide, y + b * high) for a, b in corners))
    if gap:
        del sides[0 if gap > 0 else 3]
    for side in sides:
        pen.stroke(side, 1.9, colour, taper=0)


def sunglasses(pen: Pen, s: FaceShape) -> None:
    """Draws dark glasses with a glint."""
    pen = pen.at(1.0)
    half, y = max(s.eye_rx + 2.8, 7.6), s.eye_y + 0.6
    x = max(s.eye_x, half + 0.8)
    lens = [(-1.02, -0.62), (0, -0.78), (1.02, -0.62), (0.92, 0.3), (0.35, 0.86), (-0.35, 0.86), (-0.92, 0.3)]
    for side in (-1, 1):
        k = s.on(side).skew
        at, level = side * (x + k.lens_x), y + k.lens_y
        wide, high = half * math.exp(k.lens_wide), half * math.exp(k.lens_high)
        pen.blob([(at + a * wide, level + b * high) for a, b in lens], _BLACK)
        glint = [(at - wide * 0.55, level + 1), (at - wide * 0.05, level - high * 0.5)]
        pen.stroke(glint, 1.6, (132, 142, 170))
        temple = [(side * (x + half * 0.8), y - half * 0.5), (side * (s.half_width + 1), y - 3)]
        pen.stroke(temple, 2.0, _BLACK, taper=0)
    bridge = [(-x + half * 0.8, y - half * 0.5), (0, y - half * 0.62), (x - half * 0.8, y - half * 0.5)]
    pen.stroke(bridge, 2.2, _BLACK, taper=0)


def earrings(pen: Pen, s: FaceShape) -> None:
    """Draws studs or hoops below the ears, over the hair so that they show."""
    behind, size = pen.at(-0.25), lerp(3.6, 8.4, s.traits["ear_size"])
    for side in (-1, 1):
        x, y = side * (s.half_width + size * 0.25 + 0.4), s.eye_y + 5.4 + size
        if s.kinds["earrings"] == "stud":
            behind.oval(x, y, 1.9, 1.9, (250, 246, 255))
            behind.oval(x, y, 1.2, 1.2, (126, 200, 240))
        elif s.kinds["earrings"] == "hoop":
            behind.ring(x, y + 3.2, 3.4, 4.2, 1.6, _GOLD)


def headwear(pen: Pen, s: FaceShape, kind: str) -> None:
    """Draws a cap, top hat, crown, beanie or headphones; hair stays visible below it."""
    if kind != "none":
        _HEADWEAR[kind](pen.at(0.35), s, s.half_width + min(s.volume, 4.0) * 0.6)


def _cap(pen: Pen, s: FaceShape, w: float) -> None:
    red, dark = (216, 48, 48), (160, 24, 36)
    right = [(0, TOP - 11), (w * 0.72, TOP - 6), (w + 1.5, TOP + 11), (w * 0.8, TOP + 14), (0, TOP + 13)]
    pen.blob(mirrored(right), red)
    pen.stroke([(0, TOP - 10), (-w * 0.1, TOP), (0, TOP + 10)], 1.2, glaze(dark, 0.8), taper=0)
    pen.oval(0, TOP - 11, 2.4, 1.6, dark)
    brim = [
        (-w * 0.98, TOP + 10), (0, TOP + 7), (w * 0.98, TOP + 10), (w * 1.12, TOP + 16), (0, TOP + 14.5),
        (-w * 1.12, TOP + 16),
    ]  # fmt: skip
    pen.blob(brim, dark)
    pen.oval(0, TOP + 1.5, 5, 4.4, (252, 240, 230))


def _top_hat(pen: Pen, s: FaceShape, w: float) -> None:
    tube = [
        (-w * 0.80, TOP + 9), (-w * 0.86, TOP - 18), (0, TOP - 21), (w * 0.86, TOP - 18), (w * 0.80, TOP + 9),
        (0, TOP + 10),
    ]  # fmt: skip
    pen.blob(tube, _BLACK)
    band = [(-w * 0.83, TOP + 1), (w * 0.83, TOP + 1), (w * 0.82, TOP + 8), (-w * 0.82, TOP + 8)]
    pen.polygon(band, (158, 36, 92))
    pen.stroke([(-w * 0.55, TOP - 16), (-w * 0.52, TOP - 1)], 2.4, glaze((150, 150, 176), 0.6))
    pen.oval(0, TOP + 9.5, w * 1.42, 4.2, (22, 22, 30))
    pen.stroke([(-w * 1.2, TOP + 9), (0, TOP + 7.4), (w * 1.2, TOP + 9)], 1.0, (84, 84, 104))


def _crown(pen: Pen, s: FaceShape, w: float) -> None:
    w *= 0.86
    left = [(-w, TOP + 9), (-w * 1.08, TOP - 13), (-w * 0.52, TOP - 3), (0, TOP - 17)]
    pen.polygon(mirrored(left), _GOLD)
    shade = [(w * 0.3, TOP + 9), (w * 0.52, TOP - 3), (w * 1.08, TOP - 13), (w, TOP + 9)]
    pen.polygon(shade, glaze((190, 120, 20), 0.5))
    pen.polygon([(-w, TOP + 4), (w, TOP + 4), (w * 0.98, TOP + 10), (-w * 0.98, TOP + 10)], (206, 140, 30))
    for x, y, colour in ((-1.08, -13, _GOLD), (0, -17, (222, 50, 80)), (1.08, -13, _GOLD)):
        pen.oval(w * x, TOP + y, 2.6, 2.6, colour)
    for x, colour in ((-0.6, (60, 120, 220)), (0, (222, 50, 80)), (0.6, (60, 180, 110))):
        pen.oval(w * x, TOP + 7, 2.4, 2.0, colour)


def _beanie(pen: Pen, s: FaceShape, w: float) -> None:
    teal, dark = (36, 140, 132), (20, 100, 100)
    pen.oval(0, TOP - 15, 6, 5.6, (244, 240, 226))
    right = [(0, TOP - 12), (w * 0.66, TOP - 8), (w + 1, TOP + 8), (w * 0.8, TOP + 11), (0, TOP + 11)]
    pen.blob(mirrored(right), teal)
    cuff = [
        (0, TOP + 4), (w * 0.8, TOP + 5.5), (w + 2, TOP + 9), (w + 1.5, TOP + 15), (w * 0.7, TOP + 14.5),
        (0, TOP + 13.5),
    ]  # fmt: skip
    pen.blob(mirrored(cuff), dark)
    rib = glaze((120, 200, 190), 0.7)
    for i in range(-4, 5):
        pen.stroke([(i * w * 0.235, TOP + 6), (i * w * 0.245, TOP + 13)], 1.1, rib, taper=0)


def _headphones(pen: Pen, s: FaceShape, w: float) -> None:
    w, y = w + 1.2, s.eye_y + 4
    left = [(-w, y), (-w - 0.5, -20), (-w * 0.68, TOP + 1 - s.volume), (0, TOP - 4.5 - s.volume)]
    pen.stroke(mirrored(left), 4.2, (62, 66, 82), taper=0.1)
    for side in (-1, 1):
        pen.oval(side * (w + 0.8), y, 6.8, 10.4, (238, 116, 38))
        pen.oval(side * (w - 1.6), y, 3.8, 8.8, (62, 66, 82))


_HEADWEAR = {"cap": _cap, "top hat": _top_hat, "crown": _crown, "beanie": _beanie, "headphones": _headphones}
