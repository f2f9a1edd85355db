"""Colours as a viewer shows them; the oracles are closed formulas, or profiles that are built by hand."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from hyperdreambooth.faces.image import open_photo, to_rgb

SKIN = (222, 170, 140)
P3 = (0.3127, 0.329, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
ADOBE = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
BT709 = (0.3127, 0.329, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
# columns of the published ICC profiles, relative to D50
COLUMNS = {
    "p3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)),
    "adobe": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)),
}


def icc(columns: tuple[tuple[float, ...], ...]) -> bytes:
    """Pillow's sRGB profile with other primaries."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    new = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True))
    for at in range(132, 132 + 12 * struct.unpack(">I", raw[128:132])[0], 12):
        name, place = bytes(raw[at : at + 4]), struct.unpack(">I", raw[at + 4 : at + 8])[0]
        if name in new:
            raw[place + 8 : place + 20] = b"".join(struct.pack(">i", round(v * 65536)) for v in new[name])
    return bytes(raw)


def matrix(chromaticity: tuple[float, ...]) -> Any:
    """Linear RGB of primaries and a white to XYZ."""
    white, *rest = [np.array([x / y, 1, (1 - x - y) / y]) for x, y in np.reshape(chromaticity, (4, 2))]
    columns = np.stack(rest, axis=1)
    return columns * np.linalg.solve(columns, white)


def shown(colour: tuple[int, ...], chromaticity: tuple[float, ...], linear: Any) -> list[int]:
    """The sRGB of a colour by the formulas, for primaries with the white of sRGB."""
    light = np.linalg.solve(matrix(BT709), matrix(chromaticity) @ linear(np.array(colour) / 255)).clip(0, 1)
    stored = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (stored * 255).round().astype(int).tolist()


def srgb(stored: Any) -> Any:
    return np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4)


def pixel(image: Image.Image) -> list[int]:
    return np.asarray(image)[0, 0].astype(int).tolist()


def assert_near(got: list[int], wanted: list[int], tolerance: int = 2) -> None:
    assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) <= tolerance, (got, wanted)


def stored(colour: Any, form: str, mode: str = "RGB", **words: Any) -> Image.Image:
    """Opens a picture of one colour after it was saved."""
    buffer = io.BytesIO()
    Image.new(mode, (64, 64), colour).save(buffer, form, **words)
    return open_photo(Path(f"a.{form}"), buffer.getvalue())


FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "AVIF", "HEIF")


def kept(form: str) -> dict[str, Any]:
    """How a format changes colours least."""
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    sharp = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    return sharp.get(form, {"quality": 100} if form in ("AVIF", "HEIF") else {})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("space", "primaries"), [("p3", P3), ("adobe", ADOBE)])
def test_wide_gamut_profiles_of_every_format(form: str, space: str, primaries: tuple[float, ...]) -> None:
    opened = stored(SKIN, form, icc_profile=icc(COLUMNS[space]), **kept(form))
    assert_near(pixel(opened), shown(SKIN, primaries, srgb), 3)
    assert opened.mode == "RGB" and not opened.info  # or a crop would be saved with the profile once more


@pytest.mark.parametrize("form", FORMATS)
def test_srgb_stays_as_it_is(form: str) -> None:
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for words in ({}, {"icc_profile": own}):
        assert_near(pixel(stored(SKIN, form, **words, **kept(form))), [*SKIN], 2)


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (version 2) written by hand."""
    index, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        index += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    kinds = (b"prtr", space, connection, b"acsp", 63190, 65536, 54061)
    return struct.pack(">I4xI4s4s4s12x4s28x3i48x", start + len(body), 0x02400000, *kinds) + index + body


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_grey_profiles(form: str) -> None:
    """A grey profile of gamma 1.8, and an RGB profile, which grey pictures often carry."""
    curve = struct.pack(">4sIIH", b"curv", 0, 1, round(1.8 * 256))
    grey = profile(b"GRAY", b"XYZ ", {b"kTRC": curve, b"wtpt": b"XYZ \0\0\0\0" + bytes(12)})
    wanted = shown((100, 100, 100), BT709, lambda x: x**1.8)
    assert_near(pixel(stored(100, form, "L", icc_profile=grey)), wanted)
    assert_near(pixel(stored(100, form, "L", icc_profile=icc(COLUMNS["p3"]))), [100, 100, 100])
    assert_near(pixel(stored((100, 90, 80), form, icc_profile=grey)), [100, 90, 80])  # not for this picture


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_a_cmyk_profile(form: str) -> None:
    """A table with one colour for each of the sixteen ways of printing inks at full strength."""
    rng = np.random.default_rng(0)
    nodes = rng.integers((100, 118, 118), (255, 138, 138), (16, 3))  # L* and a*, b* around grey, as bytes
    nodes[0], nodes[15] = (255, 128, 128), (0, 128, 128)  # or LittleCMS would stretch what lies between
    table = struct.pack(">4sI4B", b"mft1", 0, 4, 3, 2, 0)
    table += struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    table += bytes(range(256)) * 4 + nodes.astype(np.uint8).tobytes() + bytes(range(256)) * 3
    inks = profile(b"CMYK", b"Lab ", {b"A2B0": table, b"wtpt": b"XYZ \0\0\0\0" + bytes(12)})
    for number in (0, 2, 9, 12, 15):
        ink = tuple(255 * (number >> shift & 1) for shift in (3, 2, 1, 0))
        lightness, a, b = nodes[number]
        wanted = srgb_of_lab(lightness / 2.55, a - 128, b - 128)
        opened = stored(ink, form, "CMYK", icc_profile=inks, **kept(form))
        assert_near(
            pixel(opened), wanted, 12
        )  # for printers' profiles it also moves the black point a little


def srgb_of_lab(lightness: float, a: float, b: float) -> list[int]:
    """The formulas of CIE 1976, with the white of ICC's profiles."""
    f = np.array([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200])
    light = np.linalg.solve(matrix(BT709), np.linalg.solve(BRADFORD_TO_D50, (0.9642, 1, 0.8249) * f**3))
    return ((1.055 * light.clip(0, 1) ** (1 / 2.4) - 0.055) * 255).round().astype(int).tolist()


def test_lab() -> None:
    wanted, buffer = srgb_of_lab(60, 20, 20), io.BytesIO()
    planes = [Image.new("L", (64, 64), value) for value in (round(60 * 2.55), 128 + 20, 128 + 20)]
    image = Image.merge("LAB", planes)
    assert_near(pixel(to_rgb(Path("a"), image)), wanted)
    image.save(buffer, "TIFF")
    assert_near(pixel(open_photo(Path("a.tif"), buffer.getvalue())), wanted)


BRADFORD_TO_D50 = np.array(
    [
        [1.0478112, 0.0228866, -0.0501270],
        [0.0295424, 0.9904844, -0.0170491],
        [-0.0092345, 0.0150436, 0.7521316],
    ]
)  # Lindbloom's table of chromatic adaptations, from D65


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_without_its_profile_or_with_another(form: str) -> None:
    """Pillow's own conversion is what counts then."""
    plain = stored((40, 120, 160, 10), form, "CMYK")
    wanted = Image.new("CMYK", (1, 1), (40, 120, 160, 10)).convert("RGB")
    assert_near(pixel(plain), pixel(wanted), 4)
    assert_near(pixel(stored((40, 120, 160, 10), form, "CMYK", icc_profile=icc(COLUMNS["p3"]))), pixel(plain))


@pytest.mark.parametrize("broken", [b"x", bytes(200), icc(COLUMNS["p3"])[:200], icc(COLUMNS["p3"])[:-40]])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_broken_profile_counts_as_none(form: str, broken: bytes) -> None:
    opened = pixel(stored(SKIN, form, icc_profile=broken, **kept(form)))
    assert (
        min(
            max(abs(a - b) for a, b in zip(opened, wanted, strict=True))
            for wanted in ([*SKIN], shown(SKIN, P3, srgb))  # what is cut off may not matter
        )
        <= 3
    )


def png(*chunks: tuple[bytes, bytes], colour: tuple[int, ...] = SKIN) -> Image.Image:
    """Opens a PNG with chunks that Pillow does not write."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG", pnginfo=info)
    raw, extra = buffer.getvalue(), b""
    for kind, data in chunks:
        extra += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return open_photo(Path("a.png"), raw[:33] + extra + raw[33:])


def gama(gamma: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(gamma * 100_000))


def chrm(chromaticity: tuple[float, ...]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in chromaticity))


def cicp(primaries: int, transfer: int) -> tuple[bytes, bytes]:
    return b"cICP", bytes([primaries, transfer, 0, 1])


def test_chunks_of_png() -> None:
    assert_near(pixel(png(gama(1 / 1.8))), shown(SKIN, BT709, lambda x: x**1.8))
    assert_near(pixel(png(gama(1.0))), shown(SKIN, BT709, lambda x: x))
    assert_near(pixel(png(gama(1 / 2.2))), [*SKIN])
    assert_near(pixel(png(gama(1 / 2.2), chrm(P3))), shown(SKIN, P3, srgb))
    assert_near(pixel(png(chrm(ADOBE))), shown(SKIN, ADOBE, srgb))
    assert_near(pixel(png(cicp(12, 13))), shown(SKIN, P3, srgb))
    assert_near(pixel(png(cicp(1, 13))), [*SKIN])
    assert_near(pixel(png(cicp(1, 8))), shown(SKIN, BT709, lambda x: x))
    assert_near(pixel(png(cicp(1, 4))), shown(SKIN, BT709, lambda x: x**2.2))


def test_which_statement_of_a_png_counts() -> None:
    wide = (b"iCCP", b"name\0\0" + zlib.compress(icc(COLUMNS["p3"])))
    assert_near(pixel(png(wide, gama(1.0))), shown(SKIN, P3, srgb))
    assert_near(pixel(png((b"sRGB", b"\0"), gama(1.0), chrm(ADOBE))), [*SKIN])
    assert_near(pixel(png(cicp(1, 13), wide)), [*SKIN])


@pytest.mark.parametrize(
    "chunks",
    [[gama(0)], [chrm((0.0,) * 8)], [chrm((0.3, 0.3) * 4)], [cicp(2, 2)], [cicp(0, 255)],
     [(b"iCCP", b"name\0\0no zlib")]],
)  # fmt: skip
def test_chunks_without_sense_count_as_none(chunks: list[tuple[bytes, bytes]]) -> None:
    assert_near(pixel(png(*chunks)), [*SKIN])


def test_hdr_is_shown_up_to_paper_white() -> None:
    """PQ of 203 cd/m² is 58 % (ITU-R BT.2408, table 1), HLG's reference white 75 %."""
    for transfer, share in ((16, 0.58), (18, 0.75)):
        white, grey = (round(share * 255),) * 3, (round(share * 128),) * 3
        assert_near(pixel(png(cicp(9, transfer), colour=white)), [255] * 3, 3)
        assert max(pixel(png(cicp(9, transfer), colour=grey))) < 200
        assert_near(pixel(png(cicp(9, transfer), colour=(255, 255, 255))), [255] * 3, 1)


def test_avif_and_heic_state_codes_instead_of_a_profile() -> None:
    for form in ("AVIF", "HEIF"):
        words, buffer = kept(form), io.BytesIO()
        Image.new("RGB", (64, 64), SKIN).save(buffer, form, **words)
        raw = buffer.getvalue()
        at = raw.index(b"colrnclx") + 8
        wide = raw[:at] + struct.pack(">HH", 12, 13) + raw[at + 4 :]
        assert_near(pixel(open_photo(Path("a"), raw)), [*SKIN], 3)
        assert_near(pixel(open_photo(Path("a"), wide)), shown(SKIN, P3, srgb), 3)


def test_a_cameras_adobe_rgb_without_a_profile() -> None:
    """Cameras write R03 into the interoperability table (DCF 2.0)."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    opened = stored(SKIN, "JPEG", exif=exif, quality=100, subsampling=0)
    assert_near(pixel(opened), shown(SKIN, ADOBE, lambda x: x ** (563 / 256)), 3)


def test_transparency_is_white_after_the_conversion() -> None:
    wide, half = icc(COLUMNS["p3"]), (*SKIN, 128)
    wanted = [round(a * 128 / 255 + 127) for a in shown(SKIN, P3, srgb)]
    assert_near(pixel(stored(half, "PNG", "RGBA", icc_profile=wide)), wanted)
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([*SKIN, 0, 0, 0])
    palette.paste(1, (32, 0, 64, 64))
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=1, icc_profile=wide)
    opened = np.asarray(open_photo(Path("a.png"), buffer.getvalue()))
    assert_near(opened[0, 0].astype(int).tolist(), shown(SKIN, P3, srgb))
    assert opened[0, -1].tolist() == [255, 255, 255]
