"""A photo becomes a crop or one line on why not; five hundred broken ones too."""

from __future__ import annotations

import cmath
import io
import math
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

import portrait
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.crop import choose, crop_face, main_faces, sharpness
from hyperdreambooth.faces.detect import Face
from hyperdreambooth.faces.frame import padded
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.faces.landmarks import Landmarks, check_face, framed, laid_onto, moved
from hyperdreambooth.files import InputError

CONFIG = PrepareConfig(size=128)


def two(image: Image.Image) -> list[Face]:
    """The astronaut's face, and a larger one that is somewhere else."""
    (small,) = portrait.middle(image)
    return [small, Face((300.0, 150.0, 200.0, 200.0), portrait.scaled(1.8, -70, -60), 0.7)]


def test_of_several_one_or_none_or_all() -> None:
    image = portrait.astronaut()
    small, large = two(image)
    with pytest.raises(
        InputError, match=r"2 faces found \(200×200 at 300,150, 92×118 at 178,60\); crop to one"
    ):
        choose([small, large], CONFIG)
    assert choose([large, small], CONFIG.model_copy(update={"several": "largest"})) == [large]
    assert choose([large, small], CONFIG.model_copy(update={"several": "all"})) == [small, large]  # by place


@pytest.mark.parametrize(("share", "count"), [(0.34, 2), (0.32, 1)])
def test_passers_by_do_not_count(share: float, count: int) -> None:
    (face,) = portrait.middle(portrait.astronaut())
    passer = Face((0.0, 0.0, share * face.box[2], share * face.box[3]), face.landmarks, 0.9)
    assert len(main_faces([passer, face], CONFIG)) == count and main_faces([], CONFIG) == []


def test_no_face() -> None:
    with pytest.raises(InputError, match=r"no face found; .*--already-cropped"):
        choose([], CONFIG)


def test_too_small() -> None:
    small, config = portrait.astronaut().resize((128, 128)), PrepareConfig(size=512)
    with pytest.raises(
        InputError, match=r"too small: the face would be enlarged 10\.0 times, expected at most 4; .*most_enl"
    ):
        crop_face(small, portrait.scaled(0.25), config)
    with pytest.raises(InputError, match=r"enlarged 10\.2 times"):
        crop_face(small.crop((0, 0, 90, 50)), None, PrepareConfig(already_cropped=True))
    crop_face(small, portrait.scaled(0.25), config.model_copy(update={"most_enlarged": 10.1, "sharpness": 0}))


def test_turned_further_than_the_limit() -> None:
    image = portrait.astronaut().rotate(-30)
    turn = cmath.rect(1, math.radians(30))
    points = moved(portrait.LANDMARKS, turn, (256 + 256j) * (1 - turn))
    crop_face(image, points, CONFIG)
    with pytest.raises(InputError, match=r"turned by (31|32|33) degrees, expected at most 20; .*most_turned"):
        crop_face(image, points, CONFIG.model_copy(update={"most_turned": 20.0}))


def test_a_photo_with_room_is_cropped_with_the_whole_margin_and_without_padding() -> None:
    crop = crop_face(portrait.astronaut(), portrait.LANDMARKS, CONFIG.model_copy(update={"margin": 0.0}))
    wanted, points = laid_onto(portrait.astronaut(), portrait.LANDMARKS, framed(128, 0.0), 128)
    assert crop.picture.tobytes() == wanted.tobytes()
    assert crop.landmarks == points and crop.corners is None


def tight(left: float, top: float, right: float, bottom: float) -> tuple[Image.Image, Landmarks]:
    """The astronaut, cut to a rectangle in sides of the face's box, and the points in it."""
    x, y, width, height = portrait.BOX
    box = tuple(map(round, (x - left * width, y - top * height, x + right * width, y + bottom * height)))
    return portrait.astronaut().crop(box), portrait.scaled(1, -box[0], -box[1])


@pytest.mark.parametrize(
    ("rectangle", "padding"),
    [((0.8, 0.5, 1.8, 1.4), (0, 0)), ((0, 0, 1, 1), (0.2, 0.4)), ((0, 0.6, 1.6, 1.4), (0.02, 0.3))],
)
def test_a_tight_photo_gets_a_tighter_crop_and_little_padding(
    rectangle: tuple[float, float, float, float], padding: tuple[float, float]
) -> None:
    image, points = tight(*rectangle)
    config = CONFIG.model_copy(update={"most_padded": 1.0})
    crop = crop_face(image, points, config)
    share = 0.0 if crop.corners is None else padded(crop.corners)
    assert padding[0] <= share <= padding[1]
    if share:
        with pytest.raises(InputError, match=rf"cut off: {share:.0%} of the tightest crop lies outside"):
            crop_face(image, points, config.model_copy(update={"most_padded": share - 0.01}))


@pytest.mark.parametrize("rectangle", [(1, 1, 0.5, 2), (-0.5, 1, 2, 2), (1, 1, 2, 0.5), (1, -0.4, 2, 2)])
def test_half_a_face_is_no_face(rectangle: tuple[float, float, float, float]) -> None:
    image, points = tight(*rectangle)
    with pytest.raises(InputError, match="cut off: part of the face lies outside the photo"):
        crop_face(image, points, CONFIG)


def test_a_padded_crop_prepared_again_keeps_its_padding() -> None:
    """As it is, and aligned anew."""
    image, points = tight(0, 0, 1, 1)
    first = crop_face(image, points, CONFIG)
    resized = CONFIG.model_copy(update={"size": 64, "already_cropped": True})
    same = crop_face(first.picture, first.landmarks, resized, first.corners)
    assert first.corners is not None and same.corners == first.corners
    again = crop_face(first.picture, first.landmarks, CONFIG, first.corners)
    assert again.corners is not None
    assert padded(again.corners) == pytest.approx(padded(first.corners), abs=0.01)


def test_blurred_at_the_documented_threshold() -> None:
    """A detail of a hundredth of the crop's side: a Gaussian of 5 pixels on a crop of 512."""
    image, config = portrait.astronaut(), PrepareConfig(size=512)
    sharp = crop_face(image, portrait.LANDMARKS, config).picture
    values = [sharpness(sharp.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 3, 4, 6)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 300 and values[3] > 10 > values[4]
    soft = image.filter(ImageFilter.GaussianBlur(4))
    with pytest.raises(
        InputError, match=r"blurred: sharpness \d\.\d, expected at least 10; .*lower sharpness"
    ):
        crop_face(soft, portrait.LANDMARKS, config)
    crop_face(soft, portrait.LANDMARKS, config.model_copy(update={"sharpness": 0.0}))


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
    crop = crop_face(image, None, PrepareConfig(size=128, already_cropped=True))
    square = image.crop((50, 0, 250, 200)).resize((128, 128), Image.Resampling.LANCZOS)
    assert crop.picture.tobytes() == square.tobytes() and crop.landmarks is None and crop.corners is None


def test_a_face_beside_the_centre_square() -> None:
    """What is kept has landmarks that a training takes; of this photo it would have a part of a shoulder."""
    image, config = (
        portrait.astronaut().crop((0, 40, 512, 160)),
        PrepareConfig(size=128, already_cropped=True),
    )
    for dx, inside in ((0, True), (80, False), (200, False)):
        points = portrait.scaled(1, dx, -40)
        if inside:
            check_face(crop_face(image, points, config).landmarks or (), 128, 128)
            continue
        with pytest.raises(InputError, match=r"outside the centre square; .* leave out --already-cropped"):
            crop_face(image, points, config)


@pytest.mark.parametrize(
    "points",
    [((9.0, 9.0),) * 5, portrait.LANDMARKS[1::-1] + portrait.LANDMARKS[2:3] + portrait.LANDMARKS[:2:-1]],
)
def test_a_detector_that_sees_no_face_in_a_face(points: Landmarks) -> None:
    """A training would refuse the crop's landmarks."""
    with pytest.raises(InputError, match="the landmarks make no face"):
        crop_face(portrait.astronaut(), points, CONFIG)


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
        # Pillow 12 warns where Pillow 13 refuses: pixels of 32 bits in a PNG
        except (OSError, ValueError, KeyError, AttributeError, TypeError, DeprecationWarning):
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
    config = PrepareConfig(size=48, sharpness=1)
    for number in range(500):
        path = Path(f"{number}.jpg")
        try:
            image = open_photo(path, hostile(rng))
            crop = crop_face(image, choose(portrait.middle(image), config)[0].landmarks, config)
        except InputError as error:
            lines.append(str(error))
            continue
        assert crop.picture.mode == "RGB" and crop.picture.size == (48, 48) and len(crop.landmarks or ()) == 5
        crops += 1
    assert crops > 100 and len(lines) > 100 and crops + len(lines) == 500
    assert all(line and "\n" not in line and len(line) < 300 for line in lines)
