"""Five points to a crop: exact where it can be computed by hand, and against the textbook's SVD elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import portrait
from hyperdreambooth.faces.landmarks import (
    TEMPLATE,
    Landmarks,
    as_landmarks,
    centred,
    check_face,
    face_oval,
    framed,
    in_square,
    laid_onto,
    misfit,
    moved,
    similarity,
)
from hyperdreambooth.files import InputError

coordinates = st.floats(-100, 100)
five = st.lists(st.tuples(coordinates, coordinates), min_size=5, max_size=5)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def far(one: Image.Image, other: Image.Image | np.ndarray) -> int:
    """The largest difference of a pixel."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def test_a_similarity_computed_by_hand() -> None:
    """Half size, a quarter turn, 3 to the right and 4 down: (x, y) → (3 - y/2, 4 + x/2)."""
    points = ((0.0, 0.0), (2.0, 0.0), (1.0, 1.0), (0.0, 2.0), (2.0, 2.0))
    onto = ((3.0, 4.0), (3.0, 5.0), (2.5, 4.5), (2.0, 4.0), (2.0, 5.0))
    turn, shift = similarity(points, onto)
    assert turn == pytest.approx(0.5j) and shift == pytest.approx(3 + 4j)
    assert moved(points, turn, shift) == tuple(pytest.approx(point) for point in onto)


def test_the_astronauts_similarity_computed_by_hand() -> None:
    """The normal equations of x' = a x - b y + c, y' = b x + a y + d, written out in plain sums."""
    onto = framed(512, 0.1)
    (mx, my), (nx, ny) = (
        tuple(sum(p[k] for p in ps) / 5 for k in (0, 1)) for ps in (portrait.LANDMARKS, onto)
    )
    spread = over = across = 0.0
    for (x, y), (u, v) in zip(portrait.LANDMARKS, onto, strict=True):
        x, y, u, v = x - mx, y - my, u - nx, v - ny
        spread, over, across = spread + x * x + y * y, over + x * u + y * v, across + x * v - y * u
    a, b = over / spread, across / spread
    turn, shift = similarity(portrait.LANDMARKS, onto)
    assert turn == pytest.approx(complex(a, b), rel=1e-12)
    assert shift == pytest.approx(complex(nx - a * mx + b * my, ny - b * mx - a * my), rel=1e-9)


def umeyama(points: np.ndarray, onto: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equations 39 to 43 of Umeyama 1991: scale times rotation, and translation."""
    p, q = points - points.mean(0), onto - onto.mean(0)
    u, d, vt = np.linalg.svd(q.T @ p / len(p))
    s = np.diag([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    matrix = (np.trace(np.diag(d) @ s) / p.var(0).sum()) * u @ s @ vt
    return matrix, onto.mean(0) - matrix @ points.mean(0)


@given(points=five, onto=five)
def test_against_umeyama(points: list[tuple[float, float]], onto: list[tuple[float, float]]) -> None:
    if min(np.std(points, axis=0).min(), np.std(onto, axis=0).min()) < 1:
        return
    matrix, translation = umeyama(np.array(points), np.array(onto))
    turn, shift = similarity(points, onto)
    ours = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    np.testing.assert_allclose(ours, matrix, atol=1e-8)
    np.testing.assert_allclose([shift.real, shift.imag], translation, atol=1e-6)


def test_points_that_coincide() -> None:
    with pytest.raises(InputError, match="one point"):
        similarity(((3.0, 3.0),) * 5, TEMPLATE)


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5])
def test_the_frame_keeps_its_middle(margin: float) -> None:
    tight, wide = np.array(framed(100, 0.0)), np.array(framed(100, margin))
    np.testing.assert_allclose((wide - 50) * (1 + 2 * margin), tight - 50)


def test_a_crop_that_needs_no_resampling_is_cut_out() -> None:
    image, points = noise(200, 160), framed(64, 0.1)
    there = moved(points, 1 + 0j, 70 + 40j)
    crop, inside = laid_onto(image, there, framed(64, 0.1), 64)
    assert far(crop, image.crop((70, 40, 134, 104))) <= 1  # Pillow cuts off fractions
    np.testing.assert_allclose(inside, points, atol=1e-9)


def test_outside_of_the_photo_is_its_mirror_image() -> None:
    image = noise(60, 50)
    crop, _ = laid_onto(image, moved(framed(64, 0.0), 1 + 0j, complex(-10, -6)), framed(64, 0.0), 64)
    wanted = np.pad(np.asarray(image), ((6, 8), (10, 0), (0, 0)), mode="symmetric")[:64, :64]
    assert far(crop, wanted) <= 1


@pytest.mark.parametrize("degrees", [0, 30, -75, 180])
@pytest.mark.parametrize("zoom", [0.4, 1.0, 5.0])
def test_marks_at_the_landmarks_arrive_where_the_frame_has_them(degrees: int, zoom: float) -> None:
    turn = zoom * np.exp(1j * np.radians(degrees))
    points = moved(framed(100, 0.1), complex(turn), complex(450 - turn * (50 + 50j) + 450j))
    size, spread, ticks = 128, 3 * zoom, np.arange(900) + 0.5
    for point, (x, y) in zip(points, framed(size, 0.1), strict=True):
        down, along = (np.exp(-(((ticks - at) / spread) ** 2) / 2) for at in (point[1], point[0]))
        image = Image.fromarray((255 * np.outer(down, along)).round().astype(np.uint8)).convert("RGB")
        crop, inside = laid_onto(image, points, framed(size, 0.1), size)
        weights = np.asarray(crop, dtype=float)[..., 0]
        rows, columns = np.mgrid[:size, :size] + 0.5
        found = (weights * columns).sum() / weights.sum(), (weights * rows).sum() / weights.sum()
        assert np.hypot(found[0] - x, found[1] - y) < 0.1
        np.testing.assert_allclose(inside, framed(size, 0.1), atol=1e-6)


def test_shrinking_does_not_skip_pixels() -> None:
    """A board of single black and white pixels is grey from afar; skipping would show one of the two."""
    board = np.indices((800, 800)).sum(0) % 2 * 255
    image = Image.fromarray(board.astype(np.uint8)).convert("RGB")
    crop, _ = laid_onto(image, framed(800, 0.0), framed(64, 0.0), 64)
    assert abs(np.asarray(crop, dtype=float) - 127.5).max() < 3


def test_the_real_photograph_comes_upright() -> None:
    """Eyes level and dark, skin between them, at the template's place: on the picture itself."""
    crop, points = laid_onto(portrait.astronaut(), portrait.LANDMARKS, framed(256, 0.1), 256)
    assert np.abs(np.array(points) - np.array(framed(256, 0.1))).max() < 256 * 0.03
    grey = np.asarray(crop.convert("L"), dtype=float)
    (ax, ay), (bx, by) = points[:2]
    assert abs(ay - by) < 2
    between = grey[int((ay + by) / 2), int((ax + bx) / 2)]
    for x, y in ((ax, ay), (bx, by)):
        assert grey[int(y) - 4 : int(y) + 5, int(x) - 4 : int(x) + 5].min() < 0.5 * between
    turned = portrait.astronaut().rotate(25, center=(224, 120), resample=Image.Resampling.BICUBIC)
    angle = np.exp(-1j * np.radians(25))
    there = moved(portrait.LANDMARKS, complex(angle), complex((224 + 120j) * (1 - angle)))
    again, _ = laid_onto(turned, there, framed(256, 0.1), 256)
    inner = np.abs(np.asarray(again, float) - np.asarray(crop, float))[30:220, 30:220]
    assert inner.mean() < 3


def test_without_landmarks_the_oval_is_in_the_middle_of_an_aligned_crop() -> None:
    torch.testing.assert_close(face_oval(16, 16, TEMPLATE), face_oval(16, 16))
    moved_right = tuple((x + 0.25, y) for x, y in TEMPLATE)
    torch.testing.assert_close(face_oval(16, 16, moved_right)[:, 4:], face_oval(16, 16)[:, :12])
    tilted = face_oval(64, 64, tuple((1 - y, x) for x, y in TEMPLATE))  # a quarter turn to the right
    torch.testing.assert_close(tilted, torch.rot90(face_oval(64, 64), -1))


def test_the_oval_holds_the_face_at_any_margin() -> None:
    for margin in (0.0, 0.3):
        points = tuple((x / 128, y / 128) for x, y in framed(128, margin))
        oval = face_oval(128, 128, points)
        assert all(oval[int(y * 128), int(x * 128)] == 1 for x, y in points)
        area = 3.14159 * 0.42 * 0.34 / (1 + 2 * margin) ** 2
        assert float(oval.mean()) == pytest.approx(area, rel=0.03)


def test_the_centre_square_and_its_points() -> None:
    image = noise(120, 80)
    crop, points = centred(image, ((30.0, 20.0), (100.0, 80.0), (60.0, 40.0), (20.0, 0.0), (60.0, 80.0)), 40)
    assert crop.tobytes() == image.crop((20, 0, 100, 80)).resize((40, 40), Image.Resampling.LANCZOS).tobytes()
    assert points == ((5, 10), (40, 40), (20, 20), (0, 0), (20, 40))
    assert in_square(((60.0, 40.0),) * 5, 120, 80)[0] == (0.5, 0.5)
    assert centred(image, None, 40)[1] is None


def swap(points: Landmarks) -> Landmarks:
    return (points[1], points[0], points[2], points[4], points[3])


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (swap(portrait.LANDMARKS), "no face"),
        ((*portrait.LANDMARKS[:2], (500.0, 10.0), *portrait.LANDMARKS[3:]), "no face"),
        (portrait.scaled(1, dx=400), "outside the picture of 512×512"),
        (((5.0, 5.0),) * 5, "no face"),
    ],
)
def test_points_of_no_face(points: Landmarks, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_face(points, 512, 512)


def test_points_of_a_face_whatever_its_turn() -> None:
    check_face(portrait.LANDMARKS, 512, 512)
    profile = ((0.5, 0.46), (0.52, 0.46), (0.4, 0.6), (0.5, 0.72), (0.51, 0.72))
    check_face(profile, 1, 1)
    assert misfit(portrait.LANDMARKS) < 0.05 < 0.35 < misfit(profile) < 0.45
    assert misfit(swap(portrait.LANDMARKS)) > 0.75 and misfit(framed(100, 0.2)) < 1e-9
    for turn in (1j, -1, -1j):
        check_face(moved(portrait.LANDMARKS, complex(turn), 256 + 256j - turn * (256 + 256j)), 512, 512)


@pytest.mark.parametrize(
    "value", [None, 3, [1, 2], [[1, 2]] * 4, ["a"] * 10, [[1, float("nan")]] * 5, {"a": 1}, [10**400] * 10]
)
def test_what_is_no_landmarks(value: object) -> None:
    with pytest.raises(ValueError, match="landmarks"):
        as_landmarks(value)


def test_landmarks_as_json_has_them() -> None:
    flat = json.loads("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]")
    assert as_landmarks(flat) == as_landmarks([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]])
