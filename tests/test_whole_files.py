"""Files and folders appear whole or not at all; tensors come back, broken ones are one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperdreambooth.files import (
    InputError,
    decode_text,
    load_tensors,
    read_json,
    read_text,
    save_tensors,
    whole_file,
    whole_folder,
    write_json,
)
from hyperdreambooth.runs import rng


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_input_error_is_one_line() -> None:
    assert str(InputError("a\n  b\tc ")) == "a b c"


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with whole_file(target) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == target.parent and temporary.suffix == ".txt"
        assert not target.exists()
    assert target.read_text() == "whole"
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), whole_file(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(error), whole_folder(target) as temporary:
        (temporary / "b").write_text("half")
        raise error
    assert names(target) == ["a"] and names(tmp_path) == ["out"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with whole_folder(tmp_path / "out") as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / name).write_text(name)
        assert names(tmp_path / "out" / "deep") == [name] and names(tmp_path) == ["out"]


def test_the_old_folder_comes_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    rename, calls = os.replace, [0]

    def second_fails(source: Path, goal: Path) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, goal)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="No space"), whole_folder(target) as temporary:
        (temporary / "b").write_text("new")
    assert names(target) == ["a"] and names(tmp_path) == ["out"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="expected a folder, found a file"):
        write_json(tmp_path / "file" / "deep" / "a.json", {})
    with pytest.raises(InputError, match="expected a folder to write"), whole_folder(tmp_path / "file"):
        pass
    with pytest.raises(InputError, match="expected a file to write"):
        write_json(tmp_path / "folder", {})
    assert (tmp_path / "file").read_text() == "mine"


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with whole_file(target) as one, whole_file(target) as two:
        one.write_text("one")
        two.write_text("two")
        assert one != two
    assert target.read_text() == "one" and names(tmp_path) == ["a"]


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"é": [1, None, "x"], "path": Path("b")})
    assert read_json(file) == {"é": [1, None, "x"], "path": "b"}
    with pytest.raises(TypeError):
        write_json(file, {"tensor": torch.ones(1)})
    assert names(tmp_path) == ["a.json"]
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.json: expected a JSON file"):
            read_json(file)
    for encoding in ("utf-8-sig", "utf-16", "cp1252"):  # as editors on Windows save it
        file.write_bytes('{"é": 1}'.encode(encoding))
        assert read_json(file) == {"é": 1}
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", ""), ("ü\n".encode(), "ü\n"), (b"\xef\xbb\xbfa\r\nb\rc", "a\nb\nc"),
        ("ü".encode("utf-16"), "ü"),
        (b"\xfe\xff\x00\xfc\x00\r\x00\n", "ü\n"), ("1 €\n".encode("cp1252") + "2 €".encode(), "1 €\n2 €"),
    ],
)  # fmt: skip
def test_text_of_any_editor(tmp_path: Path, content: bytes, wanted: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text(tmp_path / "a.txt") == wanted == decode_text(content)


def test_what_is_no_text_is_one_line(tmp_path: Path) -> None:
    for content in (b"a\0b\0", b"\xff\xfea", b"\x81\x8d"):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.txt: expected a text file"):
            read_text(tmp_path / "a.txt")
        assert decode_text(content, "replace")
    with pytest.raises(InputError, match=r"cannot read the file \(Is a directory\)"):
        read_text(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_text(tmp_path / "b.txt")


TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@given(
    dtype=st.sampled_from(TYPES), shape=st.lists(st.integers(0, 4), max_size=3), seed=st.integers(0, 2**31)
)
def test_tensors_survive(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, shape: list[int], seed: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "one.safetensors"
    tensor = (torch.rand(shape, generator=rng(seed)) * 2).to(dtype)
    save_tensors(file, {"a": tensor, "turned": tensor.transpose(0, -1) if shape else tensor}, {"k": "v"})
    back, metadata = load_tensors(file)
    assert back["a"].dtype == dtype and torch.equal(back["a"], tensor) and metadata == {"k": "v"}


def test_views_and_shared_memory_are_copied(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(whole)
    saved = {"whole": whole, "same": whole, "row": whole[1], "column": whole[:, 1], "parameter": parameter}
    save_tensors(tmp_path / "a.safetensors", saved)
    back, metadata = load_tensors(tmp_path / "a.safetensors")
    assert metadata == {}
    assert all(torch.equal(back[name], tensor) for name, tensor in saved.items())
    assert (tmp_path / "a.safetensors").stat().st_size < 1000  # the row did not bring its matrix


def test_others_may_read_what_was_saved(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "a.safetensors", {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_broken_tensor_files_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_tensors(file, {"a": torch.ones(100)})
    content = file.read_bytes()
    for broken in (
        b"",
        content[:7],
        content[:50],
        content[:-1],
        b"\x80\x04pickle.",
        b"PK\x03\x04" + bytes(90),
    ):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=r"a\.safetensors: not a whole safetensors file") as caught:
            load_tensors(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        load_tensors(tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="found a folder"):
        load_tensors(tmp_path)


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        (float("nan"), torch.float32),
        (float("-inf"), torch.float32),
        (float("inf"), torch.bfloat16),
        (float("nan"), torch.float8_e4m3fn),
    ],
)
def test_nan_is_refused_by_name(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    file = tmp_path / "a.safetensors"
    save_tensors(file, {"good": torch.ones(2), "bad": torch.tensor([1.0, bad]).to(dtype)})
    with pytest.raises(InputError, match="'bad' holds NaN"):
        load_tensors(file)
    assert load_tensors(file, finite=False)[0]["bad"].dtype == dtype
