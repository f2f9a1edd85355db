"""Measures the hand-out over Ray on this machine, and simulates larger clusters; writes results/cluster.json.

`overhead` trains units of people with one process of one core, then with two actors of one core each, and
compares the people a second, without what the start of actors takes. `scheduling` hands out units that do
nothing. `slow` has three nodes wait instead of work, one of them ten times longer. `collect` is what the
process that hands out does with a result. `simulate` puts the measured figures into a simulation with the
same rules (`cluster/desk.py`): workers that start at once and load the base over shared storage, results that
one process collects, trainings that take a little longer or shorter.

    python benchmarks/cluster.py                       # everything, on a machine with nothing else to do
    python benchmarks/cluster.py --only simulate       # from the figures that are in the result already
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hyperdreambooth.apps.elsewhere import trainer
from hyperdreambooth.apps.settings import BaseConfig
from hyperdreambooth.avatars.folder import render_folder
from hyperdreambooth.cluster.desk import Desk
from hyperdreambooth.cluster.on_ray import OnRay
from hyperdreambooth.faces.dataset import read_faces
from hyperdreambooth.files import read_json, write_json
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.preopt.bank_training import groups_of
from hyperdreambooth.preopt.config import PreoptConfig
from hyperdreambooth.preopt.groups import Group, Results, Trained
from hyperdreambooth.runs import environment
from hyperdreambooth.storage import Store

RESULT = Path(__file__).parent / "results" / "cluster.json"
PLOT = Path(__file__).parent.parent / "docs" / "scale.png"
TOGETHER = 32
STORE = 80 * 2**20  # bytes of each node's object store, the least that Ray allows


@contextmanager
def cluster(nodes: Sequence[dict[str, str]], cores: int = 1) -> Generator[str]:
    """Runs a head and nodes with environment variables of their own; yields the head's address."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    running = Cluster(initialize_head=True, head_node_args=head)
    try:
        for variables in nodes:
            os.environ.update(variables)
            running.add_node(num_cpus=cores, object_store_memory=STORE)
        yield str(running.address)
    finally:
        running.shutdown()


def timed(results: Iterator[tuple[int, Any]], first: int) -> list[float]:
    """Returns the seconds from the `first` result to each of those after it."""
    moments = [time.perf_counter() for _ in results]
    return [moment - moments[first - 1] for moment in moments[first:]]


def overhead(people: int, steps: int, home: Path) -> dict[str, float]:
    """Trains everybody alone and on two actors; the first unit of each worker warms it up."""
    torch.set_num_threads(1)
    render_folder(home / "photos", "train", people + 2 * TOGETHER, 1)
    config = PreoptConfig(down_dim=32, up_dim=16, steps=steps, identities_per_batch=TOGETHER)
    base = BaseConfig(device="cpu")
    recipe = partial(trainer, base, Store(home / "out"), config)
    alone = recipe()
    groups = groups_of(alone.stage, read_faces(home / "photos"), ())
    seconds_alone = timed(((k, alone(group)) for k, group in enumerate(groups[1:])), 1)[-1]
    rate_alone = people / seconds_alone
    with cluster([{}, {}]) as address:
        spread = timed(OnRay(address, "cpu")(recipe, groups), 2)
    rate = people / spread[-1]
    return {
        "people": people,
        "steps": steps,
        "unit_seconds": seconds_alone / (people / TOGETHER),
        "people_a_second_alone": rate_alone,
        "people_a_second_on_two": rate,
        "speedup": rate / rate_alone,
    }


def nothing(size: int) -> Callable[[int], bytes]:
    """A recipe of no work, whose results have a size in bytes."""
    return lambda _: bytes(size)


def scheduling(units: int) -> dict[str, float]:
    """The milliseconds of a unit that does nothing, for a result of no size and of that of 32 people."""
    found: dict[str, float] = {}
    with cluster([{}]) as address:
        for name, size in {"empty": 0, "of_32_people": TOGETHER * 4 * 3264}.items():
            seconds = timed(OnRay(address, "cpu")(partial(nothing, size), range(units)), 1)[-1]
            found[f"milliseconds_a_unit_{name}"] = 1000 * seconds / (units - 1)
    return found


def waiter(seconds: float) -> Callable[[int], None]:
    """A recipe that waits instead of working, as long as its node says."""
    return lambda _: time.sleep(seconds * float(os.environ["SLOW"]))


def slow(units: int, seconds: float) -> dict[str, float]:
    """Three nodes, one ten times slower: the seconds, from the first result on, against the ideal."""
    with cluster([{"SLOW": "10"}, {"SLOW": "1"}, {"SLOW": "1"}]) as address:
        moments = timed(OnRay(address, "cpu")(partial(waiter, seconds), range(units + 3)), 3)
    ideal = units * seconds / (1 + 1 + 0.1)
    return {
        "units": units,
        "unit_seconds": seconds,
        "seconds": moments[-1],
        "over_ideal": moments[-1] / ideal,
    }


def collect(people: int, home: Path) -> dict[str, float]:
    """The milliseconds for keeping a result and appending it, in a bank that grows to `people`."""
    # about as many numbers a person as SD 1.5 has
    base = trainer(BaseConfig(device="cpu"), Store(home), PreoptConfig(rank=3)).stage
    numbers = base.layout.size
    bank = Bank.create(home / "bank", base.manifest(), base.start)
    kept, seconds = Results(home / "groups"), list[float]()
    for at in range(0, people, TOGETHER):
        names = tuple(f"person-{k:07d}" for k in range(at, at + TOGETHER))
        group = Group(names, ((),) * TOGETHER, str(at))
        trained = Trained(torch.randn(TOGETHER, numbers), {"last_loss": torch.zeros(TOGETHER)}, 1.0)
        began = time.perf_counter()
        kept.save(group, trained)
        read = kept.read(group)
        bank.append(names, read.numbers, read.figures)
        kept.discard(group)
        seconds.append(time.perf_counter() - began)
    tenth = max(1, len(seconds) // 10)
    return {
        "people": people,
        "numbers": numbers,
        "milliseconds_a_unit_at_first": 1000 * statistics.median(seconds[:tenth]),
        "milliseconds_a_unit_at_last": 1000 * statistics.median(seconds[-tenth:]),
    }


@dataclass(frozen=True)
class World:
    """What a simulated cluster is like; seconds and bytes.

    Attributes:
        together: the people of a unit.
        unit: 300 steps of a unit on SD 1.5, measured on an H200: 292 ms a step of 32 people, 92 ms of 8.
        jitter: the standard deviation of a unit's logarithm.
        start: from the start of an actor to the reading of the base: imports.
        base: the bytes that every machine reads once, before the first units of its eight GPUs.
        storage: the bytes a second of the shared storage.
        network: there and back for a unit and its result.
        desk: what handing out a unit and collecting its result cost the one process that does both.
        photos: the bytes of a person's photos.
    """

    together: int = TOGETHER
    unit: float = 87.6
    jitter: float = 0.05
    start: float = 20.0
    base: float = 4.3e9
    storage: float = 5e9
    network: float = 0.002
    desk: float = 0.02
    photos: float = 4 * 3e5


def simulate(world: World, people: int, gpus: int, seed: int = 0) -> float:
    """Returns the efficiency: the work of all units, over the GPU seconds until the last result.

    Events are (moment, kind, worker); the storage and the process that hands out serve one after another.
    """
    rng, units = random.Random(seed), -(-people // world.together)
    desk, free, work = Desk(range(units)), 0.0, 0.0
    gpus_used = min(gpus, units)
    storage = (world.start + (k // 8 + 1) * world.base / world.storage for k in range(gpus_used))
    events = [(moment, f"{k}") for k, moment in enumerate(storage)]
    seconds = [world.unit * rng.lognormvariate(0, world.jitter) for _ in range(units)]
    idle, busy, end = set[str](), set[str](), 0.0
    heapq.heapify(events)
    while not desk.finished:
        now, worker = heapq.heappop(events)
        free = max(free, now) + world.desk
        if worker in busy:
            busy.remove(worker)
            if (number := desk.done(worker, now)) is not None:
                work, end = work + seconds[number], free
        idle.add(worker)
        for name, number, _ in desk.hand_out(set(idle), free):
            idle.remove(name)
            busy.add(name)
            reading = world.together * world.photos / (world.storage / gpus_used)
            heapq.heappush(events, (free + world.network + reading + seconds[number], name))
    return work / (gpus * end)


GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
CASES = {
    "15,000 people": (15_000, TOGETHER),
    "15,000 people, units of 8": (15_000, 8),
    "100,000 people": (100_000, TOGETHER),
}


def curves(world: World) -> dict[str, Any]:
    """Efficiency over the number of GPUs, and the most GPUs with 0.9, for each case.

    With small units, a person costs more on each GPU, which counts as lost efficiency.
    """
    found: dict[str, Any] = {
        "world": asdict(world),
        "gpus": GPUS,
        "efficiency": {},
        "most_gpus_above_0.9": {},
    }
    for name, (people, together) in CASES.items():
        small = replace(world, together=8, unit=27.6) if together == 8 else world
        worse = (world.unit / TOGETHER) / (small.unit / small.together)
        curve = [round(worse * simulate(small, people, gpus), 4) for gpus in GPUS]
        good = [gpus for gpus, value in zip(GPUS, curve, strict=True) if value >= 0.9]
        found["efficiency"][name], found["most_gpus_above_0.9"][name] = curve, max(good, default=0)
    return found


def draw(found: dict[str, Any], file: Path) -> None:
    """Draws the curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, curve), colour in zip(
        found["efficiency"].items(), ("#4477aa", "#ee6677", "#228833"), strict=True
    ):
        axes.plot(found["gpus"], curve, marker="o", markersize=4, color=colour, label=name)
    axes.axhline(0.9, color="#686c76", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log", xlabel="GPUs", ylabel="efficiency", ylim=(0, 1.03), title="Simulated: pre-optimisation"
    )
    axes.set_xticks(found["gpus"], [str(count) for count in found["gpus"]])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Reads the command line, measures what is asked for, keeps the rest of the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("overhead", "scheduling", "slow", "collect", "simulate")
    parser.add_argument(
        "--only", choices=parts, action="append", help="may be repeated; everything by default"
    )
    parser.add_argument("--people", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--units", type=int, default=60, help="of `slow`, a second each")
    args = parser.parse_args()
    found: dict[str, Any] = read_json(RESULT) if RESULT.is_file() else {}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    for part in args.only or parts:
        with tempfile.TemporaryDirectory(prefix="ray-") as home:
            (Path(home) / "ray").mkdir()
            os.environ["RAY_TMPDIR"] = home
            before = os.getloadavg()[0]
            match part:
                case "overhead":
                    found[part] = overhead(args.people, args.steps, Path(home))
                case "scheduling":
                    found[part] = scheduling(2000)
                case "slow":
                    found[part] = slow(args.units, 1.0)
                case "collect":
                    found[part] = collect(15_000, Path(home))
                case _:
                    found[part] = curves(World(desk=_desk(found)))
                    draw(found[part], PLOT)
            found[part]["load"] = before
        write_json(RESULT, {**found, "environment": environment()})
        print(part, json.dumps(found[part], indent=1))


def _desk(found: dict[str, Any]) -> float:
    """Returns the measured seconds that a unit costs the process that hands out."""
    handed = found["scheduling"]["milliseconds_a_unit_of_32_people"]
    return (handed + found["collect"]["milliseconds_a_unit_at_last"]) / 1000


if __name__ == "__main__":
    main()
