"""`hdb train` on a Ray cluster: Ray Train starts the processes, and starts them again when a machine is lost.

The processes are those of `torchrun`: they share every batch, and exchange the hypernetwork's gradients. What
survives is the checkpoint in the run folder, so the output has to be on a disk that all machines share. The
number of processes may change at every start, because it changes no gradient.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from hyperdreambooth.cluster.on_ray import asked_for, connected, room_for_workers
from hyperdreambooth.events import Events
from hyperdreambooth.files import InputError, first_line

Process: TypeAlias = Callable[[], object]
"""Trains, as one of several processes. It is pickled for the workers."""

_RESTARTS = 1000  # machines that may be lost; a mistake in the code must end at last
_NAMED = 4  # of the workers that are lost together


def train_on_ray(process: Process, out: Path, address: str, device: str, most: int) -> None:
    """Trains with as many processes as the cluster has room for, also after machines come or go.

    Args:
        process: the work of each process, which continues from the newest checkpoint.
        out: a folder that all machines share.
        address: of Ray's head, `auto` or `local`.
        device: auto, cpu or cuda.
        most: the largest number of processes: a batch cannot be shared by more.

    Raises:
        InputError: no Ray, no cluster, no room in it, or what the training refuses.
    """
    with connected(address) as ray:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        ask = asked_for(ray, device)
        room = min(most, room_for_workers(ray, ask, address))
        each = {"CPU": ask["num_cpus"], **({"GPU": 1.0} if "num_gpus" in ask else {})}
        scaling = ScalingConfig(
            num_workers=(1, room), use_gpu="GPU" in each, resources_per_worker=each,
        )  # fmt: skip
        kept = RunConfig(
            name="train", storage_path=str((out / "ray").absolute()),
            failure_config=FailureConfig(max_failures=_RESTARTS),
            callbacks=[_teller(Events((out / "run" / "events.jsonl").absolute()))],
        )  # fmt: skip
        given = {"process": process, "folder": str(Path.cwd()), "cpu": "GPU" not in each}
        made = TorchTrainer(_run, train_loop_config=given, scaling_config=scaling, run_config=kept).fit()
    if refused := (made.metrics or {}).get("refused"):
        raise InputError(refused)


def _teller(events: Events) -> Any:
    """Returns what Ray Train calls when processes are lost. It runs where the command runs."""
    from ray.train import UserCallback

    class Teller(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            events.add("lost", what=told(worker_exceptions), restart=True)

    return Teller()


def told(errors: Mapping[int, Exception]) -> str:
    """Says which processes were lost together, where Ray knows that, and why.

    Args:
        errors: what ended each process, by its rank. Those whose peer is gone raise an error of their own.
    """
    some = [f"worker {rank} ({_reason(error)})" for rank, error in sorted(errors.items())[:_NAMED]]
    more = f" and {len(errors) - len(some)} more" if len(errors) > len(some) else ""
    return f"{', '.join(some)}{more}; all go on from the last checkpoint"


def _reason(error: Exception) -> str:
    died = getattr(error, "health_check_failure", None)  # Ray Train wraps what Ray says of a dead process
    if died is None:
        return f"{type(error).__name__}: {first_line(error)}"
    place = re.search(r"\bip: (\S+)", str(died))
    return f"{place[1]}, {type(died).__name__}" if place else type(died).__name__


def _run(given: dict[str, Any]) -> None:
    """Is what Ray Train starts. A user's mistake is reported, because Ray would try again after an error."""
    from ray.train import report

    os.chdir(given["folder"])
    if given["cpu"]:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        given["process"]()
    except InputError as error:
        report({"refused": str(error)})
