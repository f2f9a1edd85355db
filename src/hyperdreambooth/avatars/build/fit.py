"""The training loop of the embedded world; VAE, base, scorers and encoder differ only in their loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.captured import Captured
from hyperdreambooth.files import load_tensors, save_tensors
from hyperdreambooth.precision import Precision, autocast
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import Run
from hyperdreambooth.schedule import learning_rate

Tensors = dict[str, Tensor]


class StageConfig(BaseModel):
    """How one model is trained.

    Attributes:
        lr: peak learning rate of AdamW, with a warm-up over 2 % of the steps and a cosine to a twentieth.
        ema: decay of the average of the weights, which is what ships.
        seed: of weights and samples.
        people: identities rendered for it.
        each: pictures an identity.
    """

    model_config = ConfigDict(extra="forbid")
    steps: int
    batch: int = 32
    lr: float = 1e-3
    ema: float = 0.999
    precision: Precision = "bf16"
    seed: int = 0
    people: int = 6000
    each: int = 4
    checkpoint_every: int = 200


def fit(
    name: str,
    model: nn.Module,
    batch_of: Callable[[int], Tensors],
    loss_of: Callable[[Tensors], dict[str, Tensor]],
    config: StageConfig,
    folder: Path,
    device: str,
) -> None:
    """Trains a model and leaves the average of its weights (EMA) in it.

    Args:
        name: shown on the progress bar.
        model: trained in place.
        batch_of: step → tensors on the CPU; must depend on nothing but the step.
        loss_of: those tensors on the device → named losses; `loss` is minimised, the others are logged. A
            GPU records it with the step's other work, so it reads nothing back.
        folder: run folder with config, log and checkpoints; the same call continues an interrupted one.
    """
    run, cuda = Run(folder, config), torch.device(device).type == "cuda"
    # a tensor, because a recorded step reads it anew; CPUs take float64, so that no digit of it is lost
    rate = torch.zeros((), device=device, dtype=None if cuda else torch.float64)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=cuda
    )
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    first = 0
    if found := run.latest():
        first, state = found
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = rate  # loading replaces it
        average = {k: v.to(device) for k, v in state["average"].items()}
    model.train()

    def take(batch: Tensors) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with autocast(config.precision, torch.device(device)):
            losses = loss_of(batch)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    taken = Captured(take, torch.device(device))
    with Progress(name, config.steps) as bar:
        bar.update(first)
        for step, batch in enumerate(batches(batch_of, first, config.steps, device), first):
            warm = learning_rate(0.95 * config.lr, step, config.steps, warmup=config.steps // 50)
            rate.fill_(0.05 * config.lr + warm)
            losses = taken({k: v.to(device, non_blocking=True) for k, v in batch.items()})
            _follow(average, model, min(config.ema, (step + 1) / (step + 10)))
            bar.update(1)
            done, last = step + 1, step + 1 == config.steps
            if done % 20 == 0 or last:  # reading a loss makes the CPU wait for the GPU
                figures = {k: v.item() for k, v in losses.items()}
                run.log(done, **figures)
                bar.update(0, loss=figures["loss"])
            if done % config.checkpoint_every == 0 or last:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                run.save(done, {**state, "average": average}, keep=1)
    model.load_state_dict(average)
    model.eval()


def batches(batch_of: Callable[[int], Tensors], first: int, steps: int, device: str) -> Iterable[Tensors]:
    """Yields the batches in order. For a GPU, processes on idle cores make them; on a CPU no core is idle."""
    fed = torch.device(device).type == "cuda" and hasattr(os, "fork")
    workers = max(1, (os.cpu_count() or 1) - 2) if fed else 0
    loader: Any = DataLoader  # a range has all that a Dataset needs
    how = {"pin_memory": True, "multiprocessing_context": "fork"} if fed else {}
    return loader(range(first, steps), batch_size=None, collate_fn=batch_of, num_workers=workers, **how)


@torch.no_grad()
def read_all(pictures: Pictures, read: Callable[[Tensor], Tensor], file: Path, device: str) -> Tensor:
    """Returns what a network reads from all pictures, float16, from `file` if it exists.

    Args:
        pictures: `m` of them.
        read: pixels `(b, 3, h, w)` on the device → `(b, …)`.
        file: holds the answers from then on.
        device: where the network is.
    """
    if file.is_file():
        return load_tensors(file)[0]["read"]
    rows, parts = torch.arange(len(pictures)).split(64), list[Tensor]()
    for batch in batches(lambda k: {"pixels": pictures.batch(rows[k])}, 0, len(rows), device):
        with autocast("auto", torch.device(device)):
            parts.append(read(batch["pixels"].to(device)).half().cpu())
    answers = torch.cat(parts)
    save_tensors(file, {"read": answers})
    return answers


@torch.no_grad()
def _follow(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    now = model.state_dict()
    moving = [key for key, value in now.items() if value.is_floating_point()]
    get_ema_multi_avg_fn(decay)([average[key] for key in moving], [now[key] for key in moving], 0)
    for key in now.keys() - moving:
        average[key].copy_(now[key])
