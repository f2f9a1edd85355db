"""Photos of every kind open the way people see them; broken ones say so in one line."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hyperdreambooth.faces.image import open_photo, to_image, to_pixels, to_rgb
from hyperdreambooth.files import InputError
from hyperdreambooth.runs import rng

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def split(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def corner(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    pixel = image.getpixel((x % image.width, y % image.height))
    assert isinstance(pixel, tuple)
    return pixel


def close(a: tuple[int, ...], b: tuple[int, ...], tolerance: int = 3) -> bool:
    return all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif"])
def test_every_format(tmp_path: Path, suffix: str) -> None:
    split().save(tmp_path / f"a.{suffix}")
    image = open_photo(tmp_path / f"a.{suffix}")
    assert image.mode == "RGB" and image.size == (64, 48)
    assert close(corner(image, 0, 0), RED) and close(corner(image, -1, 0), BLUE)


@pytest.mark.parametrize("form", ["HEIF", "AVIF"])
def test_phones_formats(tmp_path: Path, form: str) -> None:
    """The content decides here, too; transparency is white, and a torn file is one line."""
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image = Image.new("RGBA", (64, 48), (*RED, 255))
    image.paste((0, 0, 0, 0), (32, 0, 64, 48))
    image.save(tmp_path / "a.jpg", form, quality=90)
    opened = open_photo(tmp_path / "a.jpg")
    assert close(corner(opened, 0, 0), RED, 12) and close(corner(opened, -1, 0), WHITE, 12)
    content = (tmp_path / "a.jpg").read_bytes()
    for part in (0.2, 0.6, 0.9):
        with pytest.raises(InputError, match=r"a\.jpg: (the picture is truncated|not a PNG)"):
            open_photo(Path("a.jpg"), content[: int(len(content) * part)])


def test_what_reads_a_phones_photo_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)  # importing it now fails as if it were not installed
        with pytest.raises(InputError, match=r"a\.heic: .*pip install 'hyperdreambooth\[heic\]'"):
            open_photo(Path("a.heic"), heic)
        for film in (b"qt  ", b"isom", b"crx "):
            with pytest.raises(InputError, match=r"not a PNG, JPEG, .*HEIC or AVIF picture"):
                open_photo(Path("a.heic"), heic.replace(b"heic", film).replace(b"mif1", film))
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    with pytest.raises(InputError, match="this Pillow reads no AVIF; run pip install -U pillow"):
        open_photo(Path("a.avif"), heic.replace(b"heic", b"avif"))


@pytest.mark.parametrize("form", ["JPEG", "MPO"])
def test_motion_photos(form: str) -> None:
    """A film follows the photo in its file; a gain map, in MPO, is a second picture."""
    buffer, words = io.BytesIO(), {}
    if form == "MPO":
        words = {"save_all": True, "append_images": [Image.new("L", (32, 24), 99)]}
    split().save(buffer, form, quality=95, **words)
    film = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\0\0\x10\0mdat" + bytes(4088)
    image = open_photo(Path("PXL.MP.jpg"), buffer.getvalue() + film)
    assert close(corner(image, 0, 0), RED) and close(corner(image, -1, 0), BLUE)


def test_a_phones_picture_of_pictures(tmp_path: Path) -> None:
    split().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    image = open_photo(tmp_path / "a.jpg")
    assert close(corner(image, 0, 0), RED) and close(corner(image, -1, 0), BLUE)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    split().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert open_photo(tmp_path / "a.jpg").size == (64, 48)


TURNS = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],  # the inverse of what a viewer does
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}
LOSSLESS: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_every_orientation_in_every_format_that_has_one(form: str, orientation: int) -> None:
    """HEIC and AVIF hold a turn of their own, which must not be made twice."""
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    upright, exif, buffer = split(), Image.Exif(), io.BytesIO()
    upright.paste((0, 255, 0), (0, 0, 16, 24))
    stored = upright
    for turn in TURNS[orientation]:
        stored = stored.transpose(turn)
    exif[0x0112] = orientation
    stored.save(buffer, form, exif=exif.tobytes(), **LOSSLESS.get(form, {"quality": 95}))
    opened = open_photo(Path("a"), buffer.getvalue())
    assert opened.size == upright.size
    difference = np.abs(np.asarray(opened).astype(int) - np.asarray(upright))
    assert difference.mean() < 12 if form not in LOSSLESS and form != "PNG" else not difference.any()


def test_odd_tags_cost_no_photo() -> None:
    """Text where EXIF has a number: Pillow reads it, and cannot write it."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010F] = 6, "maker"
    split((64, 48)).save(buffer, "JPEG", exif=exif)
    content = buffer.getvalue().replace(b"\x01\x0f\x00\x02", b"\x02\x13\x00\x02")
    assert content != buffer.getvalue() and open_photo(Path("a.jpg"), content).size == (48, 64)


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    Image.fromarray(ramp.astype(np.float32) / 65535).save(tmp_path / "float.tif")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray((ramp // 257).astype(np.float32)).save(tmp_path / "bytes.tif")
    wanted = (ramp / 257).round()
    for name in ("a.png", "a.tif", "float.tif", "int.tif", "bytes.tif"):
        image = np.asarray(open_photo(tmp_path / name)).astype(float)
        assert image.shape == (64, 64, 3)
        assert np.abs(image - wanted[..., None]).max() <= 1, name


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


# PNG's number of a mode, its samples of the colours looked for, and what is seen
@pytest.mark.parametrize(
    ("mode", "samples", "seen"),
    [
        (2, [65535, 32896, 0], (255, 128, 0)), (6, [65535, 32896, 0, 65535], (255, 128, 0)),
        (6, [65535, 32896, 0, 0], WHITE), (0, [32896], (128,) * 3), (4, [32896, 65535], (128,) * 3),
        (4, [32896, 0], WHITE),
    ],
)  # fmt: skip
def test_sixteen_bits_in_png(mode: int, samples: list[int], seen: tuple[int, ...]) -> None:
    """Pillow cannot write such a PNG: it is made by hand."""
    header = (40).to_bytes(4, "big") * 2 + bytes([16, mode, 0, 0, 0])
    row = b"\0" + np.array(samples * 40, dtype=">u2").tobytes()
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 40)) + chunk(b"IEND", b"")
    image = open_photo(Path("a.png"), b"\x89PNG\r\n\x1a\n" + body)
    assert close(corner(image, 20, 20), seen, 1)


@pytest.mark.parametrize(
    ("photometric", "extra", "samples", "seen"),
    [
        (2, None, [65535, 32896, 0], (255, 128, 0)), (2, 2, [65535, 32896, 0, 65535], (255, 128, 0)),
        (2, 2, [65535, 32896, 0, 0], WHITE), (1, None, [32896], (128,) * 3), (0, None, [6553], (230,) * 3),
        (5, None, [0, 0, 0, 65535], (0, 0, 0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_in_tiff(
    photometric: int, extra: int | None, samples: list[int], seen: tuple[int, ...], order: str
) -> None:
    """One strip, one directory (TIFF 6.0), in either order of bytes."""
    many, data = len(samples), np.array(samples * 1600, dtype=f"{order}u2").tobytes()
    tags = [
        (256, 40), (257, 40), (259, 1), (262, photometric), (273, 8), (277, many), (278, 40),
        (279, len(data)),
    ]  # fmt: skip
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags]
    depth = struct.pack(f"{order}HHI", 258, 3, many)
    at = 8 + len(data)
    depth += struct.pack(f"{order}I", at) if many > 2 else struct.pack(f"{order}HH", 16, 16)
    entries.insert(2, depth)
    if extra:
        entries.append(struct.pack(f"{order}HHIHH", 338, 3, 1, extra, 0))
    bits = struct.pack(f"{order}{many}H", *[16] * many)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, at + len(bits))
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    if (order, photometric) == (">", 0):
        with pytest.raises(InputError, match="convert it first"):  # Pillow does not know it
            open_photo(Path("a.tif"), head + data + bits + directory)
        return
    image = open_photo(Path("a.tif"), head + data + bits + directory)
    assert close(corner(image, 20, 20), seen, 1)


def test_cmyk(tmp_path: Path) -> None:
    for suffix in ("jpg", "tif"):
        split().convert("CMYK").save(tmp_path / f"a.{suffix}")
        image = open_photo(tmp_path / f"a.{suffix}")
        assert close(corner(image, 0, 0), RED) and close(corner(image, -1, 0), BLUE)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_is_white(tmp_path: Path, mode: str) -> None:
    grey = Image.new("LA", (40, 40), (90, 255))
    grey.paste((10, 0), (20, 0, 40, 40))
    target = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    if mode == "P":
        palette = Image.new("P", (40, 40), 0)
        palette.putpalette([90, 90, 90, 10, 10, 10])
        palette.paste(1, (20, 0, 40, 40))
        palette.save(target, transparency=1)
    elif mode == "PA":
        image = Image.new("PA", (40, 40), (0, 255))
        image.putpalette([90, 90, 90])
        image.paste((0, 0), (20, 0, 40, 40))
        assert corner(to_rgb(target, image), -1, 0) == WHITE
        return
    else:
        grey.convert(mode).save(target)
    image = open_photo(target)
    assert corner(image, 0, 0) == (90, 90, 90) and corner(image, -1, 0) == WHITE


def test_half_transparent_is_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 40), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert close(corner(open_photo(tmp_path / "a.png"), 3, 3), (255, 127, 127), 1)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_few_colours(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (40, 40), (0, 0, 0))
    image.paste(WHITE, (20, 0, 40, 40))
    image.convert(mode).save(tmp_path / "a.png")
    opened = open_photo(tmp_path / "a.png")
    assert corner(opened, 0, 0) == (0, 0, 0) and corner(opened, -1, 0) == WHITE


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert close(corner(open_photo(tmp_path / f"a.{suffix}"), 5, 5), RED)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif"])
@pytest.mark.parametrize("part", [0.3, 0.7])
def test_truncated(tmp_path: Path, suffix: str, part: float) -> None:
    file = tmp_path / f"a.{suffix}"
    noise = torch.randint(0, 256, (64, 64, 3), generator=rng(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
    with pytest.raises(InputError) as caught:
        open_photo(file)
    assert f"a.{suffix}" in str(caught.value) and "\n" not in str(caught.value)


@given(st.data())
def test_broken_bytes_never_give_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    suffix = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
    buffer = io.BytesIO()
    split().save(buffer, suffix)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "broken"
    file.write_bytes(content)
    try:
        assert open_photo(file).mode == "RGB"
    except InputError as error:
        assert "broken" in str(error) and "\n" not in str(error)


def test_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    for name in ("a.jpg", "empty.jpg", "a.eps"):
        with pytest.raises(InputError, match=f"{name}: not a PNG, JPEG"):
            open_photo(tmp_path / name)
    with pytest.raises(InputError, match="no such photo"):
        open_photo(tmp_path / "b.jpg")
    with pytest.raises(InputError, match="found a folder"):
        open_photo(tmp_path)


@pytest.mark.parametrize("size", [(9_000, 9_000), (10_000, 10_000), (40_000, 40_000)])
def test_a_bomb_is_not_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    """81 MP is over ours, 100 MP over Pillow's warning, 1600 MP over its error; only the header is real."""
    buffer = io.BytesIO()
    Image.new("1", (64, 64)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(InputError, match=r"bomb\.png.*more than 80 million pixels"):
        open_photo(tmp_path / "bomb.png")


def test_threads_leave_the_filters_of_warnings_alone(tmp_path: Path) -> None:
    """`warnings.catch_warnings` in threads would restore each other's filters, and lose warnings for good."""
    split().save(tmp_path / "a.png")
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(open_photo, [tmp_path / "a.png"] * 400))
        assert warnings.filters == before
    finally:
        sys.setswitchinterval(interval)
        warnings.filters[:] = before


def test_too_small(tmp_path: Path) -> None:
    split((200, 31)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="200×31 pixels, expected at least 32"):
        open_photo(tmp_path / "a.png")
    split((32, 32)).save(tmp_path / "a.png")
    assert open_photo(tmp_path / "a.png").size == (32, 32)


@given(width=st.integers(32, 90), height=st.integers(32, 90), size=st.integers(1, 70))
def test_pixels_are_the_centre_square(width: int, height: int, size: int) -> None:
    noise = torch.randint(0, 256, (height, width, 3), generator=rng(width, height), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    pixels = to_pixels(image, size)
    assert pixels.shape == (3, size, size) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels.min() >= -1 and pixels.max() <= 1
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    assert to_image(pixels).tobytes() == square.tobytes()


def test_pictures_and_pixels_are_inverse() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1).expand(16, 16, 3)
    image = Image.fromarray(ramp.numpy())
    pixels = to_pixels(image, 16)
    assert to_image(pixels).tobytes() == image.tobytes()
    assert pixels[0, 0, 0] == -1 and pixels[0, 15, 15] == 1


def test_pixels_out_of_range_are_clamped() -> None:
    wild = torch.tensor([-9.0, 9.0, float("nan")]).reshape(3, 1, 1).expand(3, 2, 2).requires_grad_()
    assert to_image(wild).getpixel((0, 0)) == (0, 255, 128)
    assert to_image(torch.ones(3, 2, 2, dtype=torch.bfloat16)).getpixel((1, 1)) == WHITE
