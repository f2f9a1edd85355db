"""Damaged photos of ten formats end in a crop or in one line, never in another error.

`FUZZ=100 python -m pytest tests/faces/test_fuzz.py` tries a thousand; the default is a tenth of that.
"""

from __future__ import annotations

import io
import os
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms

import portrait
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.faces.prepare import prepare_photo
from hyperdreambooth.faces.sources import Item

CONFIG = PrepareConfig(size=32, sharpness=0)
EACH = int(os.environ.get("FUZZ", "10"))
# a format's name in Pillow, and how the photo is saved
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {}), "mpo": ("MPO", {"save_all": True}), "png": ("PNG", {}), "gif": ("GIF", {}),
    "apng": ("PNG", {"save_all": True}), "webp": ("WEBP", {}), "bmp": ("BMP", {}), "heic": ("HEIF", {}),
    "tiff": ("TIFF", {"compression": "tiff_lzw"}), "avif": ("AVIF", {"speed": 10}),
}  # fmt: skip


@cache
def whole(kind: str) -> bytes:
    """A small photo with a colour profile and EXIF, whose readers are tried, too."""
    form, words = FORMATS[kind]
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image, exif, buffer = portrait.astronaut().resize((64, 64)), Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010F] = 6, "maker"
    if form != "TIFF":  # Pillow cannot write it there
        exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    if words.get("save_all"):
        words = {**words, "append_images": [image.rotate(90)]}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(buffer, form, exif=exif.tobytes(), icc_profile=profile, **words)
    return buffer.getvalue()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Changes bytes (mostly near the start, where headers are), cuts, doubles or drops a piece."""
    data, reach = bytearray(content), rng.choice((64, 600, len(content)))
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(min(reach, len(data)))] = rng.choice((0, 255, rng.randrange(256)))
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    pieces = [data, data, data[:end], data[:end] + data[start:], data[:start] + data[end:]]
    return bytes(rng.choice(pieces))


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_photos_end_in_a_crop_or_in_one_line(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    for number in range(EACH):
        photo = tmp_path / f"{number}.{kind}"
        photo.write_bytes(damaged(whole(kind), rng))
        item = Item(str(number), str(photo), photo, None)
        (record,) = prepare_photo(item, "", tmp_path / "out", CONFIG, portrait.middle)
        crop = tmp_path / "out" / f"{number}.png"
        assert crop.is_file() == record.kept and "\n" not in record.reason
        assert not record.kept or open_photo(crop).size == (32, 32)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_photos_were_good_before(kind: str) -> None:
    assert open_photo(Path(kind), whole(kind)).size == (64, 64)
