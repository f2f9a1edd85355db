"""What a GPU does in a second, in one process and one table: training steps, people, pictures, samples.

    python benchmarks/gpu.py                     # SD 1.5, SDXL, SD 3.5 medium and Flux dev, random weights
    python benchmarks/gpu.py "SD 1.5" --minutes 4
    python benchmarks/gpu.py --page              # the table of docs/families.md from the last results

A row that fails is a row with the reason, and the others go on. Rows that no longer fit into `--minutes` are
left out and named. Results go to benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from full_size import BASES, random_base, write_configs
from peft import LoraConfig
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import ViTConfig, ViTModel

from hyperdreambooth import captured
from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.denoise import denoise_loss, sample_noises
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.files import write_json
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.finetune.fast import finetune_adapters
from hyperdreambooth.generate import generate_images
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.train import train_hypernet
from hyperdreambooth.lora.relax import fresh
from hyperdreambooth.memory import skeleton
from hyperdreambooth.plan import sample_flops
from hyperdreambooth.runs import environment
from hyperdreambooth.training.warm import Warm

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "gpu.json", ROOT / "docs" / "families.md"
MARK = re.compile(r"(<!-- gpu -->\n).*?(<!-- /gpu -->)", re.DOTALL)
MEASURED = ("SD 1.5", "SDXL", "SD 3.5 medium", "Flux dev")
PROMPT = "a photo of a [V] person"
PROFILED = 3  # steps
SAVED = "seconds_to_the_saved_file"
KINDS = {
    "attention": r"attention|flash|softmax",
    "convolutions": r"conv",
    "matrix products": r"mm|linear|matmul",
    "norms": r"norm",
    "optimiser": r"adam|foreach",
    "copies and casts": r"copy|cat|stack|clone",
}
"""Kind → how its operators are called; what fits none is added, multiplied and so on, element by element."""
Row = Callable[[], dict[str, Any]]


def waited(base: Base) -> float:
    """Returns the time once the device has done what it was asked to."""
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
    return time.perf_counter()


@contextmanager
def not_recorded() -> Generator[None]:
    """Launches every kernel one by one in the block."""
    graphs = dict(captured.GRAPHS)
    captured.GRAPHS.clear()
    try:
        yield
    finally:
        captured.GRAPHS.update(graphs)


class Rows:
    """The rows of one base.

    Args:
        base: with weights of any kind.
        folder: for photos and a hypernetwork.
        steps: of a finetune.
        drawn: the denoising steps of a picture.
        crowds: how many people are trained side by side.
    """

    def __init__(
        self, base: Base, folder: Path, steps: int = 40, drawn: int = 25, crowds: tuple[int, ...] = (8, 32)
    ) -> None:
        self.base, self.folder, self.steps, self.drawn, self.crowds = base, folder, steps, drawn, crowds
        self.warm = Warm()
        self.photos: list[Photo] = []
        for k in range(8):
            place = folder / "photos" / f"person-{k // 2}" / f"{k % 2}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((base.resolution, base.resolution), 40 + k).convert("RGB").save(place)
            self.photos.append(Photo(place, f"person-{k // 2}", None))

    def all(self) -> dict[str, Row]:
        """Returns name → row, the most wanted first."""
        return {
            "bare forward and backward": self.bare,
            "diffusers + PEFT": self.plain_peft,
            "ours, kernel by kernel": self.kernel_by_kernel,
            "ours, recorded": partial(self.finetune, 1),
            "ours, warm": self.warm_person,
            "where a step goes": self.by_kind,
            "pictures, 1": partial(self.pictures, 1),
            "pictures, 8": partial(self.pictures, 8),
            "hypernetwork, batch 4": partial(self.hypernetwork, 4),
            **{f"people, {count}": partial(self.finetune, count) for count in self.crowds},
        }

    def _person(self, seed: int = 0) -> Adapter:
        return Adapter.made_on(self.base, fresh(self.base.sites, 4, seed))

    def _config(self) -> FinetuneConfig:
        return FinetuneConfig(rank=4, steps=self.steps, batch=1)

    def bare(self) -> dict[str, Any]:
        """The frozen base, with gradients to the latents only."""
        base = self.base
        latents = base.encode_images(torch.zeros(1, 3, base.resolution, base.resolution)).requires_grad_()
        noise, times = sample_noises(base, tuple(latents.shape[1:]), [(0,)])
        told = {name: one.detach() for name, one in base.encode_prompts(base.tokenize([PROMPT])).items()}

        def step() -> None:
            denoise_loss(base, latents, told, noise, times).sum().backward()

        with base.training(checkpointing=False):
            return self._repeated(step)

    def plain_peft(self) -> dict[str, Any]:
        """The loop of diffusers' LoRA script: PEFT, AdamW, autocast, one sample a step; the denoiser only."""
        base, denoiser = self.base, self.base.denoiser
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets), "plain")
        try:
            cast_training_params([denoiser], dtype=torch.float32)
            trained = [p for p in denoiser.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4)
            latents = base.encode_images(torch.zeros(1, 3, base.resolution, base.resolution))
            told = {name: one.detach() for name, one in base.encode_prompts(base.tokenize([PROMPT])).items()}

            def step() -> None:
                noise, times = sample_noises(base, tuple(latents.shape[1:]), [(0,)])
                with torch.autocast(base.device.type, torch.bfloat16):
                    loss = denoise_loss(base, latents, told, noise, times).mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                loss.item()

            with base.training(checkpointing=False):
                return self._repeated(step)
        finally:
            denoiser.unload_lora()
            denoiser.requires_grad_(False)

    def _repeated(self, step: Callable[[], None]) -> dict[str, Any]:
        for _ in range(2):
            step()
        began = waited(self.base)
        for _ in range(self.steps):
            step()
        return self._seconds(began)

    def _seconds(self, began: float, people: int = 1) -> dict[str, Any]:
        seconds = waited(self.base) - began
        each = 1000 * seconds / self.steps
        return {
            "seconds": round(seconds, 3),
            "steps": self.steps,
            "people": people,
            "ms_a_step": round(each, 2),
        }

    def finetune(self, people: int) -> dict[str, Any]:
        """People from their photos on, side by side; making adapters and the recording count."""
        began = waited(self.base)
        self._finetune(people, self.steps)
        return self._seconds(began, people)

    def _finetune(self, people: int, steps: int) -> None:
        adapters = [self._person(k) for k in range(people)]
        photos = [[self.photos[k % len(self.photos)]] for k in range(people)]
        config = self._config().model_copy(update={"steps": steps})
        finetune_adapters(self.base, adapters, photos, config)

    def kernel_by_kernel(self) -> dict[str, Any]:
        """One person without a graph."""
        with not_recorded():
            return self.finetune(1)

    def by_kind(self) -> dict[str, Any]:
        """The share of each kind of kernel in the device's time for a few steps, launched one by one.

        The recorded step has the same kernels. A profile of many steps would take minutes to read.
        """
        cuda = self.base.device.type == "cuda"
        watched = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with not_recorded(), profile(activities=watched) as seen:
            self._finetune(1, PROFILED)
        spent = dict.fromkeys([*KINDS, "element by element"], 0.0)
        for one in seen.key_averages():
            if one.key.startswith("aten::"):  # kernels have entries of their own besides
                fits = (kind for kind, names in KINDS.items() if re.search(names, one.key))
                micros = one.self_device_time_total if cuda else one.self_cpu_time_total
                spent[next(fits, "element by element")] += micros
        total = sum(spent.values())
        shares = {kind: round(micros / total, 6) for kind, micros in spent.items()}
        return {"steps": PROFILED, "seconds": round(total / 1e6, 3), "share": shares}

    def warm_person(self) -> dict[str, Any]:
        """The third person of a warm process, from photo to saved file."""
        figures: dict[str, Any] = {}
        for k in range(3):
            began = waited(self.base)
            person = self._person(k)
            made = finetune_adapters(self.base, [person], [self.photos[k]], self._config(), warm=self.warm)[0]
            figures = self._seconds(began)
            made.save(self.folder / "person.safetensors", "kohya")
            figures[SAVED] = round(waited(self.base) - began, 3)
        self.warm.forget()
        return figures

    def pictures(self, count: int) -> dict[str, Any]:
        """Pictures of one person, the second time that they are asked for."""
        figures: dict[str, Any] = {}
        for _ in range(2):
            began = waited(self.base)
            generate_images(self.base, PROMPT, self._person(), images=count, steps=self.drawn)
            seconds = round(waited(self.base) - began, 3)
            figures = {"seconds": seconds, "pictures": count, "steps": self.drawn}
        return figures

    def hypernetwork(self, batch: int) -> dict[str, Any]:
        """A hypernetwork's training after its first ten steps, without validation."""
        eye = self.folder / "eye"
        ViTModel(ViTConfig(image_size=224), add_pooling_layer=False).save_pretrained(eye)
        out = self.folder / f"hypernet-{batch}"
        config = HypernetConfig(encoder=str(eye), batch=batch, steps=30, validation=0, log_every=10, draws=1)
        train_hypernet(self.base, self.folder / "photos", out, config)
        lines = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
        first, last = (next(one for one in lines if one["step"] == step) for step in (10, 20))
        seconds = last["time"] - first["time"]
        return {"samples_a_second": round(10 * batch / max(seconds, 1e-3), 1), "batch": batch}


def attempt(base: Base, row: Row) -> dict[str, Any]:
    """Returns a row's figures and its most memory, or why it failed."""
    cuda = base.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        figures = row()
    except Exception as error:  # the other rows are wanted all the more
        return {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"}
    peak = {"gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if cuda else {}
    return {**figures, **peak}


def measured(rows: Rows, until: float) -> dict[str, Any]:
    """Returns every row for which there is time; `until` is of `time.monotonic`."""
    made: dict[str, Any] = {}
    for name, row in rows.all().items():
        late = time.monotonic() > until
        made[name] = {"left out": "no time"} if late else attempt(rows.base, row)
        print(f"  {name:28} {json.dumps(made[name])}", flush=True)
    return made


def card() -> dict[str, Any]:
    """Returns the card, its clocks and its memory, and the versions."""
    asked = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in told.stdout.partition("\n")[0].split(",")]
    return {**dict(zip(asked.split(","), values, strict=False)), "cuda": torch.version.cuda or ""}


def table(results: dict[str, Any]) -> str:
    """Returns the table of the page: a row for each thing that was measured on any base."""
    bases: dict[str, dict[str, Any]] = results["bases"]
    names = list(dict.fromkeys(name for rows in bases.values() for name in rows))
    lines = [["", *bases], ["---"] * (len(bases) + 1)]
    for name in names:
        cells = [_cell(rows.get(name)) for rows in bases.values()]
        if any(cells):
            lines.append([name, *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(row: Any) -> str:
    """Returns the time of a row, or nothing if it has none."""
    if not isinstance(row, dict):
        return ""
    if "ms_a_step" in row:
        step = row["ms_a_step"] / row["people"]
        people = " a person" if row["people"] > 1 else ""
        saved = f"; {row[SAVED]:.2f} s to the file" if SAVED in row else ""
        return f"{step:.0f} ms{people}{saved}"
    if "samples_a_second" in row:
        return f"{row['samples_a_second']:.0f} samples a second"
    return f"{row['seconds']:.2f} s" if "pictures" in row else row.get("failed", "")[:40]


def page(text: str, results: dict[str, Any]) -> str:
    """Returns the page with the table of these results between its markers."""
    return MARK.sub(lambda match: match[1] + table(results) + match[2], text)


def main() -> None:
    """Measures the bases one after the other, and writes after each of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bases", nargs="*", default=MEASURED, help=f"some of {', '.join(BASES)}")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--page", action="store_true", help="write the table, and measure nothing")
    asked = parser.parse_args()
    if asked.page:
        text = page(PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text()))
        PAGE.write_text(text, encoding="utf-8")
        return
    began, results = time.monotonic(), {"environment": environment(), "card": card(), "bases": {}}
    for k, name in enumerate(asked.bases, start=1):
        print(name, flush=True)
        until = began + 60 * asked.minutes * k / len(asked.bases)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            try:
                bare = skeleton(write_configs(name, folder), "bfloat16")
                rows: Any = Rows(random_base(folder, bare.resolution, "bfloat16", "cuda"), folder)
                # over the time of a step, how near it is to what the card can do
                arithmetic = {"tflop_a_sample": round(sample_flops(bare, True), 3)}
                results["bases"][name] = {**arithmetic, **measured(rows, until)}
            except Exception as error:
                results["bases"][name] = {"failed": str(error).partition("\n")[0][:300]}
            rows = None
            gc.collect()
            torch.cuda.empty_cache()
        write_json(RESULTS, results)


if __name__ == "__main__":
    main()
