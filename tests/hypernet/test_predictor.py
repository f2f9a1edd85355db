"""The folder says everything about itself, or is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eyes
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError, load_tensors, save_tensors
from hyperdreambooth.hypernet import predictor as module
from hyperdreambooth.hypernet.decoder import HyperNetwork, NetworkShape
from hyperdreambooth.hypernet.encoder import load_encoder
from hyperdreambooth.hypernet.predictor import HypernetInfo, Predictor, load_hypernet, load_info
from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import load_lidb, save_lidb
from hyperdreambooth.lidb.weights import Layout, factors


def made(base: Base, folder: Path, learn_basis: bool = False) -> Predictor:
    """An untrained hypernetwork of the micro base, whose predictions differ."""
    eye = load_encoder(eyes.resnet(folder / "eye"))
    layout = Layout(base.sites, 1, 6, 4)
    basis = seeded_basis(base.sites, 6, 4, 7)
    net = HyperNetwork(layout, NetworkShape(eye.tokens, eye.channels, 8, 1, 2, 2), basis, learn_basis, seed=5)
    with torch.no_grad():
        net.head.mul_(1e3)
        if learn_basis:
            net.get_parameter("basis_up_0").mul_(1.5)
    net.normalise(
        torch.randn(layout.size), torch.rand(layout.size) + 0.1, torch.randn(9, eye.tokens, eye.channels)
    )
    facts = HypernetInfo(
        base.fingerprint, base.source, base.trigger, base.class_word, base.resolution, {"step": 12}
    )
    return Predictor(net, eye, facts)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32) * 2 - 1


@pytest.mark.parametrize("learn_basis", [False, True])
def test_a_saved_folder_predicts_the_same(
    micro_base: Base, tmp_path: Path, pixels: torch.Tensor, learn_basis: bool
) -> None:
    first = made(micro_base, tmp_path, learn_basis)
    first.save(tmp_path / "hypernet")
    again = load_hypernet(tmp_path / "hypernet")
    assert torch.equal(again.predict(pixels), first.predict(pixels))
    assert again.info == first.info
    assert again.layout == first.layout
    assert again.basis_source == first.basis_source
    assert again.basis_source == (f"hypernet:{basis_fingerprint(first.basis)}" if learn_basis else "seed:7")
    assert torch.equal(again.basis.up[micro_base.sites[0].name], first.basis.up[micro_base.sites[0].name])
    assert again.encoder.source == str(tmp_path / "hypernet" / "encoder")
    assert "12 steps" in (tmp_path / "hypernet" / "README.md").read_text()


def test_strength_multiplies_delta_w(micro_base: Base, tmp_path: Path, pixels: torch.Tensor) -> None:
    plain = made(micro_base, tmp_path)
    bold = Predictor(plain.network, plain.encoder, replace(plain.info, strength=2.5))
    for name, (down, up) in bold.factors(bold.predict(pixels)).items():
        cautious = plain.factors(plain.predict(pixels))[name]
        torch.testing.assert_close(up @ down, 2.5 * cautious[1] @ cautious[0])


@pytest.mark.parametrize("change", [{"strength": 2.5}, {"resolution": 16}])
def test_the_fingerprint_names_all_that_a_prediction_comes_out_of(
    micro_base: Base, tmp_path: Path, change: dict[str, float]
) -> None:
    plain = made(micro_base, tmp_path)
    other = Predictor(plain.network, plain.encoder, replace(plain.info, **change))
    again = Predictor(plain.network, plain.encoder, replace(plain.info, training={"step": 99}))
    assert other.fingerprint != plain.fingerprint == again.fingerprint


def test_several_photos_are_averaged(micro_base: Base, tmp_path: Path, pixels: torch.Tensor) -> None:
    predictor = made(micro_base, tmp_path)
    alone = torch.cat([predictor.predict(pixels[k : k + 1]) for k in range(3)])
    assert alone.std(0).max() > 0.01
    torch.testing.assert_close(predictor.average(pixels), alone.mean(0, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learn_basis", [False, True])
def test_a_prediction_becomes_a_person_on_disk(
    micro_base: Base, tmp_path: Path, pixels: torch.Tensor, learn_basis: bool
) -> None:
    predictor = made(micro_base, tmp_path, learn_basis)
    lidb = predictor.lidb(predictor.average(pixels))
    save_lidb(tmp_path / "ana.lidb.safetensors", lidb)
    again = load_lidb(tmp_path / "ana.lidb.safetensors", micro_base.sites)
    assert again.basis_source == predictor.basis_source
    assert again.trigger == micro_base.trigger
    worn, expected = (
        predictor.factors(predictor.average(pixels)),
        factors(lidb.layout, predictor.basis, lidb.numbers[None]),
    )
    assert all(torch.equal(worn[name][1], up) for name, (_, up) in expected.items())


def test_a_foreign_base_is_refused_with_both_fingerprints(micro_base: Base, tmp_path: Path) -> None:
    predictor = made(micro_base, tmp_path)
    predictor.check_fits(micro_base.fingerprint)
    with pytest.raises(InputError, match=f"{micro_base.fingerprint}.*0123456789abcdef"):
        predictor.check_fits("0123456789abcdef")


def test_a_large_encoder_is_named_and_must_be_the_same_later(
    micro_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: torch.Tensor
) -> None:
    monkeypatch.setattr(module, "COPIED", 100)
    first = made(micro_base, tmp_path)
    first.save(tmp_path / "hypernet")
    assert not (tmp_path / "hypernet" / "encoder").exists()
    assert torch.equal(load_hypernet(tmp_path / "hypernet").predict(pixels), first.predict(pixels))
    eyes.resnet(tmp_path / "eye", seed=1)
    with pytest.raises(InputError, match=first.encoder.fingerprint):
        load_hypernet(tmp_path / "hypernet")


def _break(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "half":  # killed between the weights and the config
        save_tensors(weights, {name: t + 1 for name, t in load_tensors(weights)[0].items()})
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif how == "nan":
        save_tensors(weights, {name: t * float("nan") for name, t in load_tensors(weights)[0].items()})
    elif how == "format":
        (folder / "config.json").write_text(json.dumps({**config, "format": 99}))
    elif how == "shape":
        config["network"]["width"] = 16
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "field":
        del config["layout"]
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "basis":
        config["basis"]["source"] = "seed:8"
        (folder / "config.json").write_text(json.dumps(config))
    else:
        (folder / "config.json").unlink()


def test_a_folder_that_does_not_say_what_it_was_made_for(micro_base: Base, tmp_path: Path) -> None:
    made(micro_base, tmp_path).save(tmp_path / "hypernet")
    config = json.loads((tmp_path / "hypernet" / "config.json").read_text())
    (tmp_path / "hypernet" / "config.json").write_text(json.dumps({**config, "facts": {"trigger": "sks"}}))
    for load in (load_info, load_hypernet):
        with pytest.raises(InputError, match=r"hypernet/config\.json: does not say.*base_fingerprint"):
            load(tmp_path / "hypernet")


@pytest.mark.parametrize("how", ["half", "truncated", "nan", "format", "shape", "field", "basis", "missing"])
def test_damaged_folders_are_one_line(micro_base: Base, tmp_path: Path, how: str) -> None:
    made(micro_base, tmp_path).save(tmp_path / "hypernet")
    _break(tmp_path / "hypernet", how)
    with pytest.raises(InputError, match="hypernet") as caught:
        load_hypernet(tmp_path / "hypernet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["owner/nothing-there", "/no/such/folder", "nothing"])
def test_what_is_not_there_is_one_line(source: str) -> None:
    with pytest.raises(InputError, match=f"hypernetwork {source}: no such folder"):
        load_hypernet(source)
