"""Photos are decoded elsewhere: bombs, and whatever kills the decoder, end in a sentence."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator

import pytest
from PIL import Image
from services import face

from hyperdreambooth.files import InputError
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.decode import Decoder


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(ServeConfig(photo_side=64, decode_bytes=400_000_000))
    yield made
    made.close()


def noted() -> bytes:
    """A turned photo with metadata."""
    exif = Image.Exif()
    exif[274], exif[270] = 6, "where I live"
    file = io.BytesIO()
    Image.new("RGB", (300, 200), "red").save(file, "JPEG", exif=exif)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of few bytes and many pixels."""
    rows = zlib.compress(b"\0" * ((-(-side // 8) + 1) * side), 9)
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    parts = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
        for name, body in parts
    )


def test_photos_become_small_upright_and_bare(decoder: Decoder) -> None:
    with Image.open(io.BytesIO(decoder.decode(noted()))) as clean:
        assert (clean.format, clean.mode, clean.size) == ("PNG", "RGB", (43, 64))
        assert not clean.getexif() and not clean.info
    with pytest.raises(InputError, match="million pixels"):
        decoder.decode(bomb(30_000))
    with pytest.raises(InputError, match="too much memory"):
        decoder.decode(bomb(8_900))  # within the bound of pixels, and too much for the bound of memory
    for junk in (b"", b"GIF89a", b"%!PS-Adobe", noted()[:400], b"\0" * 1000):
        with pytest.raises(InputError, match="photo"):
            decoder.decode(junk)
    assert decoder.decode(face())


def test_a_decoder_that_was_killed_or_hangs_is_replaced(decoder: Decoder) -> None:
    decoder.start()
    process = decoder.process
    assert process is not None
    process.kill()
    process.join()
    assert decoder.decode(face())
    slow = Decoder(ServeConfig(decode_seconds=1e-6))
    with pytest.raises(InputError, match="too long"):
        slow.decode(face(side=900))
    slow.close()
