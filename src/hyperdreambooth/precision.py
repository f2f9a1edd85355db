"""The number format of forward and backward passes; what is trained stays float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

import torch

Precision: TypeAlias = Literal["auto", "float32", "bf16", "fp16"]
"""`auto` is bf16 where the machine multiplies that faster than float32, and float32 elsewhere."""

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolved(precision: Precision, device: torch.device) -> Literal["float32", "bf16", "fp16"]:
    """What `auto` stands for on a device; anything else is what it is.

    A CPU whose instructions multiply bf16 (AMX, AVX-512 BF16) takes half the time in it; any other one, 1.4
    times the time (docs/LOG.md).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # not in every torch that is supported
    told: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    able = device.type == "cpu" and (told().get("amx_bf16") or told().get("avx512_bf16"))
    return "bf16" if able else "float32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to a precision; does nothing for float32."""
    chosen = resolved(precision, device)
    return torch.autocast(device.type, _DTYPES[chosen], enabled=chosen != "float32")
