"""`auto` is bf16 where the machine multiplies it faster, and nothing else decides."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from hyperdreambooth.precision import Precision, autocast, resolved

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize("able", ["amx_bf16", "avx512_bf16", ""])
def test_auto_on_a_processor(monkeypatch: pytest.MonkeyPatch, able: str) -> None:
    told = {"avx512_f": True, "amx_bf16": False, "avx512_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**told, able: True})
    assert resolved("auto", CPU) == ("bf16" if able else "float32")
    assert resolved("auto", MPS) == "float32"
    product = torch.ones(2, 2)
    with autocast("auto", CPU):
        assert (product @ product).dtype == (torch.bfloat16 if able else torch.float32)


@pytest.mark.parametrize("new", [True, False])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, new: bool) -> None:
    def supported(**asked: Any) -> bool:
        return new and asked == {"including_emulation": False}

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolved("auto", CUDA) == ("bf16" if new else "float32")


def test_what_is_named_is_taken() -> None:
    for name in set(get_args(Precision)) - {"auto"}:
        assert all(resolved(name, device) == name for device in (CPU, CUDA, MPS))
    product = torch.ones(2, 2)
    with autocast("bf16", CPU):
        assert (product @ product).dtype == torch.bfloat16
    with autocast("float32", CPU):
        assert (product @ product).dtype == torch.float32
