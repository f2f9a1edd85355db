"""A photo becomes a crop or one line on why not; five hundred broken ones too."""

from __future__ import annotations

import io
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

import portrait
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.crop import crop_face, sharpness
from hyperdreambooth.faces.detect import Face
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.faces.landmarks import Landmarks, check_face
from hyperdreambooth.files import InputError

CONFIG = PrepareConfig(size=128)


def two(image: Image.Image) -> list[Face]:
    """The astronaut's face, and a larger one that is somewhere else."""
    (small,) = portrait.middle(image)
    return [small, Face((300.0, 150.0, 200.0, 200.0), portrait.scaled(1.8, -70, -60), 0.7)]


def test_given_landmarks_need_no_detector() -> None:
    crop, points = crop_face(portrait.astronaut(), portrait.LANDMARKS, CONFIG, None)
    found, same = crop_face(portrait.astronaut(), None, CONFIG, portrait.middle)
    assert crop.size == (128, 128) and crop.tobytes() == found.tobytes() and points == same


def test_of_several_the_largest_or_none() -> None:
    image = portrait.astronaut()
    largest, _ = crop_face(image, None, CONFIG, two)
    alone, _ = crop_face(image, two(image)[1].landmarks, CONFIG, None)
    assert largest.tobytes() == alone.tobytes()
    with pytest.raises(
        InputError, match=r"2 faces found \(200×200 at 300,150, 92×118 at 178,60\); crop to one"
    ):
        crop_face(image, None, CONFIG.model_copy(update={"several": "refuse"}), two)


@pytest.mark.parametrize("detect", [None, lambda image: []])
def test_no_face(detect: None) -> None:
    with pytest.raises(InputError, match=r"no face found; .*--already-cropped"):
        crop_face(portrait.astronaut(), None, CONFIG, detect)


def test_too_small() -> None:
    small = portrait.astronaut().resize((128, 128))
    with pytest.raises(
        InputError, match="too small: the crop would have 53 pixels per side, expected at least 64"
    ):
        crop_face(small, portrait.scaled(0.25), CONFIG, None)
    with pytest.raises(InputError, match="too small: the crop would have 50 pixels"):
        crop_face(small.crop((0, 0, 90, 50)), None, PrepareConfig(already_cropped=True), None)
    crop_face(small, portrait.scaled(0.25), PrepareConfig(min_side=50), None)


def test_blurred_at_the_documented_threshold() -> None:
    """A detail of a hundredth of the crop's side: a Gaussian of 5 pixels on a crop of 512."""
    image, config = portrait.astronaut(), PrepareConfig(size=512)
    sharp, _ = crop_face(image, portrait.LANDMARKS, config, None)
    values = [sharpness(sharp.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 3, 4, 6)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 300 and values[3] > 10 > values[4]
    soft = image.filter(ImageFilter.GaussianBlur(4))
    with pytest.raises(
        InputError, match=r"blurred: sharpness \d\.\d, expected at least 10; .*lower sharpness"
    ):
        crop_face(soft, portrait.LANDMARKS, config, None)
    crop_face(soft, portrait.LANDMARKS, config.model_copy(update={"sharpness": 0.0}), None)


def test_sharpness_against_a_naive_loop() -> None:
    for side, judged in ((300, 256), (80, 80)):
        image = portrait.astronaut().crop((150, 20, 150 + side, 20 + side))
        grey = np.asarray(image.convert("L").resize((judged, judged), Image.Resampling.LANCZOS), dtype=float)
        edges = [
            4 * grey[y, x] - grey[y - 1, x] - grey[y + 1, x] - grey[y, x - 1] - grey[y, x + 1]
            for y in range(1, judged - 1)
            for x in range(1, judged - 1)
        ]
        assert sharpness(image) == pytest.approx(np.var(edges))


def test_already_cropped_takes_the_centre_square() -> None:
    image = portrait.astronaut().crop((100, 0, 400, 200))
    crop, points = crop_face(image, None, PrepareConfig(size=128, already_cropped=True), None)
    square = image.crop((50, 0, 250, 200)).resize((128, 128), Image.Resampling.LANCZOS)
    assert crop.tobytes() == square.tobytes() and points is None


def test_a_face_beside_the_centre_square() -> None:
    """What is kept has landmarks that a training takes; of this photo it would have a part of a shoulder."""
    image, config = (
        portrait.astronaut().crop((0, 40, 512, 160)),
        PrepareConfig(size=128, already_cropped=True),
    )
    for dx, inside in ((0, True), (80, False), (200, False)):
        points = portrait.scaled(1, dx, -40)
        if inside:
            _, found = crop_face(image, points, config, None)
            check_face(found or (), 128, 128)
            continue
        with pytest.raises(InputError, match=r"outside the centre square; .* leave out --already-cropped"):
            crop_face(image, points, config, None)


@pytest.mark.parametrize(
    "points",
    [((9.0, 9.0),) * 5, portrait.LANDMARKS[1::-1] + portrait.LANDMARKS[2:3] + portrait.LANDMARKS[:2:-1]],
)
def test_a_detector_that_sees_no_face_in_a_face(points: Landmarks) -> None:
    """A training would refuse the crop's landmarks."""
    with pytest.raises(InputError, match="the landmarks make no face"):
        crop_face(portrait.astronaut(), None, CONFIG, lambda image: [Face(portrait.BOX, points, 0.9)])


# ---- five hundred photos that nobody would send ---------------------------------------------------------

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F")
SIZES = ((64, 64), (96, 64), (65, 97), (200, 160), (33, 70), (31, 80), (1, 1), (3, 300), (700, 33))


FACES = {size: portrait.astronaut().crop((150, 20, 310, 220)).resize(size) for size in SIZES}


def encoded(rng: random.Random) -> bytes:
    """A picture of any mode in any format that takes it."""
    while True:
        size, mode = rng.choice(SIZES), rng.choice(MODES)
        face = FACES[size]
        if mode.startswith(("I", "F")):
            values = np.asarray(face.convert("L")).astype(
                {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
            )
            image = Image.fromarray(values * rng.choice((1, 255)))
        else:
            image = face.convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", size, 120)
        buffer, options = io.BytesIO(), dict[str, object]()
        if rng.random() < 0.3:
            exif = Image.Exif()
            exif[0x0112] = rng.choice((*range(10), 77))
            options["exif"] = exif
        if rng.random() < 0.2:
            options |= {"save_all": True, "append_images": [image.copy()] * rng.randint(1, 3)}
        try:
            image.save(buffer, rng.choice(FORMATS), **options)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
        return buffer.getvalue()


def bomb(rng: random.Random) -> bytes:
    """A small PNG whose header promises up to 1.6 billion pixels."""
    buffer = io.BytesIO()
    Image.new("1", (64, 64)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    side = rng.choice((9_000, 20_000, 40_000))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def hostile(rng: random.Random) -> bytes:
    """Whole, torn, flipped, a bomb, or no picture at all."""
    content, kind = encoded(rng), rng.randrange(12)
    if kind < 4:
        return content
    if kind < 7:
        return content[: rng.randrange(len(content) + 1)]
    if kind < 10:
        broken = bytearray(content)
        for _ in range(rng.randint(1, 12)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return bytes(broken)
    return bomb(rng) if kind == 10 else rng.randbytes(rng.randrange(200))


def test_five_hundred_fuzzed_photos_end_in_a_crop_or_one_line() -> None:
    rng, crops, lines = random.Random(0), 0, list[str]()
    config = PrepareConfig(size=48, min_side=16, sharpness=1)
    for number in range(500):
        path = Path(f"{number}.jpg")
        try:
            image = open_photo(path, hostile(rng))
            crop, points = crop_face(image, None, config, portrait.middle)
        except InputError as error:
            lines.append(str(error))
            continue
        assert crop.mode == "RGB" and crop.size == (48, 48) and points is not None and len(points) == 5
        crops += 1
    assert crops > 100 and len(lines) > 100 and crops + len(lines) == 500
    assert all(line and "\n" not in line and len(line) < 300 for line in lines)
