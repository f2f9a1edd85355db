"""The crop's frame, its padding, and the masks that keep padding out of the loss, by plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import portrait
from hyperdreambooth.faces.frame import (
    Corners,
    as_corners,
    corners_in,
    cut,
    depth,
    fitting,
    frames,
    of_picture,
    padded,
    photo_masks,
)
from hyperdreambooth.faces.landmarks import framed, moved

LEFT_QUARTER: Corners = ((0.25, -1.0), (2.0, -1.0), (2.0, 2.0), (0.25, 2.0))  # is padding


def test_frames_go_from_the_margin_to_a_crop_that_still_holds_the_face() -> None:
    first, *_, last = frames(100, 0.1)
    np.testing.assert_allclose(first, framed(100, 0.1))
    eyes, chin = np.mean(last[:2], axis=0), 0.88  # of the template, see `face_oval`
    zoom = (last[1][0] - last[0][0]) / 0.23
    assert eyes[1] - 0.26 * zoom > 0 and eyes[1] + (chin - 0.46) * zoom < 100
    sides = [one[1][0] - one[0][0] for one in frames(100, 0.1)]
    assert sides == sorted(sides)


@pytest.mark.parametrize("degrees", [0, 30, 200])
def test_depth_against_a_rectangle_by_hand(degrees: int) -> None:
    """Distances to the sides of a rectangle, in its own coordinates."""
    turn, middle = np.exp(1j * np.radians(degrees)), 0.5 + 0.4j
    corners = moved(((-0.3, -0.2), (0.3, -0.2), (0.3, 0.2), (-0.3, 0.2)), complex(turn), middle)
    ticks = (np.arange(20) + 0.5) / 20
    own = (ticks[None] + 1j * ticks[:, None] - middle) / turn
    wanted = np.minimum(0.3 - abs(own.real), 0.2 - abs(own.imag))
    np.testing.assert_allclose(depth(corners, 20), wanted, atol=1e-12)
    assert padded(corners) == pytest.approx(1 - 0.6 * 0.4, abs=0.01)


def test_a_photo_with_enough_around_the_face_is_not_padded() -> None:
    photo = of_picture(512, 512)
    assert fitting(photo, portrait.LANDMARKS, 64, 0.0) == frames(64, 0.0)[0]
    wide = fitting(photo, portrait.LANDMARKS, 64, 1.0)
    assert wide != frames(64, 1.0)[0] and padded(corners_in(photo, portrait.LANDMARKS, wide, 64)) < 0.005


def test_the_border_is_smooth_and_fades_to_the_median() -> None:
    """Sharp noise in the photo, none in the border; no edge where the photo ends."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    points = moved(framed(128, 0.1), 1 + 0j, complex(-64, 20))  # the left half of the crop is no photo
    crop, _, corners = cut(Image.fromarray(noise), of_picture(200, 200), points, framed(128, 0.1), 128)
    pixels = np.asarray(crop, dtype=float)
    assert padded(corners) == pytest.approx(0.5, abs=0.02)
    assert np.abs(pixels[:, 64:] - noise[20:148, :64]).max() <= 1
    steps = np.abs(np.diff(pixels, axis=1)).mean(axis=(0, 2))
    assert steps[:58].max() < 4 < 40 < steps[66:].min()
    assert np.abs(pixels[:, :30] - np.median(noise[20:148, :64], axis=(0, 1))).max() < 12


def test_the_mask_is_zero_wherever_padding_is() -> None:
    masks = photo_masks([None, LEFT_QUARTER], torch.zeros(2, 4, 8, 8))
    assert masks is not None and masks.shape == (2, 1, 8, 8)
    assert (masks[0] == 1).all() and (masks[1, 0, :, :2] == 0).all() and (masks[1, 0, :, 3:] == 1).all()
    assert (masks[1, 0, :, 2] == 0.5).all()  # its middle is half a cell inside the photo
    assert photo_masks([None, None], torch.zeros(2, 4, 8, 8)) is None


def test_corners_as_json_has_them() -> None:
    assert as_corners([[0.25, -1], [2, -1], [2, 2], [0.25, 2]]) == LEFT_QUARTER


@pytest.mark.parametrize(
    "value", [None, 3, [[0, 0]] * 4, LEFT_QUARTER[::-1], LEFT_QUARTER[:3], [[float("nan"), 0]] * 4, ["a"] * 8]
)
def test_what_is_no_corners(value: object) -> None:
    with pytest.raises(ValueError, match="corners"):
        as_corners(value)
