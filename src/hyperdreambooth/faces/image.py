"""Opening photo files as upright RGB pictures, and converting pictures to tensors and back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, features

from hyperdreambooth.faces.colour import to_srgb
from hyperdreambooth.files import InputError

if TYPE_CHECKING:
    from torch import Tensor

MIN_SIDE = 32  # pixels; a smaller picture shows too little of a face
MAX_PIXELS = 80_000_000
# Only these decoders run: others of Pillow start programs (EPS), or read what no camera writes.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # JPEG includes MPO, what phones write
KINDS = "PNG, JPEG, WebP, BMP, TIFF, GIF, HEIC or AVIF"
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1")
_START = 65_536  # bytes of a file in which its format and its colours are looked for
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

    The photo is turned upright and its colours become sRGB (`to_srgb`); an animation gives its first frame.
    `path` is only a name if `content` holds the bytes of a photo without a file.
    """
    if content is None and not path.is_file():
        what = "expected a photo, found a folder" if path.is_dir() else "no such photo"
        raise InputError(f"{path}: {what}")
    try:
        with path.open("rb") if content is None else io.BytesIO(content) as file:
            return _opened(path, file)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the second with `-W error`
        raise InputError(f"{path}: more than {MAX_PIXELS // 10**6} million pixels; scale it down") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{path}: not a {KINDS} picture; convert it first") from None
    except Exception as error:  # decoders raise nearly anything for broken files
        raise InputError(f"{path}: the picture is truncated or broken, get it again ({error})") from None


def _opened(path: Path, file: BinaryIO) -> Image.Image:
    start = file.read(_START)
    formats = (_phones_format(path, start),) if start[4:8] == b"ftyp" else FORMATS
    file.seek(0)
    with Image.open(file, formats=formats) as image:
        if codes := _colour_codes(start):
            image.info["cicp"] = codes
        return to_rgb(path, image)


def _phones_format(path: Path, start: bytes) -> str:
    """Returns Pillow's name of the format of a HEIC or AVIF photo, whose decoder is loaded here."""
    brands = start[8:12] + start[16 : int.from_bytes(start[:4], "big")]
    if b"avif" in brands or b"avis" in brands:
        if not features.check("avif"):
            raise InputError(f"{path}: this Pillow reads no AVIF; run pip install -U pillow")
        return "AVIF"
    if not any(brand in brands for brand in _HEIF):
        raise Image.UnidentifiedImageError  # a film, for example
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise InputError(f"{path}: HEIC photos: run pip install 'hyperdreambooth[heic]'") from None
    register_heif_opener()
    return "HEIF"


def _colour_codes(start: bytes) -> tuple[int, int] | None:
    """Returns primaries and transfer as ITU-T H.273 numbers them, from PNG's cICP or the colour box of AVIF.

    A full-range PNG states them in single bytes, AVIF and HEIC in two bytes each. An ICC profile beside a box
    takes precedence in AVIF and HEIC, so that the box then does not count.
    """
    if start.startswith(b"\x89PNG") and (at := start.find(b"\0\0\0\x04cICP")) > 0:
        return start[at + 8], start[at + 9]
    if (at := start.find(b"colrnclx")) > 0 and b"colrprof" not in start and b"colrrICC" not in start:
        return int.from_bytes(start[at + 8 : at + 10], "big"), int.from_bytes(start[at + 10 : at + 12], "big")
    return None


def to_rgb(name: Path, image: Image.Image) -> Image.Image:
    """Converts a picture in memory like `open_photo`; messages call it `name`."""
    _check_size(name, image)
    return to_srgb(_upright(image))


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
