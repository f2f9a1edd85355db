"""Photos to crops: the same with any number of processes, after any kill, and for two runs at once."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import sys
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageFilter

import portrait
import processes
from hyperdreambooth import workers
from hyperdreambooth.faces import prepare
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.crop import crop_face
from hyperdreambooth.faces.dataset import read_faces, read_person
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.faces.journal import Record
from hyperdreambooth.faces.prepare import prepare_folder
from hyperdreambooth.faces.sources import Item
from hyperdreambooth.files import InputError

CONFIG = PrepareConfig(size=64)


def make(folder: Path, people: int = 3, each: int = 2) -> Path:
    """Small astronauts, each photo shifted, with captions; the last one is blurred, one is torn."""
    for person in range(people):
        home = folder / f"p{person}"
        home.mkdir(parents=True)
        for k in range(each):
            image = portrait.astronaut().resize((128, 128)).crop((k, 0, 128, 128 - person))
            image.save(home / f"{k}.png")
            (home / f"{k}.txt").write_text(f"a [V] face, {person}-{k}")
    image.filter(ImageFilter.GaussianBlur(9)).save(home / f"{each - 1}.png")
    torn = folder / "p0" / "torn.png"
    torn.write_bytes((folder / "p0" / "0.png").read_bytes()[:3000])
    return folder


def run(source: Path, out: Path, workers: int = 1, **fields: Any) -> list[Record]:
    config = CONFIG.model_copy(update=fields)
    return prepare_folder(source, out, config, workers, portrait.middle)


def state(out: Path) -> dict[str, bytes]:
    """All that anybody reads: everything but the journal, hidden files and the machine's own stamp."""
    files = [path for path in out.rglob("*") if path.is_file() and not any(p[0] == "." for p in path.parts)]
    return {str(f.relative_to(out)): f.read_bytes() for f in files if f.name != "environment.json"}


def test_every_photo_becomes_its_crop_or_a_reason(tmp_path: Path) -> None:
    source, out = make(tmp_path / "photos"), tmp_path / "out"
    records = run(source, out)
    assert [record.name for record in records] == ["p0/0", "p0/1", "p0/torn", "p1/0", "p1/1", "p2/0", "p2/1"]
    reasons = {record.name: record.reason.split()[0] for record in records if not record.kept}
    assert reasons == {"p0/torn": "the", "p2/1": "blurred:"} and "truncated" in records[2].reason
    people = read_faces(out)
    assert {name: [photo.path.name for photo in photos] for name, photos in people.items()} == {
        "p0": ["0.png", "1.png"], "p1": ["0.png", "1.png"], "p2": ["0.png"],
    }  # fmt: skip
    for photos in people.values():
        for photo in photos:
            given = source / photo.path.relative_to(out)
            image = open_photo(given)
            crop = crop_face(image, portrait.middle(image)[0].landmarks, CONFIG)
            assert open_photo(photo.path).tobytes() == crop.picture.tobytes()
            assert photo.landmarks == crop.landmarks and photo.corners == crop.corners
            assert photo.caption == given.with_suffix(".txt").read_text()
    assert [photo.caption for photo in read_person([out / "p1"])] == ["a [V] face, 1-0", "a [V] face, 1-1"]


def test_a_flat_folder_stays_flat(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("000001.jpg", "000002.png"):
        portrait.astronaut().save(tmp_path / "photos" / name)
    run(tmp_path / "photos", tmp_path / "out", caption="a photo of a [V] person")
    people = read_faces(tmp_path / "out")
    assert list(people) == ["000001", "000002"]
    assert {photo.caption for photos in people.values() for photo in photos} == {"a photo of a [V] person"}


def test_spawned_workers_do_what_one_process_does(tmp_path: Path) -> None:
    """As on Windows and on a Mac; detector and photos travel to the workers, records come back in order."""
    source = make(tmp_path / "photos", people=4, each=5)
    alone, shared = run(source, tmp_path / "alone"), run(source, tmp_path / "shared", workers=2)
    assert len(alone) == 21 > prepare.FEW and alone == shared
    assert state(tmp_path / "alone") == state(tmp_path / "shared")


def refuse(*_: object) -> tuple[Record, ...]:
    raise AssertionError("a photo was cropped again")


def test_run_again_it_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make(tmp_path / "photos"), tmp_path / "out"
    first, before = run(source, out), state(out)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "prepare_photo", refuse)
        assert run(source, out) == first
    assert state(out) == before
    with closing(sqlite3.connect(out / ".journal.sqlite", isolation_level=None)) as database:
        database.execute("DELETE FROM photos WHERE item = 'p1/0'")  # a kill between the crop and its record
    assert run(source, out) == first and state(out) == before


def test_a_source_that_changes_is_followed(tmp_path: Path) -> None:
    """Changed, changed back, added, broken, gone, with and without a caption: as if prepared anew."""
    source, out = make(tmp_path / "photos"), tmp_path / "out"
    photo, words = source / "p1" / "0.png", source / "p1" / "0.txt"
    old = photo.read_bytes()

    def change() -> None:
        portrait.astronaut().resize((150, 150)).save(photo)

    steps: list[Callable[[], object]] = [
        lambda: None, change, lambda: photo.write_bytes(old), words.unlink, lambda: words.write_text("new"),
        lambda: (source / "p1" / "1.png").unlink(), lambda: photo.write_bytes(old[:900]),
        lambda: photo.rename(source / "p2" / "0b.png"), lambda: photo.write_bytes(old),
    ]  # fmt: skip
    for number, step in enumerate(steps):
        step()
        records = run(source, out)
        fresh = run(source, tmp_path / f"fresh-{number}")
        assert records == fresh and state(out) == state(tmp_path / f"fresh-{number}"), number


def test_names_that_some_file_systems_cannot_tell_apart(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("ana.png", "ana.jpg", "Bob.png"):
        portrait.astronaut().save(tmp_path / "photos" / name)
    records = {Path(record.photo).name: record for record in run(tmp_path / "photos", tmp_path / "out")}
    assert records["ana.jpg"].kept and records["Bob.png"].kept
    assert "has the same name as" in records["ana.png"].reason and "rename" in records["ana.png"].reason


def reasons_of(*items: Item) -> list[str]:
    """Reasons for dropping photos by their names alone."""
    found = prepare._tasks(items, {}, Path("out"), CONFIG, portrait.middle)  # pyright: ignore[reportPrivateUsage]
    return [one[0].reason if isinstance(one, tuple) else "" for one in found]


def test_a_name_counts_once_however_it_is_written() -> None:
    """A Mac composes ü in either way, a shard may have a key twice."""
    one, two, three = (Item(name, "x.tar:1", b"", None) for name in ("ana/\u00fc", "ana/u\u0308", "ana/o"))
    reasons = reasons_of(one, two, three, three)
    assert [reason[:29] for reason in reasons] == [
        "",
        "has the same name as x.tar:1;",
        "",
        "has the same name as x.tar:1;",
    ]


def test_a_photo_named_like_the_contact_sheet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("Contact-Sheet.jpg", "b.jpg"):
        portrait.astronaut().save(tmp_path / "photos" / name)
    records = {record.name: record for record in run(tmp_path / "photos", tmp_path / "out")}
    assert records["b"].kept and "prepare's own contact-sheet.png; rename" in records["Contact-Sheet"].reason
    assert list(read_faces(tmp_path / "out")) == ["b"]


def test_a_name_that_is_not_utf8_costs_that_photo_alone(tmp_path: Path) -> None:
    """In a folder of such a name, with two spaces in it: a reason never begins with the photo's path."""
    home = tmp_path / os.fsdecode(b"our  caf\xe9") / "ana"
    try:
        home.mkdir(parents=True)
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    for name in ("a.png", os.fsdecode(b"caf\xe9.png")):
        portrait.astronaut().resize((128, 128)).save(home / name)
    (home / "torn.png").write_bytes(b"no picture")
    for _ in range(2):
        records = run(home.parent, tmp_path / "out")
        assert [(one.name, one.reason[:19]) for one in records] == [
            ("ana/a", ""), ("ana/caf\\udce9", "the file's name is "), ("ana/torn", "not a PNG, JPEG, We"),
        ]  # fmt: skip
        json.dumps([one.photo for one in records], ensure_ascii=False).encode()


def test_one_bad_sample_of_a_shard_is_dropped_with_its_reason(tmp_path: Path) -> None:
    portrait.astronaut().resize((128, 128)).save(tmp_path / "1.png")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in (("ana/1.png", None), ("ana/2.png", None), ("ana/2.json", b"not json")):
            data = data or (tmp_path / "1.png").read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    records = run(tmp_path / "s.tar", tmp_path / "out")
    assert [(one.photo[-5:], one.reason[:22]) for one in records] == [
        ("ana/1", ""), ("ana/2", "expected text and a JS"),
    ]  # fmt: skip


def test_a_source_without_photos(tmp_path: Path) -> None:
    tarfile.open(tmp_path / "s.tar", "w").close()
    with pytest.raises(InputError, match=r"s\.tar: no photo found"):
        run(tmp_path / "s.tar", tmp_path / "out")
    run(make(tmp_path / "photos", people=1), tmp_path / "out")  # what came to nothing binds nobody


def test_windows_has_no_more_than_61_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    counts = [workers.processes(asked) for asked in (None, 3, 100)]
    monkeypatch.setattr(sys, "platform", "win32")
    counts += [workers.processes(asked) for asked in (None, 3, 100)]
    assert counts == [64, 3, 100, 61, 3, 61]


def test_what_another_run_finishes_meanwhile_is_no_error(tmp_path: Path) -> None:
    """Its half-written file is seen, and gone when it is looked at; so is this link's target."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".1.abc.tmp.png").symlink_to("nowhere")
    run(make(tmp_path / "photos", people=1), tmp_path / "out")


def test_a_photo_renamed_by_its_case_keeps_its_crop(tmp_path: Path) -> None:
    """Where `Ana.png` and `ana.png` are one file, as on Windows and Macs; here a link makes them one."""
    (tmp_path / "photos").mkdir()
    portrait.astronaut().save(tmp_path / "photos" / "Ana.jpg")
    run(tmp_path / "photos", tmp_path / "out")
    (tmp_path / "photos" / "Ana.jpg").rename(tmp_path / "photos" / "ana.jpg")
    old, new = tmp_path / "out" / "Ana.png", tmp_path / "out" / "ana.png"
    if not new.exists():
        old.rename(new)
        old.symlink_to(new.name)
    run(tmp_path / "photos", tmp_path / "out")
    assert old.exists() and new.exists()


def test_a_run_that_fails_closes_its_journal(tmp_path: Path) -> None:
    """Windows removes no folder with an open file in it."""
    source, opened = make(tmp_path / "photos"), list[Any]()

    def fail(image: Any) -> Any:
        if len(opened) == 2:
            raise MemoryError
        opened.append(image)
        return portrait.middle(image)

    with pytest.raises(MemoryError) as caught:
        prepare_folder(source, tmp_path / "out", CONFIG, 1, fail)
    frame = next(entry.frame for entry in caught.traceback if entry.name == "prepare_folder")
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        frame.f_locals["journal"].add((Record("a", "a", "a"),))


def test_folders_that_are_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "photos")
    for out, words in {
        source: "lies in", source / "crops": "lies in", tmp_path: "expected a new or empty folder",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=words):
            run(source, out)
    run(source, tmp_path / "out")
    with pytest.raises(InputError, match=r"another config \(config.size was 64, now 32\)"):
        run(source, tmp_path / "out", size=32)
    other = make(tmp_path / "others")
    with pytest.raises(InputError, match="source"):
        run(other, tmp_path / "out")
    run(f"{source}/", tmp_path / "out")
    foreign = {"expected a new": {"format": 1}, "base": {"config": {}, "inputs": {"base": "a"}}}
    for words, config in foreign.items():
        file = tmp_path / words / "config.json"
        file.parent.mkdir()
        file.write_text(json.dumps(config))  # of a hypernetwork, of another stage's run
        with pytest.raises(InputError, match=words):
            run(source, file.parent)
        assert json.loads(file.read_text()) == config


def test_without_a_detector_the_first_photo_that_needs_one_says_so(tmp_path: Path) -> None:
    source = make(tmp_path / "photos")
    with pytest.raises(InputError, match="--already-cropped"):
        prepare_folder(source, tmp_path / "out", CONFIG)
    names = [path.relative_to(source).as_posix() for path in source.rglob("*.png")]
    points = [[x / 4, y / 4] for x, y in portrait.LANDMARKS]
    lines = [json.dumps({"file_name": name, "landmarks": points}) + "\n" for name in names]
    (source / "metadata.jsonl").write_text("".join(lines))
    assert sum(record.kept for record in prepare_folder(source, tmp_path / "out", CONFIG, 1)) == 5


def killed_at(number: int, source: Path, out: Path, done: bool) -> None:
    """Runs, and dies by -9 before (or just after) the rename that makes file `number` appear."""
    real, count = os.replace, 0

    def counting(*names: Any) -> None:
        nonlocal count
        count += 1
        if count == number and done:
            real(*names)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*names)

    os.replace = counting
    run(source, out)


@processes.CHEAP
@pytest.mark.parametrize("done", [False, True])
def test_killed_at_any_rename_it_leaves_whole_files_and_ends_the_same(tmp_path: Path, done: bool) -> None:
    source, whole = make(tmp_path / "photos"), tmp_path / "whole"
    records = run(source, whole)
    kills = 0
    for number in range(1, 40):
        out = tmp_path / f"killed-{number}"
        process = processes.start(killed_at, number, source, out, done)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        for name, content in state(out).items():  # what is there is as in the end, whole, captions with crops
            assert content == state(whole)[name], (number, name)
            assert not name.endswith(".png") or Path(name).with_suffix(".txt").as_posix() in state(out)
        assert run(source, out) == records and state(out) == state(whole)
    assert kills >= 14  # config, environment, 5 crops, 5 captions, metadata of 3 people


def both(barrier: Any, source: Path, out: Path) -> None:
    barrier.wait()
    run(source, out)


@processes.CHEAP
def test_two_runs_at_once_write_the_same(tmp_path: Path) -> None:
    source = make(tmp_path / "photos", people=5, each=6)
    records = run(source, tmp_path / "alone")
    barrier = processes.CONTEXT.Barrier(2)
    runs = [processes.start(both, barrier, source, tmp_path / "out") for _ in range(2)]
    for process in runs:
        process.join()
    assert [process.exitcode for process in runs] == [0, 0]
    assert state(tmp_path / "out") == state(tmp_path / "alone") and run(source, tmp_path / "out") == records
    assert not list((tmp_path / "out").rglob(".*.tmp.*"))
