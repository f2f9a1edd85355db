"""Folders to people: natural rules, and one line for everything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hyperdreambooth.faces.dataset import Photo, photo_hash, read_faces, read_person
from hyperdreambooth.files import InputError


def touch(folder: Path, *names: str) -> None:
    """Empty files: nothing here may open a picture."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_one_identity_a_subfolder(tmp_path: Path) -> None:
    touch(
        tmp_path, "bob/2.PNG", "bob/10.jpg", "ana/a.webp", "ana/notes.md", "ana/deep/x.jpg", "empty/none.txt"
    )
    touch(tmp_path, ".git/a.jpg", "ana/.hidden.jpg", "ana/._a.jpg", "README.md")
    faces = read_faces(tmp_path)
    assert list(faces) == ["ana", "bob"]
    assert faces["ana"] == (Photo(tmp_path / "ana" / "a.webp", "ana", None),)
    assert [photo.path.name for photo in faces["bob"]] == ["10.jpg", "2.PNG"]


def test_a_flat_folder_is_one_identity_a_photo(tmp_path: Path) -> None:
    touch(tmp_path, "000002.jpg", "000001.jpg", "notes/readme.txt")
    faces = read_faces(tmp_path)
    assert list(faces) == ["000001", "000002"]
    assert faces["000002"] == (Photo(tmp_path / "000002.jpg", "000002", None),)


def test_the_same_stem_is_the_same_person(tmp_path: Path) -> None:
    touch(tmp_path, "ana.jpg", "ana.png")
    assert [photo.path.name for photo in read_faces(tmp_path)["ana"]] == ["ana.jpg", "ana.png"]


@pytest.mark.parametrize(
    "suffix",
    ["png", "jpg", "jpeg", "JPEG", "jpe", "jfif", "webp", "bmp", "tif", "tiff", "gif", "heic", "HIF", "avif"],
)
def test_every_extension(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, f"a.{suffix}")
    assert list(read_faces(tmp_path)) == ["a"]


def test_a_phones_photo_is_passed_over_only_where_its_conversion_lies_beside_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.HEIC", "a.jpg", "b.heic", "c.avif")
    found = {name: [photo.path.name for photo in photos] for name, photos in read_faces(tmp_path).items()}
    assert found == {"a": ["a.jpg"], "b": ["b.heic"], "c": ["c.avif"]}


def test_a_persons_name_can_be_written_down(tmp_path: Path) -> None:
    try:
        touch(tmp_path, os.fsdecode(b"Ren\xe9/1.png"))
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    assert list(read_faces(tmp_path)) == ["Ren\\udce9"]
    assert read_person([tmp_path / os.fsdecode(b"Ren\xe9")])[0].identity == "Ren\\udce9"


def test_captions(tmp_path: Path) -> None:
    touch(tmp_path, "ana/1.jpg", "ana/2.jpg", "ana/3.jpg", "ana/4.jpg", "ana/5.jpg")
    (tmp_path / "ana" / "1.txt").write_text("  a [V] face,\n smiling \n", encoding="utf-8")
    (tmp_path / "ana" / "5.txt").write_text("\ufeffwith a mark", encoding="utf-8")
    lines = ['{"file_name": "1.jpg", "text": "beaten"}', '{"file_name": "2.jpg", "text": "of its\\nown"}', ""]
    (tmp_path / "ana" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    lines = ['{"file_name": "ana/3.jpg", "text": "ü"}', '{"file_name": "ana/4.jpg"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"metadata\.jsonl: line 1: 1\.jpg has another caption entry"):
        captions = [photo.caption for photo in read_faces(tmp_path)["ana"]]
    assert captions == ["a [V] face, smiling", "of its own", "ü", None, "with a mark"]


def test_bad_folders(tmp_path: Path) -> None:
    touch(tmp_path, "file.jpg", "none/a.txt", "mixed/ana/1.jpg", "mixed/2.jpg", "nested/all/ana/1.jpg")
    for name, words in {
        "missing": "no such photo or folder",
        "file.jpg": "expected a folder of photos, found a file",
        "none": "no photo found; expected none/PERSON",
        "nested": "no photo found",
        "mixed": "photos lie beside people's folders; move 2.jpg",
    }.items():
        with pytest.raises(InputError, match=words) as caught:
            read_faces(tmp_path / name)
        assert name in str(caught.value)


def test_links_that_lead_back_are_harmless(tmp_path: Path) -> None:
    touch(tmp_path, "ana/1.jpg")
    os.symlink(tmp_path, tmp_path / "self")
    os.symlink(tmp_path / "ana", tmp_path / "ana" / "loop")
    os.symlink(tmp_path / "b.jpg", tmp_path / "a.jpg")
    os.symlink(tmp_path / "a.jpg", tmp_path / "b.jpg")
    os.symlink("nowhere.jpg", tmp_path / "ana" / "gone.jpg")
    assert [photo.path.name for photo in read_faces(tmp_path)["ana"]] == ["1.jpg"]


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="cannot read the folder"):
        read_faces(tmp_path)


def test_one_person(tmp_path: Path) -> None:
    touch(tmp_path, "ana/2.jpg", "ana/1.jpg", "other/x.heif")
    (tmp_path / "ana" / "2.txt").write_text("words")
    folder, two = tmp_path / "ana", tmp_path / "ana" / "2.jpg"
    photos = read_person([two, folder, two, tmp_path / "other" / "x.heif"])
    assert [photo.path.name for photo in photos] == ["2.jpg", "1.jpg", "x.heif"]
    assert {photo.identity for photo in photos} == {"2"} and photos[0].caption == "words"
    assert {photo.identity for photo in read_person([folder])} == {"ana"}


def test_no_person(tmp_path: Path) -> None:
    touch(tmp_path, "people/ana/1.jpg")
    for given, words in {
        (): "no photo given",
        ("people",): "no photo found",
        ("gone.jpg",): "no such photo",
    }.items():
        with pytest.raises(InputError, match=words):
            read_person([tmp_path / name for name in given])


def test_a_hash_is_of_the_content(tmp_path: Path) -> None:
    for name, content in {"a": b"1", "b": b"1", "c": b"2"}.items():
        (tmp_path / name).write_bytes(content)
    assert photo_hash(tmp_path / "a") == photo_hash(tmp_path / "b") != photo_hash(tmp_path / "c")
    assert len(photo_hash(tmp_path / "a")) == 32
    with pytest.raises(InputError, match="cannot read the photo"):
        photo_hash(tmp_path / "d")
