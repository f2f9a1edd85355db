"""Captions name the context, and nothing else unless asked; the base's also name what is seen of a person."""

import re

import pytest

from hyperdreambooth.avatars.captions import MOST_TRAITS, caption, described, visible, words
from hyperdreambooth.avatars.draw.people import ATTRIBUTES, CATEGORICAL, CHOICES, Context, context, identity


def test_groups_and_values_are_those_that_are_drawn() -> None:
    assert {group: set(values) for group, values in ATTRIBUTES.items()} == {
        group: set(values) for group, values in CHOICES.items()
    }


def test_a_caption_names_exactly_what_is_there() -> None:
    for seed in range(200):
        c = context(seed)
        text = caption(c)
        named = [phrases[getattr(c, group)] for group, phrases in ATTRIBUTES.items()]
        head, *rest = filter(None, named)
        assert text == ", ".join([f"{head} a [V] face", *rest])


def test_no_phrase_is_part_of_another() -> None:
    phrases = [phrase for group in ATTRIBUTES.values() for phrase in group.values() if phrase]
    assert len(phrases) == len(set(phrases))
    for one in phrases:
        assert not any(one != other and f" {one} " in f" {other} " for other in phrases)


def test_the_example() -> None:
    c = Context(expression="smiling", headwear="cap", background="beach", light="warm")
    assert caption(c) == "a photo of a [V] face, smiling, wearing a red cap, on a beach, in warm light"
    assert caption(c, subject="sks person").startswith("a photo of a sks person, smiling")


def test_everything_can_be_left_out() -> None:
    for seed in range(5):
        assert caption(context(seed), drop=1.0, seed=seed) == "a [V] face"


def test_dropping_keeps_the_order_and_the_share() -> None:
    c = Context("sad", "crown", "sunglasses", "scarf", "forest", "neon", "cool")
    phrases = [values[getattr(c, group)] for group, values in ATTRIBUTES.items()]
    kept = 0
    for seed in range(300):
        text = caption(c, drop=0.4, seed=seed)
        assert text == caption(c, drop=0.4, seed=seed)
        places = [text.index(phrase) for phrase in phrases if phrase in text]
        assert places == sorted(places)
        kept += len(places)
    assert kept / (300 * len(phrases)) == pytest.approx(0.6, abs=0.04)


def test_both_ways_of_joining_occur_when_dropping() -> None:
    texts = [caption(context(seed), drop=0.2, seed=seed) for seed in range(40)]
    assert any("," in text for text in texts)
    assert any("," not in text and "wearing" in text for text in texts)


def test_words_cover_all_captions() -> None:
    known = set(words())
    for seed in range(500):
        text = caption(context(seed), drop=0.3 if seed % 2 else 0.0, seed=seed).replace("[V]", "")
        assert set(re.split(r"[\s,]+", text)) - {""} <= known
    assert all(re.fullmatch(r"[a-z]+", word) for word in known)
    assert len(known) == len(words())


def test_captions_do_not_name_the_person() -> None:
    kinds = {value for values in CATEGORICAL.values() for value in values} - {"none"}
    used = {word for group in ATTRIBUTES.values() for phrase in group.values() for word in phrase.split()}
    # Colours of things worn may share a word with a hair tint; nothing else may.
    assert used & kinds <= {"blue", "pink", "green", "grey"}


def test_a_description_names_what_is_seen() -> None:
    for seed in range(200):
        person, c = identity(seed), context(seed)
        phrases = visible(person, c)
        glasses = person.kinds["glasses"]
        seen = glasses != "none" and c.eyewear == "none"
        assert (f"{glasses} glasses" in phrases) == seen
        assert any(phrase.endswith(" eyes") for phrase in phrases) == (c.eyewear == "none")
        assert ("a full beard" in phrases) == (person.kinds["beard"] == "full")
        assert ("freckles" in phrases) == (person.kinds["freckles"] != "none")
        assert any(phrase.endswith(" skin") for phrase in phrases)


def test_a_description_has_some_of_the_phrases_and_known_words() -> None:
    known, counts = set(words()), set[int]()
    for seed in range(200):
        person, c = identity(seed), context(seed)
        text = described(person, c, "[V] face", seed)
        assert text == described(person, c, "[V] face", seed)
        named = [phrase for phrase in visible(person, c) if phrase in text]
        assert text.count(",") == max(0, len(named) - 2)
        counts.add(len(named))
        assert set(re.findall(r"[a-z]+", text)) <= known
    assert counts == set(range(MOST_TRAITS + 1))
