"""Captions of a training: encoded once where nothing changes them; a warning names those without a name."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import pipelines
from hyperdreambooth.base.conditioning import Conditioner, mentions, read_part, warn_captions
from hyperdreambooth.base.load import Base

PHOTOS = [Path(f"{k}.png") for k in range(6)]
CAPTIONS = ["a photo of a sks face", "a sks face, smiling", "a photo of a sks face"]


@pytest.mark.parametrize("text_worn", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_every_caption_is_encoded_as_if_alone(
    micro_base: Base, tmp_path: Path, text_worn: bool, kept: bool
) -> None:
    cache = tmp_path if kept else None
    for _ in range(2):  # the second time from the cache
        encode = Conditioner(micro_base, CAPTIONS, text_worn, cache)
        got = encode(CAPTIONS[::-1])
        for place, caption in enumerate(CAPTIONS[::-1]):
            alone = micro_base.encode_prompts(micro_base.tokenize([caption]))
            for name, tensor in alone.items():
                torch.testing.assert_close(got[name][place], tensor[0])
                assert got[name].requires_grad is False


def test_captions_that_name_nobody_warn_once(micro_base: Base) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_captions(micro_base, [*CAPTIONS, "a [V] face"], PHOTOS)
    with pytest.warns(UserWarning, match=r"^2 of 5 captions .* 'holiday' of 3.png: write \[V\]"):
        warn_captions(micro_base, [*CAPTIONS, "holiday", "sksy"], PHOTOS)


@pytest.mark.parametrize(
    ("text", "found"), [("a sks face", True), ("sks", True), ("a sksy face", False), ("", False)]
)
def test_a_trigger_is_a_word_of_its_own(text: str, found: bool) -> None:
    assert mentions("sks", text) is found


@pytest.mark.parametrize("rows", [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1], [2, 2, 2, 2]])
@pytest.mark.parametrize("images", [1, 2, 4])
def test_sharing_captions_within_a_person_changes_nothing(
    micro_base: Base, rows: list[int], images: int
) -> None:
    captions = [CAPTIONS[row] for row in rows]
    encode = Conditioner(micro_base, CAPTIONS, text_worn=True)
    torch.testing.assert_close(encode(captions, images)["hidden"], encode(captions)["hidden"])


LONG = "hat " * 30  # more than any tokenizer of the tiny bases reads


@pytest.mark.parametrize("family", ["sd21", "sdxl", "sd3", "flux"])
def test_what_is_read_of_a_text_decides_its_tokens(family: str) -> None:
    base = Base.from_pipeline(getattr(pipelines, family)(), family)
    longest = base.tokenize(["a"]).shape[1]
    for text in ("a sks face", " ".join(["hat"] * (longest + 5)), "日本" * longest, "", "写"):
        read = read_part(base, text)
        assert text.startswith(read)
        assert torch.equal(base.tokenize([read]), base.tokenize([text]))
        if read:  # a shorter beginning is another text
            assert not torch.equal(base.tokenize([read[:-1]]), base.tokenize([text]))
    assert read_part(base, "a sks face ") == "a sks face"


def test_long_captions_warn_and_name_their_photo(micro_base: Base) -> None:
    captions = ["a [V] face " + LONG, LONG + "a [V] face", "a [V] face"]
    with pytest.warns(UserWarning) as warned:
        warn_captions(micro_base, captions, PHOTOS)
    first, second = (str(one.message) for one in warned)
    assert first.startswith("1 of 3 captions name the person too late, for example that of 1.png")
    assert second.startswith("1 of 3 captions are too long, for example that of 0.png, read as far as")
