"""Prompts → token ids → hidden states. Each text encoder runs on its own device."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hyperdreambooth.base.readers import reader
from hyperdreambooth.precision import without_autocast

REMEMBERED = 64  # texts; each has 512 states of 4,096 half-precision numbers, 4 MB

_known: WeakKeyDictionary[Any, OrderedDict[bytes, Tensor]] = WeakKeyDictionary()


def token_numbers(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    """Returns token ids `(b, length)`, padded and truncated."""
    padding = {"padding": "max_length", "max_length": length, "truncation": True}
    return tokenizer(prompts, **padding, return_tensors="pt").input_ids


def read(encoder: Any, tokens: Tensor) -> Any:
    """Runs a CLIP text encoder and returns all hidden states; an adapter that it wears gets gradients."""
    return encoder(tokens.to(encoder.device), output_hidden_states=True)


def concatenate(first: Tensor, second: Tensor) -> Tensor:
    """Concatenates states `(…, c)` and `(…, d)` to `(…, c + d)`; the second may be on another device."""
    return torch.cat([first, second.to(first.device)], dim=-1)


@torch.no_grad()
def frozen_states(pipe: Any, name: str, tokens: Tensor) -> Tensor:
    """Returns the last hidden states `(b, t, c)` of a text encoder without adapters, which reads a text once.

    Such encoders are the largest networks of their pipelines, and captions repeat at every step. For texts
    that it has read, the encoder need not be in memory.
    """
    known = _known.setdefault(pipe, OrderedDict())
    keys = [row.numpy().tobytes() for row in tokens.cpu()]
    rows = {key: row for row, key in enumerate(keys) if key not in known}
    if rows:
        encoder = reader(pipe, name)
        # without autocast: what is cached must not depend on the first caller
        with without_autocast(encoder.device):
            states = encoder(tokens[list(rows.values())].to(encoder.device))[0]
        known.update(zip(rows, states, strict=True))
    device = getattr(pipe, name).device if getattr(pipe, name) is not None else known[keys[0]].device
    found = torch.stack([known[key].to(device) for key in keys])  # it may have moved since
    while len(known) > REMEMBERED:
        known.popitem(last=False)
    return found
