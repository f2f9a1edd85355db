"""The demo on many unseen people: scores of base, prediction and finetuned LoRA, with their spread.

python benchmarks/demo_seeds.py --seeds 8        # -> benchmarks/results/demo_seeds.json, out/demo-seeds/SEED/
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from hyperdreambooth.runs import environment, read_json, write_json

HERE = Path(__file__).parent
STAGES = ("base", "prediction", "finetuned")


def main() -> None:
    """Runs the demo for every seed (or finds it done) and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/demo-seeds"))
    chosen = parser.parse_args()
    reports = [report(seed, chosen.out / str(seed)) for seed in range(chosen.seeds)]
    result = {
        "seeds": chosen.seeds,
        "scores": {
            score: {stage: spread(reports, score, stage) for stage in STAGES}
            for score in ("identity", "prompt")
        },
        "identity_rises_all_the_way": sum(rises(r["scores"]["identity"]) for r in reports),
        "seconds": {
            stage: round(statistics.median(r["seconds"][stage] for r in reports), 2)
            for stage in reports[0]["seconds"]
        },
        "each": [r["scores"] for r in reports],
        "made_by": environment(),
    }
    write_json(HERE / "results" / "demo_seeds.json", result)
    for score, stages in result["scores"].items():
        print(
            score, "  ".join(f"{stage} {s['mean']:.3f} ± {s['deviation']:.3f}" for stage, s in stages.items())
        )
    print(f"identity rises at both steps for {result['identity_rises_all_the_way']} of {chosen.seeds} people")


def report(seed: int, out: Path) -> dict[str, Any]:
    """The demo's report; a finished one is not made again."""
    if not (out / "report.json").is_file():
        command = [sys.executable, "-m", "hyperdreambooth", "demo", "--seed", str(seed), "--out", str(out)]
        subprocess.run(command, check=True)
    return read_json(out / "report.json")


def spread(reports: list[dict[str, Any]], score: str, stage: str) -> dict[str, float]:
    """Mean and standard deviation over people."""
    values = [r["scores"][score][stage] for r in reports]
    return {"mean": round(statistics.mean(values), 4), "deviation": round(statistics.stdev(values), 4)}


def rises(identity: dict[str, float]) -> bool:
    """Whether each stage is more like the person than the one before."""
    return identity["base"] < identity["prediction"] < identity["finetuned"]


if __name__ == "__main__":
    main()
