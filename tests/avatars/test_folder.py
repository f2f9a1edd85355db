"""Rendered photo folders: ordinary, the same every time, whole after any interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyperdreambooth.avatars.draw.people import CHOICES, SPLITS
from hyperdreambooth.avatars.folder import photo, render_folder
from hyperdreambooth.faces.dataset import read_faces
from hyperdreambooth.files import InputError


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_an_ordinary_photo_folder(tmp_path: Path) -> None:
    names = render_folder(tmp_path, "val", 2, 3, workers=1)
    people = read_faces(tmp_path)
    assert list(people) == names == ["val-2000000", "val-2000001"]
    assert all(len(photos) == 3 and "[V] face" in str(photos[0].caption) for photos in people.values())
    traits = json.loads((tmp_path / "traits.json").read_text())
    assert traits["identities"]["val-2000000"]["seed"] == SPLITS["val"].start


def test_the_first_photo_wears_nothing() -> None:
    worn = [
        phrase
        for group in ("headwear", "eyewear", "neckwear")
        for phrase in CHOICES[group]
        if phrase != "none"
    ]
    for person in SPLITS["test"][:20]:
        assert "wearing" not in photo(person, 0)[1], worn


def test_running_again_adds_only_what_is_missing(tmp_path: Path) -> None:
    render_folder(tmp_path / "a", "train", 3, 2, workers=1)
    whole = contents(tmp_path / "a")
    (tmp_path / "a" / "train-1000001" / "1.txt").unlink()
    kept = tmp_path / "a" / "train-1000002" / "0.png"
    before = kept.stat().st_mtime_ns
    render_folder(tmp_path / "a", "train", 3, 2, workers=1)
    assert contents(tmp_path / "a") == whole and kept.stat().st_mtime_ns == before


def test_processes_make_the_same_files(tmp_path: Path) -> None:
    render_folder(tmp_path / "one", "train", 16, 1, workers=1)
    render_folder(tmp_path / "two", "train", 16, 1, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    for split, identities, photos, seed in (
        ("bad", 1, 1, 0),
        ("val", 0, 1, 0),
        ("val", 1, 1001, 0),
        ("val", 1, 1, -1),
    ):
        with pytest.raises(InputError):
            render_folder(tmp_path, split, identities, photos, seed)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="pass another --out"):
        render_folder(tmp_path / "file" / "faces", "val", 1, 1)
    render_folder(tmp_path, "val", 1, 1, workers=1)
    with pytest.raises(InputError, match="seed 0"):
        render_folder(tmp_path, "val", 1, 1, seed=1)
