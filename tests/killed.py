"""Kills `hdb preoptimize` and `hdb train` with -9 at random moments; compares with uninterrupted runs.

python tests/killed.py --kills 10        # a minute or two for each command, on the micro base
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import eyes
import micro
from banks import bank_files

HDB = [sys.executable, "-m", "hyperdreambooth"]


def run(words: list[str], seconds: float | None = None) -> bool:
    """Runs a command, and kills it after `seconds` if given. Returns whether it was killed."""
    process = subprocess.Popen([*HDB, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    if code:
        raise SystemExit(f"{words[0]} ended with exit code {code}")
    return False


def weights(folder: Path) -> dict[str, bytes]:
    """Returns the files that must be the same, byte for byte."""
    if (folder / "model.safetensors").exists():
        return {"model.safetensors": (folder / "model.safetensors").read_bytes()}
    return bank_files(folder)


def trial(name: str, words: list[str], home: Path, kills: int, rng: random.Random) -> None:
    """Kills a command again and again, lets it finish, and compares its weights."""
    whole, broken = home / f"{name}-whole", home / f"{name}-broken"
    run([*words, "--out", str(whole)])
    killed = sum(run([*words, "--out", str(broken)], rng.uniform(4, 10)) for _ in range(kills))
    run([*words, "--out", str(broken)])
    same = weights(whole) == weights(broken) and bool(weights(whole))
    print(f"{name}: killed {killed} of {kills} times while running; same weights: {same}", flush=True)
    if not same:
        raise SystemExit(1)


def main() -> None:
    """Tries both commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    home, rng = Path(tempfile.mkdtemp()), random.Random(chosen.seed)
    base, photos = micro.save(home / "base"), micro.photos(home / "photos", identities=12)
    eyes.resnet(home / "eye")
    on = [str(photos), "--base", str(base), "--device", "cpu", "--set", "down_dim=6", "--set", "up_dim=4"]
    bank = ["preoptimize", *on, "--steps", "150", "--set", "identities_per_batch=2"]
    trial("preoptimize", bank, home, chosen.kills, rng)
    net = ["train", *on, "--steps", "400", "--set", f"encoder={home / 'eye'}", "--set", "width=16"]
    net += ["--set", "save_every=20", "--set", "validation=2", "--set", "validate_every=1000"]
    trial("train", net, home, chosen.kills, rng)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
