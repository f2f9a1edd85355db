"""Captions → conditioning for a training: tokenized once, and encoded once where nothing changes it."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.fingerprint import weights_fingerprint
from hyperdreambooth.base.load import Base
from hyperdreambooth.cache import cached_rows

_TOGETHER = 32  # captions a forward


def mentions(trigger: str, text: str) -> bool:
    """Whether a text has the trigger as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text) is not None


def warn_unnamed(base: Base, captions: Sequence[str]) -> None:
    """Warns of captions that do not name the person: what such a photo teaches is bound to no word."""
    silent = [text for text in captions if not mentions(base.trigger, base.prompt(text))]
    if silent:
        warnings.warn(
            f"{len(silent)} of {len(captions)} captions do not name the person, {silent[0]!r} for one: "
            "write [V] where the person is",
            stacklevel=2,
        )


class Conditioner:
    """Captions → conditioning.

    Args:
        base: tokenizes and encodes.
        captions: all that will be asked for; many photos may share one.
        text_worn: whether the text encoders answer otherwise as the training goes on; if not, everything is
            encoded at the first call, in the precision of that moment, and never again.
        cache: folder of conditioning that was encoded before; None to keep none.
    """

    def __init__(
        self, base: Base, captions: Iterable[str], text_worn: bool, cache: Path | None = None
    ) -> None:
        known = sorted(set(captions))
        self._base, self._text_worn, self._cache = base, text_worn, cache
        self._rows, self._tokens = {caption: row for row, caption in enumerate(known)}, base.tokenize(known)
        self._once: Conditioning | None = None

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """The conditioning of `b` captions, each read by what its own sample wears."""
        rows = [self._rows[caption] for caption in captions]
        if self._text_worn:
            return self._base.encode_prompts(self._tokens[rows])
        if self._once is None:
            self._once = self._all()
        return {name: tensor[rows].to(self._base.device) for name, tensor in self._once.items()}

    @torch.no_grad()
    def _encoded(self, places: list[int]) -> Conditioning:
        return self._base.encode_prompts(self._tokens[places])

    def _all(self) -> Conditioning:
        """The conditioning of all captions, from the cache where it is known."""
        if self._cache is None:
            rows = torch.arange(len(self._tokens)).split(_TOGETHER)
            made = [self._encoded(part.tolist()) for part in rows]
            return {name: torch.cat([part[name] for part in made]) for name in made[0]}
        base, kind = self._base, self._base.device.type
        parts = sorted(name for name, part in base.pipe.components.items() if part is not None)
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.dtype
        texts = {name: base.pipe.components[name] for name in parts if name.startswith("text_encoder")}
        facts = repr((base.fingerprint, weights_fingerprint(texts), parts, base.dtype, precision))
        folder = self._cache / f"conditioning-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        names = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:32] for row in self._tokens.cpu()]
        return cached_rows(names, partial(map, self._encoded), folder, _TOGETHER, "encode captions")
