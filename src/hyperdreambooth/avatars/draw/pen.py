"""The pen, which draws smooth shapes and tapered strokes in head coordinates; colour arithmetic."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.float64]
Controls = Sequence[tuple[float, float]] | Points
Colour = tuple[int, ...]

_SAMPLES = 7


def lerp(low: float, high: float, t: float) -> float:
    """Interpolates from `low` at `t = 0` to `high` at `t = 1`."""
    return low + (high - low) * t


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """Interpolates from colour `a` at `t = 0` to `b` at `t = 1`."""
    return tuple(round(lerp(x, y, t)) for x, y in zip(a[:3], b[:3], strict=True))


def ramp(stops: Sequence[Colour], t: float) -> Colour:
    """Returns a colour of a ramp of evenly spaced stops, `t` in [0, 1]."""
    place = min(max(t, 0.0), 1.0) * (len(stops) - 1)
    index = min(int(place), len(stops) - 2)
    return mix(stops[index], stops[index + 1], place - index)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Returns the RGB colour of hue, saturation and value in [0, 1]."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


def glaze(colour: Colour, opacity: float) -> Colour:
    """Returns the colour with an opacity in [0, 1]."""
    return (*colour[:3], round(255 * opacity))


@lru_cache(maxsize=128)
def _basis(count: int, closed: bool) -> Points:
    """Returns the matrix from control points to samples of the Catmull-Rom spline through them."""
    t = np.linspace(0.0, 1.0, _SAMPLES, endpoint=False)
    weights = 0.5 * np.stack(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3]
    )
    segments = count if closed else count - 1
    matrix = np.zeros((segments * _SAMPLES + (not closed), count))
    for segment in range(segments):
        rows = slice(segment * _SAMPLES, (segment + 1) * _SAMPLES)
        for step, weight in zip(range(-1, 3), weights, strict=True):
            index = (segment + step) % count if closed else min(max(segment + step, 0), count - 1)
            matrix[rows, index] += weight
    if not closed:
        matrix[-1, -1] = 1.0
    return matrix


def curve(controls: Controls, closed: bool = True) -> Points:
    """Returns a smooth curve through the control points."""
    points = np.asarray(controls, dtype=np.float64)
    return _basis(len(points), closed) @ points


def mirrored(half: Controls) -> Points:
    """Returns a half outline followed by its mirror image, in reverse order: together they are symmetric."""
    points = np.asarray(half, dtype=np.float64)
    # A point on the axis must not come twice, or the spline gets a kink there.
    other = points[::-1][np.abs(points[::-1, 0]) > 1e-6]
    return np.concatenate([points, other * (-1.0, 1.0)])


_ANGLES = np.linspace(0.0, 2.0 * np.pi, 28, endpoint=False)
CIRCLE: Points = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


@dataclass(frozen=True)
class Pen:
    """Draws in units of a 128-pixel frame around an origin, with a pose.

    `depth` is how far a part moves sideways as the head turns: 1 for the face's features, below 0 for parts
    behind them. `aside` is how far to the right of its place a part is drawn.
    """

    canvas: ImageDraw.ImageDraw
    zoom: float
    origin: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0
    turn: float = 0.0
    depth: float = 0.0
    pivot: float = 30.0
    aside: float = 0.0

    def at(self, depth: float, aside: float = 0.0) -> "Pen":
        """Returns the same pen for a part at another depth."""
        return replace(self, depth=depth, aside=aside)

    def place(self, points: Points) -> list[float]:
        """Returns the flat canvas coordinates of points in head coordinates."""
        x, y = points[:, 0] + self.aside, points[:, 1] - self.pivot
        # Parts near the edge of the head slide less than those in the middle, as on a ball.
        x = x + self.turn * self.depth * 5.0 * (1.0 - 0.45 * np.minimum((x / 32.0) ** 2, 1.0))
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        out = np.empty_like(points)
        out[:, 0] = self.origin[0] + self.zoom * (cos * x - sin * y)
        out[:, 1] = self.origin[1] + self.zoom * (sin * x + cos * y + self.pivot)
        return out.ravel().tolist()

    def polygon(self, points: Controls, fill: Colour) -> None:
        """Draws a polygon with straight sides."""
        self.canvas.polygon(self.place(np.asarray(points, dtype=np.float64)), fill=fill)

    def blob(self, controls: Controls, fill: Colour) -> None:
        """Draws a smooth closed shape through the control points."""
        self.polygon(curve(controls), fill)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour, angle: float = 0.0) -> None:
        """Draws an ellipse, turned by `angle` radians."""
        points = CIRCLE * (rx, ry)
        if angle:
            cos, sin = math.cos(angle), math.sin(angle)
            points = points @ np.array([[cos, sin], [-sin, cos]])
        self.polygon(points + np.array([x, y]), fill)

    def stroke(self, controls: Controls, width: float, fill: Colour, taper: float = 0.4) -> None:
        """Draws a smooth stroke that thins toward its ends; with `taper` 0 it keeps its width."""
        middle = curve(controls, closed=False)
        tangent = np.gradient(middle, axis=0)
        normal = tangent[:, ::-1] * (-1.0, 1.0) / (np.hypot(tangent[:, :1], tangent[:, 1:]) + 1e-9)
        profile = np.sin(np.linspace(0.12, math.pi - 0.12, len(middle))) ** taper
        offset = normal * profile[:, None] * (width / 2.0)
        self.polygon(np.concatenate([middle + offset, (middle - offset)[::-1]]), fill)

    def ring(self, x: float, y: float, rx: float, ry: float, width: float, fill: Colour) -> None:
        """Draws an elliptic outline."""
        circle = np.concatenate([CIRCLE, CIRCLE[:1]])
        outer = circle * (rx + width / 2, ry + width / 2)
        inner = circle[::-1] * (rx - width / 2, ry - width / 2)
        self.polygon(np.concatenate([outer, inner]) + np.array([x, y]), fill)

    def glow(self, x: float, y: float, rx: float, ry: float, colour: Colour, opacity: float) -> None:
        """Draws a soft spot: a few faint ellipses inside one another."""
        for part in (1.0, 0.8, 0.6, 0.4):
            self.oval(x, y, rx * part, ry * part, glaze(colour, opacity / 4))


def gradient(stops: Sequence[Colour], size: int) -> Image.Image:
    """Returns a square picture whose colour runs through the stops from top to bottom."""
    places = np.linspace(0.0, len(stops) - 1, size)
    table = np.asarray(stops, dtype=np.float64)
    rows = np.stack([np.interp(places, np.arange(len(stops)), table[:, c]) for c in range(3)], axis=1)
    column = Image.fromarray(rows[:, None, :].round().astype(np.uint8))
    return column.resize((size, size), Image.Resampling.NEAREST)
