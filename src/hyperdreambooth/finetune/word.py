"""Textual inversion (Gal et al., arXiv 2208.01618): a person is one new word; its embedding is trained."""

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
from hyperdreambooth.training.trainable import Put, leaf

TOKEN = "<person>"
"""The word's name in the file. The trigger will not do: diffusers refuses words that the tokenizer knows."""


def _embedding(base: Base) -> nn.Embedding:
    """Returns the table of the text encoder's token embeddings."""
    names = base.family.TEXT_ENCODERS
    if len(names) != 1:
        raise InputError(
            f"method: textual inversion needs a base with one text encoder, this one has {len(names)}; "
            "use another method"
        )
    encoder: Any = base.components[names[0]]
    return encoder.get_input_embeddings()


def _tokens(base: Base, text: str) -> list[int]:
    """Returns the token numbers of a text."""
    return base.pipe.tokenizer(text, add_special_tokens=False).input_ids


def _trigger_token(base: Base) -> int:
    """Returns the number of the one token that the trigger is."""
    found = _tokens(base, base.trigger)
    if len(found) != 1:
        raise InputError(
            f"trigger {base.trigger!r}: textual inversion needs a trigger of one token, got {len(found)}"
        )
    return found[0]


@contextmanager
def spoken(base: Base, vectors: Tensor) -> Generator[None]:
    """Gives the trigger the embeddings of `n` people for the length of the block.

    The samples of each person follow each other in a batch.

    Args:
        base: the frozen base.
        vectors: `(n, c)`, read again in every forward, so that they may be changed in place.
    """
    token = _trigger_token(base)

    def replace(_: nn.Module, tokens: tuple[Tensor, ...], output: Tensor) -> Tensor:
        each = vectors.repeat_interleave(len(output) // len(vectors), 0)[:, None].to(output)
        return torch.where((tokens[0] == token)[..., None], each, output)

    hook = _embedding(base).register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Word:
    """One person as the embedding of one word.

    Attributes:
        vector: `(c,)`.
        metadata: the `Outcome.metadata` of the training.
    """

    vector: Tensor
    metadata: dict[str, str] = field(default_factory=dict[str, str])

    @contextmanager
    def worn(self, base: Base) -> Generator[None]:
        """Makes the base's trigger mean this person for the length of the block."""
        with spoken(base, self.vector[None].to(base.device)):
            yield

    @property
    def nbytes(self) -> int:
        """The size of a person in bytes."""
        return self.vector.nbytes

    def save(self, file: Path) -> None:
        """Writes a file for `pipe.load_textual_inversion`; prompts then call the person `TOKEN`."""
        save_tensors(file, {TOKEN: self.vector})


class Words:
    """The embeddings of `n` people in training; each starts from that of the class word.

    Attributes:
        leaves: `word`, `(n, c)`.
        people: `n`.
        parts: the text encoder, whose output changes with every step.
    """

    def __init__(self, base: Base, people: int) -> None:
        table = _embedding(base).weight
        start = table[_tokens(base, base.class_word)].mean(0, keepdim=True)
        self.people, self.parts = people, set(base.family.TEXT_ENCODERS)
        self.leaves: dict[str, Tensor] = {"word": leaf(start.repeat(people, 1), base.device)}

    @contextmanager
    def on(self, base: Base) -> Generator[Put]:
        """Gives the trigger everybody's embedding for the length of the block."""
        with spoken(base, self.leaves["word"]):
            yield lambda images: None

    def each(self) -> list[Word]:
        """Returns everybody's current word."""
        return [Word(row.clone()) for row in self.leaves["word"].detach().cpu()]
