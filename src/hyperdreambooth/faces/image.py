"""One photo file to one upright RGB picture, and pictures to pixels and back."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from hyperdreambooth.files import InputError

MIN_SIDE = 32  # pixels; a smaller face has nothing to learn from
MAX_PIXELS = 80_000_000
# Only these decoders ever run: Pillow has others that start programs (EPS) or that no camera writes.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # JPEG includes MPO, what phones write
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_photo(path: Path, content: bytes | None = None) -> Image.Image:
    """Read a photo as people see it.

    EXIF rotation is applied, 16-bit and CMYK become 8-bit RGB, transparency becomes white, and an animation
    gives its first frame.

    Args:
        path: a PNG, JPEG, WebP, BMP, TIFF or GIF file.
        content: of a photo that is no file of its own; `path` then only names it.

    Returns:
        An RGB picture, no side under ``MIN_SIDE``.

    Raises:
        InputError: missing, unreadable, truncated, too large or too small; the line names the file.
    """
    if content is None and not path.is_file():
        raise InputError(
            f"{path}: {'expected a photo, found a folder' if path.is_dir() else 'no such photo'}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning comes before our check
            with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
                _check_size(path, image)
                return _rgb(_upright(image))
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {MAX_PIXELS // 10**6} million pixels; scale it down") from None
    except Image.UnidentifiedImageError:
        raise InputError(
            f"{path}: not a PNG, JPEG, WebP, BMP, TIFF or GIF picture; convert it first"
        ) from None
    except Exception as error:  # broken files make the decoders raise nearly anything
        raise InputError(f"{path}: the picture is truncated or broken, get it again ({error})") from None


def to_rgb(name: Path, image: Image.Image) -> Image.Image:
    """A picture in memory as `open_photo` gives a file: upright, 8-bit RGB, no side under ``MIN_SIDE``.

    Raises:
        InputError: too large or too small; the line names the picture.
    """
    _check_size(name, image)
    return _rgb(_upright(image))


def _check_size(path: Path, image: Image.Image) -> None:
    """Judge by the header, before anything is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        limit = f"more than {MAX_PIXELS // 10**6} million pixels; scale it down"
        raise InputError(f"{path}: the picture is {width}×{height}, {limit}")
    if min(width, height) < MIN_SIDE:
        limit = f"expected at least {MIN_SIDE} a side; use a larger photo"
        raise InputError(f"{path}: the picture is {width}×{height} pixels, {limit}")


def _upright(image: Image.Image) -> Image.Image:
    """As EXIF has it. Pillow's `exif_transpose` also writes the tags anew, and fails at odd ones."""
    image.load()
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB."""
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits or floats as eight bits (Pillow's own conversion clips, not scales)."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = float(values.max())
    usual = 65535.0 if image.mode != "F" else 1.0 if top <= 1 else 255.0
    scaled = np.clip(values / max(usual, top) * 255, 0, 255)
    return Image.fromarray(scaled.round().astype(np.uint8))


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """The centre square of a picture, resized.

    Args:
        image: a picture of any size.
        size: pixels a side.

    Returns:
        ``(3, size, size)``, float32 in [-1, 1].
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    square = square.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels ``(3, h, w)`` in [-1, 1] as a picture; the inverse of ``to_pixels`` up to 8-bit rounding."""
    bytes_ = pixels.detach().float().cpu().nan_to_num().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())
