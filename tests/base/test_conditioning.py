"""Captions of a training: encoded once where nothing changes them; a warning names those without a name."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from hyperdreambooth.base.conditioning import Conditioner, mentions, warn_unnamed
from hyperdreambooth.base.load import Base

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
        warn_unnamed(micro_base, [*CAPTIONS, "a [V] face"])
    with pytest.warns(UserWarning, match=r"^2 of 5 captions .* 'holiday 2024, Rome': write \[V\]"):
        warn_unnamed(micro_base, [*CAPTIONS, "holiday 2024, Rome", "sksy weather"])


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
