"""The number format of forward and backward passes; what is trained stays float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

Precision: TypeAlias = Literal["auto", "float32", "bf16", "fp16"]
"""`auto` is bf16 where the machine multiplies that faster than float32, and float32 elsewhere."""

_DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def resolved(precision: Precision, device: torch.device) -> Literal["float32", "bf16", "fp16"]:
    """Returns the number format that `auto` stands for on a device, or the precision itself.

    On CPUs with bf16 instructions (AMX, AVX-512 BF16) a step takes half the time in bf16; on other CPUs it
    takes 1.4 times the time (docs/LOG.md).
    """
    if precision != "auto":
        return precision
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # not every supported version of torch has it
    capabilities: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    found = capabilities()
    fast = device.type == "cpu" and (found.get("amx_bf16") or found.get("avx512_bf16"))
    return "bf16" if fast else "float32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Returns an autocast to a precision, which does nothing for float32."""
    import torch

    chosen = resolved(precision, device)
    return torch.autocast(device.type, getattr(torch, _DTYPES[chosen]), enabled=chosen != "float32")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a block that computes in the number format of its networks, whatever surrounds it."""
    import torch

    # the meta device has no autocast
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
