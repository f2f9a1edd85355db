"""Textual inversion (Gal et al., arXiv 2208.01618): a person is one new word; only its vector is trained."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError, save_tensors
from hyperdreambooth.finetune.trainable import Put, leaf

TOKEN = "<person>"
"""What the file calls the word: diffusers adds no word that the tokenizer knows, as it may the trigger."""


def _embedding(base: Base) -> nn.Embedding:
    """The table of the text encoder's words."""
    names = base.family.TEXT_ENCODERS
    if len(names) != 1:
        raise InputError(
            f"method: textual inversion drives bases with one text encoder, this has {len(names)}"
        )
    encoder: Any = base.components[names[0]]
    return encoder.get_input_embeddings()


def _numbers(base: Base, text: str) -> list[int]:
    return base.pipe.tokenizer(text, add_special_tokens=False).input_ids


def _place(base: Base) -> int:
    """The one token that the trigger is."""
    found = _numbers(base, base.trigger)
    if len(found) != 1:
        raise InputError(f"trigger {base.trigger!r}: textual inversion needs one token, it is {len(found)}")
    return found[0]


@contextmanager
def spoken(base: Base, vectors: Tensor) -> Generator[None]:
    """The trigger means `vectors` in the block: of `n` people, whose samples follow each other in a batch.

    Args:
        base: the frozen base.
        vectors: `(n, c)`, looked at anew in every forward: it may be changed in place in between.
    """
    place = _place(base)

    def replace(_: nn.Module, tokens: tuple[Tensor, ...], output: Tensor) -> Tensor:
        each = vectors.repeat_interleave(len(output) // len(vectors), 0)[:, None].to(output)
        return torch.where((tokens[0] == place)[..., None], each, output)

    hook = _embedding(base).register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Word:
    """One person as the vector of one word.

    Attributes:
        vector: `(c,)`.
        metadata: what the training noted.
    """

    vector: Tensor
    metadata: dict[str, str] = field(default_factory=dict[str, str])

    @contextmanager
    def worn(self, base: Base) -> Generator[None]:
        """The base's trigger means this person in the block."""
        with spoken(base, self.vector[None].to(base.device)):
            yield

    @property
    def nbytes(self) -> int:
        """Bytes a person."""
        return self.vector.nbytes

    def save(self, file: Path) -> None:
        """Writes what `pipe.load_textual_inversion` reads; prompts then say `TOKEN` for the person."""
        save_tensors(file, {TOKEN: self.vector})


class Words:
    """The vectors of `n` people in training; each starts from the class's word.

    Attributes:
        leaves: `word`, `(n, c)`.
        people: `n`.
        parts: the text encoder: what it says changes with every step.
    """

    def __init__(self, base: Base, people: int) -> None:
        table = _embedding(base).weight
        start = table[_numbers(base, base.class_word)].mean(0, keepdim=True)
        self.people, self.parts = people, set(base.family.TEXT_ENCODERS)
        self.leaves: dict[str, Tensor] = {"word": leaf(start.repeat(people, 1), base.device)}

    @contextmanager
    def on(self, base: Base) -> Generator[Put]:
        """The trigger means everybody's vector."""
        with spoken(base, self.leaves["word"]):
            yield lambda images: None

    def each(self) -> list[Word]:
        """Everybody's word as it is now."""
        return [Word(row.clone()) for row in self.leaves["word"].detach().cpu()]
