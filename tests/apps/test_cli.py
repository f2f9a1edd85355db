"""What a user sees: help, exit codes, errors of one line, resolved configs, progress."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

import hyperdreambooth
from hyperdreambooth.apps import cli
from hyperdreambooth.apps.settings import PRESETS, TABLES, GenerateConfig, resolve
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.hypernet.predictor import load_info
from hyperdreambooth.personalize import EMBEDDED_HYPERNET

COMMANDS = (
    "demo", "personalize", "predict", "relax", "finetune", "generate", "export", "merge", "inspect",
    "dreambooth", "preoptimize", "train", "evaluate", "doctor", "prepare", "watch", "plan", "ui",
)  # fmt: skip
# the decorator adds these; the last three say which machines do it, not what a command does
SHARED = {"--config", "--set", "--dry-run", "--help", "--device", "--cluster", "--shard"}


def options_of(name: str) -> set[str]:
    """A command's own options by their first names; `--preset` is a second name of the shared `--config`."""
    group = typer.main.get_command(cli.app)
    named = [[word for word in one.opts if word.startswith("--")] for one in group.commands[name].params]
    return {words[0] for words in named if words} - SHARED


@pytest.mark.parametrize("name", COMMANDS)
def test_at_most_eight_options_of_its_own(name: str) -> None:
    assert len(options_of(name)) <= 8


@pytest.mark.parametrize("name", [*COMMANDS, "avatars"])
def test_help(name: str) -> None:
    result = CliRunner().invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0 and "Usage" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["train"],
        ["train", "x", "--out", "y", "--steps", "many"],
        ["personalize", "x", "--out", "y", "--steps", "many"],
        ["predict", "", "--out", "y.safetensors"],
        ["train", "", "--out", "y"],
        ["finetune", "x", "--photo", "", "--out", "y.safetensors"],
    ],
)
def test_usage_errors_are_one_line(words: list[str]) -> None:
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "constrained" not in result.stderr
    assert "" not in words or "expected a file or a folder, got ''" in result.stderr


INTERRUPTED = """
import sys, time
import hyperdreambooth
from hyperdreambooth.apps import cli

def command() -> None:
    try:
        print("ready", flush=True)
        while True:  # a signal just before one long sleep would be seen only after it
            time.sleep(0.01)
    except KeyboardInterrupt:
        {then}

cli.app.command()(command)
sys.argv = ["hdb", "command"]
cli.main()
"""


@pytest.mark.parametrize("then", ["raise", "raise RecursionError", "raise ValueError('an import')"])
def test_an_interrupt_is_one_line_and_130_whatever_becomes_of_it(then: str) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)" + INTERRUPTED
    words = [sys.executable, "-c", code.replace("{then}", then)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, printed = child.communicate(timeout=60)
    assert child.returncode == 130, printed
    assert printed == "interrupted; run the same command again to continue from what was saved\n"


EARLY = """
import sys

class Interrupt:
    def find_spec(self, name, *rest):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
from hyperdreambooth.__main__ import main
main()
"""


def test_an_interrupt_of_the_first_imports_is_one_line_too() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (InputError("photo.jpg: no such file"), 2, "error: photo.jpg: no such file"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "Permission denied"),
        (KeyboardInterrupt(), 130, "run the same command again"),
    ],
)
def test_errors_become_exit_codes(
    raised: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("hyperdreambooth.avatars.folder.render_folder", fail)
    result = CliRunner().invoke(cli.app, ["avatars", "render", "--out", str(tmp_path)])
    assert result.exit_code == code
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hyperdreambooth.avatars.folder.render_folder", lambda *_, **__: 1 // 0)
    result = CliRunner().invoke(cli.app, ["avatars", "render", "--out", str(tmp_path)])
    assert isinstance(result.exception, ZeroDivisionError)


def test_dry_run_prints_a_config_that_config_reads(tmp_path: Path) -> None:
    words = ["train", "photos", "--out", str(tmp_path / "out"), "--dry-run"]
    first = CliRunner().invoke(cli.app, [*words, "--steps", "7", "--set", "learn_basis=true"])
    assert first.exit_code == 0, first.output
    config = yaml.safe_load(first.stdout)
    assert config["steps"] == 7 and config["learn_basis"] is True and not (tmp_path / "out").exists()
    (tmp_path / "again.yaml").write_text(first.stdout)
    again = CliRunner().invoke(cli.app, [*words, "--config", str(tmp_path / "again.yaml")])
    assert yaml.safe_load(again.stdout) == config


def test_the_own_table_counts_and_others_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('base = "here"\nseed = 5\n[relax]\nrank = 9\n[generate]\nsteps = 3\n[train]\nwidth = 1\n')
    found = resolve("generate", GenerateConfig, file, ["guidance=2"], {"seed": None})
    assert (found.base.base, found.own.steps, found.own.guidance, found.own.seed) == ("here", 3, 2.0, 5)
    assert resolve("generate", GenerateConfig, file, ["steps=4"], {"seed": 6}).own.steps == 4


def dry(*words: object) -> dict[str, Any]:
    """The config that a command says it would run with."""
    result = CliRunner().invoke(cli.app, [*map(str, words), "--dry-run"])
    assert result.exit_code == 0, result.output
    return yaml.safe_load(result.stdout)


@pytest.mark.parametrize("words", [["demo"], ["personalize", "a.png"], ["finetune", "a", "--photo", "a.png"]])
def test_the_finetune_is_as_the_hypernetwork_recommends_unless_set(words: list[str], tmp_path: Path) -> None:
    recommended = load_info(EMBEDDED_HYPERNET).finetune
    command = [*words, "--out", tmp_path / "out"]
    assert recommended["lr"] != FinetuneConfig().lr
    assert {name: dry(*command)[name] for name in recommended} == recommended
    assert dry(*command, "--set", "lr=0.25")["lr"] == 0.25
    (tmp_path / "lr.toml").write_text("lr = 1e-3\n")  # what the default would be anyway
    assert dry(*command, "--config", tmp_path / "lr.toml")["lr"] == 1e-3
    if words != ["demo"]:
        assert dry(*command, "--base", "owner/another")["lr"] == FinetuneConfig().lr


def test_train_takes_the_finetune_table_with_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[finetune]\nlr = 0.5\n[generate]\nsteps = 3\n")
    command = ["train", "photos", "--out", tmp_path / "out", "--config", tmp_path / "recipe.toml"]
    assert dry(*command)["finetune"] == {"lr": 0.5}
    assert dry(*command, "--set", "finetune.steps=9")["finetune"] == {"lr": 0.5, "steps": 9}
    result = CliRunner().invoke(cli.app, [*map(str, command), "--set", "finetune.steps=-1", "--dry-run"])
    assert result.exit_code == 2 and "steps" in result.stderr and result.stderr.count("\n") == 1


def test_a_build_without_a_base_has_a_stage_of_that_name(tmp_path: Path) -> None:
    config = dry("avatars", "build", "--out", tmp_path / "out", "--set", "base.steps=7")
    assert config["base"]["steps"] == 7 and config["base"]["batch"] == 64


def test_set_changes_one_key_of_a_nested_table_and_leaves_the_others() -> None:
    words = ["evaluate", "photos", "--out", "out", "--preset", "avatars"]
    plain, changed = dry(*words)["methods"], dry(*words, "--set", "methods.lidb.lr=0.5")["methods"]
    assert changed["lidb"] == {**plain["lidb"], "lr": 0.5} and plain["lidb"]["lr"] != 0.5
    assert {name: some for name, some in changed.items() if name != "lidb"} == {
        name: some for name, some in plain.items() if name != "lidb"
    }


def test_an_unknown_key_names_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown key 'stepz'.*steps"):
        resolve("generate", GenerateConfig, None, ["stepz=1"])


@pytest.mark.parametrize("preset", sorted(file.stem for file in PRESETS.glob("*.toml")))
@pytest.mark.parametrize(
    "command", ["dreambooth", "preoptimize", "train", "finetune", "personalize", "evaluate"]
)
def test_presets_fit_every_command(preset: str, command: str) -> None:
    words = {"finetune": ["x.safetensors", "--photo", "x.png"]}.get(command, ["photos"])
    result = CliRunner().invoke(cli.app, [command, *words, "--out", "out", "--config", preset, "--dry-run"])
    assert result.exit_code == 0, result.output


def test_a_folder_named_like_a_preset_is_not_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paper").mkdir()
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        cli.app, ["evaluate", "photos", "--out", "paper", "--preset", "paper", "--dry-run"]
    )
    assert result.exit_code == 0, result.output


def test_a_broken_connection_is_one_line() -> None:
    error = type("ReadError", (Exception,), {"__module__": "httpx2"})("reset by\npeer")
    assert cli.explain(error) == ("error: the network failed: reset by peer; try again", 1)


def test_quiet_shows_no_progress(tmp_path: Path) -> None:
    words = ["avatars", "render", "--out", str(tmp_path), "--identities", "1", "--photos", "1"]
    assert "1/1" in CliRunner().invoke(cli.app, words).stderr
    assert CliRunner().invoke(cli.app, ["--quiet", *words]).stderr == ""


def test_a_recipe_for_a_base_is_refused_by_no_command_that_loads_none(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('base = "here"\n[prepare]\nsize = 99\n')
    words = ["--out", tmp_path / "out", "--config", tmp_path / "recipe.toml"]
    assert dry("prepare", "photos", *words)["size"] == 99
    assert "base" not in dry("prepare", "photos", *words)
    refused = CliRunner().invoke(cli.app, ["avatars", "render", *map(str, words), "--dry-run"])
    assert refused.exit_code == 2 and "unknown key 'base'" in refused.stderr


def test_every_table_is_a_command() -> None:
    assert set(TABLES) <= set(COMMANDS)


def test_doctor_says_what_is_missing(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "--base", str(tmp_path)])
    assert result.exit_code == 1
    assert "torch" in result.stdout and f"MISSING: {tmp_path / 'model_index.json'}" in result.stdout


def test_the_version_and_a_wrong_word_before_the_command_are_one_line() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and result.stdout == f"hyperdreambooth {hyperdreambooth.__version__}\n"
    result = CliRunner().invoke(cli.app, ["--bogus"])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "Usage" in CliRunner().invoke(cli.app, []).output


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(InputError, match=r"^nope: .* no preset; the presets are avatars, "):
        resolve("generate", GenerateConfig, Path("nope"))


@pytest.mark.parametrize("words", [["relax", "x"], ["generate", "--prompt", "a"], ["train", "photos"]])
def test_a_dry_run_says_what_each_setting_means(words: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*words, "--out", "out", "--dry-run"])
    lines = result.stdout.splitlines()
    explained = {line.partition(":")[0] for above, line in pairwise(lines) if above.startswith("# ")}
    config = yaml.safe_load(result.stdout)
    assert explained <= config.keys() and {"seed", "base", "device"} <= explained


HEAVY = """
import sys
sys.argv = ["hdb", *sys.argv[1:]]
try:
    from hyperdreambooth.__main__ import main
    main()
finally:
    found = {"torch", "diffusers", "transformers", "peft"} & set(sys.modules)
    print("imported", *sorted(found))
"""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["predict", "none.png", "--out", "p.safetensors"], "none.png: no such photo"),
        (["predict", "tiny.png", "--out", "p.safetensors"], "tiny.png"),
        (["personalize", "none.png", "--out", "me"], "none.png: no such photo"),
        (["dreambooth", "torn.png", "--out", "me"], "torn.png"),
        (["generate", "--prompt", "a", "--out", "g", "--seed", "-1"], "--seed"),
        (["finetune", "torn.png", "--photo", "tiny.png", "--out", "f.safetensors"], "torn.png"),
        (["relax", "none.safetensors", "--out", "r.safetensors"], "no such file"),
        (["predict", "good.png", "--out", "good.png/p.safetensors"], "good.png"),
        (["train", "people", "--out", "good.png"], "out good.png"),
        (["generate", "--prompt", "a", "--out", "g", "--base", "good.png"], "pass it as a photo"),
        (["generate", "--prompt", "a", "--out", "g", "--set", "stepz=1"], "unknown key 'stepz'"),
        (["predict", "good.png", "--out", "p.safetensors", "--hypernet", "people"], "config.json"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_heavy_is_imported(
    words: list[str], named: str, tmp_path: Path
) -> None:
    """Seconds depend on the machine; what is imported does not."""
    (tmp_path / "people").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    Image.new("RGB", (24, 24)).save(tmp_path / "tiny.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    command = [sys.executable, "-c", HEAVY, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == "imported\n"


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("error: out/.ana.0123456789ab.tmp.safetensors: no", "error: out/ana.safetensors: no"),
        ("error: e/.forms-ab_c1/person.safetensors: no", "error: e/person.safetensors: no"),
        ("error: .cache/a.tmp: no", "error: .cache/a.tmp: no"),
    ],
)
def test_messages_name_no_hidden_file(line: str, seen: str) -> None:
    assert cli.visible(line) == seen


def test_what_a_stream_cannot_encode_is_escaped(tmp_path: Path) -> None:
    """As on Windows, where a pipe has a code page: the work is done by the time the name is printed."""
    words = ["avatars", "render", "--identities", "1", "--photos", "1", "--out", str(tmp_path / "日本")]
    coded = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "hyperdreambooth", *words]
    done = subprocess.run(command, capture_output=True, env=coded)
    assert done.returncode == 0, done.stderr
    # the second where even file names are ASCII (LC_ALL=C), whose bytes Python keeps as halves of characters
    assert any(name + b": 1 people" in done.stdout for name in (b"\\u65e5\\u672c", b"\\udcac"))
