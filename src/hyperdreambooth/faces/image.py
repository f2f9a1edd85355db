"""Opening photo files as upright RGB pictures, and converting pictures to tensors and back."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from hyperdreambooth.files import InputError

if TYPE_CHECKING:
    from torch import Tensor

MIN_SIDE = 32  # pixels; a smaller picture shows too little of a face
MAX_PIXELS = 80_000_000
# Only these decoders run: others of Pillow start programs (EPS), or read what no camera writes.
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
    """Reads a photo as viewers show it, or refuses it in a line that names the file.

    EXIF rotation is applied, 16-bit and CMYK become 8-bit RGB, transparency becomes white, and an animation
    gives its first frame. `path` is only a name if `content` holds the bytes of a photo without a file.
    """
    if content is None and not path.is_file():
        what = "expected a photo, found a folder" if path.is_dir() else "no such photo"
        raise InputError(f"{path}: {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures before our check refuses them
            with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
                return to_rgb(path, image)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {MAX_PIXELS // 10**6} million pixels; scale it down") from None
    except Image.UnidentifiedImageError:
        raise InputError(
            f"{path}: not a PNG, JPEG, WebP, BMP, TIFF or GIF picture; convert it first"
        ) from None
    except Exception as error:  # decoders raise nearly anything for broken files
        raise InputError(f"{path}: the picture is truncated or broken, get it again ({error})") from None


def to_rgb(name: Path, image: Image.Image) -> Image.Image:
    """Converts a picture in memory like `open_photo`; messages call it `name`."""
    _check_size(name, image)
    return _rgb(_upright(image))


def _check_size(path: Path, image: Image.Image) -> None:
    """Refuses a picture by its header, before anything is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        limit = f"more than {MAX_PIXELS // 10**6} million pixels; scale it down"
        raise InputError(f"{path}: the picture is {width}×{height}, {limit}")
    if min(width, height) < MIN_SIDE:
        limit = f"expected at least {MIN_SIDE} per side; use a larger photo"
        raise InputError(f"{path}: the picture is {width}×{height} pixels, {limit}")


def _upright(image: Image.Image) -> Image.Image:
    """Turns a picture as EXIF says. Pillow's `exif_transpose` also rewrites tags, and fails at odd ones."""
    image.load()
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales grey values of 16 or 32 bits, or floats, to eight bits; Pillow's own conversion clips them."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = float(values.max())
    usual = 65535.0 if image.mode != "F" else 1.0 if top <= 1 else 255.0
    scaled = np.clip(values / max(usual, top) * 255, 0, 255)
    return Image.fromarray(scaled.round().astype(np.uint8))


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """Returns the centre square of a picture, resized to `size` pixels per side."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """Returns the centre square of a picture as `(3, size, size)`, float32 in [-1, 1]."""
    import torch  # seconds, which the check of a photo need not take

    square = centre_square(image.convert("RGB"), size)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Converts pixels `(3, h, w)` in [-1, 1] to a picture; inverts `to_pixels` up to 8-bit rounding."""
    import torch

    bytes_ = pixels.detach().float().cpu().nan_to_num().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())
