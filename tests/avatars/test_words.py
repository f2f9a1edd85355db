"""The words that the avatars' base knows: each is one token, and some are people's names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from hyperdreambooth.avatars.build.diffusion import TRIGGER, new_tokenizer, training_caption
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.avatars.captions import KNOWN, names, words
from hyperdreambooth.avatars.draw.people import SPLITS, identity, photo_context


def test_every_known_word_is_one_token(tmp_path: Path) -> None:
    tokenizer = new_tokenizer()
    known = [*words(), *names(), TRIGGER]
    assert {word: tokenizer.tokenize(word) for word in known} == {word: [f"{word}</w>"] for word in known}
    tokenizer.save_pretrained(tmp_path)
    text = "A photo of a SKS face, smiling; masks, zebras and café 👍"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.tokenize("a photo of a sks face") == [
        "a</w>",
        "photo</w>",
        "of</w>",
        "a</w>",
        "sks</w>",
        "face</w>",
    ]
    assert loaded.unk_token_id not in loaded(text).input_ids[1:-1]


def test_names_are_names_of_nothing_else() -> None:
    assert len(set(names())) == KNOWN - 1 == len(names())
    assert not {*names()} & {*words(), TRIGGER}


def test_captions_call_known_people_by_name_and_one_by_the_trigger() -> None:
    person, count = SPLITS["base"][0], KNOWN + 1
    scenes = [photo_context(person, 0, album=False)] * count
    pictures = Pictures([], [identity(person)] * count, scenes, each=1)
    for row, own in ((0, TRIGGER), (1, names()[0]), (KNOWN - 1, names()[-1]), (KNOWN, None)):
        texts = [training_caption(pictures, row, 0, step).split() for step in range(60)]
        called = {*names(), TRIGGER} & {word for text in texts for word in text}
        assert called == ({own} if own else set())
        assert not any("[V]" in text for text in texts)
        assert any(not text for text in texts)  # for guidance
        if own:
            assert 0.3 < np.mean([own in text for text in texts]) < 0.7
