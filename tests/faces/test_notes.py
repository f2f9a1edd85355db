"""Captions and landmarks find their photos in any spelling; what is of no use is named, and only that."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import portrait
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.dataset import Album, read_album, read_faces, read_person
from hyperdreambooth.faces.sources import not_used, read_items
from hyperdreambooth.files import InputError

WORDS = "a [V] face"
NFC, NFD = (unicodedata.normalize(form, "Zoë.jpg") for form in ("NFC", "NFD"))


def write(folder: Path, **files: str | bytes) -> Path:
    """Writes files whose names have `__` for a slash and `_` for a dot; photos are empty."""
    for name, content in files.items():
        file = folder / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def entry(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


def captions(album: Album) -> dict[str, str | None]:
    return {photo.path.name: photo.caption for photos in album.people.values() for photo in photos}


def unused(album: Album, folder: Path) -> dict[str, str]:
    return {name.removeprefix(f"{folder}/"): reason for name, reason in album.unused}


def others(album: Album, folder: Path) -> dict[str, str]:
    return {name.removeprefix(f"{folder}/"): reason for name, reason in album.others}


@pytest.mark.parametrize(
    ("named", "stored"),
    [
        ("1.jpg", "1.jpg"), (NFC, NFD), (NFD, NFC), ("b.jpg", "B.JPG"), ("./1.jpg", "1.jpg"),
        (".\\1.jpg", "1.jpg"), ("/home/me/photos/ana/1.jpg", "1.jpg"), ("C:\\photos\\ana\\1.JPG", "1.jpg"),
        ("\\\\server\\ana\\1.jpg", "1.jpg"), ("ß.jpg", "ß.jpg"), ("我 1.jpg", "我 1.jpg"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["jsonl", "csv", "csv;", "above"])
def test_metadata_names_a_photo_in_any_spelling(tmp_path: Path, named: str, stored: str, form: str) -> None:
    home = tmp_path / "ana"
    home.mkdir()
    (home / stored).touch()
    if form == "jsonl":
        write(home, metadata_jsonl=entry(file_name=named, text=WORDS, landmarks=portrait.LANDMARKS))
    elif form == "above":
        inner = named if named[0] in "/\\" or named[1] == ":" else f"ana/{named}"
        inner = inner.replace("/", "\\") if "\\" in named else inner
        write(tmp_path, metadata_jsonl=entry(file_name=inner, text=WORDS, landmarks=portrait.LANDMARKS))
    else:
        mark, points = form[3:] or ",", json.dumps(portrait.LANDMARKS)
        write(
            home, metadata_csv=f'file_name{mark}text{mark}landmarks\n{named}{mark}"{WORDS}"{mark}"{points}"\n'
        )
    (photo,) = read_faces(tmp_path)["ana"]
    assert (photo.caption, photo.landmarks) == (WORDS, portrait.LANDMARKS)
    assert read_person(home) == (photo,) and read_person(photo.path)[0].landmarks == photo.landmarks
    assert [(item.caption, item.landmarks) for item in read_items(str(tmp_path), PrepareConfig())] == [
        (WORDS, portrait.LANDMARKS)
    ]


@pytest.mark.parametrize(
    "name",
    ["1.txt", "1.TXT", "1.jpg.txt", "1.caption", "1.JPG.Caption", "1.jpg.caption"],
)
def test_text_files_beside_a_photo(tmp_path: Path, name: str) -> None:
    write(tmp_path / "ana", **{"1_jpg": "", name.replace(".", "_"): WORDS})
    assert captions(read_album(tmp_path)) == {"1.jpg": WORDS}
    assert read_person(tmp_path / "ana")[0].caption == WORDS
    assert read_person(tmp_path / "ana" / "1.jpg")[0].caption == WORDS


def test_names_that_differ_in_case_alone_keep_their_own_notes(tmp_path: Path) -> None:
    write(tmp_path, a_jpg="", A_jpg="", a_txt="small", A_txt="large")
    if len(list(tmp_path.iterdir())) < 4:
        pytest.skip("the file system does not tell these names apart")
    assert captions(read_album(tmp_path)) == {"a.jpg": "small", "A.jpg": "large"}
    (tmp_path / "A.txt").unlink()
    assert captions(read_album(tmp_path)) == {"a.jpg": "small", "A.jpg": None}


def test_the_first_of_several_notes_counts_and_the_others_are_named(tmp_path: Path) -> None:
    write(
        tmp_path, ana__1_jpg="", ana__1_txt="first", ana__1_jpg_txt="second", ana__1_caption="third",
        ana__metadata_jsonl=entry(file_name="1.jpg", text="fourth") + entry(file_name="1.jpg", text="fifth"),
        ana__metadata_csv="file_name,text\n1.jpg,sixth\n",
        metadata_jsonl=entry(file_name="ana/1.jpg", text="seventh", landmarks=portrait.LANDMARKS),
    )  # fmt: skip
    places = [
        "ana/1.txt", "ana/1.jpg.txt", "ana/1.caption", "ana/metadata.jsonl: line 1",
        "ana/metadata.jsonl: line 2", "ana/metadata.csv: line 2", "metadata.jsonl: line 1",
    ]  # fmt: skip
    album = read_album(tmp_path)
    assert captions(album) == {"1.jpg": "first"} and [*unused(album, tmp_path)] == places[1:]
    assert set(unused(album, tmp_path).values()) == {
        "1.jpg has another caption entry, which takes precedence"
    }
    assert album.people["ana"][0].landmarks == portrait.LANDMARKS  # from the last note, as no other has them
    (tmp_path / "ana" / "1.txt").write_text("\n")  # an empty file is no caption
    assert captions(read_album(tmp_path)) == {"1.jpg": "second"}


def test_notes_that_agree_are_not_named(tmp_path: Path) -> None:
    """What `prepare` writes: the caption beside the photo and in metadata.jsonl."""
    write(tmp_path, ana__1_jpg="", ana__1_txt=WORDS, ana__metadata_jsonl=entry(file_name="1.jpg", text=WORDS))
    assert read_album(tmp_path).unused == ()
    assert read_faces(tmp_path)["ana"][0].caption == WORDS


def test_a_note_for_no_photo_is_named(tmp_path: Path) -> None:
    lines = entry(file_name="gone.jpg", landmarks=portrait.LANDMARKS) + entry(file_name="../1.jpg", text="x")
    write(tmp_path, ana__1_jpg="", ana__2_txt="x", ana__metadata_jsonl=lines, readme_txt="x")
    found = unused(read_album(tmp_path), tmp_path)
    assert set(found) == {
        "ana/2.txt", "readme.txt", "ana/metadata.jsonl: line 1", "ana/metadata.jsonl: line 2",
    }  # fmt: skip
    assert set(found.values()) == {"there is no photo of this name here"}
    assert not_used(str(tmp_path)) == read_album(tmp_path).unused
    with pytest.warns(UserWarning, match=r"not used: .*; 1 more, which hdb prepare lists"):
        read_faces(tmp_path)
    assert read_person(tmp_path / "ana" / "1.jpg")  # the others' notes are not its own: no warning


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '{"text": "x"}', '{"file_name": 3, "text": "x"}', '{"file_name": ""}', "[" * 99_999],
)  # fmt: skip
def test_a_line_that_is_no_entry_stops_no_other(tmp_path: Path, line: str) -> None:
    good = entry(file_name="1.jpg", text=WORDS), entry(file_name="2.jpg", text=WORDS)
    write(tmp_path, ana__1_jpg="", ana__2_jpg="", ana__metadata_jsonl=f"{good[0]}{line}\n{good[1]}")
    album = read_album(tmp_path)
    assert captions(album) == {"1.jpg": WORDS, "2.jpg": WORDS} and not album.refused
    assert "expected {" in unused(album, tmp_path)["ana/metadata.jsonl: line 2"]


@pytest.mark.parametrize(
    ("table", "named"),
    [("name,text\n1.jpg,x\n2.jpg,x\n", "line 1"), ("", None), ("file_name,text\n1.jpg\n,x\n", "line 3")],
)
def test_tables_without_sense(tmp_path: Path, table: str, named: str | None) -> None:
    write(tmp_path, ana__1_jpg="", ana__metadata_csv=table)
    album = read_album(tmp_path)
    wanted = [f"ana/metadata.csv: {named}"] if named else ["ana/metadata.csv: line 1"]
    assert captions(album) == {"1.jpg": None} and [*unused(album, tmp_path)] == wanted


BAD_NOTES = {
    "2_txt": b"\xff\xfe\x00", "2_caption": b"a\0b\0", "2_jpg_txt": b"\x81\x8d",
    "metadata_jsonl": b'{"file_name": "2.jpg", "text": "\\ud800"}\n',
    "metadata_csv": b'file_name,landmarks\n2.jpg,"[1, 2]"\n',
    "Metadata_JSONL": b'{"file_name": "2.jpg", "landmarks": [1, 2]}\n{"file_name": "3.jpg", "text": "c"}\n',
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_NOTES)
def test_one_bad_note_costs_its_photo_alone(tmp_path: Path, name: str) -> None:
    """In `prepare` it is dropped with the reason, in trainings it is left out with a warning."""
    write(tmp_path, ana__1_jpg="1", ana__2_jpg="2", ana__3_jpg="3", **{f"ana__{name}": BAD_NOTES[name]})
    file = name.replace("_", ".")
    one, two, three = read_items(str(tmp_path), PrepareConfig())
    assert (
        (one.refused, three.refused) == ("", "") and two.refused.startswith(file) and "\n" not in two.refused
    )
    for read in (lambda: read_faces(tmp_path)["ana"], lambda: read_person(tmp_path / "ana")):
        with pytest.warns(UserWarning, match=rf"not used: .*2\.jpg: {file}"):
            assert [photo.path.name for photo in read()] == ["1.jpg", "3.jpg"]
    with pytest.raises(InputError, match=rf"2\.jpg: {file}"):
        read_person(tmp_path / "ana" / "2.jpg")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("the person’s smile".encode("cp1252"), "the person’s smile"), (b"caf\xe9\r\nna\xefve", "café naïve"),
        ("a [V] face, ü".encode("utf-16"), "a [V] face, ü"), ("ü".encode("utf-16-be"), None),
        (b"\xfe\xff" + "ü".encode("utf-16-be"), "ü"), (b"\xef\xbb\xbfa [V] face\r\n", WORDS),
        ("naïve".encode() + b"\n" + "café".encode("cp1252"), "naïve café"), (b"", None),
    ],
)  # fmt: skip
def test_captions_in_any_encoding(tmp_path: Path, content: bytes, wanted: str | None) -> None:
    write(tmp_path, ana__1_jpg="", ana__2_jpg="", ana__1_txt=content)
    album = read_album(tmp_path)
    assert captions(album)["1.jpg"] == wanted
    assert bool(album.refused) == (content == "ü".encode("utf-16-be"))


def test_one_old_line_of_metadata_changes_no_other(tmp_path: Path) -> None:
    lines = (
        '{"file_name": "1.jpg", "text": "naïve"}\n'.encode()
        + '{"file_name": "2.jpg", "text": "café"}\n'.encode("cp1252")
    )
    write(tmp_path, ana__1_jpg="", ana__2_jpg="", ana__metadata_jsonl=lines)
    assert captions(read_album(tmp_path)) == {"1.jpg": "naïve", "2.jpg": "café"}
    write(tmp_path, ana__metadata_jsonl=lines.decode("utf-8", "replace").replace("caf", "").encode("utf-16"))
    assert captions(read_album(tmp_path))["1.jpg"] == "naïve"


def test_all_else_in_a_folder_is_named(tmp_path: Path) -> None:
    """A Live Photo's film, an original beside its copy, raw photos, folders too deep, links to nothing."""
    write(
        tmp_path, ana__IMG__x="", ana__1_HEIC="", ana__1_MOV="", ana__2_heic="", ana__2_JPG="", ana__3_dng="",
        ana__notes_md="", ana__deep__4_jpg="", empty__notes_md="", report_json="{}", ana__contact_x="",
    )  # fmt: skip
    (tmp_path / "ana" / "contact-sheet.png").touch()
    (tmp_path / "ana" / "gone.jpg").symlink_to("nowhere.jpg")
    album = read_album(tmp_path)
    assert [photo.path.name for photo in album.people["ana"]] == ["1.HEIC", "2.JPG"]
    assert unused(album, tmp_path) == {
        "ana/3.dng": "this kind of picture is not read; convert it to JPEG or PNG"
    }
    reasons = {name: reason.split()[0:4] for name, reason in others(album, tmp_path).items()}
    assert reasons == {
        "empty": ["no", "photo", "lies", "in"], "ana/1.MOV": ["not", "a", "photo", "(PNG,"],
        "ana/2.heic": ["a", "converted", "copy", "beside"], "ana/notes.md": ["not", "a", "photo", "(PNG,"],
        "ana/contact.x": ["not", "a", "photo", "(PNG,"], "ana/gone.jpg": ["a", "link", "that", "leads"],
        "ana/IMG": ["folders", "inside", "a", "person's"], "ana/deep": ["folders", "inside", "a", "person's"],
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"3\.dng: this kind of picture is not read"):
        read_person(tmp_path / "ana")


@given(st.sampled_from(["metadata.jsonl", "metadata.csv", "1.txt"]), st.binary(max_size=80))
def test_no_note_breaks_the_reading(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes
) -> None:
    home = tmp_path_factory.getbasetemp() / f"noted-{name}" / "ana"
    write(home, **{"1_jpg": "", "2_jpg": ""})
    start = {"metadata.jsonl": b'{"file_name": "1.jpg", "text": "', "metadata.csv": b"file_name,text\n1.jpg,"}
    (home / name).write_bytes(start.get(name, b"") + content)
    album = read_album(home.parent)
    assert captions(album)["2.jpg"] is None and set(album.refused) <= {home / "1.jpg"}
    for text in [*album.refused.values(), *(reason for _, reason in album.unused)]:
        assert "\n" not in text and text.encode()
