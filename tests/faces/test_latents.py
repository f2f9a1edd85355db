"""Latents are computed once for a content, a base and a size, whoever asks."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

import processes
from hyperdreambooth import cache
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.image import open_photo, to_pixels
from hyperdreambooth.faces.latents import cached_photos, encoder_key
from hyperdreambooth.files import InputError, load_tensors
from hyperdreambooth.runs import rng


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
        noise = torch.randint(0, 256, (40, 40, 3), generator=rng(name, index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{name}{index}.png")
        photos.append(Photo(folder / f"{name}{index}.png", "ana", None))
    return photos


def naive(photos: list[Photo], size: int) -> Tensor:
    return torch.stack([Encoder()(to_pixels(open_photo(photo.path), size)[None])[0] for photo in photos])


def cached_latents(
    photos: list[Photo], size: int, encode: Callable[[Tensor], Tensor], cache: Path, key: str, batch: int = 32
) -> Tensor:
    return cached_photos(photos, size, lambda pixels: {"latents": encode(pixels)}, cache, key, batch)[
        "latents"
    ]


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
    for some in (photos[:4], photos[4:]):
        cached_latents(some, 32, encode, tmp_path / "cache", "key", batch=4)
    shards = files(tmp_path)
    assert len(shards) == 2
    shards[0].write_bytes(shards[0].read_bytes()[:-5])
    shards[1].write_bytes(b"")
    (shards[0].parent / ".x.tmp.safetensors").write_bytes(b"half")
    for _ in range(2):
        got = cached_latents(photos, 32, encode, tmp_path / "cache", "key", batch=4)
        assert torch.equal(got, naive(photos, 32)) and sum(encode.batches) == 14
    for shard in files(tmp_path):
        shard.write_bytes(shard.read_bytes()[:200])
    assert torch.equal(cached_latents(photos, 32, encode, tmp_path / "cache", "key"), naive(photos, 32))


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").rglob("[!.]*.safetensors"))


def test_many_batches_become_one_shard_that_is_mapped_into_memory(
    tmp_path: Path, photos: list[Photo]
) -> None:
    """Eight processes of a training share one copy then; writing into it changes nobody's."""
    encode = Encoder()
    cached_latents(photos[2:4], 32, encode, tmp_path / "cache", "key")
    first = cached_latents(photos, 32, encode, tmp_path / "cache", "key", batch=2)
    (shard,) = files(tmp_path)
    again = cached_latents(photos, 32, encode, tmp_path / "cache", "key", batch=2)
    assert sum(encode.batches) == 7 and torch.equal(again, naive(photos, 32))
    maps = Path("/proc/self/maps")
    assert not maps.exists() or shard.name in maps.read_text()
    first.zero_()
    assert torch.equal(cached_latents(photos, 32, encode, tmp_path / "cache", "key"), naive(photos, 32))
    some = cached_latents(photos[5:0:-2], 32, encode, tmp_path / "cache", "key")
    assert torch.equal(some, naive(photos[5:0:-2], 32)) and sum(encode.batches) == 7


def test_latents_of_another_encoder_are_another_key() -> None:
    """The base's own fingerprint says nothing of its VAE."""

    class Vae(torch.nn.Linear):
        config: ClassVar[dict[str, object]] = {"scaling_factor": 0.18, "_name_or_path": "here"}

    torch.manual_seed(0)
    vae = Vae(3, 3)
    key = encoder_key("base", vae)
    assert key.startswith("base-") and key != encoder_key("other", vae)
    vae.config["_name_or_path"] = "there"  # pyright: ignore
    assert encoder_key("base", vae) == key
    vae.config["scaling_factor"] = 0.2
    assert encoder_key("base", vae) != key
    vae.config["scaling_factor"] = 0.18
    keys = {key, encoder_key("base", Vae(3, 3)), encoder_key("base", vae.half())}
    vae.float().bias.data[0] += 1
    assert len({*keys, encoder_key("base", vae)}) == 4


def test_latents_outlive_another_decoder_and_drawn_pictures_do_not() -> None:
    parts = ("encoder", "quant_conv", "decoder", "post_quant_conv")
    vae = torch.nn.ModuleDict({part: torch.nn.Linear(2, 2) for part in parts})
    latents, drawn = encoder_key("base", vae), encoder_key("base", vae, decodes=True)
    for part in parts:
        next(vae[part].parameters()).data.fill_(1.0)
        assert (encoder_key("base", vae) == latents) == (part in ("decoder", "post_quant_conv")), part
        assert encoder_key("base", vae, decodes=True) != drawn
        latents, drawn = encoder_key("base", vae), encoder_key("base", vae, decodes=True)


def killed_at(number: int, folder: Path) -> None:
    """Fills the cache and dies by -9 before the disk is changed for the n-th time: a rename or a removal."""
    cache.BATCHES, count = 1, 0

    def counting(real: Callable[..., None]) -> Callable[..., None]:
        def instead(*words: Any, **names: Any) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*words, **names)

        return instead

    os.replace, os.unlink = counting(os.replace), counting(os.unlink)
    fill(folder, 0)


@processes.CHEAP
def test_killed_at_any_moment_the_cache_is_whole(tmp_path: Path, photos: list[Photo]) -> None:
    kills = 0
    for number in range(1, 60):
        process = processes.start(killed_at, number, tmp_path)
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
        for shard in files(tmp_path):
            load_tensors(shard)
        encode = Encoder()
        got = cached_latents(photos[1:3], 32, encode, tmp_path / "cache", "key")
        assert torch.equal(got, naive(photos[1:3], 32))
        shutil.rmtree(tmp_path / "cache")
    assert kills >= 15  # 7 shards of a batch each, the one shard, 7 removals


@processes.CHEAP
def test_four_processes_fill_one_cache_at_once(tmp_path: Path, photos: list[Photo]) -> None:
    for _ in range(5):
        workers = [processes.start(fill, tmp_path, start) for start in (0, 3, 3, 5)]
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0] * 4
        encode = Encoder()
        got = cached_latents(photos, 32, encode, tmp_path / "cache", "key")
        assert torch.equal(got, naive(photos, 32)) and encode.batches == []
        assert {len(load_tensors(file)[0]["latents"]) for file in files(tmp_path)} == {7}
        shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize("content", ["whole", "torn", "none"])
def test_a_shard_that_windows_does_not_replace(
    tmp_path: Path, photos: list[Photo], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """Another process has made it meanwhile, and mapped it: that is fine if it is whole, and only then."""

    def replace(source: Path, target: Path) -> None:
        if content != "none":
            target.write_bytes(source.read_bytes()[: None if content == "whole" else 200])
        raise PermissionError(13, "Access is denied", str(target))

    monkeypatch.setattr(os, "replace", replace)
    if content == "whole":
        assert torch.equal(
            cached_latents(photos, 32, Encoder(), tmp_path / "cache", "key", batch=3), naive(photos, 32)
        )
        return
    with pytest.raises(PermissionError):
        cached_latents(photos, 32, Encoder(), tmp_path / "cache", "key", batch=3)


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
