"""The class users meet: prediction, the whole way, the folder that it leaves behind."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import micro
from hyperdreambooth import personalize as module
from hyperdreambooth.adapter import Adapter
from hyperdreambooth.apps.loading import load_personalizer
from hyperdreambooth.apps.person_folder import FILES, check_person, save_card
from hyperdreambooth.apps.saving import save_trained
from hyperdreambooth.apps.settings import BaseConfig
from hyperdreambooth.base.load import EMBEDDED_NAME, Base, load_base
from hyperdreambooth.config import load_config
from hyperdreambooth.faces.dataset import read_person
from hyperdreambooth.faces.image import open_photo, to_pixels
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.hypernet.predictor import load_hypernet
from hyperdreambooth.lora.formats.card import licence_of, model_card
from hyperdreambooth.lora.formats.headers import LoraInfo
from hyperdreambooth.personalize import Personalizer


@pytest.fixture(scope="module")
def hypernet(micro_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.hypernet(tmp_path_factory.mktemp("hypernet"), load_base(micro_dir, device="cpu"))


@pytest.fixture
def me(micro_dir: Path, hypernet: Path) -> Personalizer:
    return Personalizer.from_pretrained(micro_dir, hypernet, device="cpu")


def test_the_person_is_called_as_in_the_training(micro_dir: Path, hypernet: Path) -> None:
    base = load_base(micro_dir, "cpu", trigger="zwx", class_word="man")
    person = Personalizer(base, load_hypernet(hypernet))
    assert person.base.prompt("a [V]") == "a sks" and person.base.class_word == "face"


def test_a_prediction_is_the_average_over_the_photos(me: Personalizer, micro_photos: Path) -> None:
    photos = sorted((micro_photos / "person-1").glob("*.png"))
    one = me.predict(photos[0])
    assert one.kind == "lidb"
    assert one.lidb is not None
    alone = [me.predictor.predict(to_pixels(open_photo(photo), 32)[None])[0] for photo in photos]
    torch.testing.assert_close(one.lidb.numbers, alone[0])
    every = me.predict(micro_photos / "person-1").lidb
    assert every is not None
    torch.testing.assert_close(every.numbers, torch.stack(alone).mean(0))
    again = me.predict([str(photo) for photo in photos]).lidb
    assert again is not None
    torch.testing.assert_close(again.numbers, every.numbers)
    stranger = me.predict(micro_photos / "person-2").lidb
    assert stranger is not None
    assert (stranger.numbers - every.numbers).abs().max() > 1e-3


def test_personalize_is_predict_relax_finetune(me: Personalizer, micro_photos: Path) -> None:
    photo = micro_photos / "person-0" / "0.png"
    prediction = me.predict(photo)
    untrained = me.personalize(photo, rank=3, steps=0)
    for name, (down, up) in prediction.factors.items():
        relaxed_down, relaxed_up = untrained.factors[name]
        torch.testing.assert_close(relaxed_up @ relaxed_down, up @ down, atol=1e-5, rtol=1e-4)
    for way in ("complement", "side_by_side"):
        config = load_config(FinetuneConfig, way=way, batch=2)
        trained = me.personalize(photo, rank=3, steps=2, config=config, prediction=prediction)
        assert (trained.rank, trained.kind, trained.trigger) == (3, "lora", "sks")
        assert trained.metadata["steps"] == "2"
    prior = FinetuneConfig(prior_weight=0.5, prior_images=1)
    me.personalize(photo, rank=2, steps=1, prediction=prediction, config=prior)
    images = me.generate(["a [V] face"], adapter=untrained, steps=1)
    assert [image.size for image in images] == [(32, 32)]
    assert set(me.seconds) == {"load", "predict", "relax", "finetune", "generate"}
    assert all(seconds >= 0 for seconds in me.seconds.values())


def test_the_hypernetwork_says_how_to_finetune_and_the_user_has_the_last_word(
    me: Personalizer, micro_photos: Path
) -> None:
    photo = micro_photos / "person-0" / "0.png"
    plain = me.personalize(photo, rank=3, steps=2, config=FinetuneConfig(lr=5e-3, batch=1))
    me.predictor.info.finetune.update(rank=3, steps=2, lr=5e-3, batch=1)
    recommended, other = me.personalize(photo), me.personalize(photo, rank=2, config=FinetuneConfig(lr=1e-3))
    assert recommended.metadata == plain.metadata
    for name, (down, up) in plain.factors.items():
        assert torch.equal(recommended.factors[name][0], down)
        assert torch.equal(recommended.factors[name][1], up)
    assert (other.rank, other.metadata["steps"]) == (2, "2")
    me.predictor.info.finetune.update(nonsense=1)
    with pytest.raises(InputError, match="unknown key 'nonsense'"):
        me.personalize(photo)


def test_personalize_is_a_function_of_photo_and_seed(me: Personalizer, micro_photos: Path) -> None:
    photo = micro_photos / "person-0" / "0.png"
    one, same, other = (me.personalize(photo, rank=2, steps=2, seed=seed) for seed in (0, 0, 1))
    for name, (_, up) in one.factors.items():
        assert torch.equal(up, same.factors[name][1])
    assert any(not torch.equal(up, other.factors[name][1]) for name, (_, up) in one.factors.items())


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, micro_photos: Path) -> None:
    photos = read_person([micro_photos / "person-0"])
    check_person(tmp_path / "new" / "deep", photos)
    assert not (tmp_path / "new").exists()
    check_person(tmp_path, photos)
    (tmp_path / ".DS_Store").touch()
    check_person(tmp_path, photos)
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    for taken in (tmp_path, tmp_path / "holiday.jpg"):
        with pytest.raises(InputError, match="another --out"):
            check_person(taken, photos)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "report.json",
            '{"command": "personalize", "files": {}}',
        ),  # without the record of what it was made from
        ("config.json", '{"model_type": "clip"}'),
        ("config.json", "[]"),
    ],
)
def test_only_a_folder_that_says_what_it_was_made_from_is_gone_on_from(
    tmp_path: Path, micro_photos: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="another --out"):
        check_person(tmp_path, read_person([micro_photos / "person-0"]))


def test_the_card_tells_three_tools_what_to_do(me: Personalizer, micro_photos: Path, tmp_path: Path) -> None:
    prediction = me.predict(micro_photos / "person-0")
    adapter = me.personalize(micro_photos / "person-0", rank=2, steps=1, prediction=prediction)
    prediction.save(tmp_path / "out" / FILES["lidb"], "lidb")
    save_trained(adapter, tmp_path / "out", me.base)
    save_card(tmp_path / "out", adapter, me.base.class_word, tuple(FILES))
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["instance_prompt"] == "sks face" and "template:sd-lora" in front["tags"]
    assert front["license"] == "other" and "base_model" not in front  # a folder here, which the hub lacks
    assert front["widget"][0]["output"]["url"] == "picture.png"
    for tool in ("diffusers", "ComfyUI", "A1111"):
        assert f"## {tool}" in text
    for name in FILES.values():
        assert name in text
    code = text.split("```python\n")[1].split("```")[0].replace("path/to/base", me.base.source)
    monkey: dict[str, Any] = {}
    with contextlib.chdir(tmp_path / "out"):
        exec(code.replace(").images", ", num_inference_steps=1).images"), monkey)
    assert monkey["image"].size == (32, 32)


@pytest.mark.parametrize(
    ("source", "tools", "line"),
    [
        ("hyperdreambooth/avatars", "", "import EMBEDDED as base"),
        ("someone/a-base", "ComfyUI, A1111", 'base = "someone/a-base"\n'),
        ("/home/me/my base", "ComfyUI, A1111", 'base = "path/to/my base"  #'),
    ],
)
def test_the_card_names_tools_that_have_the_base_and_a_place_that_is_there(
    source: str, tools: str, line: str
) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {name: (torch.ones(1, 1, 768), torch.ones(1, 1280, 1))}
    text = Adapter(factors, "sks", "", source, family="sd1").card(None)
    assert line in text and ("base_model" in text) == (not source.startswith("/"))
    assert ", ".join(tool for tool in ("ComfyUI", "A1111") if f"\n## {tool}" in text) == tools
    assert "{" not in text.replace("{}", "")


@pytest.mark.parametrize(
    ("family", "heading"), [("sdxl", "A1111 and Forge"), ("flux", "Forge"), ("sd3", "Forge")]
)
def test_the_card_of_a_transformer_names_no_a1111(family: str, heading: str) -> None:
    files = {"diffusers": "a.safetensors", "kohya": "b.safetensors"}
    info = LoraInfo("sks", "someone/a-base", 64, "Ana")
    text = model_card(info, "sks face", files, 4, None, "base = 1", "other", family)
    assert f"\n\n## {heading}\n\n" in text and "<lora:b:1>" in text and "\n\n\n" not in text


def test_the_licence_is_the_bases_own(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == "other"
    (tmp_path / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    assert licence_of(tmp_path) == "creativeml-openrail-m"


def test_what_does_not_belong_together_is_refused(
    micro_dir: Path, micro_base: Base, hypernet: Path, tmp_path: Path, micro_photos: Path
) -> None:
    far = tmp_path / "a base of gigabytes"  # nothing of it is read before these are said
    with pytest.raises(InputError, match="hypernet: expected the one trained for base"):
        Personalizer.from_pretrained(far)
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        Personalizer.from_pretrained(far, tmp_path / "nowhere", device="cpu")
    for word in ({"trigger": "zzz"}, {"class_word": "man"}):
        with pytest.raises(InputError, match=r"the hypernetwork was trained with '(sks|face)', got"):
            load_personalizer(BaseConfig(base=str(far), device="cpu", **word), str(hypernet))
    own = BaseConfig(base=str(micro_dir), device="cpu", trigger="sks", class_word="face")
    side_by_side = FinetuneConfig(way="side_by_side")
    with pytest.raises(InputError, match="rank 5000: expected 1 to"):
        load_personalizer(own, str(hypernet)).personalize(
            micro_photos / "person-0", rank=5000, config=side_by_side
        )
    predictor = Personalizer.from_pretrained(micro_dir, hypernet, device="cpu").predictor
    with pytest.raises(InputError, match="0000000000000000"):
        Personalizer(replace(micro_base, fingerprint="0" * 16), predictor)
    me = Personalizer.from_pretrained(micro_dir, hypernet, device="cpu")
    with pytest.raises(InputError, match=r"gone\.png"):
        me.predict(tmp_path / "gone.png")
    with pytest.raises(InputError, match="no photo"):
        me.personalize([])
    with pytest.raises(InputError, match="rank"):
        me.personalize(micro_photos / "person-0", rank=1, config=side_by_side)


def test_nothing_given_means_the_embedded_pack(
    micro_dir: Path, hypernet: Path, micro_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperdreambooth.base.load.EMBEDDED", micro_dir)
    monkeypatch.setattr(module, "EMBEDDED_HYPERNET", hypernet)
    me = Personalizer.from_pretrained(device="cpu")
    assert me.base.source == EMBEDDED_NAME
    assert Personalizer.from_pretrained(micro_dir, device="cpu").base.source == EMBEDDED_NAME
    photo = micro_photos / "person-0" / "0.png"
    assert me.predict(photo).rank == 1 and me.personalize(photo, rank=2, steps=1).rank == 2
