"""Captions → conditioning for a training: encoded once where the text encoders do not change."""

from __future__ import annotations

import bisect
import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.fingerprint import weights_fingerprint
from hyperdreambooth.base.load import Base
from hyperdreambooth.base.readers import readers_of
from hyperdreambooth.base.text import REMEMBERED
from hyperdreambooth.cache import cached_rows
from hyperdreambooth.captured import sent
from hyperdreambooth.storage import Store

_TOGETHER = 32  # captions encoded in one call


def mentions(trigger: str, text: str) -> bool:
    """Returns whether a text contains the trigger as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text) is not None


def class_caption(base: Base, text: str) -> str:
    """Returns a text that names anybody of the class in place of the person.

    The trigger is left out, `a photo of a sks face` → `a photo of a face`. Where a text does not name the
    class, the class word stands in its place, `a photo of sks` → `a photo of face`.

    Args:
        base: its words are left out and put in; `[V]` and `{class_word}` stand for them.
        text: a prompt or a caption.
    """
    text, trigger = base.prompt(text), rf"(?<!\w){re.escape(base.trigger)}(?!\w)"
    if mentions(base.class_word, text):
        return re.sub(rf"\s*{trigger}", "", text).strip()
    return re.sub(trigger, lambda _: base.class_word, text)


def read_part(base: Base, text: str) -> str:
    """Returns as much of a text as the base's text encoders read.

    Args:
        base: its tokenizers cut what is too long. Of several, the one that reads most counts.
        text: a prompt or a caption.
    """
    text = base.prompt(text).rstrip()
    whole = base.tokenize([text])

    def enough(length: int) -> bool:
        return torch.equal(base.tokenize([text[:length]]), whole)

    if not text or not enough(len(text) - 1):
        return text
    return text[: bisect.bisect_left(range(len(text)), True, key=enough)]


def warn_captions(base: Base, captions: Sequence[str], photos: Sequence[Path]) -> None:
    """Warns about captions that are read in part, and about those that do not name the person.

    What a photo teaches is tied to no word if its caption lacks the trigger, or has it where nobody reads.

    Args:
        base: its text encoders read a limited number of tokens.
        captions: the caption of each photo.
        photos: the names of the photos, for the messages.
    """
    texts = [base.prompt(caption) for caption in captions]
    read = {text: read_part(base, text) for text in _at_the_limit(base, sorted(set(texts)))}
    unnamed, late, cut = list[int](), list[int](), list[int]()
    for k, text in enumerate(texts):
        if not mentions(base.trigger, text):
            unnamed.append(k)
        elif not mentions(base.trigger, read.get(text, text)):
            late.append(k)
        elif text in read:
            cut.append(k)
    for found, what in (
        (unnamed, "do not name the person, for example {text!r} of {photo}: write [V] where the person is"),
        (late, "name the person too late, for example that of {photo}, read as far as {end!r}: move [V] up"),
        (cut, "are too long, for example that of {photo}, read as far as {end!r}: shorten it"),
    ):
        if found:
            k = found[0]
            example = what.format(text=captions[k], photo=photos[k], end=read.get(texts[k], "")[-30:])
            warnings.warn(f"{len(found)} of {len(captions)} captions {example}", stacklevel=2)


def _at_the_limit(base: Base, texts: Sequence[str]) -> list[str]:
    """Returns the texts whose last character makes no difference to what is read."""
    if not texts:
        return []
    whole, less = base.tokenize(texts), base.tokenize([text.rstrip()[:-1] for text in texts])
    return [text for text, same in zip(texts, (whole == less).all(1), strict=True) if text.strip() and same]


class Conditioner:
    """Encodes the captions of a training.

    `text_worn` says whether the text encoders change during the training. If not, all captions are encoded at
    the first call, in the precision of that moment, and never again, and the folder `cache` keeps the result.
    Either way, frozen text encoders are let go after the first call (see `readers.py`). Where the cache has
    all captions, they are not even read.
    """

    def __init__(
        self, base: Base, captions: Iterable[str], text_worn: bool, cache: Path | Store | None = None
    ) -> None:
        known = sorted(set(captions))
        self._base, self._text_worn, self._cache = base, text_worn, cache
        self._rows = {caption: row for row, caption in enumerate(known)}
        self._tokens = base.tokenize(known).cpu()  # where steps choose their rows without waiting for a GPU
        self._once: Conditioning | None = None
        self._read = False

    def __call__(self, captions: Sequence[str], images: int = 1) -> Conditioning:
        """Returns the conditioning of `b` captions, each as its person (of `images` in a row) is worn."""
        return self.encode(self.inputs(captions, images))

    def inputs(self, captions: Sequence[str], images: int = 1) -> dict[str, Tensor]:
        """Returns what `encode` needs of `b` captions, as tensors on the base's device.

        That is the conditioning itself where the text encoders do not change.
        """
        rows, device = [self._rows[caption] for caption in captions], self._base.device
        if not self._text_worn:
            if self._once is None:
                self._once = self._encode_all()
            made = {name: tensor[rows] for name, tensor in self._once.items()}
            return {name: sent(tensor, device) for name, tensor in _without_padding(made).items()}
        self._read_ahead()
        chosen, places = _distinct(rows, images)
        tokens = self._tokens[[rows[k] for k in chosen]]
        found = {"tokens": tokens, "frozen": self._base.encode_frozen(tokens)}
        if len(chosen) != len(rows):
            found["places"] = torch.tensor(places)
        return {name: sent(tensor, device) for name, tensor in found.items() if tensor is not None}

    def encode(self, inputs: Mapping[str, Tensor]) -> Conditioning:
        """Returns the conditioning of `inputs`, as the base is worn at this moment."""
        if not self._text_worn:
            return dict(inputs)
        made = self._base.encode_prompts(inputs["tokens"], inputs.get("frozen"))
        places = inputs.get("places")
        return made if places is None else {name: tensor[places] for name, tensor in made.items()}

    @torch.no_grad()
    def _read_ahead(self) -> None:
        """Has the frozen text encoder beside those that wear an adapter (T5) read all captions, and go."""
        if not self._read and len(self._tokens) <= REMEMBERED and readers_of(self._base.pipe) is not None:
            with self._base.reading():
                self._base.encode_frozen(self._tokens)
        self._read = True

    @torch.no_grad()
    def _encode_all(self) -> Conditioning:
        """Returns the conditioning of all captions, from the cache where it is there."""
        with ExitStack() as stack:

            def encode(part: Tensor) -> Conditioning:
                if not self._read:  # nothing is read where the cache has all captions
                    stack.enter_context(self._base.reading())
                    self._read = True
                return self._base.encode_prompts(part)

            if self._cache is not None:
                names = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:32] for row in self._tokens.cpu()]
                tokens, place = self._tokens, self._cache / self._folder()
                return cached_rows(names, lambda k: encode(tokens[k]), place, _TOGETHER, "encode captions")
            made = [encode(part) for part in self._tokens.split(_TOGETHER)]
            return {name: torch.cat([part[name] for part in made]) for name in made[0]}

    def _folder(self) -> str:
        """Names all that the conditioning depends on besides the captions."""
        base, kind = self._base, self._base.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.dtype
        readers, components = readers_of(base.pipe), base.pipe.components
        texts = {name for name in base.parts if name.startswith("text_encoder")}
        texts -= {*(readers.names if readers else ())}
        weights = weights_fingerprint({name: components[name] for name in texts})
        identity: list[Any] = [base.fingerprint, weights, base.parts, base.dtype, precision]
        identity += [readers.fingerprint] if readers else []
        identity += [base.quantize] if base.quantize else []
        return f"conditioning-{hashlib.sha256(repr(tuple(identity)).encode()).hexdigest()[:16]}"


def _without_padding(made: Conditioning) -> Conditioning:
    """Leaves out the tokens that every caption masks, so that a batch is as long as its longest caption."""
    if "mask" not in made:
        return made
    used = made["mask"].any(dim=0)
    return {name: tensor[:, used] for name, tensor in made.items()}


def _distinct(rows: Sequence[int], images: int) -> tuple[list[int], list[int]]:
    """Returns the samples to encode, no caption twice for one person, and each sample's place among them.

    A batch of people is shared out evenly by `inject.routing`, so it can only shrink to one caption a person.
    """
    people = [rows[at : at + images] for at in range(0, len(rows), images)]
    if len(people) > 1 and any(len(set(own)) > 1 for own in people):
        return [*range(len(rows))], [*range(len(rows))]
    chosen: dict[tuple[int, int], int] = {}
    for k, row in enumerate(rows):
        chosen.setdefault((k // images, row), k)
    order = {key: place for place, key in enumerate(chosen)}
    return [*chosen.values()], [order[k // images, row] for k, row in enumerate(rows)]
