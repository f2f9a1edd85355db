"""Measures the service under load: jobs from many clients at once, one person a batch and several.

Each arm starts `hdb serve` on the embedded avatars with a folder of its own, on loopback. Clients send photos
of drawn people, one job after another, and wait for the end of each. The jobs, their settings and the machine
are the same in all arms. Promises are checked: every accepted job succeeded, and jobs were begun in the order
in which they were accepted. Prints a table and writes results/serve.json.

    python benchmarks/serve.py                                   # 200 jobs, 16 clients, batches of 1 and 8
    python benchmarks/serve.py --jobs 16 --clients 8 --steps 2   # a small one
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hyperdreambooth.avatars.folder import photo
from hyperdreambooth.files import write_json
from hyperdreambooth.runs import environment

RESULT = Path(__file__).parent / "results" / "serve.json"


@contextmanager
def service(batch: int, sets: list[str]) -> Iterator[str]:
    """Runs `hdb serve` until the block ends; gives its address once a worker is ready."""
    with tempfile.TemporaryDirectory() as home:
        words = ["--data", home, "--port", "0", "--batch", str(batch), "--device", "cpu"]
        words += ["--set", "per_minute=1000000"]  # clients that wait ask again and again
        words += [word for one in sets for word in ("--set", one)]
        command = [sys.executable, "-m", "hyperdreambooth", "serve", *words]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            found = None
            while found is None:
                line = process.stderr.readline()
                if not line:
                    raise SystemExit("the service did not start")
                found = re.search(r"http://\S+", line)
            threading.Thread(target=process.stderr.read, daemon=True).start()
            while not ready(found[0]):
                if process.poll() is not None:
                    raise SystemExit("the service ended")
                time.sleep(0.5)
            yield found[0]
        finally:
            process.terminate()
            process.wait()


def ready(address: str) -> bool:
    """Returns whether a worker is there."""
    try:
        return call(f"{address}/readyz")["status"] == "ready"
    except OSError:
        return False


def call(address: str, body: Any = None) -> Any:
    """Sends JSON, and returns the answer's."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def data_uri(number: int) -> str:
    """Returns a photo of a drawn person."""
    file = io.BytesIO()
    photo(number, 0)[0].save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def job(address: str, uri: str, steps: int) -> dict[str, Any]:
    """Sends one job, waits for its end, and returns how it ended."""
    sent = call(f"{address}/v1/people", {"photos": [uri], "consent": "synthetic", "steps": steps})
    while sent["status"] in ("queued", "running"):
        time.sleep(1)  # asking costs the service time that it then lacks for the jobs
        sent = call(f"{address}/v1/jobs/{sent['id']}")
    return sent


def measure(batch: int, given: argparse.Namespace, uris: list[str]) -> dict[str, Any]:
    """One arm: jobs a minute, seconds from acceptance to end, and the promises."""
    with service(batch, given.set) as address:
        job(address, uris[0], given.steps)  # warm
        began = time.perf_counter()
        with ThreadPoolExecutor(given.clients) as clients:
            ended = list(clients.map(lambda uri: job(address, uri, given.steps), uris))
        seconds = time.perf_counter() - began
        listed = {one["id"]: one for one in every(address)}
    took = sorted(one["ended"] - one["created"] for one in ended)
    order = [one["started"] for one in listed.values()]
    liked = [one["result"]["likeness"] or 0 for one in ended if one["status"] == "succeeded"]
    return {
        "batch": batch, "jobs": len(uris), "clients": given.clients, "steps": given.steps,
        "seconds": round(seconds, 1), "jobs_a_minute": round(60 * len(uris) / seconds, 2),
        "p50_seconds": round(statistics.median(took), 2),
        "p95_seconds": round(took[max(0, round(0.95 * len(took)) - 1)], 2),
        "lost": len(uris) - sum(listed.get(one["id"], one)["status"] == "succeeded" for one in ended),
        "in_order": order == sorted(order),
        "likeness": round(statistics.fmean(liked), 3) if liked else None,
    }  # fmt: skip


def every(address: str) -> list[dict[str, Any]]:
    """Returns all jobs, in the order of acceptance."""
    found, after = list[dict[str, Any]](), 0
    while page := call(f"{address}/v1/jobs?after={after}"):
        if not page["data"]:
            return found
        found, after = found + page["data"], page["next"]
    return found


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=4, help="of the finetune, the same in all arms")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the service's settings")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    uris = [data_uri(number) for number in range(given.jobs)]
    rows = [measure(batch, given, uris) for batch in given.batches]
    columns = ("batch", "jobs_a_minute", "p50_seconds", "p95_seconds", "lost", "in_order", "likeness")
    print("  ".join(f"{name:>13}" for name in columns))
    for row in rows:
        print("  ".join(f"{row[name]!s:>13}" for name in columns))
    ratio = round(rows[-1]["jobs_a_minute"] / rows[0]["jobs_a_minute"], 2)
    print(f"{rows[-1]['batch']} people a batch over {rows[0]['batch']}: {ratio} times the jobs a minute")
    facts = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "sets": given.set}
    write_json(given.out, {"rows": rows, "ratio": ratio, **facts, "environment": environment()})


if __name__ == "__main__":
    main()
