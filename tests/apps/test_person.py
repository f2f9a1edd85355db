"""The folder of a person: what is kept and gone on from, what is refused, and the way without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError

import micro
from commands import QUICK, error, hdb, report
from hyperdreambooth import files
from hyperdreambooth.adapter import FILES, read_adapter
from hyperdreambooth.apps import person_folder, work
from hyperdreambooth.base.load import load_base
from kills import run_killed

PROMPTS = ["--prompt", "a photo of a [V] face, smiling", "--prompt", "a [V] face in a red hat"]
RUN = [*PROMPTS, "--steps", 3, *QUICK, "--device", "cpu", "--set", "save_every=2"]
VOLATILE = {"report.json", "log.jsonl", "events.jsonl", "environment.json"}  # they hold times


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, micro_dir: Path) -> Path:
    """A micro base with scorers in `base`, and a hypernetwork for it in `made`."""
    home = tmp_path_factory.mktemp("scored")
    shutil.copytree(micro_dir, home / "base")
    micro.scorers(home / "base" / "scorers")
    micro.hypernet(home, load_base(home / "base", device="cpu"))
    return home


def words(world: Path, photos: Path, out: Path, *more: object) -> list[object]:
    """The command that most tests run: one photo, rank 2, three steps, a checkpoint after two."""
    network = ["--base", world / "base", "--hypernet", world / "made", "--rank", 2]
    return ["personalize", photos / "person-0" / "0.png", "--out", out, *network, *RUN, *more]


@pytest.fixture(scope="session")
def whole(world: Path, micro_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "me"
    hdb(*words(world, micro_photos, out))
    return out


def contents(out: Path) -> dict[str, bytes]:
    """Every file that has to come out the same, hidden ones as well."""

    def content(file: Path) -> bytes:
        """The bytes; of safetensors in an order of their own (theirs is random) and without the date."""
        data = file.read_bytes()
        if file.suffix != ".safetensors":
            return data
        size = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:size])
        header.get("__metadata__", {}).pop("modelspec.date", None)
        return json.dumps(header, sort_keys=True).encode() + data[size:]

    files = [path for path in out.rglob("*") if path.is_file() and path.name not in VOLATILE]
    return {path.relative_to(out).as_posix(): content(path) for path in files}


def same(one: Path, other: Path) -> None:
    assert contents(one) == contents(other)
    first, second = report(one), report(other)
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in second.items() if k != "seconds"
    }


class Renames:
    """Counts the files that appear, and raises an error in place of one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = -1, error: BaseException | None = None) -> None:
        self.count, self.at, self.error, self._replace = 0, at, error, os.replace
        patch.setattr("hyperdreambooth.files.os.replace", self)

    def __call__(self, source: Path, target: Path) -> None:
        self.count += 1
        if self.count == self.at and self.error is not None:
            raise self.error
        self._replace(source, target)


@pytest.fixture(scope="session")
def places(world: Path, micro_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many files appear in a run: the places at which one can be interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Renames(patch)
        hdb(*words(world, micro_photos, tmp_path_factory.mktemp("counted") / "me"))
    return counted.count


def interrupted(world: Path, photos: Path, out: Path, at: int) -> None:
    """Presses Ctrl-C in place of the file number `at`."""
    with pytest.MonkeyPatch.context() as patch:
        Renames(patch, at, KeyboardInterrupt())
        assert "run the same command again" in hdb(*words(world, photos, out), code=130).stderr


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_files(
    share: float, world: Path, micro_photos: Path, whole: Path, places: int, tmp_path: Path
) -> None:
    out = tmp_path / "me"
    interrupted(world, micro_photos, out, int(share * places))
    hdb(*words(world, micro_photos, out))
    same(out, whole)


@pytest.mark.slow
def test_interrupted_at_every_place_one_after_the_other(
    world: Path, micro_photos: Path, whole: Path, places: int, tmp_path: Path
) -> None:
    assert places > 10
    for at in range(1, places + 1):
        out = tmp_path / f"{at}"
        interrupted(world, micro_photos, out, at)
        hdb(*words(world, micro_photos, out))
        same(out, whole)


def test_what_is_kept_is_not_made_again(
    world: Path, micro_photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "me"
    shutil.copytree(whole, out)
    kept = {name: (out / name).stat().st_mtime_ns for name in contents(out) if name.startswith("pictures")}
    (out / "pictures" / "finetuned-01.png").write_bytes(b"torn")
    (out / "picture.png").unlink()
    asked: list[object] = []
    drawn = work.generate_images

    def count(base: Any, prompts: Any, adapter: Any, **options: Any) -> Any:
        asked.append(prompts)
        return drawn(base, prompts, adapter, **options)

    monkeypatch.setattr(work, "generate_images", count)
    monkeypatch.setattr("hyperdreambooth.training.loop.step_inputs", None)  # no step is taken
    hdb(*words(world, micro_photos, out))
    assert len(asked) == 1  # the batch of the torn picture
    same(out, whole)
    unchanged = {name: (out / name).stat().st_mtime_ns for name in kept if "finetuned" not in name}
    assert unchanged.items() <= kept.items()


def test_the_adapters_are_there_before_anything_is_drawn(
    world: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "generate_images", stop)
    hdb(*words(world, micro_photos, tmp_path / "me"), code=130)
    base = load_base(world / "base", device="cpu")
    for name in FILES.values():
        read_adapter(tmp_path / "me" / name, base.sites, base.fingerprint)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--set", "guidance=2"], "guidance was 4.0, now 2.0"),
        (["--set", "lr=0.5"], "lr"),
        (["--prompt", "another"], "prompts"),
        (["--set", "prompt=a drawing of a [V] face"], "prompt"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    more: list[object], part: str, world: Path, micro_photos: Path, whole: Path
) -> None:
    before = contents(whole)
    line = error(*words(world, micro_photos, whole, *more))
    assert part in line and "--out" in line
    assert contents(whole) == before


def test_another_persons_folder_is_refused_before_anything_is_loaded(
    world: Path, micro_photos: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperdreambooth.apps.personalization.load_personalizer", None)
    asked = words(world, micro_photos, whole)
    asked[1] = micro_photos / "person-1" / "0.png"
    assert "holds the result of other photos; pass another --out" in error(*asked)


def test_a_copy_of_the_photo_under_another_name_is_the_same_photo(
    world: Path, micro_photos: Path, whole: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "renamed.png"
    shutil.copy(micro_photos / "person-0" / "0.png", copy)
    shutil.copy(micro_photos / "person-0" / "0.txt", copy.with_suffix(".txt"))
    asked = words(world, micro_photos, whole)
    asked[1] = copy
    hdb(*asked)
    copy.write_bytes((micro_photos / "person-1" / "0.png").read_bytes())
    assert "other photos" in error(*asked)


def test_another_hypernetwork_or_base_is_refused(
    world: Path, micro_photos: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "made", tmp_path / "made")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    config["facts"]["strength"] = 0.5
    (tmp_path / "made" / "config.json").write_text(json.dumps(config))
    assert "hypernet" in error(*words(world, micro_photos, whole, "--hypernet", tmp_path / "made"))


def test_a_planted_prediction_is_not_believed(
    world: Path, micro_photos: Path, whole: Path, tmp_path: Path
) -> None:
    other = words(world, micro_photos, tmp_path / "other")
    other[1] = micro_photos / "person-1" / "0.png"
    hdb(*other)
    out = tmp_path / "me"
    interrupted(world, micro_photos, out, 6)
    shutil.copy(tmp_path / "other" / FILES["lidb"], out / FILES["lidb"])
    hdb(*words(world, micro_photos, out))
    same(out, whole)


FULL = [FILES["lidb"], FILES["kohya"], "checkpoint-2", "base-00.png", "picture.png", "report.json"]


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_loses_only_what_did_not_fit(
    name: str, world: Path, micro_photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "me", safetensors.torch.save_file
    beside = files._beside  # pyright: ignore[reportPrivateUsage]

    def full(path: Path) -> Path:
        hidden = beside(path)
        if path.name == name and path.suffix != ".safetensors" and "checkpoint" not in name:
            hidden.symlink_to("/dev/full")  # where the kernel says that the disk is full
        return hidden

    def full_tensors(tensors: Any, path: Path, **more: Any) -> None:
        hidden = rf"\.{name.removesuffix('.safetensors')}\.[0-9a-f]{{12}}\.tmp"
        if re.search(hidden, str(path)):
            raise SafetensorError("I/O error: No space left on device (os error 28)")  # as it says it
        save(tensors, path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_beside", full)
        patch.setattr(safetensors.torch, "save_file", full_tensors)
        line = hdb(*words(world, micro_photos, out), code=1).stderr.splitlines()[-1]
    assert line.startswith("error: the disk is full: ") and name in line and "free some space" in line
    assert ".tmp" not in line and re.search(r", which needs \d+\.\d [kM]B, did not fit", line)
    hdb(*words(world, micro_photos, out))
    same(out, whole)


@pytest.mark.parametrize("method", ["lora", "lidb"])
def test_one_photo_without_a_hypernetwork(
    method: str, world: Path, micro_photos: Path, tmp_path: Path
) -> None:
    """One command on a base that nobody trained a hypernetwork for: files, card, picture, scores, strip."""
    out, photo = tmp_path / "me", micro_photos / "person-0" / "0.png"
    base = ["--base", world / "base"]
    line = error("personalize", photo, "--out", out, *base)
    assert "--hypernet" in line and "--method lora" in line
    asked = ["personalize", photo, "--out", out, *base, "--method", method, *RUN]
    hdb(*asked)
    entries = report(out)
    expected = {"kohya", "diffusers", "picture", "photo", "caption", "card", "strip"}
    assert entries["files"].keys() == expected | ({"lidb"} if method == "lidb" else set())
    assert all((out / file).is_file() for file in entries["files"].values())
    assert entries["scores"]["prompt"].keys() == {"base", "trained"} and entries["steps"] == 3
    assert "person.safetensors" in (out / "README.md").read_text()
    assert "prediction" not in (out / "README.md").read_text()
    assert entries["command"] == "personalize" and entries["config"]["method"] == method
    before = contents(out)
    hdb(*asked)
    assert contents(out) == before
    read = read_adapter(out / FILES["diffusers"], load_base(world / "base", device="cpu").sites, "")
    assert any(bool(up.any()) for _, up in read.factors.values())


def test_dreambooth_is_the_same_road(world: Path, micro_photos: Path, tmp_path: Path) -> None:
    photo, base = micro_photos / "person-0" / "0.png", ["--base", world / "base", "--method", "lora"]
    hdb("personalize", photo, "--out", tmp_path / "one", *base, *RUN)
    hdb("dreambooth", photo, "--out", tmp_path / "two", *base, *RUN)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"config.json", "training/config.json"}


def test_the_recommended_method_must_not_be_mixed(world: Path, micro_photos: Path, tmp_path: Path) -> None:
    asked = words(world, micro_photos, tmp_path / "me", "--method", "lora")
    assert "hypernet: method lora trains without one" in error(*asked)
    photo = micro_photos / "person-0"
    line = error(
        "personalize", photo, "--out", tmp_path / "me", "--method", "lora", "--set", "way=complement"
    )
    assert "unknown key 'way'" in line


@pytest.mark.parametrize("count", [2, 3])
def test_the_last_of_several_photos_judges(
    count: int, world: Path, micro_photos: Path, tmp_path: Path
) -> None:
    photos = [micro_photos / "person-1" / f"{k}.png" for k in range(count)]
    asked = words(world, micro_photos, tmp_path / "me")
    asked[1:2] = photos
    printed = hdb(*asked).stdout
    entries = report(tmp_path / "me")
    assert (entries["photos"], entries["held_out"]) == (count, f"{count - 1}.png")
    assert f"{count - 1}.png, which was left out of the training" in printed
    assert all(isinstance(value, float) for value in entries["scores"]["identity"].values())
    trained = json.loads((tmp_path / "me" / "training" / "config.json").read_text())["inputs"]["photos"]
    assert trained.count(",") == count - 2
    kept = words(world, micro_photos, tmp_path / "all", "--set", "hold_out=false")
    kept[1:2] = photos
    assert "not scored" in hdb(*kept).stdout
    assert report(tmp_path / "all")["held_out"] is None


def test_one_photo_says_why_identity_is_not_judged(
    world: Path, micro_photos: Path, tmp_path: Path, whole: Path
) -> None:
    printed = hdb(*words(world, micro_photos, whole)).stdout
    assert "identity   not scored: only one photo was given" in printed


def test_a_base_without_scorers_trains_on_every_photo(
    micro_dir: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperdreambooth.apps.personalization.load_base_scorers", lambda _base: None)
    base = ["--base", micro_dir, "--method", "lora"]
    printed = hdb("personalize", micro_photos / "person-1", "--out", tmp_path / "me", *base, *RUN).stdout
    assert "this base has no scorers" in printed and report(tmp_path / "me")["held_out"] is None


def test_steps_auto_chooses_among_looks_and_keeps_the_strip(
    world: Path, micro_photos: Path, tmp_path: Path
) -> None:
    asked = words(world, micro_photos, tmp_path / "me", "--steps", "auto", "--set", "most=8")
    printed = hdb(*asked).stdout
    entries = report(tmp_path / "me")
    assert entries["steps"] in (0, 2, 5, 8) and entries["stopped"].startswith("the best of 4 looks")
    assert entries["stopped"] in printed and entries["files"]["strip"] == "strip.png"
    assert len(list((tmp_path / "me" / "training" / "looks").glob("*.png"))) == 4 * len(PROMPTS) // 2
    with Image.open(tmp_path / "me" / "strip.png") as picture:
        assert picture.height > 4 * 128
    fixed = words(world, micro_photos, tmp_path / "fixed", "--steps", entries["steps"])
    hdb(*fixed)
    base = load_base(world / "base", device="cpu")
    one, two = (read_adapter(tmp_path / n / FILES["kohya"], base.sites, "") for n in ("me", "fixed"))
    for site, (down, up) in one.factors.items():
        torch.testing.assert_close(up @ down, two.factors[site][1] @ two.factors[site][0])


def test_a_picture_made_from_something_else_is_not_taken(tmp_path: Path) -> None:
    file, image = tmp_path / "a.png", Image.new("RGB", (4, 4), (1, 2, 3))
    person_folder.save_picture(file, image, "key")
    kept = person_folder.read_picture(file, "key")
    assert kept is not None and kept.getpixel((0, 0)) == (1, 2, 3)
    assert person_folder.read_picture(file, "other") is None
    file.write_bytes(file.read_bytes()[:-30])
    assert person_folder.read_picture(file, "key") is None
    assert person_folder.read_picture(tmp_path / "none.png") is None


RUN_THROUGH = """
from typer.testing import CliRunner
from hyperdreambooth.apps import personalization
from hyperdreambooth.apps.cli import app

def run(folder):
    done = CliRunner().invoke(app, [*given, "--out", str(folder)])
    assert done.exit_code == 0, done.output
"""


def killed_and_resumed(world: Path, photos: Path, out: Path, kills: int) -> int:
    """Runs a person through in one go, and another killed at random moments."""
    asked = words(world, photos, out)
    killed = run_killed(RUN_THROUGH, out, kills, [*asked[:2], *asked[4:], "--steps", 9], (0.1, 0.6))
    same(out / "whole", out / "killed")
    return killed


def test_killed_twice_is_the_same_person(world: Path, micro_photos: Path, tmp_path: Path) -> None:
    assert killed_and_resumed(world, micro_photos, tmp_path, kills=2) >= 1


@pytest.mark.slow
def test_killed_ten_times_is_the_same_person(world: Path, micro_photos: Path, tmp_path: Path) -> None:
    assert killed_and_resumed(world, micro_photos, tmp_path, kills=10) >= 5
