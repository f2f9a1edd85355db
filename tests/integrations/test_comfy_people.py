"""What the nodes do with photos and LoRAs, in the types of ComfyUI."""

from __future__ import annotations

import math
from pathlib import Path

import node
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import micro
from hyperdreambooth import Adapter, Base, InputError, Predictor, load_adapter, load_hypernet
from shared import YUNET, needs_photos, needs_yunet, portraits

people = node.part("people")


@pytest.fixture
def predictor(tmp_path: Path, micro_base: Base) -> Predictor:
    return load_hypernet(micro.hypernet(tmp_path / "hypernet", micro_base))


def photo(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (48, 32), colour)


def none(step: int, loss: float) -> None:
    """A callback that counts nothing."""


def made(base: Base, predictor: Predictor, colour: str, steps: int = 0) -> Adapter:
    return people.person(base, predictor, [photo(colour)], steps, 2, 0, none)


def delta(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer → ΔW by the rule of every reader: up @ down · alpha / rank."""
    layers = {name.removesuffix(".alpha") for name in lora if name.endswith(".alpha")}
    return {
        layer: lora[f"{layer}.lora_up.weight"] @ lora[f"{layer}.lora_down.weight"]
        * (lora[f"{layer}.alpha"] / len(lora[f"{layer}.lora_down.weight"]))
        for layer in layers
    }  # fmt: skip


def test_pictures_come_back_as_they_were() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    pictures = [Image.fromarray(one) for one in pixels]
    back = people.pictures(people.image(pictures))
    assert [one.tobytes() for one in back] == [one.tobytes() for one in pictures]


def test_transparency_of_a_photo_is_dropped() -> None:
    assert people.pictures(torch.ones(1, 4, 4, 4))[0].mode == "RGB"


def test_photos_that_are_crops_give_their_centre_square() -> None:
    wide = Image.new("RGB", (64, 32), "blue")
    wide.paste((255, 0, 0), (16, 0, 48, 32))
    crop = people.crops([wide], 32, False, Path())[0]
    assert crop.size == (32, 32)
    assert crop.getcolors() == [(1024, (255, 0, 0))]


@needs_photos
@needs_yunet
def test_face_is_found_with_the_file_in_the_models_folder() -> None:
    square = portraits(1, 512)[0]
    wide = Image.new("RGB", (1024, 512), "gray")
    wide.paste(square, (400, 0))
    crop = people.crops([wide], 128, True, YUNET.parent)[0]
    centre = people.crops([square], 128, True, YUNET.parent)[0]
    apart = np.abs(np.asarray(crop, float) - np.asarray(centre, float)).mean()
    assert apart < 12  # the same face, whose surroundings may differ


@needs_photos
@needs_yunet
def test_photo_has_to_show_one_person() -> None:
    pair = Image.new("RGB", (1024, 512))
    for k, one in enumerate(portraits(2, 512)):
        pair.paste(one, (512 * k, 0))
    for photo_, count in ((pair, 2), (photo(), 0)):
        with pytest.raises(InputError, match=f"expected one face, found {count}; crop it to one person"):
            people.crops([photo_], 64, True, YUNET.parent)


@needs_photos
@needs_yunet
def test_passer_by_is_no_second_person() -> None:
    street = portraits(2, 512)[0]
    street.paste(portraits(2, 64)[1], (440, 0))
    assert len(people.crops([street], 64, True, YUNET.parent)) == 1


def test_without_steps_it_is_the_prediction(micro_base: Base, predictor: Predictor) -> None:
    assert made(micro_base, predictor, "red").kind == "lidb"


def test_steps_and_rank_are_those_of_the_finetune(micro_base: Base, predictor: Predictor) -> None:
    seen: list[int] = []
    one = people.person(micro_base, predictor, [photo()], 3, 2, 0, lambda step, loss: seen.append(step))
    assert seen == [1, 2, 3]
    assert (one.kind, one.rank) == ("lora", 2)


def test_person_without_a_hypernetwork_is_trained_from_scratch(micro_base: Base) -> None:
    one = people.person(micro_base, None, [photo()], 2, 3, 0, none)
    assert (one.kind, one.rank, one.trigger) == ("lora", 3, "sks")
    with pytest.raises(InputError, match="expected 1 or more without a hypernetwork, got 0"):
        people.person(micro_base, None, [photo()], 0, 3, 0, none)


def test_what_a_callback_raises_ends_the_training_and_leaves_the_base_bare(
    micro_base: Base, predictor: Predictor
) -> None:
    """ComfyUI interrupts by an exception."""
    before = [name for part in micro_base.components.values() for name, _ in part.named_modules()]

    def interrupted(step: int, loss: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        people.person(micro_base, predictor, [photo()], 3, 2, 0, interrupted)
    assert before == [name for part in micro_base.components.values() for name, _ in part.named_modules()]


def test_lora_has_the_tensors_of_the_kohya_file(
    micro_base: Base, predictor: Predictor, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    one = made(micro_base, predictor, "red", steps=1)
    one.save(tmp_path / "ana.safetensors", format="kohya")
    lora, file = one.state_dict(form="kohya"), load_file(tmp_path / "ana.safetensors")
    assert lora.keys() == file.keys()
    assert all(torch.equal(lora[name], file[name]) for name in file)


def test_mix_is_the_weighted_sum(micro_base: Base, predictor: Predictor, tmp_path: Path) -> None:
    ana, ben = made(micro_base, predictor, "red", steps=1), made(micro_base, predictor, "blue")
    mixed = people.mix([(ana.state_dict(form="kohya"), 0.7), (ben.state_dict(form="kohya"), -0.2)])
    first, second, both = (
        delta(one) for one in (ana.state_dict(form="kohya"), ben.state_dict(form="kohya"), mixed)
    )
    for layer, change in both.items():
        torch.testing.assert_close(change, 0.7 * first[layer] - 0.2 * second[layer], rtol=1e-4, atol=1e-7)
    from safetensors.torch import save_file

    save_file(mixed, tmp_path / "mix.safetensors")  # as ComfyUI's own node does
    assert load_adapter(tmp_path / "mix.safetensors", micro_base).rank == ana.rank + ben.rank


def test_mix_heeds_alpha(micro_base: Base, predictor: Predictor) -> None:
    lora = made(micro_base, predictor, "red").state_dict(form="kohya")
    halved = {name: t / 2 if name.endswith(".alpha") else t for name, t in lora.items()}
    whole, half = delta(people.mix([(lora, 1.0)])), delta(people.mix([(halved, 1.0)]))
    for layer in whole:
        torch.testing.assert_close(half[layer], whole[layer] / 2)


@pytest.mark.parametrize("lora", [{}, {"diffusion_model.out.diff": torch.zeros(2)}])
def test_mix_refuses_loras_of_other_nodes(lora: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="expected one of Photo → Person LoRA or Person Mix"):
        people.mix([(lora, 1.0)])


def test_likeness_is_unknown_without_a_face_encoder(
    micro_base: Base, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people, "load_base_scorers", lambda base: None)
    assert math.isnan(people.likeness(micro_base, made(micro_base, predictor, "red"), [photo()], 0))


def test_likeness_is_the_identity_score_of_a_picture(
    micro_dir: Path, micro_base: Base, predictor: Predictor, tmp_path: Path
) -> None:
    import shutil

    from hyperdreambooth import generate_images, load_base
    from hyperdreambooth.evaluate.base_scorers import load_base_scorers

    shutil.copytree(micro_dir, tmp_path / "base")
    micro.scorers(tmp_path / "base" / "scorers")
    base, person = load_base(tmp_path / "base", device="cpu"), made(micro_base, predictor, "red")
    drawn = generate_images(base, people.LOOK, person, seed=5)
    scorers = load_base_scorers(base)
    assert scorers is not None
    expected = scorers.judge.identity(drawn, [photo()])[0]
    assert people.likeness(base, person, [photo()], 5) == expected
