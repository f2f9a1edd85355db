"""What wearing costs: one training step of the denoiser, bare against worn, as JSON on standard output.

`bare` is the frozen denoiser's forward and backward (to its input). `shared` wears one adapter for all
samples, `per_sample` a different identity on every sample, `one_by_one` runs the identities in a loop; all
with gradients to the factors. The arms take turns and each figure is the smallest of its rounds, which a busy
machine spoils least.

    python benchmarks/wear.py --identities 32 --rank 1
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hyperdreambooth.lora.inject import wear
from hyperdreambooth.runs import environment
from hyperdreambooth.shapes import Factors, canonical

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
WIDTH, TOKENS, CHANNELS = 128, 24, 24  # of the conditioning, its length, of the latents: the avatars'


def denoiser(channels: tuple[int, ...], latents: int) -> nn.Module:
    """A random UNet of Stable Diffusion's shape, frozen."""
    torch.manual_seed(0)
    attending = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=latents,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    ).requires_grad_(False)


def random_factors(unet: nn.Module, n: int, rank: int) -> Factors:
    """Factors with gradients at every attention projection: down `(n, r, i)`, up `(n, o, r)`."""
    linears = {path: m for path, m in unet.named_modules() if isinstance(m, nn.Linear)}
    return {
        canonical("unet", path): (
            (torch.randn(n, rank, m.in_features) * 0.05).requires_grad_(),
            (torch.randn(n, m.out_features, rank) * 0.05).requires_grad_(),
        )
        for path, m in linears.items()
        if path.endswith(PROJECTIONS)
    }


def step(unet: nn.Module, inputs: tuple[Tensor, ...], autocast: bool) -> None:
    """One forward and backward of a mean squared error; inputs `(b, c, h, w)`, `(b,)`, `(b, t, d)`."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=autocast):
        loss = unet(*inputs).sample.float().square().mean()
    loss.backward()


def timed(work: Callable[[], None]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def one_round(
    unet: nn.Module, n: int, rank: int, latents: int, autocast: bool, loop: bool
) -> dict[str, float]:
    """Seconds a step of every arm, once."""
    noisy = torch.randn(n, CHANNELS, latents, latents)
    inputs = (noisy, torch.randint(0, 1000, (n,)), torch.randn(n, TOKENS, WIDTH))
    leaf = (noisy.clone().requires_grad_(), *inputs[1:])
    seconds = {"bare": timed(lambda: step(unet, leaf, autocast))}
    with wear({"unet": unet}, random_factors(unet, n, rank)):
        seconds["per_sample"] = timed(lambda: step(unet, inputs, autocast))
    with wear({"unet": unet}, random_factors(unet, 1, rank)):
        seconds["shared"] = timed(lambda: step(unet, inputs, autocast))
        singles = [tuple(x[k : k + 1] for x in inputs) for k in range(n)]
        if loop:
            seconds["one_by_one"] = timed(
                lambda: [step(unet, single, autocast) for single in singles].clear()
            )
    return seconds


def main() -> None:
    """Reads the command line, prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--identities", type=int, default=32)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 192])
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--no-loop", action="store_true", help="leave the arm one_by_one out")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    unet = denoiser(tuple(asked.channels), asked.latents)
    sizes = (asked.identities, asked.rank, asked.latents, asked.autocast, not asked.no_loop)
    rounds = [one_round(unet, *sizes) for _ in range(asked.rounds)]
    best = {arm: min(r[arm] for r in rounds) for arm in rounds[0]}
    ratios = {arm: seconds / best["bare"] for arm, seconds in best.items()}
    print(
        json.dumps({"config": vars(asked), "seconds": best, "to_bare": ratios, "on": environment()}, indent=2)
    )


if __name__ == "__main__":
    main()
