"""Folders, shards and data sets become the same stream; writers of other projects are the oracles."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import portrait
import pytest
from PIL import Image

from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.sources import Item, read_items, safe_name
from hyperdreambooth.runs import InputError

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


def told(found: list[Item]) -> list[tuple[str, str | None]]:
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
    assert told(found) == [("ana/1.v2", "sad"), ("ana/2", "smiling"), ("bob/1", None)]
    assert [item.landmarks for item in found] == [portrait.LANDMARKS, None, portrait.LANDMARKS]
    assert found[0].content == tmp_path / "ana" / "1.v2.png"
    (alone,) = items(tmp_path / "ana" / "2.png")
    assert (alone.name, alone.caption) == ("2", "smiling")


def test_landmarks_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "1.png").touch()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "landmarks": [1, 2]}\n')
    with pytest.raises(InputError, match=r"metadata\.jsonl: line 1: expected .*landmarks"):
        items(tmp_path)


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
    assert told(found) == [("ana/1", "a face, smiling"), ("ana/2", "sad"), ("bob/x1", None), ("7/x2", None)]
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
    with pytest.raises(InputError, match=r"j\.tar:1: expected UTF-8 text and a JSON object"):
        items(shard(tmp_path / "j.tar", **{"1_png": content(1), "1_json": b"[1]"}))


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
        assert told(found) == [("bob/train-00000000", "sad"), ("ana/train-00000001", None)]
        opened = [Image.open(io.BytesIO(item.content)) for item in found if isinstance(item.content, bytes)]
        assert [image.getpixel((0, 0)) for image in opened] == [(1, 0, 0), (2, 0, 0)]
    assert [item.name for item in items(tmp_path / "splits")][2:] == [
        "bob/test-00000000",
        "ana/test-00000001",
    ]
    chosen = items(tmp_path / "saved", identity_column="who", caption_column="who")
    assert told(chosen) == [("x/train-00000000", "x"), ("y/train-00000001", "y")]
    alone = datasets.Dataset.from_dict(
        {"picture": [picture(1)]}, features=datasets.Features(picture=kinds["image"])
    )
    alone.save_to_disk(str(tmp_path / "flat"))
    assert told(items(tmp_path / "flat")) == [("data-00000000", None)]


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
    assert told(items("hf:some/faces")) == found and asked == [("some/faces", "train", True)]
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
