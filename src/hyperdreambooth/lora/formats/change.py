"""What the parts of one changed layer mean: ΔW as two factors, exact for every kind that has one.

A convolution `(o, i, k, k)` counts as a matrix `(o, i·k·k)`. A change of full rank has an identity as one of
its factors, so that whatever can be done to a LoRA (wear, scale, add, merge, truncate) can be done to it. The
formulas are those of LyCORIS (github.com/KohakuBlueleaf/LyCORIS, docs/Algo-Details.md) and, for DoRA,
equation 5 of arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = tuple[Tensor, Tensor]
"""down `(r, i)` and up `(o, r)` of one layer."""


def pair_of(parts: Mapping[str, Tensor]) -> Pair:
    """Returns the factors of a layer's change, without its scale.

    Raises:
        RuntimeError: matrices that do not fit together.
    """
    if "down" in parts:
        return _low_rank(parts["up"].flatten(1), parts["down"], parts.get("mid"))
    if "diff" in parts:
        return dense(parts["diff"].flatten(1))
    if "hada_w1_a" in parts:
        return _hadamard(*(_half(parts, f"hada_w{n}", f"hada_t{n}") for n in (1, 2)))
    return _kronecker(*(_half(parts, f"lokr_w{n}", f"lokr_t{n}") for n in (1, 2)))


def rank_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Returns the rank by which alpha is divided; None where the kind has no alpha."""
    for part in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in shapes:
            return shapes[part][0]
    return None


def size_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """Returns outputs and inputs of ΔW by the shapes of its parts; None if these do not fit together."""
    try:
        down, up = pair_of({part: torch.empty(shape, device="meta") for part, shape in shapes.items()})
    except (RuntimeError, IndexError):
        return None
    return up.shape[0], down.shape[1]


def dense(delta: Tensor) -> Pair:
    """Returns the factors of any matrix `(o, i)`: itself and an identity, of rank `min(o, i)`."""
    o, i = delta.shape
    identity = torch.eye(min(o, i), dtype=delta.dtype, device=delta.device)
    return (identity, delta) if i <= o else (delta, identity)


def decomposed(pair: Pair, magnitude: Tensor, weight: Tensor, channels: int) -> Pair:
    """Returns ΔW of a DoRA: the changed weight with its columns or rows brought to the learned magnitudes.

    As its trainers do (LyCORIS, PEFT), the norm is that of the weight with the change, on either axis.

    Args:
        pair: the factors of the change, scale included.
        magnitude: one number for each output, `(o,)` or `(o, 1, …)`, or for each input, `(1, channels, …)`.
        weight: of the base, `(o, i)`.
        channels: the inputs of the layer; fewer than `i` if it is a convolution.
    """
    changed = (weight + pair[1] @ pair[0]).unflatten(1, (channels, -1))
    outputs = magnitude.ndim == 1 or len(magnitude) == len(weight)
    norms = changed.norm(dim=(1, 2) if outputs else (0, 2), keepdim=True)
    scale = magnitude.reshape(norms.shape) / norms.clamp_min(torch.finfo(norms.dtype).eps)
    return dense((changed * scale).flatten(1) - weight)


def _low_rank(up: Tensor, down: Tensor, core: Tensor | None) -> Pair:
    """Joins a core `(r, r, k, k)`, where there is one, to `down`."""
    if core is None:
        return down.flatten(1), up
    return torch.einsum("mnxy,ni->mixy", core, down.flatten(1)).flatten(1), up


def _half(parts: Mapping[str, Tensor], name: str, core: str) -> Pair:
    """Returns the factors of one of a LoHa's or LoKr's two matrices: whole, of low rank, or with a core."""
    if name in parts:
        return dense(parts[name].flatten(1))
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return _low_rank(a.mT, b, parts[core]) if core in parts else (b.flatten(1), a)


def _hadamard(one: Pair, two: Pair) -> Pair:
    """Multiplies two matrices number by number: the ranks multiply, unless the whole matrix is smaller."""
    (down, up), (down2, up2) = one, two
    if len(down) * len(down2) >= min(len(up), down.shape[1]):
        return dense((up @ down) * (up2 @ down2))
    rows = (down[:, None] * down2[None]).flatten(0, 1)
    return rows, (up[:, :, None] * up2[:, None]).flatten(1)


def _kronecker(one: Pair, two: Pair) -> Pair:
    """Returns the Kronecker product of two matrices: the product of the factors' own."""
    (down, up), (down2, up2) = one, two
    outputs, inputs = len(up) * len(up2), down.shape[1] * down2.shape[1]
    if len(down) * len(down2) > min(outputs, inputs):
        return dense(_kron(up @ down, up2 @ down2))
    return _kron(down, down2), _kron(up, up2)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """Returns `a ⊗ b`; `torch.kron` fails on tensors without storage, by which shapes are checked."""
    return (a[:, None, :, None] * b[None, :, None]).flatten(2).flatten(0, 1)
