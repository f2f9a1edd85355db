"""Hair: the part behind the head and the part over it, one function a style."""

import math

import numpy as np

from hyperdreambooth.avatars.draw.pen import Controls, Pen, glaze, lerp, mirrored, mix
from hyperdreambooth.avatars.draw.shape import TOP, FaceShape


def back_hair(pen: Pen, s: FaceShape) -> None:
    """Draws the hair behind neck and face."""
    if back := _BACKS.get(s.kinds["hair_style"]):
        back(pen.at(-0.2), s)


def front_hair(pen: Pen, s: FaceShape) -> None:
    """Draws the hair over the forehead and at the sides."""
    if front := _FRONTS.get(s.kinds["hair_style"]):
        front(pen.at(0.35), s)


def _fall(pen: Pen, s: FaceShape, low: float, flare: float, tips: float) -> None:
    """Draws a curtain of hair down to `low`, wider there by `flare`, its tips drawn in by `tips`."""
    w, v = s.half_width, s.volume
    right = [
        (0, TOP - v), (w * 0.6 + v * 0.6, TOP + 4.4 - v * 0.7), (w + v * 0.8, TOP + 19),
        (w + v + flare * 0.5, 4), (w + v + flare, low * 0.6), (w + v + flare - tips, low),
        (w * 0.35, low + 2.5), (0, low - 2),
    ]  # fmt: skip
    pen.blob(mirrored(right), mix(s.hair, s.hair_dark, 0.55))


def _back_bob(pen: Pen, s: FaceShape) -> None:
    _fall(pen, s, lerp(19, 36, s.traits["hair_length"]), 3.0, 4.0)


def _back_long(pen: Pen, s: FaceShape) -> None:
    low = lerp(44, 68, s.traits["hair_length"])
    _fall(pen, s, low, 4.0, 3.0)
    for side in (-1, 1):
        x = side * (s.half_width + s.volume * 0.6)
        pen.stroke([(x, 0), (x + side * 2.5, low * 0.5), (x, low - 2)], 1.6, glaze(s.hair_light, 0.5))


def _back_afro(pen: Pen, s: FaceShape) -> None:
    """Draws a round cloud with a soft uneven edge."""
    radius = s.half_width + lerp(6, 15, s.traits["hair_volume"]) + lerp(0, 4, s.traits["hair_length"])
    low = lerp(0.25, 0.85, s.traits["hair_length"])
    for i in range(19):
        angle = lerp(-math.pi - low, low, i / 18)
        x, y = math.cos(angle) * radius, -13 + math.sin(angle) * radius * 0.94
        pen.oval(x * 0.86, y * 0.86 - 2, 7.4, 7.4, mix(s.hair, s.hair_dark, 0.35))
    pen.oval(0, -14, radius * 0.9, radius * 0.88, s.hair)


def _back_curly(pen: Pen, s: FaceShape) -> None:
    radius, reach = s.half_width + s.volume * 0.6, lerp(0.1, 0.9, s.traits["hair_length"])
    for i in range(15):
        angle = lerp(-math.pi - reach, reach, i / 14)
        x, y = math.cos(angle) * radius, -9 + math.sin(angle) * (radius + 3)
        pen.oval(x, y, 6.2, 6.2, mix(s.hair, s.hair_dark, 0.6 if i % 2 else 0.35))


def _back_bun(pen: Pen, s: FaceShape) -> None:
    """Draws the bun behind the crown of the head."""
    size = lerp(7.5, 13, s.traits["hair_length"])
    y, x = TOP - size * 0.52 - s.volume * 0.3, size * 0.6
    pen.oval(0, y, size, size * 0.88, s.hair)
    pen.stroke([(-x, y - 1), (0, y - size * 0.52), (x, y - 1)], 1.6, glaze(s.hair_light, 0.7))
    x = size * 0.7
    pen.stroke([(-x, y + size * 0.6), (0, y + size * 0.36), (x, y + size * 0.6)], 2.0, s.hair_dark)


def _back_locs(pen: Pen, s: FaceShape) -> None:
    """Draws ropes of hair, left and right."""
    low, reach = lerp(14, 56, s.traits["hair_length"]), s.half_width + s.volume * 0.7
    pen.blob(mirrored([(0, TOP - 2), (reach, TOP + 14), (reach, 6), (reach * 0.5, 12), (0, 10)]), s.hair_dark)
    for i in range(5):
        colour, end = s.hair if i % 2 else s.hair_dark, low - (i % 2) * 4
        for side in (-1, 1):
            x = side * (reach + 3 - i * 4.3)
            pen.stroke([(x * 0.82, -26), (x, -6), (x + side * 1.5, end * 0.5), (x, end)], 4.8, colour, 0.15)


def _cap(
    pen: Pen, s: FaceShape, lift: float, side_y: float, hairline: Controls, thick: float | None = None
) -> None:
    """Draws hair over the skull, `lift` above it and down to `side_y`; the hairline starts at the right."""
    w, v = s.half_width, s.volume * 0.5 if thick is None else thick
    temple = (-w * 0.64 - v * 0.62, TOP + 4.2 - lift * 0.74)
    left = [(-w - v * 0.3, side_y), (-w - v, -14), temple, (0, TOP - lift)]
    pen.blob(np.concatenate([mirrored(left), hairline]), s.hair)


def _shine(pen: Pen, s: FaceShape, lift: float) -> None:
    """Draws light on the upper left of the hair and shade on its right."""
    w, y = s.half_width, TOP - lift
    light = [(-w * 0.82, TOP + 12), (-w * 0.55, y + 6.5), (-w * 0.05, y + 3.6)]
    pen.stroke(light, 3.2, glaze(s.hair_light, 0.65), taper=0.8)
    shade = [(w * 0.95, TOP + 16), (w * 0.72, y + 8), (w * 0.2, y + 3.6)]
    pen.stroke(shade, 2.6, glaze(s.hair_dark, 0.5), taper=0.8)


def _front_buzz(pen: Pen, s: FaceShape) -> None:
    w, lift = s.half_width, lerp(0.2, 2.6, s.traits["hair_length"])
    line = mirrored([(w * 0.9, -10), (w * 0.72, -22), (w * 0.3, -26)])
    _cap(pen, s, lift + s.volume * 0.2, -1, line, thick=0.4 + lift * 0.3)
    for i in range(-3, 4):
        pen.stroke([(i * w * 0.2, TOP + 2), (i * w * 0.24, -28)], 0.9, glaze(s.hair_dark, 0.4))


def _front_short(pen: Pen, s: FaceShape) -> None:
    """Draws a crop whose fringe falls in a few points."""
    w, low = s.half_width, lerp(-27, -18, s.traits["hair_length"])
    line = [
        (w * 0.90, -8), (w * 0.78, low), (w * 0.5, low - 3), (w * 0.3, low + 1.5), (0, low - 3),
        (-w * 0.3, low + 2), (-w * 0.55, low - 3), (-w * 0.78, low), (-w * 0.90, -8),
    ]  # fmt: skip
    _cap(pen, s, s.volume, 3, line)
    _shine(pen, s, s.volume)


def _front_side_part(pen: Pen, s: FaceShape) -> None:
    """Draws hair swept from a parting on one side."""
    w, lift, low = s.half_width, s.volume + 1.5, lerp(-22, -12, s.traits["hair_length"])
    line = [
        (w * 0.90, -4), (w * 0.86, low), (w * 0.45, low - 4), (-w * 0.1, -25), (-w * 0.42, -30),
        (-w * 0.66, -22), (-w * 0.9, -8),
    ]  # fmt: skip
    _cap(pen, s, lift, 4, line)
    pen.stroke([(-w * 0.42, -30), (-w * 0.40, TOP), (-w * 0.3, TOP - lift + 1)], 1.3, s.hair_dark)
    fringe = [(-w * 0.36, -31), (w * 0.2, -29), (w * 0.82, low - 2)]
    pen.stroke(fringe, 2.0, glaze(s.hair_light, 0.6), taper=0.8)
    _shine(pen, s, lift)


def _front_quiff(pen: Pen, s: FaceShape) -> None:
    """Draws short sides and a wave that stands up over the forehead."""
    w, lift = s.half_width, lerp(5, 13, s.traits["hair_length"])
    line = mirrored([(w * 0.91, -8), (w * 0.8, -20), (w * 0.45, -26)])
    _cap(pen, s, 2.0, 2, line, thick=s.volume * 0.25)
    wave = [
        (-w * 0.80, -25), (-w * 0.94, TOP + 3), (-w * 0.6, TOP - lift * 0.5), (0, TOP - lift),
        (w * 0.66, TOP - lift * 0.8), (w * 1.0, TOP + 1), (w * 0.82, -24), (w * 0.2, -27.5), (-w * 0.4, -26),
    ]  # fmt: skip
    pen.blob(wave, mix(s.hair, s.hair_light, 0.18))
    for i in range(3):
        x = w * (-0.5 + 0.42 * i)
        strand = [(x, -28), (x - 2, TOP - lift * 0.3), (x + 5, TOP - lift * 0.75)]
        pen.stroke(strand, 1.7, glaze(s.hair_dark, 0.55), taper=0.8)


def _front_curly(pen: Pen, s: FaceShape) -> None:
    w, v, low = s.half_width, s.volume, lerp(-27, -20, s.traits["hair_length"])
    _cap(pen, s, v, 0, mirrored([(w * 0.9, -8), (w * 0.75, low), (0, low - 3)]))
    for i in range(9):
        angle = math.pi * (1.04 + 0.115 * i)
        x, y = math.cos(angle) * (w * 0.86), low + 3 + math.sin(angle) * (9 if i % 2 else 5)
        pen.oval(x, y, 5.0, 4.7, s.hair if i % 2 else mix(s.hair, s.hair_light, 0.2))
        pen.ring(x, y, 2.5, 2.4, 0.9, glaze(s.hair_dark, 0.5))
    for i in range(5):
        x = w * (-0.62 + 0.31 * i)
        pen.ring(x, TOP + 2 - v * 0.6 + abs(i - 2) * 2, 3.0, 2.7, 1.0, glaze(s.hair_light, 0.55))


def _front_afro(pen: Pen, s: FaceShape) -> None:
    w = s.half_width
    _cap(pen, s, 5, 0, mirrored([(w * 0.9, -10), (w * 0.72, -23), (w * 0.3, -27)]))
    top = TOP - lerp(2, 9, s.traits["hair_volume"])
    pen.glow(-w * 0.45, top + 3, w * 0.6, 7, s.hair_light, 0.7)


def _front_bob(pen: Pen, s: FaceShape) -> None:
    """Draws a straight fringe and side pieces."""
    w, v, low = s.half_width, s.volume, lerp(6, 22, s.traits["hair_length"])
    line = mirrored([(w * 0.86, low * 0.3), (w * 0.84, -13), (w * 0.4, -17.5)])
    _cap(pen, s, v, low, line, thick=v * 0.9)
    for x in (-0.45, -0.1, 0.25):
        pen.stroke([(w * x, TOP + 3), (w * x * 1.25, -20)], 1.2, glaze(s.hair_dark, 0.4))
    _shine(pen, s, v)


def _front_long(pen: Pen, s: FaceShape) -> None:
    """Draws a middle parting and strands that frame the face."""
    w, v, low = s.half_width, s.volume, lerp(18, 34, s.traits["hair_length"])
    line = mirrored([(w * 0.93, low * 0.4), (w * 0.86, -8), (w * 0.5, -21), (0.6, -31)])
    _cap(pen, s, v, low, line, thick=v)
    pen.stroke([(0, -31), (0, TOP - v + 1)], 1.2, s.hair_dark)
    _shine(pen, s, v)


def _front_bun(pen: Pen, s: FaceShape) -> None:
    """Draws hair that is combed back."""
    w = s.half_width
    line = mirrored([(w * 0.93, -6), (w * 0.8, -21), (w * 0.36, -28)])
    _cap(pen, s, s.volume * 0.5, -1, line, thick=s.volume * 0.25)
    for x in (-0.6, -0.2, 0.2, 0.6):
        pen.stroke([(w * x, -25 + abs(x) * 6), (w * x * 0.55, TOP - 0.5)], 1.0, glaze(s.hair_dark, 0.45))
    _shine(pen, s, s.volume * 0.5)


def _front_locs(pen: Pen, s: FaceShape) -> None:
    w, v = s.half_width, s.volume
    _cap(pen, s, v * 0.8, 2, mirrored([(w * 0.92, -4), (w * 0.76, -21), (w * 0.3, -26)]))
    for i in range(7):
        x = w * (-0.78 + 0.26 * i)
        rope = [(x * 0.45, TOP - v * 0.7), (x * 0.8, TOP + 4), (x * 1.02, -22 + abs(i - 3) * 2)]
        pen.stroke(rope, 3.0, s.hair_dark if i % 2 else s.hair, 0.2)
        pen.stroke([(x * 0.4 - 1, TOP - v * 0.5), (x * 0.8 - 1, TOP + 5)], 1.0, glaze(s.hair_light, 0.6))


_BACKS = {
    "bob": _back_bob, "long": _back_long, "afro": _back_afro, "curly": _back_curly, "bun": _back_bun,
    "locs": _back_locs,
}  # fmt: skip
_FRONTS = {
    "buzz": _front_buzz, "short": _front_short, "side_part": _front_side_part, "quiff": _front_quiff,
    "curly": _front_curly, "afro": _front_afro, "bob": _front_bob, "long": _front_long, "bun": _front_bun,
    "locs": _front_locs,
}  # fmt: skip
