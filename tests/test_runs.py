"""Run folders: whole files, exact resume, no pickles."""

from __future__ import annotations

import errno
import json
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from hyperdreambooth import runs
from hyperdreambooth.files import InputError, save_tensors
from hyperdreambooth.runs import Run, environment, rng


class Sub(BaseModel):
    lr: float = 0.1


class Config(BaseModel):
    steps: int = 10
    sub: Sub = Sub()


def same(a: Any, b: Any) -> bool:
    """Equal in structure, types and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- draw, environment --


def test_draw_is_a_function_of_its_key_alone() -> None:
    one = torch.randn(5, generator=rng(0, "ana", 3))
    torch.randn(7)
    assert torch.equal(one, torch.randn(5, generator=rng(0, "ana", 3)))
    for other in [
        (0, "ana", 4),
        (1, "ana", 3),
        (0, "ana", "3"),
        ("0", "ana", 3),
        (0, "ana3"),
        (0, "an", "a", 3),
    ]:
        assert not torch.equal(one, torch.randn(5, generator=rng(*other)))


def test_draw_is_the_same_on_every_machine() -> None:
    assert rng(0, "ana", 3).initial_seed() == 7958433233463865792


def test_the_environment_names_the_versions() -> None:
    stamp = environment()
    assert stamp["torch"] == torch.__version__ and {"python", "platform", "diffusers"} <= stamp.keys()


@pytest.mark.parametrize("failure", [OSError(), subprocess.CalledProcessError(128, "git")])
def test_no_git_no_commit(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(subprocess, "run", fails)
    runs._commit.cache_clear()
    assert "commit" not in environment()
    runs._commit.cache_clear()


# -- the run folder --


def state_of_training() -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "rng": torch.Generator().get_state(),
        "shared": [model.weight, model.weight],
        "best": float("inf"),
        "nan": torch.tensor(float("nan")).isnan(),
        "plain": [1, 0.1, "x", None, True, (1, (2,))],
        "odd keys": {1: "int", "1": "str", (0, 1): "tuple", "$": "tensor"},
        "$": {"$": {}},
    }


def test_a_checkpoint_gives_back_every_bit(tmp_path: Path) -> None:
    state = state_of_training()
    run = Run(tmp_path, Config())
    run.save(3, state)
    found = Run(tmp_path, Config()).latest()
    assert found is not None and found[0] == 3
    state["shared"] = [weight.detach() for weight in state["shared"]]
    state["model"] = dict(state["model"])  # an OrderedDict comes back as a dict
    assert same(found[1], state)
    optimizer = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
    optimizer.load_state_dict(found[1]["optimizer"])


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text(max_size=3) | st.integers() | st.just("$")
trees = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


@given(trees)
def test_any_plain_tree_survives(tree: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    assert same(runs._unpack(json.loads(json.dumps(runs._pack(tree, tensors))), tensors), tree)


def test_what_would_need_a_pickle_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, Config())
    with pytest.raises(TypeError, match="not object"):
        run.save(1, {"a": [object()]})
    assert run.latest() is None and names(tmp_path) == ["config.json", "environment.json"]


def test_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    run = Run(tmp_path, Config())
    for step in (1, 9, 10, 100):
        run.save(step, {"step": step})
    run.save(200, {"step": 200}, keep=3)
    (tmp_path / "checkpoint-best").mkdir()  # not ours
    kept = [name for name in names(tmp_path) if name.startswith("checkpoint")]
    assert kept == ["checkpoint-10", "checkpoint-100", "checkpoint-200", "checkpoint-best"]
    assert run.latest() == (200, {"step": 200})
    run.clear()
    assert run.latest() is None and "checkpoint-best" in names(tmp_path)


def test_what_was_loaded_may_be_changed(tmp_path: Path) -> None:
    """Files are memory-mapped, and optimisers work on the very tensors they are given."""
    run = Run(tmp_path, Config())
    run.save(1, {"a": torch.ones(5000)})
    found = run.latest()
    assert found is not None
    found[1]["a"].mul_(7)
    again = run.latest()
    assert again is not None and again[1]["a"].eq(1).all()
    run.clear()
    assert found[1]["a"].eq(7).all()


def test_unreadable_checkpoints_are_passed_over(tmp_path: Path) -> None:
    run = Run(tmp_path, Config())
    for step in range(1, 6):
        run.save(step, {"a": torch.full((100,), step), "step": step}, keep=9)
    (tmp_path / "checkpoint-5" / "tree.json").unlink()
    (tmp_path / "checkpoint-4" / "tree.json").write_text('{"a": {"$": "tensor", "of": "7"}}')
    torn = tmp_path / "checkpoint-3" / "tensors.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    (tmp_path / ".checkpoint-6.abc.tmp").mkdir()  # a kill while saving
    found = run.latest()
    assert found is not None and found[0] == found[1]["step"] == 2
    run.save(3, {"step": 3})
    kept = [name for name in names(tmp_path) if "checkpoint" in name]
    assert kept == ["checkpoint-2", "checkpoint-3"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run = Run(tmp_path, Config())
    run.save(1, {"a": 1})
    run.save(1, {"a": 2})
    assert run.latest() == (1, {"a": 2})


def test_another_config_or_input_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, Config(), inputs={"base": "aa"})
    Run(tmp_path, Config(), inputs={"base": "aa"})
    with pytest.raises(InputError) as caught:
        Run(tmp_path, Config(steps=20, sub=Sub(lr=0.5)), inputs={"base": "bb"})
    text = str(caught.value)
    for part in (
        "config.steps was 10, now 20",
        "config.sub.lr was 0.1, now 0.5",
        'inputs.base was "aa", now "bb"',
    ):
        assert part in text
    assert "--out" in text
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="expected a JSON file"):
        Run(tmp_path, Config())


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="expected a folder"):
        Run(tmp_path / "file", Config())


def read_log(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]


def test_the_log_is_json_lines(tmp_path: Path) -> None:
    run = Run(tmp_path, Config())
    weight = torch.ones(1, requires_grad=True)
    run.log(1, loss=weight.sum(), rate=0.5, word="ü\u2028\n", none=None, count=3, bad=float("nan"))
    (line,) = read_log(run)
    assert line.pop("time") > 0
    assert line == {
        "step": 1,
        "loss": 1.0,
        "rate": 0.5,
        "word": "ü\u2028\n",
        "none": None,
        "count": 3,
        "bad": None,
    }


def test_the_log_goes_back_with_the_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, Config())
    assert run.latest() is None
    for step in range(1, 6):
        run.log(step, loss=step)
        if step == 3:
            run.save(step, {})
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "lo')  # killed here
    run = Run(tmp_path, Config())
    assert run.latest() == (3, {})
    run.log(4, loss=4)
    assert [line["step"] for line in read_log(run)] == [1, 2, 3, 4]
    run.clear()
    assert run.latest() is None and read_log(run) == []


def test_a_torn_line_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    run = Run(tmp_path, Config())
    run.log(2)
    run.log(3)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines[:2] == ['{"step": 1}', '{"st'] and [json.loads(line)["step"] for line in lines[2:]] == [2, 3]


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk's end: the same call fails, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = Run(tmp_path / "run", Config())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1_000_000)})
        with pytest.raises(OSError):
            run.save(1, {"a": torch.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert caught.value.errno == errno.EFBIG and not isinstance(caught.value, InputError)
    assert names(tmp_path) == ["run"] and names(run.folder) == ["config.json", "environment.json"]


def test_killed_anywhere_the_newest_checkpoint_is_whole(tmp_path: Path) -> None:
    script = """
        import sys, torch
        from pathlib import Path
        from pydantic import BaseModel
        from hyperdreambooth.runs import Run
        class Config(BaseModel): lr: float = 10
        run = Run(Path(sys.argv[1]), Config())
        found = run.latest()
        step, state = found or (0, {"a": torch.zeros(10_000)})
        assert state["a"].eq(step).all()
        print("ready", step, flush=True)
        while True:
            step += 1
            run.log(step, loss=step)
            run.save(step, {"a": torch.full((10_000,), float(step)), "step": step})
            print(step, flush=True)
    """
    last = 0
    for lines in (1, 3, 8):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            assert words[0] == "ready" and int(words[1]) >= last
            for _ in range(lines):
                last = int(process.stdout.readline())
            process.kill()
    run = Run(tmp_path, Sub(lr=10))
    found = run.latest()
    assert found is not None and found[0] >= last and found[1]["a"].eq(found[0]).all()
    assert [line["step"] for line in read_log(run)] == list(range(1, found[0] + 1))
