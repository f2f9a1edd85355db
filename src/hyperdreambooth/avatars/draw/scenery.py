"""Backgrounds: simple scenes whose layout varies with one number."""

import numpy as np
from PIL import Image, ImageDraw

from hyperdreambooth.avatars.draw.pen import Colour, Pen, gradient, mix


def scenery(kind: str, variant: float, size: int) -> Image.Image:
    """Returns a square picture of a scene; `variant` in [0, 1] moves its parts."""
    stops, paint = _SCENES[kind]
    picture = gradient(stops, size)
    pen = Pen(ImageDraw.Draw(picture, "RGBA"), size / 128.0, pivot=0.0)
    paint(pen, np.random.default_rng(int(variant * 1e6)))
    return picture


def _studio(pen: Pen, rng: np.random.Generator) -> None:
    x = rng.uniform(30, 98)
    for radius in range(70, 14, -7):
        pen.oval(x, 46, radius, radius, (255, 255, 255, 8))


def _beach(pen: Pen, rng: np.random.Generator) -> None:
    side = -1 if rng.random() < 0.5 else 1
    pen.oval(64 - side * 46, 18, 9, 9, (255, 240, 150))
    pen.polygon([(0, 62), (128, 62), (128, 90), (0, 90)], (40, 150, 196))
    for y in (68, 75):
        x = rng.uniform(0, 24)
        for k in range(4):
            pen.stroke([(x + 34 * k, y), (x + 34 * k + 12, y)], 1.4, (170, 224, 236))
    pen.blob([(-20, 88), (30, 82), (70, 88), (150, 82), (150, 150), (-20, 150)], (238, 208, 146))
    _palm(pen, 64 + side * rng.uniform(46, 54), side)


def _palm(pen: Pen, x: float, side: int) -> None:
    pen.stroke([(x, 92), (x + side * 2, 60), (x - side * 1, 26)], 4.4, (136, 96, 60), taper=0.1)
    for dx, dy in ((-22, 6), (-17, -9), (0, -17), (17, -9), (22, 6)):
        pen.stroke([(x, 26), (x + dx * 0.6, 24 + dy), (x + dx, 30 + dy)], 6.0, (38, 134, 76), taper=0.8)


def _forest(pen: Pen, rng: np.random.Generator) -> None:
    for row, tone in ((60, (112, 164, 104)), (84, (66, 128, 76)), (112, (34, 92, 58))):
        start = rng.uniform(-10, 8)
        for k in range(7):
            _fir(pen, start + k * 23 + rng.uniform(-4, 4), row, row - 22 + rng.uniform(-8, 8), tone)
    pen.polygon([(0, 110), (128, 110), (128, 128), (0, 128)], (34, 82, 50))


def _fir(pen: Pen, x: float, base: float, height: float, tone: Colour) -> None:
    pen.polygon([(x - 2, base), (x + 2, base), (x + 2, base + 30), (x - 2, base + 30)], (92, 66, 48))
    for k in range(3):
        wide, top = 13 - 3 * k, base - height * (0.42 + 0.29 * k)
        low = top + height * 0.46
        pen.polygon([(x, top), (x + wide, low), (x - wide, low)], mix(tone, (220, 240, 160), 0.07 * k))


def _city(pen: Pen, rng: np.random.Generator) -> None:
    for base, tone in ((30, (176, 150, 186)), (52, (104, 98, 148))):
        x = -rng.uniform(0, 12)
        while x < 128:
            wide, top = rng.uniform(15, 24), base + rng.uniform(-18, 16)
            pen.polygon([(x, top), (x + wide - 1.5, top), (x + wide - 1.5, 128), (x, 128)], tone)
            if base > 40:
                _windows(pen, x, top, wide)
            x += wide


def _windows(pen: Pen, x: float, top: float, wide: float) -> None:
    for column in range(int((wide - 3) // 7)):
        for row in range(5):
            left, y = x + 3 + 7.5 * column, top + 5 + 12 * row
            pen.polygon([(left, y), (left + 4.5, y), (left + 4.5, y + 7), (left, y + 7)], (255, 220, 130))


def _night(pen: Pen, rng: np.random.Generator) -> None:
    stars = rng.uniform(0, 128, 22), rng.uniform(0, 112, 22), rng.uniform(1.2, 2.2, 22)
    for x, y, size in zip(*stars, strict=True):
        pen.polygon([(x, y - 1.5 * size), (x + size, y), (x, y + 1.5 * size), (x - size, y)], (255, 250, 214))
    x = 20.0 if rng.random() < 0.5 else 108.0
    pen.oval(x, 22, 10, 10, (250, 240, 196))
    pen.oval(x + 4.5, 19.5, 8.6, 8.6, (24, 28, 84))


def _snow(pen: Pen, rng: np.random.Generator) -> None:
    lift = rng.uniform(-6, 6)
    hills = [(-20, 70 + lift), (24, 56 + lift), (60, 74), (104, 58 - lift), (150, 70)]
    pen.blob([*hills, (150, 150), (-20, 150)], (226, 236, 248))
    for x in (10, 30, 98, 118):
        _fir(pen, x + rng.uniform(-5, 5), 84, 44, (150, 186, 196))
    pen.blob([(-20, 92), (40, 84), (90, 92), (150, 84), (150, 150), (-20, 150)], (250, 252, 255))
    for x, y in zip(rng.uniform(0, 128, 18), rng.uniform(0, 128, 18), strict=True):
        pen.oval(x, y, 2.2, 2.2, (255, 255, 255))


def _living_room(pen: Pen, rng: np.random.Generator) -> None:
    side = -1 if rng.random() < 0.5 else 1
    x = 64 + side * 44
    pen.polygon([(x - 15, 12), (x + 15, 12), (x + 15, 46), (x - 15, 46)], (122, 84, 58))
    pen.polygon([(x - 12, 15), (x + 12, 15), (x + 12, 43), (x - 12, 43)], (180, 216, 214))
    pen.polygon([(x - 12, 43), (x - 3, 27), (x + 4, 36), (x + 8, 31), (x + 12, 43)], (90, 140, 130))
    lamp = 64 - side * 48
    pen.glow(lamp, 50, 30, 30, (255, 240, 180), 0.6)
    pen.stroke([(lamp, 50), (lamp, 100)], 2.4, (90, 66, 60), taper=0)
    pen.polygon([(lamp - 7, 32), (lamp + 7, 32), (lamp + 13, 54), (lamp - 13, 54)], (250, 214, 130))
    pen.blob([(-12, 92), (6, 80), (122, 80), (140, 92), (140, 150), (-12, 150)], (74, 122, 138))
    pen.stroke([(-6, 90), (64, 84), (134, 90)], 1.6, (52, 92, 110))


def _brick(pen: Pen, rng: np.random.Generator) -> None:
    for row in range(8):
        for column in range(-1, 5):
            x, y = column * 32 + (row % 2) * 16, row * 16
            tone = mix((176, 82, 62), (146, 64, 52), float(rng.random()))
            pen.polygon([(x, y), (x + 29.5, y), (x + 29.5, y + 13.5), (x, y + 13.5)], tone)


_SCENES = {
    "studio": (((176, 180, 186), (126, 130, 138)), _studio),
    "beach": (((112, 196, 240), (206, 238, 248), (206, 238, 248)), _beach),
    "forest": (((214, 234, 196), (150, 196, 130), (70, 120, 70)), _forest),
    "city": (((250, 190, 150), (246, 214, 190), (200, 180, 200)), _city),
    "night sky": (((14, 16, 56), (28, 34, 98), (60, 62, 138)), _night),
    "snow": (((164, 200, 232), (206, 226, 242), (240, 246, 252)), _snow),
    "living room": (((238, 214, 182), (232, 200, 164), (214, 178, 140)), _living_room),
    "brick wall": (((206, 190, 176), (196, 180, 166)), _brick),
}
