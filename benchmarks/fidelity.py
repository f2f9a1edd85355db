"""Is it the person? Every way to a person on the same unseen people, prompts and noise, beside its bounds.

python benchmarks/fidelity.py --people 64     # -> benchmarks/results/fidelity.json, docs/fidelity/*.jpg

One reference photo a person; identity is scored against *other* photos (0 a stranger, 1 another real photo).
Finished cells are kept in --out: a larger --people, or another hypernetwork in another --out, adds to them.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hyperdreambooth import Adapter, Personalizer
from hyperdreambooth.apps.job import resolve_tuned
from hyperdreambooth.apps.show import PROMPTS, ShowConfig
from hyperdreambooth.avatars.folder import photo
from hyperdreambooth.avatars.render import SPLITS
from hyperdreambooth.evaluate.scorers import Scorers, load_scorers
from hyperdreambooth.faces.align import to_image, to_pixels
from hyperdreambooth.faces.dataset import Photo, read_person
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig
from hyperdreambooth.finetune.dreambooth import dreambooth_many
from hyperdreambooth.finetune.train import finetune_many
from hyperdreambooth.finetune.trainable import together
from hyperdreambooth.generate import generate
from hyperdreambooth.runs import environment, read_json, write_json

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "fidelity"
OTHERS = range(1, 7)  # photos of a person that only judge
ALBUM = range(0, 8)  # what the DreamBooth with many photos sees; never a judging one but the first seven
CURVE = (10, 20, 40, 80, 160, 320)  # steps of the single-photo DreamBooth
TOGETHER = 16  # people trained and drawn side by side


@dataclass(frozen=True)
class Bench:
    """What every row works with."""

    person: Personalizer
    scorers: Scorers
    prompts: list[str]
    finetuning: FinetuneConfig
    out: Path


Cells = dict[str, dict[str, float | None]]
"""Person → score → value."""

Row = Callable[[Bench, Sequence[int]], list[Adapter] | None]
"""People → an adapter each, or None for the bare base."""


def shots(bench: Bench, who: int, numbers: Sequence[int]) -> tuple[Photo, ...]:
    """Photos of a test person as files, rendered once."""
    folder = bench.out / "photos" / f"{who}"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number}.png" for number in numbers]
    for file, number in zip(files, numbers, strict=True):
        if not file.is_file():
            photo(who, number)[0].save(file)
    return read_person(files)


def base_row(bench: Bench, people: Sequence[int]) -> None:
    return None


def prediction(bench: Bench, people: Sequence[int]) -> list[Adapter]:
    return [bench.person.predict(shots(bench, who, [0])[0].path) for who in people]


def finetuned(bench: Bench, people: Sequence[int]) -> list[Adapter]:
    photos = [shots(bench, who, [0]) for who in people]
    return finetune_many(bench.person.base, prediction(bench, people), photos, bench.finetuning)


def scratch(name: str, numbers: Sequence[int], **fields: Any) -> Row:
    """DreamBooth without a hypernetwork, with the finetune's own batch and mask."""

    def row(bench: Bench, people: Sequence[int]) -> list[Adapter]:
        same = bench.finetuning.model_dump(include={"steps", "batch", "background", "seed"})
        layout = bench.person.predictor.layout
        shape = {"down_dim": layout.down_dim, "up_dim": layout.up_dim}
        config = DreamboothConfig(**{**same, **shape, **fields})
        run = bench.out / "runs" / name / f"{people[0]}"
        return dreambooth_many(bench.person.base, [shots(bench, who, numbers) for who in people], run, config)

    return row


def rows(rank: int, lr: float) -> dict[str, Row]:
    """Name → how its adapters are made."""
    lora = {"method": "lora", "rank": rank, "lr": lr}
    return {
        "base": base_row,
        "prediction": prediction,
        "finetuned": finetuned,
        "lidb": scratch("lidb", [0], method="lidb", rank=1, lr=lr),
        "lora": scratch("lora", [0], **lora),
    }


def ceilings(rank: int, lr: float) -> dict[str, Row]:
    """Rows that bound the others, on fewer people: they train long."""
    lora = {"method": "lora", "rank": rank, "lr": lr}
    curve = {f"lora-{steps}": scratch(f"lora-{steps}", [0], steps=steps, **lora) for steps in CURVE}
    return {"dreambooth-8-photos": scratch("eight", ALBUM, steps=600, background=1.0, **lora), **curve}


def judge(bench: Bench, name: str, row: Row, people: Sequence[int]) -> Cells:
    """Person → scores of a row; what is finished is not made again."""
    file = bench.out / "rows" / f"{name}.json"
    found: Cells = read_json(file) if file.is_file() else {}
    missing = [who for who in people if str(who) not in found]
    for at in range(0, len(missing), TOGETHER):
        part = missing[at : at + TOGETHER]
        drawn = draw(bench, row(bench, part), part)
        for who, pictures in zip(part, drawn, strict=True):
            others = [Image.open(p.path) for p in shots(bench, who, OTHERS)]
            found[str(who)] = bench.scorers.summary(pictures, bench.prompts, others)
            sheet = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
            for k, picture in enumerate(pictures):
                sheet.paste(picture, (k * picture.width, 0))
            (bench.out / "drawn" / name).mkdir(parents=True, exist_ok=True)
            sheet.save(bench.out / "drawn" / name / f"{who}.png")
        write_json(file, found)
        print(f"{name}: {len(found)} people", flush=True)
    return {str(who): found[str(who)] for who in people}


def draw(bench: Bench, adapters: list[Adapter] | None, people: Sequence[int]) -> list[list[Image.Image]]:
    """Every prompt for every person, many people in a batch, each from noise of its own."""
    count = len(bench.prompts)
    prompts, seeds = bench.prompts * len(people), [who for who in people for _ in range(count)]
    worn = None if adapters is None else together([a.factors for a in adapters for _ in range(count)])
    done = generate(bench.person.base, prompts, per_prompt=worn, seed=seeds, batch=32)
    return [done[k * count : (k + 1) * count] for k in range(len(people))]


def bounds(bench: Bench, people: Sequence[int]) -> dict[str, Cells]:
    """Another real photo through the VAE, and somebody else's photo."""
    base = bench.person.base
    found: dict[str, Cells] = {"another photo": {}, "somebody else": {}}
    for k, who in enumerate(people):
        others = [Image.open(p.path) for p in shots(bench, who, OTHERS)]
        for name, whose in (("another photo", who), ("somebody else", people[(k + 1) % len(people)])):
            pixels = to_pixels(Image.open(shots(bench, whose, [7])[0].path), base.resolution)[None]
            with torch.no_grad():
                latents = base.encode_images(pixels) / base.pipe.vae.config.scaling_factor
                passed = to_image(base.pipe.vae.decode(latents).sample[0])
            found[name][str(who)] = {"identity": bench.scorers.identity([passed], others)[0], "prompt": None}
    return found


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, deviation and the 95 % bootstrap interval of the mean over people."""
    dice = random.Random(0)
    means = sorted(statistics.mean(dice.choices(values, k=len(values))) for _ in range(2000))
    figures = {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}
    figures |= {"low": means[49], "high": means[1949]}
    return {"n": len(values), **{name: round(value, 4) for name, value in figures.items()}}


def table(cells: dict[str, Cells]) -> dict[str, Any]:
    """Row → score → interval."""
    return {
        name: {
            score: interval(values)
            for score in ("identity", "prompt")
            if len(values := [s for one in people.values() if (s := one[score]) is not None]) > 1
        }
        for name, people in cells.items()
    }


def paired(cells: dict[str, Cells], one: str, other: str, score: str) -> dict[str, float]:
    """The interval of the difference, person by person."""
    return interval([cells[one][who][score] - cells[other][who][score] for who in cells[one]])


def contact_sheets(bench: Bench, people: Sequence[int], names: Sequence[str], cell: int = 64) -> None:
    """Everybody, not the best: reference and drawings, two people a line."""
    wide = (len(bench.prompts) + 1) * cell
    for name in names:
        sheet = Image.new("RGB", (2 * wide + cell // 2, -(-len(people) // 2) * cell), "white")
        for k, who in enumerate(people):
            x, y = (k % 2) * (wide + cell // 2), (k // 2) * cell
            sheet.paste(Image.open(shots(bench, who, [0])[0].path).resize((cell, cell)), (x, y))
            drawn = Image.open(bench.out / "drawn" / name / f"{who}.png")
            sheet.paste(drawn.resize((len(bench.prompts) * cell, cell)), (x + cell, y))
        DOCS.mkdir(parents=True, exist_ok=True)
        sheet.save(DOCS / f"{name}.jpg", quality=88)


def main() -> None:
    """Fills the cells that are missing and writes table and contact sheets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--ceilings", type=int, default=16, help="people of the rows that train long")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--base", help="another base with scorers [the shipped one]")
    parser.add_argument("--hypernet", help="another hypernetwork [the shipped one]")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the finetune")
    parser.add_argument("--out", type=Path, default=Path("out/fidelity"))
    parser.add_argument("--only", nargs="*", help="these rows only; nothing is written but the cells")
    chosen = parser.parse_args()
    settings = resolve_tuned("demo", ShowConfig, chosen.hypernet, None, chosen.set).own
    person = Personalizer.from_pretrained(chosen.base, chosen.hypernet)
    scorers = load_scorers(person.base)
    assert scorers is not None
    prompts = [prompt.replace("{class_word}", person.base.class_word) for prompt in PROMPTS]
    finetuning = FinetuneConfig(**settings.finetuning())
    bench = Bench(person, scorers, prompts, finetuning, chosen.out)
    people = list(SPLITS[chosen.split][: chosen.people])
    few = people[: chosen.ceilings]
    wanted = [(name, row, people) for name, row in rows(finetuning.rank, finetuning.lr).items()]
    wanted += [(name, row, few) for name, row in ceilings(finetuning.rank, finetuning.lr).items()]
    cells = {
        name: judge(bench, name, row, who)
        for name, row, who in wanted
        if who and (not chosen.only or name in chosen.only)
    }
    for name, score in table(cells).items():
        print(
            f"{name:20}",
            *(f"{k} {v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}] n={v['n']}" for k, v in score.items()),
        )
    if chosen.only:
        return
    cells |= bounds(bench, people)
    result = {
        "table": table(cells),
        "paired": {
            f"{one} - {other}, {score}": paired(cells, one, other, score)
            for one, other, score in (
                ("prediction", "lidb", "identity"), ("prediction", "lora", "identity"),
                ("finetuned", "prediction", "identity"), ("finetuned", "base", "prompt"),
            )
        },
        "prompts": prompts, "finetune": finetuning.model_dump(mode="json"), "made_by": environment(),
    }  # fmt: skip
    write_json(HERE / "results" / "fidelity.json", result)
    for name, one in result["paired"].items():
        print(f"{name:40} {one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]")
    contact_sheets(bench, people, ("base", "prediction", "finetuned"))


if __name__ == "__main__":
    main()
