"""Captions name a context in words, and nothing of an identity."""

from __future__ import annotations

import re

import numpy as np

from hyperdreambooth.avatars.draw.people import ATTRIBUTES, Context

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


def words() -> tuple[str, ...]:
    """Returns every lower-case word that a caption can use, and words that users may type instead; sorted."""
    phrases = [phrase for group in ATTRIBUTES.values() for phrase in group.values()]
    return tuple(sorted(set(re.findall(r"[a-z]+", " ".join([*phrases, "a face", _SYNONYMS])))))
