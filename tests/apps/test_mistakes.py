"""The matrix of mistakes: every command × every input and output × every way in which it can be wrong.

It is made from the list of commands, so a new command joins by itself. Each mistake is one line on standard
error and exit code 2, and leaves no file behind.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from commands import photo
from hyperdreambooth.apps import cli
from hyperdreambooth.base.load import load_base
from hyperdreambooth.files import load_tensors, save_tensors

Make = Callable[[Path, Path], Path]
"""Makes a wrong input in a folder from a right one, and returns its path."""


def walk(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from walk(command, (*before, name))
        else:
            yield (*before, name), command


COMMANDS = dict(walk(typer.main.get_command(cli.app)))
ADAPTERS = {"file", "files", "adapter", "against", "source"}
PHOTOS = {"photos", "photo"}
REPORTS = {("doctor",)}  # names what is missing in its table, and exits with 1

# ---- ways to be wrong -------------------------------------------------------------------------------------


def missing(home: Path, right: Path) -> Path:
    return home / f"no-such-{right.name}"


def empty(home: Path, right: Path) -> Path:
    (home / right.name).mkdir() if right.is_dir() else (home / right.name).touch()
    return home / right.name


def wrong_kind(home: Path, right: Path) -> Path:
    file = home / f"notes{right.suffix or '.txt'}"
    file.write_text("buy milk\n" * 20)
    return file


def a_folder(home: Path, right: Path) -> Path:
    (home / f"folder{right.suffix}").mkdir()
    return home / f"folder{right.suffix}"


def truncated(home: Path, right: Path) -> Path:
    content = right.read_bytes()
    (home / right.name).write_bytes(content[: len(content) // 2])
    return home / right.name


def dangling(home: Path, right: Path) -> Path:
    """What cannot be read, whoever asks: for root, permissions forbid nothing."""
    (home / right.name).symlink_to(home / "gone")
    return home / right.name


def huge_header(home: Path, right: Path) -> Path:
    """A file that claims to be larger than any disk."""
    (home / right.name).write_bytes((2**60).to_bytes(8, "little") + right.read_bytes()[8:])
    return home / right.name


def huge_picture(home: Path, right: Path) -> Path:
    """A picture of a few bytes that would fill the memory."""
    Image.new("1", (32, 32)).save(home / right.name)
    content = bytearray((home / right.name).read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2  # width and height in the header of a PNG
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (home / right.name).write_bytes(content)
    return home / right.name


def tiny_picture(home: Path, right: Path) -> Path:
    Image.new("RGB", (24, 24)).save(home / right.name)
    return home / right.name


def other_version(home: Path, right: Path) -> Path:
    tensors, header = load_tensors(right)
    save_tensors(home / right.name, tensors, {**header, "lidb_format": "99"})
    return home / right.name


def other_base(home: Path, right: Path) -> Path:
    tensors, header = load_tensors(right)
    changed = {key: "0" * 16 if "fingerprint" in key else value for key, value in header.items()}
    save_tensors(home / right.name, tensors, changed)
    return home / right.name


def config_of(key: str, value: Any) -> Make:
    """A hypernetwork's folder with another entry in its config."""

    def make(home: Path, right: Path) -> Path:
        shutil.copytree(right, home / right.name)
        file = home / right.name / "config.json"
        config = json.loads(file.read_text())
        (config["facts"] if key in config["facts"] else config)[key] = value
        file.write_text(json.dumps(config))
        return home / right.name

    make.__name__ = key
    return make


def torn_config(home: Path, right: Path) -> Path:
    shutil.copytree(right, home / right.name)
    (home / right.name / "config.json").write_text("{")
    return home / right.name


def lora_as_base(home: Path, right: Path) -> Path:
    save_tensors(home / "lora.safetensors", {"unet.q.lora_A.weight": load_any()})
    return home / "lora.safetensors"


def load_any() -> Any:
    import torch

    return torch.zeros(1, 2)


def torn_index(home: Path, right: Path) -> Path:
    shutil.copytree(right, home / right.name)
    (home / right.name / "model_index.json").write_text("{")
    return home / right.name


def torn_toml(home: Path, right: Path) -> Path:
    (home / "torn.toml").write_text("steps = [")
    return home / "torn.toml"


def unknown_key(home: Path, right: Path) -> Path:
    (home / "odd.toml").write_text("no_such_key = 1\n")
    return home / "odd.toml"


WRONG: dict[str, tuple[Make, ...]] = {
    "adapter": (
        missing, empty, wrong_kind, a_folder, truncated, dangling, huge_header, other_version, other_base
    ),
    "photo": (missing, empty, wrong_kind, a_folder, truncated, dangling, huge_picture, tiny_picture),
    "people": (missing, a_folder),
    "bank": (missing, wrong_kind, a_folder, dangling),
    "hypernet": (
        missing, wrong_kind, a_folder, dangling, torn_config, config_of("format", 99),
        config_of("base_fingerprint", "0" * 16),
    ),
    "base": (missing, wrong_kind, a_folder, dangling, torn_index, lora_as_base),
    "config_file": (missing, wrong_kind, a_folder, dangling, torn_toml, unknown_key),
}  # fmt: skip


def kind_of(name: tuple[str, ...], parameter: Any) -> str | None:
    """What a parameter names, as `WRONG` calls it; None for what is no input."""
    if parameter.name in ADAPTERS:
        return "adapter"
    if parameter.name in PHOTOS:
        people = {("train",), ("preoptimize",), ("evaluate",), ("prepare",)}
        return (
            ("people" if name in people else "photo")
            if parameter.param_type_name == "argument" or (parameter.name == "photo")
            else None
        )
    return parameter.name if parameter.name in WRONG else None


INPUTS = [
    pytest.param(name, parameter.name, make, id=f"{'-'.join(name)}-{parameter.name}-{k}")
    for name, command in COMMANDS.items()
    if name not in REPORTS
    for parameter in command.params
    if (kind := kind_of(name, parameter))
    for k, make in enumerate(WRONG[kind])
]
OUTPUTS = [
    pytest.param(name, wrong, id=f"{'-'.join(name)}-{wrong}")
    for name, command in COMMANDS.items()
    if any(parameter.name == "out" for parameter in command.params)
    for wrong in ("under a file", "of another kind", "cannot be made")
]
# `inspect` reports a file that does not fit. A LiDB over seeded bases needs no hypernetwork, so the commands
# that open one have no use for the hypernetwork's own base and version.
FINE = {("inspect", "file", "other_base"), ("finetune", "hypernet", "base_fingerprint")} | {
    (command, "hypernet", key)
    for command in ("relax", "generate", "export", "merge", "inspect")
    for key in ("format", "base_fingerprint")
}


SHORT: dict[tuple[str, ...], tuple[str, ...]] = {
    ("generate",): ("--set", "steps=1"),
    ("demo",): ("--set", "steps=1", "--set", "draw_steps=1"),
    ("personalize",): ("--set", "draw_steps=1"),
    ("prepare",): ("--already-cropped", "--set", "size=32"),
    ("evaluate",): ("--set", 'rows=["base"]', "--set", "draw_steps=1"),
    ("avatars", "render"): ("--identities", "1"),
}
"""Settings that keep the work small where a mistake is found late, or not at all."""


class Right:
    """Right words for every command, from what the commands made on the micro base."""

    def __init__(self, made: Path, base: Path, people: Path) -> None:
        self._of = {
            "adapter": made / "p.lidb.safetensors", "photo": photo(people), "people": people,
            "bank": made / "bank", "hypernet": made / "hypernet", "base": base,
            "config_file": made / "hypernet" / "config.json",
        }  # fmt: skip

    def of(self, kind: str) -> Path:
        return self._of[kind]

    def words(self, name: tuple[str, ...], out: Path, **given: Path) -> list[str]:
        """The words of a command with all that it needs, and the parameters that are given."""
        words, places = list(name), list[str]()
        command = COMMANDS[name]
        plain = {"steps": "1", "device": "cpu", "prompt": "a [V] face", "out": str(out)}
        needed = {"base", "hypernet", "device", "steps", "out"}
        for parameter in command.params:
            kind = kind_of(name, parameter)
            value: Any = given.get(parameter.name)
            if value is None and (parameter.required or parameter.name in needed):
                value = self.of(kind) if kind else plain[parameter.name]
            if value is not None and parameter.param_type_name == "argument":
                places.append(str(value))
            elif value is not None:
                words += [parameter.opts[0], str(value)]
        return [*words, *SHORT.get(name, ()), *places]


@pytest.fixture(scope="module")
def right(made: Path, micro_dir: Path, micro_photos: Path) -> Right:
    return Right(made, micro_dir, micro_photos)


def run(words: list[str]) -> Result:
    return CliRunner().invoke(cli.app, words)


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def out_of(name: tuple[str, ...], home: Path) -> Path:
    return home / "out.safetensors" if name[0] in ("relax", "finetune", "predict", "merge") else home / "out"


def is_one_line(result: Result, code: int = 2) -> bool:
    lines = result.stderr.splitlines()
    assert result.exit_code == code, (result.output, result.exception)
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return True


@pytest.mark.parametrize(("name", "parameter", "make"), INPUTS)
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    name: tuple[str, ...], parameter: str, make: Make, right: Right, tmp_path: Path
) -> None:
    kind = kind_of(name, next(one for one in COMMANDS[name].params if one.name == parameter))
    assert kind is not None
    wrong, home = make(tmp_path, right.of(kind)), tmp_path / "results"
    home.mkdir()
    result = run(right.words(name, out_of(name, home), **{parameter: wrong}))
    if (name[0], parameter, make.__name__) in FINE:
        assert result.exit_code == 0, result.output
    else:
        assert is_one_line(result) and not files(home)


@pytest.mark.parametrize(("name", "wrong"), OUTPUTS)
def test_an_output_that_cannot_be_is_one_line_before_the_work(
    name: tuple[str, ...], wrong: str, right: Right, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    out = out_of(name, tmp_path)
    if wrong == "under a file":
        out = tmp_path / "file" / out.name
    elif wrong == "of another kind":
        out.mkdir() if out.suffix else out.write_text("mine")
    else:
        out = Path("/proc/self") / out.name  # where not even root can make a file
    before = files(tmp_path)
    assert is_one_line(run(right.words(name, out)))
    assert files(tmp_path) == before and (tmp_path / "file").read_text() == "mine"


# the page waits for a tab, a worker of the service for jobs, and its keys are rows of a database
READERS = {("inspect",), ("watch",), ("avatars", "build"), ("ui",), *(n for n in COMMANDS if n[0] == "serve")}
WRITERS = [name for name in COMMANDS if name not in REPORTS | READERS]


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS, ids="-".join)
@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device"), 1)]
)
def test_an_interrupt_or_a_full_disk_at_the_first_file_leaves_no_half_of_it(
    name: tuple[str, ...],
    raised: BaseException,
    code: int,
    right: Right,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = [f"encoder={made / 'encoder'}", "width=8", "heads=2", "batch=2", "validation=1", "draws=1"]
    more: dict[str, list[str]] = {
        "train": [word for setting in small for word in ("--set", setting)],
        "evaluate": [str(right.of("people"))],
    }

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(os, "replace", fail)
    result = run([*right.words(name, out_of(name, tmp_path)), *more.get(name[0], [])])
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == code, (result.output, result.exception)
    assert last.startswith("interrupted" if code == 130 else "error: the disk is full"), last
    assert not [file for file in files(tmp_path) if file.name.startswith(".") and ".tmp" in file.name]


def test_a_base_of_other_weights_refuses_the_person(right: Right, made: Path, tmp_path: Path) -> None:
    base = load_base(right.of("base"), "cpu")
    base.pipe.unet.conv_in.weight.data.mul_(2)
    base.pipe.save_pretrained(tmp_path / "other")
    for words in (
        ["relax", right.of("adapter"), "--out", tmp_path / "r.safetensors"],
        ["predict", right.of("photo"), "--out", tmp_path / "p.safetensors"],
    ):
        on = ["--base", tmp_path / "other", "--hypernet", made / "hypernet", "--device", "cpu"]
        assert is_one_line(run([str(word) for word in [*words, *on]]))
    assert not list(tmp_path.glob("*.safetensors"))
