"""Folders, shards and data sets become the same stream; writers of other projects are the oracles."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import portrait
from hyperdreambooth.faces import sources
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.sources import Item, read_items, safe_name
from hyperdreambooth.files import InputError

CONFIG = PrepareConfig()
FLAT = [number for point in portrait.LANDMARKS for number in point]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (40, 40), (shade, 0, 0))


def content(shade: int) -> bytes:
    buffer = io.BytesIO()
    picture(shade).save(buffer, "PNG")
    return buffer.getvalue()


def items(source: object, **fields: Any) -> list[Item]:
    return list(read_items(str(source), PrepareConfig(**fields)))


def labels(found: list[Item]) -> list[tuple[str, str | None]]:
    return [(item.name, item.caption) for item in found]


def test_a_folder_of_people_with_captions_and_landmarks(tmp_path: Path) -> None:
    for name in ("bob/1.png", "ana/1.v2.png", "ana/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content(1))
    (tmp_path / "ana" / "2.txt").write_text("smiling")
    lines = [{"file_name": "ana/1.v2.png", "text": "sad", "landmarks": portrait.LANDMARKS}]
    lines += [{"file_name": "bob/1.png", "landmarks": FLAT}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = items(tmp_path)
    assert labels(found) == [("ana/1.v2", "sad"), ("ana/2", "smiling"), ("bob/1", None)]
    assert [item.landmarks for item in found] == [portrait.LANDMARKS, None, portrait.LANDMARKS]
    assert found[0].content == tmp_path / "ana" / "1.v2.png"
    (alone,) = items(tmp_path / "ana" / "2.png")
    assert (alone.name, alone.caption) == ("2", "smiling")


def test_landmarks_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "1.png").touch()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "landmarks": [1, 2]}\n')
    (item,) = items(tmp_path)
    assert item.refused.startswith("metadata.jsonl: line 1: expected five [x, y] landmarks")


def test_shards_of_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a-000.tar")) as shard:
        shard.write({"__key__": "ana/1", "png": content(1), "txt": " a face,\n smiling"})
        shard.write({"__key__": "ana/2", "png": content(2), "json": {"caption": "sad", "landmarks": FLAT}})
    with webdataset.TarWriter(str(tmp_path / "a-001.tar")) as shard:
        shard.write({"__key__": "x1", "jpg": picture(3), "json": {"identity": "bob", "who": "eve"}})
        shard.write({"__key__": "x2", "png": content(4), "cls": 7})
        shard.write({"__key__": "x3", "txt": "no picture"})
    found = items(tmp_path)
    assert labels(found) == [
        ("ana/a-000-1", "a face, smiling"), ("ana/a-000-2", "sad"), ("bob/a-001-x1", None),
        ("7/a-001-x2", None),
    ]  # fmt: skip
    assert found[1].content == content(2) and found[1].landmarks == portrait.LANDMARKS
    assert found[0].origin == f"{tmp_path / 'a-000.tar'}:ana/1"
    assert items(tmp_path / "a-001.tar", identity_column="who")[0].name == "eve/x1"


def shard(file: Path, **members: bytes) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("__", "/").replace("_", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def test_hostile_shards(tmp_path: Path) -> None:
    """Paths that lead out name no file outside, links and pickles are not read, torn files are one line."""
    (item,) = items(
        shard(tmp_path / "a.tar", **{"..__..__etc__x_png": content(1), "..__..__etc__x_pkl": b"cos\n"})
    )
    assert ".." not in item.name and item.name.count("/") == 1 and item.name.endswith("/x")
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        link = tarfile.TarInfo("ana/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert items(tmp_path / "link.tar") == []
    whole = shard(tmp_path / "b.tar", ana__1_png=content(1), ana__2_png=bytes(3000)).read_bytes()
    (tmp_path / "torn.tar").write_bytes(whole[:2000])
    (tmp_path / "no.tar").write_bytes(b"no tar" * 200)
    for name in ("torn.tar", "no.tar", "none.tar"):
        with pytest.raises(InputError, match=rf"{name}: not a whole tar file"):
            items(tmp_path / name)


def test_one_bad_sample_costs_no_other(tmp_path: Path) -> None:
    bad = [b"[1]", b"not json", b"\xff", b'{"text": "\\ud800"}', b'{"landmarks": [3]}', b"[" * 100_000]
    bad += [b'{"landmarks": [1, 2, 3, 4, 5, 6, 7, 8, 9, 1%s]}' % (b"0" * 400)]
    members = {
        f"{k}_{ending}": data
        for k, text in enumerate(bad)
        for ending, data in (("png", content(1)), ("json", text))
    }
    *refused, good = items(shard(tmp_path / "j.tar", **members, ok_png=content(2)))
    assert [item.origin for item in refused] == [f"{tmp_path / 'j.tar'}:{k}" for k in range(len(bad))]
    assert all(item.refused.startswith("expected text and a JSON object") for item in refused)
    assert (good.name, good.refused, good.content) == ("ok", "", content(2))


def test_several_shards_that_count_from_the_same_number(tmp_path: Path) -> None:
    for name in ("000", "001"):
        shard(
            tmp_path / f"{name}.tar",
            **{"0_png": content(1), "0_cls": b"3\n", "1_png": content(2), "1_cls": b"3"},
        )
    names = [item.name for item in items(tmp_path)]
    assert names == ["3/000-0", "3/000-1", "3/001-0", "3/001-1"]
    assert [item.name for item in items(tmp_path / "000.tar")] == ["3/0", "3/1"]
    (tmp_path / "._000.tar").write_bytes(b"what a Mac leaves on a foreign disk")
    assert [item.name for item in items(tmp_path)] == names


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A folder's photo keeps its name and so is refused; a shard's gets one of ours."""
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "photos" / "ana").mkdir(parents=True)
    try:
        (tmp_path / "photos" / "ana" / f"{name}.png").write_bytes(content(1))
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    (tmp_path / "photos" / "ana" / "b.png").write_bytes(content(2))
    good, bad = items(tmp_path / "photos")
    assert (good.name, good.refused) == ("ana/b", "") and "not UTF-8; rename it" in bad.refused
    (packed,) = items(shard(tmp_path / f"{name}.tar", **{f"{name}_png": content(1)}))
    assert not packed.refused and packed.content == content(1)
    for text in (bad.name, bad.origin, packed.name, packed.origin):
        text.encode()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_fuzzed_shards_are_read_or_refused(tmp_path: Path, mode: str) -> None:
    buffer, rng = io.BytesIO(), random.Random(0)
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in (("ü" * 60 + ".png", bytes(700)), ("ü" * 60 + ".json", b'{"identity": "a"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for _ in range(150):
        broken = bytearray(buffer.getvalue())
        for _ in range(3):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        (tmp_path / "x.tar").write_bytes(broken)
        with suppress(InputError):
            for item in items(tmp_path / "x.tar"):
                f"{item.name} {item.origin} {item.refused}".encode()


def test_a_sparse_photo_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST", 1000)
    (item,) = items(shard(tmp_path / "x.tar", **{"1_png": bytes(5000)}))
    assert item.content == bytes(1000)


def test_a_zip_of_photos_that_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As image folders of the hub come: rows with addresses within the zip. One photo has rotted there."""
    datasets = pytest.importorskip("datasets")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for k in range(3):
            file.writestr(f"{k}.png", content(k))
    whole = (tmp_path / "photos.zip").read_bytes()
    at = whole.index(content(1)) + 50
    (tmp_path / "photos.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    real = datasets.load_dataset

    def load(name: str, split: str, streaming: bool) -> Any:
        return real("imagefolder", data_files=str(tmp_path / name), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = items("hf:photos.zip")
    assert [item.content for item in found] == [content(0), b"", content(2)]
    assert "cannot read the photo (Bad CRC-32" in found[1].refused
    (tmp_path / "photos.zip").unlink()


def test_rows_that_are_no_use_cost_no_other(tmp_path: Path) -> None:
    """Also: a folder's name may look like a pattern."""
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["ana"]),
        landmarks=datasets.Sequence(datasets.Value("float32")),
    )
    rows = {"image": [picture(k) for k in range(3)], "label": [0, -1, 0], "landmarks": [None, None, [1.0]]}
    (tmp_path / "set[1]").mkdir()
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(str(tmp_path / "set[1]" / "0.parquet"))
    good, *refused = items(tmp_path / "set[1]")
    assert good.name == "ana/train-00000000" and not good.refused
    assert "-1" in refused[0].refused and "five [x, y] landmarks" in refused[1].refused


def test_a_parquet_file_that_is_broken_inside(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(
        {"image": [picture(1)]}, features=datasets.Features(image=datasets.Image())
    )
    made.to_parquet(str(tmp_path / "0.parquet"))
    raw = (tmp_path / "0.parquet").read_bytes()
    (tmp_path / "0.parquet").write_bytes(raw[:4] + b"\x0f" * 36 + raw[40:])
    with pytest.raises(OSError, match=r"the stream broke off \(.*\); get its files again"):
        items(tmp_path)


def test_data_sets_of_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [picture(1), picture(2)], "label": [1, 0], "text": ["sad", ""], "who": ["x", "y"]}
    kinds = {
        "image": datasets.Image(), "label": datasets.ClassLabel(names=["ana", "bob"]),
        "text": datasets.Value("string"), "who": datasets.Value("string"),
    }  # fmt: skip
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds), split="train")
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    made.to_parquet(str(tmp_path / "parquet" / "data" / "0.parquet"))
    for name in ("saved", "parquet"):
        found = items(tmp_path / name)
        assert labels(found) == [("bob/train-00000000", "sad"), ("ana/train-00000001", None)]
        opened = [Image.open(io.BytesIO(item.content)) for item in found if isinstance(item.content, bytes)]
        assert [image.getpixel((0, 0)) for image in opened] == [(1, 0, 0), (2, 0, 0)]
    assert [item.name for item in items(tmp_path / "splits")][2:] == [
        "bob/test-00000000",
        "ana/test-00000001",
    ]
    chosen = items(tmp_path / "saved", identity_column="who", caption_column="who")
    assert labels(chosen) == [("x/train-00000000", "x"), ("y/train-00000001", "y")]
    alone = datasets.Dataset.from_dict(
        {"picture": [picture(1)]}, features=datasets.Features(picture=kinds["image"])
    )
    alone.save_to_disk(str(tmp_path / "flat"))
    assert labels(items(tmp_path / "flat")) == [("data-00000000", None)]


def test_a_stream_of_the_hub_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def rows(breaks: bool) -> Iterator[dict[str, Any]]:
        for shade in range(3):
            yield {"image": picture(shade), "person": f"p{shade}", "caption": "words"}
        if breaks:
            raise RuntimeError("connection reset\nby peer")

    kinds = datasets.Features(
        image=datasets.Image(), person=datasets.Value("string"), caption=datasets.Value("string")
    )
    asked: list[tuple[Any, ...]] = []

    def load(name: str, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        words = {"breaks": split == "test"}
        return datasets.IterableDataset.from_generator(rows, features=kinds, gen_kwargs=words)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = [(f"p{k}/train-0000000{k}", "words") for k in range(3)]
    assert labels(items("hf:some/faces")) == found and asked == [("some/faces", "train", True)]
    stream = iter(read_items("hf:some/faces:test", CONFIG))
    assert [next(stream).name for _ in range(3)] == [f"p{k}/test-0000000{k}" for k in range(3)]
    with pytest.raises(OSError, match=r"hf:some/faces:test: the stream broke off \(connection reset\)"):
        next(stream)


def test_what_is_no_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(str(tmp_path / "numbers"))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "0.parquet").write_bytes(b"PAR1")
    for source, words, fields in (
        (tmp_path / "numbers", "expected a column of images, found a", {}),
        (tmp_path / "torn", "cannot be read as a data set", {}),
        ("hf:", "hf:: the name of the data set is missing; expected hf:NAME", {}),
        ("hf::train", "hf::train: the name of the data set is missing", {}),
        ("hf:nobody/nothing", r"hf:nobody/nothing: cannot be loaded .*expected hf:NAME", {}),
        (tmp_path / "none", "no such photo", {}),
    ):
        with pytest.raises(InputError, match=words) as caught:
            items(source, **fields)
        assert "\n" not in str(caught.value)


def test_names_for_every_file_system() -> None:
    assert safe_name("ana_1-x") == "ana_1-x" and safe_name("Çağla") == "Çağla"
    names = ["a/b", "a_b", "a b", "CON", "", "..", "a:b", "x" * 300, "x" * 301]
    safe = [safe_name(name) for name in names]
    assert len(set(safe)) == len(names)
    assert all(0 < len(name) < 100 and not set(name) & set('/\\:*?"<>|. ') for name in safe)


def test_a_fingerprint_is_of_all_that_the_crop_depends_on(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(content(1))
    base = Item("a", "x", content(1), "words")
    same = [Item("b", "y", tmp_path / "1.png", "words"), Item("a", "x", content(1), "words", None)]
    other = [Item("a", "x", content(2), "words"), Item("a", "x", content(1), None)]
    other += [Item("a", "x", content(1), "words", portrait.LANDMARKS)]
    assert {item.fingerprint() for item in same} == {base.fingerprint()}
    assert len({item.fingerprint() for item in [base, *other]}) == 4
