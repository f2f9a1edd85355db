"""The number format of forward and backward passes; what is trained stays float32."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

Precision: TypeAlias = Literal["auto", "float32", "bf16", "fp16"]
"""`auto` is bf16 on GPUs that multiply it faster than float32, and float32 elsewhere."""

_DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def resolved(precision: Precision, device: torch.device) -> Literal["float32", "bf16", "fp16"]:
    """Returns the number format that `auto` stands for on a device, or the precision itself.

    CPUs get float32, so that a training comes out the same on all of them. On those with bf16 instructions
    (AMX, AVX-512 BF16) a step takes half the time in bf16. On others it takes 1.4 times the time, and 8 times
    on those that have AVX2 alone, where bf16 causes a warning (docs/LOG.md).
    """
    import torch

    if precision == "bf16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        warnings.warn(
            "precision: this CPU has no instructions for bf16, so a step takes many times as long; "
            "use precision=float32",
            stacklevel=1,
        )
    if precision != "auto":
        return precision
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "float32"


def resolved_dtype(dtype: str, device: torch.device) -> str:
    """Returns the format of frozen weights that `auto` stands for on a device, or the format itself."""
    return _DTYPES[resolved("auto", device)] if dtype == "auto" else dtype


def autocast(
    precision: Precision, device: torch.device, weights: torch.dtype | None = None
) -> AbstractContextManager[Any]:
    """Returns an autocast to a precision, which does nothing for float32.

    Args:
        precision: of the passes.
        device: where they run.
        weights: the number format of the network. Where it is the precision's own, there is nothing to cast,
            and `auto` is the format of a network in half precision.
    """
    import torch

    half = weights in (torch.bfloat16, torch.float16)
    chosen = resolved(precision, device)
    needed = chosen != "float32" and weights != getattr(torch, _DTYPES[chosen])
    enabled = needed and not (half and precision == "auto")
    return torch.autocast(device.type, getattr(torch, _DTYPES[chosen]), enabled=enabled)


def compute_dtype(device: torch.device, weights: torch.dtype) -> torch.dtype:
    """Returns the format in which a network computes at this moment: that of autocast, or of its weights."""
    import torch

    kind = "cpu" if device.type == "meta" else device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a block that computes in the number format of its networks, whatever surrounds it."""
    import torch

    # the meta device has no autocast
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
