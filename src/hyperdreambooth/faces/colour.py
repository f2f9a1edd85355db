"""Colour: every picture becomes 8-bit sRGB, as a viewer shows it, by what its file states about its colours.

Each statement (an ICC profile, PNG's gAMA, cHRM and cICP, EXIF's Adobe RGB) becomes an ICC profile, which
Pillow's LittleCMS applies. A statement that makes no sense counts as none: the picture is then sRGB.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageCms

Matrix: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Curve: TypeAlias = bytes | Callable[[Matrix], Matrix]
"""A curve from stored to linear values: an ICC parametric curve, or a function on [0, 1]."""

_D50 = (0.9642, 1.0, 0.8249)  # the white of every ICC profile
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_REFERENCE_WHITE = 203.0  # cd/m² of paper white in HDR pictures (ITU-R BT.2408)
_D65 = (0.3127, 0.329)
_709 = (*_D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_ADOBE = (*_D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)  # Adobe RGB (1998), section 4.3.1
# x and y of white, red, green, blue: ITU-T H.273, table 2
_PRIMARIES = {
    1: _709,
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
}


def to_srgb(image: Image.Image) -> Image.Image:
    """Returns a loaded picture of any mode as 8-bit sRGB: without transparency, and without any metadata.

    16 and 32 bits are scaled to 8, transparent areas become white, and colours are converted as the file
    states. Pillow does not read cICP: `open_photo` puts a PNG's or AVIF's into `image.info`.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    rgb = _converted(image)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    # Pillow would save the old profile with the new pixels
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales grey values of 16 or 32 bits, or floats, to eight bits; Pillow's own conversion clips them."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = float(values.max())
    usual = 65535.0 if image.mode != "F" else 1.0 if top <= 1 else 255.0
    shades = np.clip(values / max(usual, top) * 255, 0, 255).round().astype(np.uint8)
    if image.getexif().get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero in this TIFF
        shades = 255 - shades
    scaled = Image.fromarray(shades)
    scaled.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return scaled


def _converted(image: Image.Image) -> Image.Image:
    """Returns an RGB picture in sRGB, whatever the transparency."""
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))  # Pillow itself cannot convert LAB to RGB
    for profile in filter(None, (_stated(image), plain if image.mode == "LAB" else None)):
        try:
            source = _in_the_profiles_mode(image, profile)
            if source is not None:
                return _applied(source, profile)
        except (ImageCms.PyCMSError, ValueError, OSError):
            continue  # a broken profile, or one for another number of channels
    return image.convert("RGB")


def _applied(image: Image.Image, profile: Any) -> Image.Image:
    converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if converted is None:
        raise ValueError("the profile gives no picture")
    return converted


def _in_the_profiles_mode(image: Image.Image, profile: Any) -> Image.Image | None:
    """Returns the picture in the mode that the profile is for; None if the profile is for other pictures."""
    space = profile.profile.xcolor_space.strip()
    if space == "RGB" and image.mode not in ("CMYK", "LAB"):
        return image.convert("RGB")  # grey pictures often carry an RGB profile
    if space == "GRAY" and image.mode in ("1", "L", "LA", "La"):
        return image.convert("L")
    return image if space.upper() == image.mode else None  # CMYK and LAB


def _stated(image: Image.Image) -> Any:
    """Returns what the file states about its colours as a profile; None if that is nothing, or sRGB."""
    try:
        if (codes := image.info.get("cicp")) is not None:  # PNG (third edition) and AVIF prefer it to ICC
            return _of_codes(*codes)
        if content := image.info.get("icc_profile"):
            return ImageCms.ImageCmsProfile(io.BytesIO(content))
        if "srgb" not in image.info and ({"gamma", "chromaticity"} & image.info.keys()):
            return _of_png(image.info)
        if image.getexif().get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) == "R03":
            return _profile(_ADOBE, _power(563 / 256))  # cameras write this for Adobe RGB, not a profile
    except Exception:  # what a stranger's file states may break anything
        return None
    return None


def _of_png(info: Mapping[Any, Any]) -> Any:
    """Returns the profile of a PNG's gAMA and cHRM chunks."""
    gamma = float(info.get("gamma", 1 / 2.2))
    near_srgb = abs(gamma * 2.2 - 1) < 0.05  # 1/2.2 is what writers of sRGB pictures put there
    curve = _srgb_curve() if near_srgb else _power(1 / gamma)
    return _profile(info.get("chromaticity", _709), curve)


def _of_codes(primaries: int, transfer: int) -> Any:
    """Returns the profile of coding-independent code points (ITU-T H.273); None for sRGB."""
    curve = _CURVES.get(transfer, _srgb_curve)()
    usual = primaries not in _PRIMARIES or primaries == 1
    if usual and transfer not in _CURVES:
        return None
    return _profile(_PRIMARIES.get(primaries, _709), curve)


def _profile(chromaticity: Sequence[float], curve: Curve) -> Any:
    """Writes an ICC profile (version 4) of three primaries and one curve, and opens it."""
    encoded = curve if isinstance(curve, bytes) else _table(curve)
    tags = [(name, encoded) for name in (b"rTRC", b"gTRC", b"bTRC")]
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), _to_xyz(chromaticity).T, strict=True)
    tags += [(name, b"XYZ \0\0\0\0" + _fixed(column)) for name, column in columns]
    tags += [(b"wtpt", b"XYZ \0\0\0\0" + _fixed(_D50))]
    index, body, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags:
        index += name + struct.pack(">II", at + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"", 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + _fixed(_D50)
    return ImageCms.ImageCmsProfile(io.BytesIO(head.ljust(128, b"\0") + index + body))


def _to_xyz(chromaticity: Sequence[float]) -> Matrix:
    """Returns the matrix from linear RGB to XYZ relative to D50, as Lindbloom and Bradford have it."""
    (white, *rest) = [np.array([x / y, 1, (1 - x - y) / y]) for x, y in np.reshape(chromaticity, (4, 2))]
    primaries = np.stack(rest, axis=1)
    matrix = primaries * np.linalg.solve(primaries, white)
    adapt = np.diag(_BRADFORD @ np.array(_D50) / (_BRADFORD @ white))
    return np.linalg.inv(_BRADFORD) @ adapt @ _BRADFORD @ matrix


def _fixed(numbers: Sequence[float] | Matrix) -> bytes:
    """Returns numbers as ICC's s15Fixed16."""
    return b"".join(struct.pack(">i", round(float(number) * 65536)) for number in numbers)


def _power(exponent: float) -> bytes:
    return struct.pack(">4sIHH", b"para", 0, 0, 0) + _fixed([exponent])


def _srgb_curve() -> bytes:
    """Returns the curve of IEC 61966-2-1; also for BT.709 and BT.601, as browsers show their pictures."""
    return struct.pack(">4sIHH", b"para", 0, 3, 0) + _fixed(
        [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045]
    )


def _table(curve: Callable[[Matrix], Matrix]) -> bytes:
    """Samples a curve for which ICC has no formula."""
    values = np.clip(curve(np.linspace(0, 1, 4096)), 0, 1)
    return struct.pack(">4sII", b"curv", 0, len(values)) + (values * 65535).round().astype(">u2").tobytes()


def _pq(stored: Matrix) -> Matrix:
    """Returns light of HDR's PQ curve (SMPTE ST 2084, equation 4.1); all above paper white is white."""
    root = stored ** (1 / 78.84375)
    light = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
    return 10_000 * light ** (1 / 0.1593017578125) / _REFERENCE_WHITE


def _hlg(stored: Matrix) -> Matrix:
    """Returns light of HDR's HLG curve on a screen of 1000 cd/m² (ITU-R BT.2100, table 5), grey by grey."""
    scene = np.where(
        stored <= 0.5, stored**2 / 3, (np.exp((stored - 0.55991073) / 0.17883277) + 0.28466892) / 12
    )
    return 1000 * scene**1.2 / _REFERENCE_WHITE


# by H.273's number of the transfer; all others are shown with sRGB's curve
_CURVES: Mapping[int, Callable[[], Curve]] = {
    4: lambda: _power(2.2), 5: lambda: _power(2.8), 8: lambda: _power(1.0), 16: lambda: _pq, 18: lambda: _hlg,
}  # fmt: skip
