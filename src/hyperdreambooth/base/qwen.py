"""Captions for the families whose frozen text encoder is a Qwen, which is never changed by an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.base.readers import reader
from hyperdreambooth.precision import without_autocast


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


@torch.no_grad()
def layer_states(
    pipe: Any, tokens: Tensor, layers: Sequence[int], *, trim: bool, axes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns hidden states of the text encoder, `(b, t, layers, c)`, and the mask of its tokens, `(b, t)`.

    The mask is False for padding. The states have no gradient, and the denoiser's number format.

    Args:
        pipe: the pipeline, whose padding token is one that no text contains.
        tokens: token ids `(b, t)`.
        layers: the layers, counted like the encoder's `hidden_states`.
        trim: leave out the columns that are padding in every row, which come back as zeros. The encoder then
            reads what there is, and not the longest caption that there could be.
        axes: the number of axes of the encoder's positions, if they are to count only what is no padding.
    """
    encoder, tokens = reader(pipe, "text_encoder"), tokens.cpu()
    mask = tokens != pipe.tokenizer.pad_token_id
    used = mask.any(dim=0) if trim else torch.ones(tokens.shape[1], dtype=torch.bool)
    states = _states(encoder, tokens[:, used], mask[:, used], layers, axes).to(pipe.transformer.dtype)
    if not trim:
        return states, mask
    whole = states.new_zeros(*tokens.shape, *states.shape[2:])
    whole[:, used.to(whole.device)] = states
    return whole, mask


def _states(encoder: Any, tokens: Tensor, mask: Tensor, layers: Sequence[int], axes: int | None) -> Tensor:
    """Runs a text encoder; returns the states of some layers, `(b, t, layers, c)`."""
    device, options = encoder.device, {}
    if device.type == "meta":  # its masks depend on the numbers of tensors
        width = encoder.config.get_text_config().hidden_size
        return torch.empty(*tokens.shape, len(layers), width, device=device)
    if axes is not None:
        places = (mask.long().cumsum(dim=-1) - 1).clamp_min(0)
        options["position_ids"] = places.expand(axes, -1, -1).to(device)
    # without the head, as the logits of every token would be the largest tensor of all
    network: Any = getattr(encoder, "model", encoder)
    with without_autocast(device):  # as for T5: what is cached must not depend on the caller
        read = network(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            output_hidden_states=True,
            use_cache=False,
            **options,
        ).hidden_states
    return torch.stack([read[layer] for layer in layers], dim=2)
