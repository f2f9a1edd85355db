"""The public surface: every line of docs/api.md runs, with types that are public themselves."""

from __future__ import annotations

import inspect
import pydoc
import re
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import hyperdreambooth
import micro
from hyperdreambooth import Adapter, FinetuneConfig, InputError, Personalizer, load_base, load_hypernet
from hyperdreambooth import hub as module

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hypernet(micro_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.hypernet(tmp_path_factory.mktemp("hypernet"), load_base(micro_dir, device="cpu"))


@pytest.fixture
def me(micro_dir: Path, hypernet: Path) -> Personalizer:
    return Personalizer.from_pretrained(micro_dir, hypernet, device="cpu")


class Hub:
    """A hub in a folder, at the boundary of huggingface_hub: repositories are subfolders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[dict[str, Any]] = []

    def __call__(self, token: str | None = None) -> Hub:
        self.asked.append({"token": token})
        return self

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        self.asked.append({"repo_id": repo_id, "private": private})
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> SimpleNamespace:
        self.asked.append(options)
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def hf_hub_download(self, repo_id: str, file: str, **options: Any) -> str:
        self.asked.append(options)
        return str(self.folder / repo_id / file)

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.asked.append(options)
        return str(self.folder / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(module, "HfApi", made)
    monkeypatch.setattr(module, "hf_hub_download", made.hf_hub_download)
    monkeypatch.setattr(module, "snapshot_download", made.snapshot_download)
    return made


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_line_of_the_api_page_runs(
    micro_dir: Path,
    hypernet: Path,
    micro_photos: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a micro base: its own name stands for the embedded one, and few steps for many."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(micro_photos, "photos")
    shutil.copytree(micro_photos / "person-0", "photos/ana")
    hub.create_repo("me/base", None, True)
    names: dict[str, Any] = {name: getattr(hyperdreambooth, name) for name in hyperdreambooth.__all__}
    names |= {"image": Image.open("photos/ana/0.png"), "token": "hf_token"}
    first = Personalizer.from_pretrained(micro_dir, hypernet, device="cpu")
    names |= {"ben": first.predict("photos/person-1"), "cleo": first.predict("photos/person-2")}
    names |= {"DiffusionPipeline": DiffusionPipeline, "folder": micro_dir}
    (first.predict("photos/person-1")).save("watercolour.safetensors")
    eye = load_hypernet(hypernet).encoder.source
    small = [
        (
            "Personalizer.from_pretrained()",
            f"Personalizer.from_pretrained({str(micro_dir)!r}, {str(hypernet)!r})",
        ),
        ('from_pretrained("me/base", "me/hypernet"', f'from_pretrained({str(micro_dir)!r}, "me/hypernet"'),
        ('"stable-diffusion-v1-5/stable-diffusion-v1-5", dtype="bfloat16"', repr(str(micro_dir))),
        ('method="lora", rank=8', 'method="lora", rank=8, steps=1'),
        ("PreoptConfig(steps=300)", "PreoptConfig(steps=1, down_dim=8, up_dim=4)"),
        ("HypernetConfig()", f"HypernetConfig(encoder={eye!r}, steps=1, batch=2, width=8, heads=2)"),
    ]
    for block in blocks():
        for written, meant in small:
            block = block.replace(written, meant)
        exec(compile(block, "docs/api.md", "exec"), names)
    made = names["ana"], names["mix"], names["small"]
    assert all(isinstance(adapter, Adapter) for adapter in made)
    assert (0.5 * names["draft"] + 0.5 * names["ben"]).kind == "lidb"
    assert isinstance(names["me"], Personalizer) and Path("beach.png").is_file()
    assert all(option["revision"] in (None, "main", "v2") for option in hub.asked if "revision" in option)
    assert {"private": True, "repo_id": "me/ana"} in hub.asked


@pytest.mark.slow
def test_the_first_block_runs_on_the_embedded_avatars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperdreambooth.avatars.folder import photo

    monkeypatch.chdir(tmp_path)
    image, _ = photo(3_000_001, 0)
    me = Personalizer.from_pretrained(device="cpu")
    ben, cleo = (me.predict(photo(person, 0)[0]) for person in (3_000_002, 3_000_003))
    names: dict[str, Any] = {"image": image, "ben": ben, "cleo": cleo}
    exec(compile(blocks()[0], "docs/api.md", "exec"), names)
    assert [picture.size for picture in names["pictures"]] == [(128, 128)] * 3
    assert names["ana"].resolution == 128


def test_functions_take_public_types_alone() -> None:
    public = {getattr(hyperdreambooth, name) for name in hyperdreambooth.__all__ if name != "__version__"}
    for name in ("dreambooth", "finetune_adapter", "generate_images", "preoptimize", "train_hypernet"):
        function = getattr(hyperdreambooth, name)
        hints = typing.get_type_hints(function)
        for parameter in inspect.signature(function).parameters:
            for part in leaves(hints[parameter]):
                ours = getattr(part, "__module__", "").startswith("hyperdreambooth")
                assert not ours or part in public, f"{name}({parameter}: {part})"


def leaves(kind: Any) -> list[Any]:
    """The types that an annotation is made of."""
    inner = [argument for argument in typing.get_args(kind) if argument is not Ellipsis]
    flat = [each for argument in inner for each in (argument if isinstance(argument, list) else [argument])]
    return [leaf for each in flat for leaf in leaves(each)] if flat else [kind]


def test_help_shows_every_public_name_with_its_arguments() -> None:
    shown = pydoc.plain(pydoc.render_doc(hyperdreambooth))
    for name in set(hyperdreambooth.__all__) - {"__version__"}:
        assert name in shown
        made = getattr(hyperdreambooth, name)
        if inspect.isfunction(made):
            assert made.__doc__ and "Args:" in made.__doc__ and "Raises:" in made.__doc__, name
        elif inspect.isclass(made):
            assert made.__doc__
            for method, function in inspect.getmembers(made, inspect.isfunction):
                own = function.__module__.startswith("hyperdreambooth") and not method.startswith("_")
                assert not own or function.__doc__, f"{name}.{method}"


def test_a_picture_in_memory_is_a_photo(me: Personalizer, micro_photos: Path) -> None:
    path = micro_photos / "person-0" / "0.png"
    image = Image.open(path)
    one, other = me.predict(path), me.predict(image)
    assert one.lidb is not None and other.lidb is not None
    assert torch.equal(one.lidb.numbers, other.lidb.numbers)
    several = me.predict([image, micro_photos / "person-0" / "1.png"])
    assert several.lidb is not None and not torch.equal(several.lidb.numbers, one.lidb.numbers)
    with pytest.raises(InputError, match="picture 1: the picture is 8×8"):
        me.predict(Image.new("RGB", (8, 8)))


def test_returning_false_ends_the_finetune(me: Personalizer, micro_photos: Path) -> None:
    seen: list[tuple[int, float]] = []

    def watch(step: int, loss: float) -> bool:
        seen.append((step, loss))
        return step < 3

    config = FinetuneConfig(batch=2)
    ended = me.personalize(micro_photos / "person-0", steps=9, config=config, callback=watch)
    assert [step for step, _ in seen] == [1, 2, 3] and ended.metadata["steps"] == "3"
    whole = me.personalize(micro_photos / "person-0", steps=3, config=config, callback=lambda *_: None)
    for site, (down, up) in whole.factors.items():
        assert torch.equal(down, ended.factors[site][0]) and torch.equal(up, ended.factors[site][1])


def test_the_worn_pipeline_draws_the_person_and_is_bare_afterwards(
    me: Personalizer, micro_photos: Path
) -> None:
    ana = me.personalize(micro_photos / "person-0", steps=1)
    before = {name: tensor.clone() for name, tensor in me.base.denoiser.state_dict().items()}
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}

    def draw(pipe: Any) -> Any:
        return pipe("a sks face", generator=torch.Generator().manual_seed(0), **options).images

    with me.wearing(ana) as pipe:
        worn = draw(pipe)
    bare = draw(me.base.pipe)
    pipe.load_lora_weights(ana.state_dict())
    loaded = draw(pipe)
    pipe.unload_lora_weights()
    assert abs(worn - bare).max() > 1e-3 and abs(worn - loaded).max() < 1e-4
    after = me.base.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "lidb"])
def test_what_is_saved_is_loaded(me: Personalizer, micro_photos: Path, tmp_path: Path, form: Any) -> None:
    ana = me.predict(micro_photos / "person-0")
    ana.save(tmp_path / "ana.safetensors", form)
    back = me.load(tmp_path / "ana.safetensors")
    assert back.kind == ("lidb" if form == "lidb" else "lora")
    assert back.resolution == me.base.resolution == 32 and back.trigger == "sks"
    for site, (down, up) in ana.factors.items():
        torch.testing.assert_close(back.factors[site][1] @ back.factors[site][0], up @ down)


def test_an_adapter_on_the_hub_is_the_same(me: Personalizer, micro_photos: Path, hub: Hub) -> None:
    ana = me.predict(micro_photos / "person-0")
    assert ana.push_to_hub("me/ana", private=True, token="t") == "https://hub/me/ana/commit/1"
    assert {"token": "t"} in hub.asked and {"repo_id": "me/ana", "private": True} in hub.asked
    back = me.load("me/ana", weight_name="person.lidb.safetensors", revision="r", token="t")
    assert back.kind == "lidb" and {"revision": "r", "token": "t"} in hub.asked
    card = (hub.folder / "me/ana/README.md").read_text()
    assert "sks" in card and "pytorch_lora_weights.safetensors" in card


def test_the_hub_out_of_reach_is_one_line(me: Personalizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Callable[[], None]:
        raise OSError("Cannot reach\nhttps://huggingface.co")

    for name in ("HfApi", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(module, name, offline)
    for ask in (lambda: me.load("me/ana"), lambda: me.push_to_hub("me/h"), lambda: load_hypernet("me/h")):
        with pytest.raises(InputError, match=r"me/(ana|h).*Cannot reach.*check the name, the token") as error:
            ask()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda me, ana: me.generate("a [V] face", "ana.safetensors"), "expected an Adapter, got str"),
        (lambda me, ana: me.generate("a [V] face", [ana, ana]), "one for each of 1 prompts, got 2; repeat"),
        (lambda me, ana: me.generate("a [V] face", ana, steps=0), "steps: expected 1 or more, got 0"),
        (lambda me, ana: me.predict(None), "photo: expected a path or a PIL image, got NoneType"),
        (lambda me, ana: me.predict(np.zeros((8, 8, 3))), "expected a path or a PIL image, got ndarray"),
        (lambda me, ana: me.load("nowhere.safetensors"), "no such file"),
        (lambda me, ana: me.load("nowhere/ana.safetensors"), "no such file"),  # not a hub id
    ],
)
def test_a_wrong_call_is_one_line(me: Personalizer, micro_photos: Path, wrong: Any, words: str) -> None:
    ana = me.predict(micro_photos / "person-0")
    with pytest.raises(InputError, match=re.escape(words)) as error:
        wrong(me, ana)
    assert "\n" not in str(error.value)


def test_an_adapter_is_one_line_and_does_arithmetic(me: Personalizer, micro_photos: Path) -> None:
    ana, ben = (me.predict(micro_photos / f"person-{k}") for k in (0, 1))
    assert repr(ana).startswith("Adapter(lidb, rank 1, 'sks', 32 px, base ") and "\n" not in repr(ana)
    for site, (down, up) in sum([ana, ben, ana - ben]).factors.items():  # twice ana
        torch.testing.assert_close(up @ down / 2, ana.factors[site][1] @ ana.factors[site][0])
    halved = (ana / 2).factors
    assert all(torch.equal(2 * up, ana.factors[site][1]) for site, (_, up) in halved.items())
    with pytest.raises(TypeError):
        _ = ana + 1  # type: ignore[operator]


def test_an_adapter_does_not_change_when_it_is_used() -> None:
    with pytest.raises(AttributeError):
        Adapter({}, "sks", "", "").trigger = "zwx"  # type: ignore[misc]
