"""`auto` is bf16 on GPUs that multiply it faster, and nothing else decides."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, get_args

import pytest
import torch

from hyperdreambooth.precision import Precision, autocast, compute_dtype, resolved, resolved_dtype

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


def test_auto_on_a_processor_is_float32_whatever_it_can_do() -> None:
    assert resolved("auto", CPU) == resolved("auto", MPS) == "float32"
    assert resolved_dtype("auto", CPU) == "float32"
    product = torch.ones(2, 2)
    with autocast("auto", CPU):
        assert (product @ product).dtype == torch.float32


@pytest.mark.parametrize("new", [True, False])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, new: bool) -> None:
    def supported(**asked: Any) -> bool:
        return new and asked == {"including_emulation": False}

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolved("auto", CUDA) == ("bf16" if new else "float32")
    assert resolved_dtype("auto", CUDA) == ("bfloat16" if new else "float32")
    assert resolved_dtype("float16", CUDA) == "float16"


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_weights_in_half_precision_need_no_autocast(weights: torch.dtype) -> None:
    """It would cast activations to float32 and back at every norm."""
    for precision in get_args(Precision):
        needed = weights == torch.float32 and precision in ("bf16", "fp16")
        needed |= weights == torch.bfloat16 and precision == "fp16"
        with autocast(precision, CPU, weights):
            assert torch.is_autocast_enabled("cpu") == needed
            expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision] if needed else weights
            assert compute_dtype(CPU, weights) == expected


@pytest.mark.parametrize("has", ["AVX2", "AVX512"])
def test_bf16_that_a_processor_imitates_causes_a_warning(monkeypatch: pytest.MonkeyPatch, has: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: has)
    with pytest.warns(UserWarning, match="no instructions for bf16") if has == "AVX2" else nullcontext():
        assert resolved("bf16", CPU) == "bf16"
    for precision, device in (("auto", CPU), ("float32", CPU), ("bf16", CUDA)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resolved(precision, device)


def test_what_is_named_is_taken() -> None:
    for name in set(get_args(Precision)) - {"auto"}:
        assert all(resolved(name, device) == name for device in (CPU, CUDA, MPS))
    product = torch.ones(2, 2)
    with autocast("bf16", CPU):
        assert (product @ product).dtype == torch.bfloat16
    with autocast("float32", CPU):
        assert (product @ product).dtype == torch.float32
