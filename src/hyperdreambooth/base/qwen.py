"""Captions for the families whose frozen text encoder is a Qwen, which is never changed by an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def chat_tokens(tokenizer: Any, prompts: list[str], length: int, thinking: bool) -> Tensor:
    """Returns token ids `(b, length)` of prompts as the first turn of a conversation, padded and truncated.

    With `thinking` the answer starts freely; without, it starts with an empty thought.
    """
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    texts = [tokenizer.apply_chat_template(turn, **options) for turn in turns]
    return padded_tokens(tokenizer, texts, length)


def padded_tokens(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Returns token ids `(b, length)`, padded on the right and truncated."""
    padding = {"padding": "max_length", "max_length": length, "truncation": True, "padding_side": "right"}
    return tokenizer(texts, **padding, return_tensors="pt").input_ids


def mask_of(tokenizer: Any, tokens: Tensor) -> Tensor:
    """Returns which tokens `(b, t)` are no padding; Qwen pads with a token that no text contains."""
    return tokens != tokenizer.pad_token_id


@torch.no_grad()
def layer_states(
    encoder: Any, tokens: Tensor, mask: Tensor, layers: Sequence[int], *, trim: bool, axes: int | None = None
) -> Tensor:
    """Returns the hidden states of some layers, `(b, t, layers, c)`, without a gradient.

    `trim` leaves out the columns that are padding in every row, which come back as zeros: the encoder then
    reads what there is, and not the longest caption that there could be. With `axes` the positions count only
    tokens that are no padding, for so many axes of a rotary embedding.
    """
    used = mask.any(dim=0) if trim else torch.ones(tokens.shape[1], dtype=torch.bool)
    # without the head: the logits of every token would be the largest tensor of all
    network: Any = getattr(encoder, "model", encoder)
    device, options = encoder.device, {}
    if axes is not None:
        places = (mask[:, used].long().cumsum(dim=-1) - 1).clamp_min(0)
        options["position_ids"] = places.expand(axes, -1, -1).to(device)
    kind = "cpu" if device.type == "meta" else device.type
    with torch.autocast(kind, enabled=False):  # as for T5: what is cached must not depend on the caller
        read = network(
            input_ids=tokens[:, used].to(device),
            attention_mask=mask[:, used].to(device),
            output_hidden_states=True,
            use_cache=False,
            **options,
        ).hidden_states
    states = torch.stack([read[layer] for layer in layers], dim=2)
    if not trim:
        return states
    whole = states.new_zeros(len(tokens), tokens.shape[1], *states.shape[2:])
    whole[:, used.to(whole.device)] = states
    return whole
