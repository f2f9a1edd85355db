"""A bank of a million people: seconds to write, to open and to read, and memory, as JSON.

The numbers are drawn, not trained. Every measurement runs in a process of its own, whose peak memory counts.
`--writers` processes append at once in units of `--unit` people. With `--kills` some of them are killed by
-9 on the way and started again; each first looks at what is already there. At the end all that any of them
had reported as written must be there, once, and the bank must be that of one writer alone: the names of the
files are their content. `--s3` does the same over moto's S3 server on the loopback.

    python benchmarks/bank.py --people 1000000 --numbers 256
    python benchmarks/bank.py --people 15000 --numbers 19200
    python benchmarks/bank.py --people 20000 --numbers 256 --s3
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "bank.json"
SPAWN = multiprocessing.get_context("spawn")


def parts(numbers: int) -> tuple[Any, dict[str, Any]]:
    """A layout of `numbers` numbers a person, on sites of 150 or 32 numbers, and the manifest."""
    from hyperdreambooth.lidb.weights import Layout
    from hyperdreambooth.shapes import Site

    down, up = (100, 50) if numbers % 150 == 0 else (16, 16)
    sites = tuple(Site(f"unet.site{k:04d}", 320, 320) for k in range(numbers // (down + up)))
    layout = Layout(sites, 1, down, up)
    assert layout.size == numbers, f"--numbers: expected a multiple of 150 or of 32, got {numbers}"
    return layout, {"layout": layout.to_json(), "base_fingerprint": "0" * 16, "basis_source": "seed:0"}


def names_of(unit: int, size: int, people: int) -> list[str]:
    """The people of a unit."""
    return [f"person-{k:07d}" for k in range(unit * size, min(people, (unit + 1) * size))]


def drawn(unit: int, count: int, numbers: int) -> Any:
    """The numbers of a unit, the same whoever draws them."""
    import torch

    return torch.randn(count, numbers, generator=torch.Generator().manual_seed(unit))


def write(place: str, units: range, size: int, people: int, numbers: int, said: str) -> None:
    """Appends the units that are missing, and notes each whose append has returned."""
    import torch

    from hyperdreambooth.lidb.bank import Bank
    from hyperdreambooth.lidb.weights import start

    torch.set_num_threads(1)
    layout, manifest = parts(numbers)
    bank = Bank.create(place, manifest, start(layout, 0))
    with open(said, "a") as lines:
        for unit in units:
            names = names_of(unit, size, people)
            if names[0] not in bank:
                bank.append(names, drawn(unit, len(names), numbers))
                lines.write(f"{unit}\n")
                lines.flush()


def write_all(place: str, chosen: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Runs all writers, kills some, and starts those again until everybody is there."""
    units = -(-chosen.people // chosen.unit)
    shares = [range(k, units, chosen.writers) for k in range(chosen.writers)]
    draw, kills, began = random.Random(0), 0, time.monotonic()
    waiting = list(range(chosen.writers))
    while waiting:
        running = {}
        for k in waiting:
            words = (place, shares[k], chosen.unit, chosen.people, chosen.numbers, str(home / f"said-{k}"))
            running[k] = SPAWN.Process(target=write, args=words)
            running[k].start()
        for k in draw.sample(waiting, min(len(waiting), chosen.kills - kills)):
            running[k].join(draw.uniform(5, chosen.patience))
            if running[k].is_alive():
                os.kill(running[k].pid or 0, signal.SIGKILL)
                kills += 1
        for process in running.values():
            process.join()
        waiting = [k for k, process in running.items() if process.exitcode]
    seconds = time.monotonic() - began
    reported = sum(len(file.read_text().split()) for file in home.glob("said-*"))
    return {
        "writers": chosen.writers,
        "kills": kills,
        "units": units,
        "reported": reported,
        "seconds": seconds,
    }


def peak() -> float:
    """The largest memory of this process, in megabytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def read(place: str, people: int, numbers: int, unit: int) -> dict[str, Any]:
    """Opens the bank, reads a thousand people at random, then the first tenth in blocks."""
    import torch

    from hyperdreambooth.lidb.bank import Bank

    torch.set_num_threads(1)
    before, began, worked = peak(), time.monotonic(), time.process_time()
    bank = Bank.open(place)
    opened, cpu = time.monotonic() - began, time.process_time() - worked
    found = {"files_of_the_index": len((bank.store / "index").names()), "open_s": opened, "open_cpu_s": cpu}
    found["people"] = len(bank)
    chosen = random.Random(1).sample(range(people), min(1000, people))
    began, worked = time.monotonic(), time.process_time()
    rows = bank.numbers([f"person-{k:07d}" for k in chosen])
    found["read_1000_at_random_s"] = time.monotonic() - began
    found["read_1000_at_random_cpu_s"] = time.process_time() - worked
    began = time.monotonic()
    for k in chosen[:100]:
        bank.numbers([f"person-{k:07d}"])
    found["read_one_ms"] = (time.monotonic() - began) * 10
    for k, row in list(zip(chosen, rows, strict=True))[:50]:
        count = len(names_of(k // unit, unit, people))
        assert torch.equal(row, drawn(k // unit, count, numbers)[k % unit])
    found["peak_mb_before"], found["peak_mb"] = before, peak()
    began, first = time.monotonic(), names_of(0, max(1, people // 10), people)
    read = sum(len(block) for block in bank.blocks(first))
    found["blocks_people_a_second"] = read / (time.monotonic() - began)
    found["peak_mb_after_blocks"] = peak()
    return found


def compact(place: str, people: int, numbers: int, unit: int) -> dict[str, Any]:
    """Makes one file of the index, and checks who is there."""
    from hyperdreambooth.lidb.bank import Bank
    from hyperdreambooth.lidb.index import index_of, merged
    from hyperdreambooth.storage import digest

    bank = Bank.open(place)
    began = time.monotonic()
    bank.compact()
    found = {"compact_s": time.monotonic() - began, "peak_mb": peak()}
    began = time.monotonic()
    names = bank.identities
    found["all_names_s"] = time.monotonic() - began
    assert names == [f"person-{k:07d}" for k in range(people)], "somebody is lost or there twice"
    store = bank.store / "index"
    (index,) = store.names()
    found["index_mb"] = len(store.read(index)) / 1e6
    if people <= 100_000:  # against one writer alone, in memory
        from hyperdreambooth.lidb.bank import _offset, _packed  # pyright: ignore[reportPrivateUsage]

        alone = []
        for k in range(-(-people // unit)):
            ids = names_of(k, unit, people)
            tensors = {"numbers": drawn(k, len(ids), numbers)}
            content = _packed(tensors, {"identities": json.dumps(ids)})
            alone.append(index_of(ids, digest(content), _offset(content)))
        assert index == f"{digest(merged(alone).to_bytes()).hex()}.safetensors"
        found["the_same_as_one_writer_alone"] = True
    return found


def apart(name: str, *words: Any) -> dict[str, Any]:
    """Runs a function in a process of its own."""
    command = [sys.executable, __file__, "--run", name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures one bank and adds it to the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("people", 1_000_000), ("numbers", 256), ("unit", 32), ("writers", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--patience", type=float, default=15.0, help="the latest kill, in seconds")
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--note", default="")
    parser.add_argument("--home", type=Path)
    chosen = parser.parse_args()
    home = Path(tempfile.mkdtemp(dir=chosen.home))
    with ExitStack() as stack:
        place = str(home / "bank")
        if chosen.s3:
            sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
            import objects

            place = stack.enter_context(objects.bucket("million")) + "/bank"
        size = (place, chosen.people, chosen.numbers, chosen.unit)
        found: dict[str, Any] = {"people": chosen.people, "numbers": chosen.numbers, "unit": chosen.unit}
        found |= {"place": "s3" if chosen.s3 else "disk", "note": chosen.note}
        found["write"] = write_all(place, chosen, home)
        found["read_before_compact"] = apart("read", *size)
        found["compact"] = apart("compact", *size)
        found["read"] = apart("read", *size)
    shutil.rmtree(home)
    from hyperdreambooth.files import read_json, write_json
    from hyperdreambooth.runs import environment

    result = read_json(RESULT) if RESULT.is_file() else {"banks": []}
    key = [found[name] for name in ("people", "numbers", "unit", "place")]
    others = [b for b in result["banks"] if [b[n] for n in ("people", "numbers", "unit", "place")] != key]
    write_json(RESULT, {"banks": [*others, found], "environment": environment()})
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        _, _, name, place, *sizes = sys.argv
        print(json.dumps({"read": read, "compact": compact}[name](place, *map(int, sizes))))
    else:
        main()
