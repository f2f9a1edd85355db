"""A denoiser whose blocks are compiled computes the same, and compiles nothing again as factors change."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from hyperdreambooth.base.denoise import denoise_loss
from hyperdreambooth.base.load import Base
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import fresh


@pytest.mark.slow
# of torch's own compiler, when it is imported
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_changing_factors_compiles_nothing_again(micro_base: Base) -> None:
    torch.manual_seed(0)
    factors = [
        {site: (torch.randn_like(down), torch.randn_like(up)) for site, (down, up) in made.items()}
        for made in (fresh(micro_base.sites, 2, k) for k in range(4))
    ]
    for pairs in factors:
        for down, up in pairs.values():
            down.requires_grad_()
            up.requires_grad_()
    latents, noise, times = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([300])

    def losses(compiled: bool) -> list[float]:
        found: list[float] = []
        with wear(micro_base.components, factors[0]) as worn, micro_base.training(False, compiled):
            for k, one in enumerate(factors):
                worn.set(one)
                told = micro_base.encode_prompts(micro_base.tokenize(["a [V] face"]))
                loss = denoise_loss(micro_base, latents, told, noise, times).sum()
                loss.backward()
                found.append(loss.item())
                if k == 1:
                    counters.clear()
        return found

    plain = losses(False)
    assert losses(True) == pytest.approx(plain, rel=1e-4)
    assert not counters["recompiles"] and not counters["graph_break"] and not counters["stats"]
    assert not any(module._compiled_call_impl for module in micro_base.denoiser.modules())
