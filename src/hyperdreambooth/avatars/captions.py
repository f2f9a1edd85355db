"""Captions name a context in words; those that the base learns from also name what is seen of the person."""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from hyperdreambooth.avatars.draw.people import ATTRIBUTES, CATEGORICAL, Context, Identity

# Words that no caption uses but that users type: the tokenizer gets a token for each.
_SYNONYMS = (
    "an and at by for from is it its of on the to with without under over near like as or but not no i me "
    "my you your he she they his her their this that someone somebody person people portrait picture "
    "image painting drawing photograph photography illustration art artwork man woman boy girl human "
    "avatar head selfie close up closeup style color colour colored happy joyful grinning crying frowning "
    "mad shocked amazed serious calm open mouth eyes eye wink smile laugh hat cap helmet glasses shades "
    "earphones music king queen hair beard neck tie knitted woollen gold sea ocean sand palm tree trees "
    "woods street town buildings skyline stars moon evening dark bright snowy winter summer sunny home "
    "house room sofa indoors outdoors outside inside background gray white black red green blue yellow "
    "orange purple pink brown sunset sunrise golden cold blue lit lighting pencil sketched watercolor "
    "pixelated retro game glowing lights very small big young old nice beautiful cute funny two one "
    "sitting standing looking"
)


_HAIR = {
    "bald": "a bald head", "buzz": "cropped {} hair", "short": "short {} hair",
    "side_part": "parted {} hair", "quiff": "a {} quiff", "curly": "curly {} hair", "afro": "a {} afro",
    "bob": "a {} bob", "long": "long {} hair", "bun": "a {} bun", "locs": "{} locs",
}  # fmt: skip
_BEARD = {"stubble": "stubble", "moustache": "a moustache", "goatee": "a goatee", "full": "a full beard"}
_SKIN, _SHADES = ("light", "tan", "brown", "dark"), ("black", "dark", "brown", "fair", "blonde")
_GINGER = ("black", "auburn", "red", "ginger", "ginger")
_EYES = ("brown", "hazel", "green", "blue", "grey")
MOST_TRAITS = 4

KNOWN = 1024
"""People of the base's training whom captions call by name, as those of real bases do with known people; the
first of them is called by the trigger."""


def visible(person: Identity, context: Context) -> list[str]:
    """Returns a phrase for each trait of the person that the picture shows, such as "curly red hair"."""
    t, kinds = person.traits, person.kinds
    phrases = [
        _HAIR[kinds["hair_style"]].format(_hair_colour(person)),
        f"{_word(_SKIN, t['skin_tone'])} skin",
    ]
    if kinds["beard"] in _BEARD:
        phrases.append(_BEARD[kinds["beard"]])
    if context.eyewear == "none":
        phrases.append(f"{_word(_EYES, t['eye_hue'])} eyes")
        phrases += [f"{kinds['glasses']} glasses"] if kinds["glasses"] != "none" else []
    phrases += ["freckles"] if kinds["freckles"] != "none" else []
    phrases += ["earrings"] if kinds["earrings"] != "none" else []
    return phrases


def _hair_colour(person: Identity) -> str:
    if person.kinds["hair_tint"] != "natural":
        return person.kinds["hair_tint"]
    return _word(_GINGER if person.traits["hair_hue"] > 0.5 else _SHADES, person.traits["hair_lightness"])


def _word(words: tuple[str, ...], value: float) -> str:
    """Returns the word for a trait in [0, 1]; the words divide the range evenly."""
    return words[min(int(value * len(words)), len(words) - 1)]


def described(person: Identity, context: Context, subject: str, seed: int) -> str:
    """Returns the words for the person with some of the visible traits: "[V] face with round glasses".

    None, or up to `MOST_TRAITS` of them, in any order; the seed chooses.
    """
    rng = np.random.default_rng([seed, 6])
    phrases = visible(person, context)
    some = [phrases[k] for k in rng.permutation(len(phrases))[: rng.integers(0, MOST_TRAITS + 1)]]
    *first, last = some or [""]
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"{subject} with {listed}" if listed else subject


def caption(context: Context, subject: str = "[V] face", drop: float = 0.0, seed: int = 0) -> str:
    """Returns the caption of a context, with its phrases in the order of `ATTRIBUTES`.

    Args:
        context: the context to describe.
        subject: the words for the person.
        drop: the probability with which each phrase, the style included, is left out.
        seed: chooses what is left out. If `drop` is above 0 it also chooses between commas and spaces,
            because people also write "a [V] face wearing sunglasses on a beach".
    """
    rng = np.random.default_rng([seed, 4])
    phrases = [phrases[getattr(context, group)] for group, phrases in ATTRIBUTES.items()]
    style, *rest = [phrase if rng.random() >= drop else "" for phrase in phrases]
    joiner = " " if drop > 0.0 and rng.random() < 0.5 else ", "
    return joiner.join([f"{style} a {subject}".strip(), *filter(None, rest)])


@cache
def names() -> tuple[str, ...]:
    """Returns invented names of two syllables for all `KNOWN` people but the first; nothing else has them."""
    syllables = [consonant + vowel for consonant in "bdfgjklmnprstvwz" for vowel in "aeiou"]
    pairs = [syllables[k % 80] + syllables[(k // 80 * 7 + k * 3 + 1) % 80] for k in range(1, 2 * KNOWN)]
    taken = set(words())
    return tuple(name for name in dict.fromkeys(pairs) if name not in taken)[: KNOWN - 1]


def words() -> tuple[str, ...]:
    """Returns every lower-case word that a caption can use, and words that users may type instead; sorted."""
    phrases = [phrase for group in ATTRIBUTES.values() for phrase in group.values()]
    phrases += [*_HAIR.values(), *_BEARD.values(), *_SKIN, *_SHADES, *_GINGER, *_EYES]
    phrases += [*CATEGORICAL["hair_tint"], *CATEGORICAL["glasses"], "skin freckles earrings"]
    return tuple(sorted(set(re.findall(r"[a-z]+", " ".join([*phrases, "a face", _SYNONYMS])))))
