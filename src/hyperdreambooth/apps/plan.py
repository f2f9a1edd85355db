"""`hdb plan`: what many people will cost, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from typer import echo

from hyperdreambooth.apps.options import command

if TYPE_CHECKING:
    from hyperdreambooth.apps.settings import Job
    from hyperdreambooth.plan import PlanConfig, Stage

_COLUMNS: tuple[str, ...] = ("stage", "work", "hours", "GPU hours", "GiB a device", "GiB on disk", "price")
_FLAGS = ("people", "photos", "gpus", "price")


@command("hyperdreambooth.plan:PlanConfig", *_FLAGS)
def plan(job: Job[PlanConfig]) -> None:
    """Show what preparing, pre-optimising and training will cost: hours, memory, storage, price.

    The tables [preoptimize] and [train] of a --config set the stages, as they do for the commands. Without
    --gpus, this machine runs each stage for a few steps. For GPUs that are not here, measured figures are
    scaled.
    """
    from hyperdreambooth.base.device import pick_device
    from hyperdreambooth.memory import skeleton
    from hyperdreambooth.plan import RATES, measure, parse_gpus, stages
    from hyperdreambooth.precision import resolved_dtype

    loading, own = job.base, job.own
    devices, kind = parse_gpus(own.gpus)
    without = {"base", "device", "variant", "trigger", "class_word"}  # which change no size
    here = kind == "here"
    dtype = resolved_dtype(loading.dtype, pick_device(loading.device)) if here else _on_gpus(loading.dtype)
    sizes: dict[str, Any] = {**loading.model_dump(exclude=without), "dtype": dtype}
    bare = skeleton(loading.base, **sizes)
    if here:
        from hyperdreambooth.apps.loading import load

        speed = measure(load(loading), bare, own)
    else:
        speed = RATES[kind]
    _show(stages(bare, own, speed, (os.cpu_count() or 1) if here else None), own.price)
    echo(f"speed: {speed.source}")
    echo(f"prepare: {_cores(devices, kind)} at 6.9 photos a second each")


def _on_gpus(dtype: str) -> str:
    """Returns the number format of weights on GPUs that are not here: all in the plan compute in bfloat16."""
    return "bfloat16" if dtype == "auto" else dtype


def _cores(devices: int, kind: str) -> str:
    return f"{os.cpu_count()} cores" if kind == "here" else f"{8 * devices} cores, eight for each GPU,"


def _show(rows: Sequence[Stage], price: float | None) -> None:
    """Prints a table, a line for each stage and one for all."""
    from hyperdreambooth.plan import total  # which imports torch

    lines = [_COLUMNS, *(_cells(row, price) for row in (*rows, total(rows)))]
    if price is None:
        lines = [line[:-1] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, work, *figures in lines:
        cells = [f"{text:>{width}}" for text, width in zip(figures, widths[2:], strict=True)]
        echo("  ".join([f"{name:{widths[0]}}", f"{work:{widths[1]}}", *cells]))


def _cells(row: Stage, price: float | None) -> tuple[str, ...]:
    """Formats what a stage costs."""
    return (
        row.name, row.work, f"{row.seconds / 3600:,.2f}", f"{row.gpu_hours:,.1f}",
        f"{row.memory / 2**30:.1f}", f"{row.storage / 2**30:,.1f}", f"{row.gpu_hours * (price or 0):,.0f}",
    )  # fmt: skip
