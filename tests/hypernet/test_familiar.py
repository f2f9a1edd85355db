"""How far photos are from those of the training: distances against numpy's, files, the shipped numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from hyperdreambooth.avatars.draw.people import ATTRIBUTES, SPLITS, Context
from hyperdreambooth.avatars.folder import draw, identity, photo, photo_context
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError, save_tensors
from hyperdreambooth.hypernet.familiar import FEWEST, FILE, familiar_of, load_familiar
from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET, Predictor, load_hypernet

SHARED = Path(__file__).resolve().parents[3] / "shared"


def cloud(count: int, seed: int = 0, width: int = 4) -> torch.Tensor:
    """A Gaussian whose channels depend on one another and have different scales."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) * torch.tensor(10.0)
    return torch.randn(count, width, generator=generator) @ mixing + 3


def test_of_one_gaussian_it_is_mahalanobis_distance() -> None:
    rows, others, asked = cloud(600), cloud(400, 1), 2 * cloud(50, 2)
    made = familiar_of(rows, others)
    assert made is not None and made.means.shape == (1, 4)
    inverse, centre = np.linalg.inv(np.cov(rows.numpy().T, bias=True)), rows.mean(0).numpy()

    def square(points: torch.Tensor) -> np.ndarray:
        away = points.numpy() - centre
        return np.einsum("bi,ij,bj->b", away, inverse, away)

    naive = (square(asked) / np.quantile(square(others), 0.99)) ** 0.5
    np.testing.assert_allclose(made.distance(asked).numpy(), naive, rtol=0.02)


def test_several_kinds_of_photos_are_all_familiar_and_what_lies_between_is_not() -> None:
    def two(count: int, seed: int) -> torch.Tensor:
        return torch.cat([cloud(count, seed), cloud(count, seed + 1) + 400])

    made = familiar_of(two(2000, 0), two(300, 10))
    assert made is not None and len(made.means) > 1
    assert float((made.distance(two(300, 20)) > 1).float().mean()) < 0.03
    assert float(made.distance(cloud(100, 30) + 200).min()) > 1


@pytest.mark.parametrize(("photos", "others"), [(FEWEST - 1, 50), (FEWEST, 0)])
def test_too_few_photos_say_nothing(photos: int, others: int) -> None:
    assert familiar_of(cloud(photos), cloud(others)) is None


def test_a_channel_that_never_changes_does_no_harm() -> None:
    rows = cloud(600)
    rows[:, 2] = 5
    made = familiar_of(rows, rows[:100])
    assert made is not None and made.distance(rows).isfinite().all()


def test_a_file_keeps_the_distances(tmp_path: Path) -> None:
    made = familiar_of(cloud(600), cloud(100, 1))
    assert made is not None and load_familiar(tmp_path) is None
    made.save(tmp_path)
    again = load_familiar(tmp_path)
    assert again is not None
    one, other = again.distance(cloud(50, 2)), made.distance(cloud(50, 2))
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    save_tensors(tmp_path / FILE, {"centre": made.centre})
    with pytest.raises(InputError, match=r"familiar\.safetensors: expected axes, .* got centre; delete it"):
        load_familiar(tmp_path)


@pytest.fixture(scope="module")
def shipped() -> Predictor:
    return load_hypernet(EMBEDDED_HYPERNET)


def distances(predictor: Predictor, pictures: list[Image.Image]) -> torch.Tensor:
    assert predictor.familiar is not None
    pixels = torch.stack([to_pixels(one, predictor.info.resolution) for one in pictures])
    return predictor.familiar.distance(predictor.encoder.texture(pixels))


def scenes(group: str) -> list[Context]:
    """A plain photo's context with every value of one attribute."""
    plain = photo_context(SPLITS["test"].start, 0, 0)
    return [replace(plain, **{group: value}) for value in ATTRIBUTES[group]]


@pytest.mark.parametrize("group", ["style", "expression", "headwear", "background"])
def test_unseen_avatars_of_every_kind_are_familiar(shipped: Predictor, group: str) -> None:
    person = identity(SPLITS["test"].start + 3)
    far = distances(shipped, [draw(person, scene) for scene in scenes(group)])
    assert float(far.max()) < 1, far


def strange(kind: str) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    if kind == "noise":
        return [Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))]
    if kind == "blank":
        return [Image.new("RGB", (128, 128), colour) for colour in ("black", "white", "gray", "peru", "navy")]
    cup = Image.new("RGB", (128, 128), "white")
    pen = ImageDraw.Draw(cup)
    pen.rectangle((30, 40, 90, 110), fill="firebrick")
    pen.ellipse((80, 55, 115, 95), outline="firebrick", width=8)
    return [cup]


@pytest.mark.parametrize("kind", ["noise", "blank", "cup"])
def test_what_is_no_avatar_is_strange(shipped: Predictor, kind: str) -> None:
    assert float(distances(shipped, strange(kind)).min()) > 1.3


@pytest.mark.skipif(not SHARED.is_dir(), reason="the portraits of ../shared are not here")
def test_photographs_are_further_than_avatars(shipped: Predictor) -> None:
    files = sorted((SHARED / "photos").glob("*.jpg"))
    photographs = distances(shipped, [Image.open(file).convert("RGB") for file in files])
    avatars = distances(shipped, [photo(SPLITS["test"].start + k, n)[0] for k in range(12) for n in (0, 1)])
    assert float((photographs[:, None] > avatars[None]).float().mean()) > 0.99
    assert float((photographs > 1).float().mean()) > 0.8
