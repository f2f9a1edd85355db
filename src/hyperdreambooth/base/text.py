"""Prompts → token numbers → what text encoders make of them. Each encoder runs where it lies."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

REMEMBERED = 64  # texts; 512 states of 4,096 half-precision numbers are 4 MB each

_known: WeakKeyDictionary[nn.Module, OrderedDict[tuple[torch.dtype, bytes], Tensor]] = WeakKeyDictionary()


def token_numbers(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    """Token numbers `(b, length)`, padded and cut."""
    encoded = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids


def read(encoder: Any, tokens: Tensor) -> Any:
    """A CLIP text encoder's answer with all hidden states; gradients flow through what it wears."""
    return encoder(tokens.to(encoder.device), output_hidden_states=True)


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Two encoders' states, `(…, c)` and `(…, d)` → `(…, c + d)`; one of them may rest on the CPU."""
    return torch.cat([first, second.to(first.device)], dim=-1)


@torch.no_grad()
def frozen_states(encoder: Any, tokens: Tensor) -> Tensor:
    """Last hidden states `(b, t, c)` of an encoder that never wears anything; a text is read once.

    Such encoders are the largest part of their pipelines, and captions come again at every step.
    """
    known = _known.setdefault(encoder, OrderedDict())
    keys = [(encoder.dtype, row.numpy().tobytes()) for row in tokens.cpu()]
    rows = {key: row for row, key in enumerate(keys) if key not in known}
    if rows:
        # as if alone: what is remembered must not depend on who asked first (a skeleton knows no autocast)
        kind = "cpu" if encoder.device.type == "meta" else encoder.device.type
        with torch.autocast(kind, enabled=False):
            states = encoder(tokens[list(rows.values())].to(encoder.device))[0]
        known.update(zip(rows, states, strict=True))
    # an encoder that rests has moved since
    answer = torch.stack([known[key].to(encoder.device) for key in keys])
    while len(known) > REMEMBERED:
        known.popitem(last=False)
    return answer
