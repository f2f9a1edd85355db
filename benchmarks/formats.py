"""Writing a person's files and switching who is worn, at the sizes of SD 1.5, as JSON on standard output.

`write` is one whole file of a LoRA, read back and compared site by site. `switch` is another identity worn in
place in a live pipeline; `reload` is diffusers' `unload_lora_weights` and `load_lora_weights`, from a file in
the page cache. The UNet has its real sizes and one shared zero for weights: neither job reads those. Each
is the smallest of its rounds, which a busy machine spoils least.

    python benchmarks/formats.py --rank 4
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from hyperdreambooth.base import sd
from hyperdreambooth.lora.formats.headers import LoraInfo
from hyperdreambooth.lora.formats.write import write_lora
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.runs import environment
from hyperdreambooth.shapes import Factors, Site

FACTS = LoraInfo("sks", "stable-diffusion-v1-5", 512, "Ana", 40)


def pipeline() -> Any:
    """SD 1.5 without its weights."""
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    for module in unet.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(()).expand(weight.shape), False)
    pipe: Any = StableDiffusionPipeline
    return pipe(
        vae=None, text_encoder=CLIPTextModel(text), tokenizer=None, unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def person(sites: tuple[Site, ...], rank: int) -> Factors:
    """A random adapter: down `(1, r, i)`, up `(1, o, r)`."""
    return {
        s.name: (torch.randn(1, rank, s.in_features), torch.randn(1, s.out_features, rank)) for s in sites
    }


def best(rounds: int, work: Callable[[], object]) -> float:
    """Milliseconds of the quickest of several times."""
    taken: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return round(min(taken) * 1000, 1)


def reload(pipe: Any, file: Path) -> None:
    """What a user of plain diffusers does for another person."""
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)


def main() -> None:
    """Reads the command line, prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    pipe = pipeline()
    sites, components = sd.sites(pipe), sd.components(pipe)
    one, other = person(sites, asked.rank), person(sites, asked.rank)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "person.safetensors"
        for form in ("kohya", "diffusers"):
            figures[f"write_{form}"] = best(asked.rounds, lambda: write_lora(file, one, form, FACTS))  # noqa: B023
        figures["reload"] = best(asked.rounds, lambda: reload(pipe, file))
        pipe.unload_lora_weights()
    with wear(components, one) as worn:
        figures["switch"] = best(asked.rounds, lambda: worn.set(other))
    told = {"config": vars(asked), "sites": len(sites), "milliseconds": figures, "on": environment()}
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
