"""Styles and light: effects on the finished drawing that keep the person recognisable."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Floats = NDArray[np.float32]


def _floats(picture: Image.Image) -> Floats:
    return np.asarray(picture, dtype=np.float32) / 255.0


def _rgb(red: float, green: float, blue: float) -> Floats:
    return np.array([red, green, blue], dtype=np.float32)


def _picture(values: Floats | NDArray[np.float64]) -> Image.Image:
    return Image.fromarray((values.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8))


def _blur(picture: Image.Image, radius: float) -> Image.Image:
    """Blurs a picture; the radius is in pixels of a 128-pixel frame."""
    return picture.filter(ImageFilter.GaussianBlur(radius * picture.width / 128.0))


@lru_cache(maxsize=8)
def _grain(size: int, scale: int, seed: int) -> Floats:
    """Returns a fixed noise texture in [0, 1] with grains of `scale` pixels of a 128-pixel frame."""
    cells = max(2, 128 // scale)
    noise = np.random.default_rng(seed).random((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)).clip(0.0, 1.0)


def _sketch(picture: Image.Image) -> Image.Image:
    """Draws dark lines where the tone changes and soft shade where it is dark; a VAE would lose hatching."""
    grey = picture.convert("L")
    tone, soft = _floats(grey), _floats(_blur(grey, 2.2))
    # Dividing a picture by its blur leaves lines on white.
    lines = np.minimum((tone + 0.05) / (soft + 0.05), 1.0) ** 2.6
    value = lines * (1.0 - 0.5 * (1.0 - tone))
    ink, paper = _rgb(0.16, 0.16, 0.19), _rgb(0.98, 0.97, 0.94)
    return _picture(ink + (paper - ink) * value[..., None])


def _watercolour(picture: Image.Image) -> Image.Image:
    """Paints flat washes that pool at their edges, on paper with a bare margin."""
    size = picture.width
    wash = picture.filter(ImageFilter.MedianFilter(3 if size < 200 else 5))
    flat = _floats(wash)
    pool = flat - _floats(_blur(wash, 1.6))
    flow = _grain(size, 12, 8)[..., None] - 0.5
    paint = 0.10 + 0.90 * flat + 0.7 * np.minimum(pool, 0.0) + 0.16 * flow
    edge = _margin(size)[..., None]
    return _picture(paint * edge + (1.0 - edge) * _rgb(0.985, 0.975, 0.95))


@lru_cache(maxsize=8)
def _margin(size: int) -> Floats:
    """Returns 1 inside and 0 at an uneven border of bare paper."""
    line = np.linspace(0.0, 1.0, size, dtype=np.float32)
    near = np.minimum(line, 1.0 - line)
    inset = np.minimum(near[:, None], near[None, :]) - 0.05 * _grain(size, 16, 10)
    return np.clip(inset * 45.0, 0.0, 1.0)


def _pixel_art(picture: Image.Image) -> Image.Image:
    """Reduces to coarse cells in a small palette; two cells span a latent, so they can stay crisp."""
    small = picture.resize((32, 32), Image.Resampling.HAMMING)
    small = small.filter(ImageFilter.UnsharpMask(radius=1, percent=75, threshold=0))
    few = small.quantize(colors=28, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    return few.resize(picture.size, Image.Resampling.NEAREST)


def _neon(picture: Image.Image) -> Image.Image:
    """Draws glowing outlines in the picture's own hues over a dim picture."""
    base = _floats(_blur(picture, 0.9))
    down, across = np.gradient(base, axis=(0, 1))
    edge = np.sqrt((down**2 + across**2).sum(axis=2)) * (picture.width / 128.0)
    # Relative to the brightness around it, an edge on deep skin shines as much as one on light skin.
    near = _floats(_blur(picture.convert("L"), 2.0))
    lines = np.clip(edge * 2.9 / (near + 0.22) - 0.14, 0.0, 1.0)[..., None]
    hue = _vivid(_floats(_blur(picture, 1.5)))
    tubes = _picture(lines * hue)
    glow = _floats(_blur(tubes, 2.5))
    return _picture(base * 0.30 * _rgb(0.95, 0.85, 1.1) + 0.95 * _floats(tubes) + 0.85 * glow)


def _vivid(values: Floats) -> Floats:
    """Returns the same hues, bright and saturated."""
    low, high = values.min(axis=2, keepdims=True), values.max(axis=2, keepdims=True)
    return 0.1 + 0.9 * ((values - 0.75 * low) / (high - 0.75 * low + 0.02))


_STYLES = {"pencil sketch": _sketch, "watercolour": _watercolour, "pixel art": _pixel_art, "neon": _neon}
_LIGHTS = {"warm": (1.06, 0.93, 0.72), "cool": (0.83, 0.95, 1.12), "dark": (0.56, 0.55, 0.64)}


def stylise(picture: Image.Image, style: str, light: str) -> Image.Image:
    """Returns the picture in a style and under a light, which comes last to show in a sketch and in neon."""
    styled = _STYLES[style](picture) if style in _STYLES else picture
    if light not in _LIGHTS:
        return styled
    return styled.point([min(255, round(value * gain)) for gain in _LIGHTS[light] for value in range(256)])
