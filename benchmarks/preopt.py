"""Measures what pre-optimising many people together costs on this machine; writes results/preopt.json.

`bare` is the frozen base's own forward and backward at the same batch, text encoder included, with
gradients to the prompt's embeddings and the latents. `together` is a whole step of
`preopt.bank_training.train_group` with as many people (draws, factors, loss, backward, clipping, Adam),
`alone` one of a single person. The arms take turns, and figures are medians, so that other load on the
machine affects all alike. `--equal N` trains the people N steps both ways and compares the numbers.

    python benchmarks/preopt.py            # the embedded base, or its architecture with random weights
    python benchmarks/preopt.py --base DIR --people 32 --equal 100
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hyperdreambooth.base.denoise import Key, denoise_loss, sample_noises
from hyperdreambooth.base.load import EMBEDDED, Base, load_base
from hyperdreambooth.files import write_json
from hyperdreambooth.precision import autocast
from hyperdreambooth.preopt.bank_training import PreoptConfig, Stage, prepare, train_group
from hyperdreambooth.runs import environment, rng
from hyperdreambooth.training.shots import Shots

RESULT = Path(__file__).parent / "results" / "preopt.json"
CAPTION = "a photo of a [V] face, smiling, with a red hat, in front of a forest"


People = list[list[Shots]]


class Clock:
    """Measures the seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def stop(self, step: int = 0, loss: float = 0.0) -> None:
        """Ends a step; the callback of a training."""
        del step, loss
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def random_base() -> Base:
    """The avatars' architecture, random weights: 24×16×16 latents, a 3-layer text encoder of width 128."""
    from hyperdreambooth.avatars.build.autoencoder import LATENT_CHANNELS, new_vae
    from hyperdreambooth.avatars.build.diffusion import assemble

    return Base.from_pipeline(
        assemble(new_vae(0, LATENT_CHANNELS), seed=0), "random weights", trigger="sks", class_word="face"
    )


def crowd(base: Base, count: int) -> People:
    """Returns people of random latents: what they look like does not change what a step costs."""
    config = cast("Any", base.components["unet"]).config
    shape = (4, config.in_channels, config.sample_size, config.sample_size)
    names = [f"person-{k:03d}" for k in range(count)]
    return [
        [Shots(torch.randn(shape, generator=rng(0, name)).to(base.device), (base.prompt(CAPTION),) * 4, name)]
        for name in names
    ]


def bare_step(stage: Stage, people: People) -> Callable[[], None]:
    """Returns the frozen base's forward and backward, without an adapter, on inputs made beforehand."""
    base = stage.base
    encoder = cast("Any", base.components["text_encoder"])
    tokens = base.tokenize([CAPTION] * len(people))
    latents = torch.stack([person.latents[0] for (person,) in people]).requires_grad_()
    keys: list[Key] = [(0, person.person) for (person,) in people]
    noise, timesteps = sample_noises(base, tuple(latents.shape[1:]), keys)
    inner = getattr(encoder, "text_model", encoder)

    def live(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del module, inputs
        output.requires_grad_()

    def step() -> None:
        latents.grad = None
        handle = inner.embeddings.register_forward_hook(live)
        with autocast(stage.config.precision, base.device):
            losses = denoise_loss(base, latents, base.encode_prompts(tokens), noise, timesteps)
        losses.sum().backward()
        handle.remove()

    return step


def timed(step: Callable[[], None], times: int) -> list[float]:
    """Seconds of each call."""
    clock = Clock()
    for _ in range(times):
        step()
        clock.stop()
    return clock.seconds


def steps_of(stage: Stage, people: People) -> list[float]:
    """Returns the seconds of each step of a training but the first, which also wears the adapter."""
    clock = Clock()
    train_group(stage, people, callback=clock.stop)
    return clock.seconds[1:]


def measure(stage: Stage, people: People, rounds: int) -> dict[str, float]:
    """The three arms in turn, medians in seconds, and their ratios."""
    arms: dict[str, list[float]] = {"bare": [], "together": [], "alone": []}
    bare = bare_step(stage, people)
    timed(bare, 2)
    steps_of(stage, people)
    for k in range(rounds):
        arms["bare"] += timed(bare, stage.config.steps)[1:]
        arms["together"] += steps_of(stage, people)
        arms["alone"] += steps_of(stage, [people[k % len(people)]])
    seconds = {name: statistics.median(values) for name, values in arms.items()}
    each, alone = 1000 * seconds["together"] / len(people), 1000 * seconds["alone"]
    return {
        **{f"{name}_seconds": round(value, 4) for name, value in seconds.items()},
        "together_over_bare": round(seconds["together"] / seconds["bare"], 3),
        "identities_an_hour_over_alone": round(alone / each, 2),
        "ms_a_person_and_step": round(each, 2),
        "ms_a_person_and_step_alone": round(alone, 2),
    }


def equal(stage: Stage, people: People) -> float:
    """Largest difference of the numbers between people trained together and each alone."""
    together, _ = train_group(stage, people)
    alone = torch.cat([train_group(stage, [person])[0] for person in people])
    return float((together - alone).abs().max())


def main() -> None:
    """Reads the command line, measures, writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="", help="folder, or `random`; the embedded base if there is one")
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument(
        "--equal", type=int, default=0, help="steps of the comparison with one by one; 0 for none"
    )
    parser.add_argument("--profile", action="store_true", help="print the operators of a few steps instead")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    embedded = (EMBEDDED / "model_index.json").is_file()
    random = args.base == "random" or not (args.base or embedded)
    base = random_base() if random else load_base(args.base or None)
    people = crowd(base, args.people)
    config = PreoptConfig(down_dim=32, up_dim=16, steps=5, precision=args.precision)
    stage = prepare(base, config)
    if args.profile:
        show(stage, people)
        return
    figures: dict[str, Any] = measure(stage, people, args.rounds)
    if args.equal:
        figures["largest_difference"] = equal(
            prepare(base, config.model_copy(update={"steps": args.equal})), people
        )
        figures["steps_compared"] = args.equal
    unet = sum(p.numel() for p in base.components["unet"].parameters())
    facts = {
        "base": base.source,
        "unet_parameters": unet,
        "sites": len(stage.layout.sites),
        "numbers": stage.layout.size,
        "people": args.people,
        "precision": args.precision,
        "device": str(base.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": processor(),
        "load": os.getloadavg()[0],
    }
    write_json(args.out, {**figures, **facts, "environment": environment()})
    for name, value in {**figures, **facts}.items():
        print(f"{name:32} {value}")


def processor() -> str:
    """The processor's name as Linux knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def show(stage: Stage, people: People) -> None:
    """The costliest operators of the bare step and of the worn one."""
    bare = bare_step(stage, people)
    timed(bare, 2)
    for name, run in {"bare": lambda: timed(bare, 5), "together": lambda: steps_of(stage, people)}.items():
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            run()
        print(
            name,
            seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40),
        )


if __name__ == "__main__":
    main()
