"""Latents are computed once for a content, a base and a size, whoever asks."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from hyperdreambooth.faces.align import open_photo, to_pixels
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.latents import cached_latents
from hyperdreambooth.runs import InputError, draw


class Encoder:
    """Stands for the base's: counts what it is given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches.append(len(pixels))
        return torch.nn.functional.avg_pool2d(pixels, 8)


def make(folder: Path, count: int, name: str = "p") -> list[Photo]:
    folder.mkdir(exist_ok=True)
    photos: list[Photo] = []
    for index in range(count):
        noise = torch.randint(0, 256, (40, 40, 3), generator=draw(name, index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{name}{index}.png")
        photos.append(Photo(folder / f"{name}{index}.png", "ana", None))
    return photos


def naive(photos: list[Photo], size: int) -> Tensor:
    return torch.stack([Encoder()(to_pixels(open_photo(photo.path), size)[None])[0] for photo in photos])


@pytest.fixture
def photos(tmp_path: Path) -> list[Photo]:
    return make(tmp_path / "photos", 7)


def test_equal_to_one_by_one_and_cached(tmp_path: Path, photos: list[Photo]) -> None:
    encode = Encoder()
    first = cached_latents(photos, 32, encode, tmp_path / "cache", "key", batch=3)
    assert encode.batches == [3, 3, 1] and first.shape == (7, 3, 4, 4)
    assert torch.equal(first, naive(photos, 32))
    again = cached_latents(photos[::-1], 32, encode, tmp_path / "cache", "key")
    assert encode.batches == [3, 3, 1] and torch.equal(again, first.flip(0))


def test_key_size_and_content_decide(tmp_path: Path, photos: list[Photo]) -> None:
    encode = Encoder()
    cached_latents(photos, 32, encode, tmp_path / "cache", "key")
    cached_latents(photos, 32, encode, tmp_path / "cache", "another")
    cached_latents(photos, 16, encode, tmp_path / "cache", "key")
    assert encode.batches == [7, 7, 7]
    photos[0].path.rename(photos[0].path.with_name("moved.png"))
    moved = Photo(photos[0].path.with_name("moved.png"), "bob", "words")
    cached_latents([moved], 32, encode, tmp_path / "cache", "key")
    assert encode.batches == [7, 7, 7]
    changed = make(tmp_path / "photos", 2, "q")
    changed[0].path.replace(photos[1].path)  # the same name, another picture
    latents = cached_latents(photos[1:], 32, encode, tmp_path / "cache", "key")
    assert encode.batches == [7, 7, 7, 1] and torch.equal(latents, naive(photos[1:], 32))


def test_the_same_picture_twice_is_encoded_once(tmp_path: Path, photos: list[Photo]) -> None:
    encode = Encoder()
    latents = cached_latents([photos[0], photos[1], photos[0]], 32, encode, tmp_path / "cache", "key")
    assert encode.batches == [2] and torch.equal(latents[0], latents[2])


def test_broken_shards_are_made_again(tmp_path: Path, photos: list[Photo]) -> None:
    encode = Encoder()
    first = cached_latents(photos, 32, encode, tmp_path / "cache", "key", batch=4)
    shards = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(shards) == 2
    shards[0].write_bytes(shards[0].read_bytes()[:-5])
    shards[1].write_bytes(b"")
    (shards[0].parent / ".x.tmp.safetensors").write_bytes(b"half")
    assert torch.equal(cached_latents(photos, 32, encode, tmp_path / "cache", "key"), first)
    assert sum(encode.batches) == 14


def test_a_broken_photo_is_named_and_the_rest_is_kept(tmp_path: Path, photos: list[Photo]) -> None:
    photos[5].path.write_bytes(photos[5].path.read_bytes()[:200])
    encode = Encoder()
    with pytest.raises(InputError, match=r"p5\.png"):
        cached_latents(photos, 32, encode, tmp_path / "cache", "key", batch=2)
    good = [photo for photo in photos if photo is not photos[5]]
    assert torch.equal(cached_latents(good, 32, encode, tmp_path / "cache", "key", batch=2), naive(good, 32))
    assert encode.batches == [2, 2, 2]


def test_nan_is_refused_and_not_kept(tmp_path: Path, photos: list[Photo]) -> None:
    def encode(pixels: Tensor) -> Tensor:
        latents = Encoder()(pixels)
        latents[2] = float("nan")
        return latents

    with pytest.raises(InputError, match=r"p2\.png: the base's encoder gives NaN"):
        cached_latents(photos, 32, encode, tmp_path / "cache", "key")
    assert not list((tmp_path / "cache").rglob("*"))


def test_no_photo(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no photo"):
        cached_latents([], 32, Encoder(), tmp_path / "cache", "key")


def test_half_precision_stays(tmp_path: Path, photos: list[Photo]) -> None:
    for _ in range(2):
        latents = cached_latents(photos, 32, lambda x: Encoder()(x).bfloat16(), tmp_path / "cache", "key")
        assert latents.dtype == torch.bfloat16 and not latents.requires_grad


def fill(folder: Path, start: int) -> None:
    photos = [Photo(path, "ana", None) for path in sorted((folder / "photos").iterdir())]
    photos = photos[start:] + photos[:start]
    assert torch.equal(
        cached_latents(photos, 32, Encoder(), folder / "cache", "key", batch=1), naive(photos, 32)
    )


@pytest.mark.slow
def test_two_processes_may_fill_one_cache(tmp_path: Path, photos: list[Photo]) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=fill, args=(tmp_path, start)) for start in (0, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    encode = Encoder()
    assert torch.equal(cached_latents(photos, 32, encode, tmp_path / "cache", "key"), naive(photos, 32))
    assert encode.batches == []
