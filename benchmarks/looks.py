"""How well a base draws avatars: distances to rendered pictures, evenness of faces, attributes, and a sheet.

    python benchmarks/looks.py                                            # the base that ships
    python benchmarks/looks.py --base out/full/world/decoder --out new.json
    python benchmarks/looks.py --count 200 --out quick.json               # a quick look

Two small networks judge (avatars/build/looks.py). They are trained if `--work` does not have them, and bases
compare only under the same networks: the results name them. The prompts are captions of random contexts of
the validation split, of nobody special. The pictures are compared with rendered ones of other people. The
sheet shows the first 64, beside the results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from hyperdreambooth.avatars.build import pictures
from hyperdreambooth.avatars.build.autoencoder import through
from hyperdreambooth.avatars.build.distances import frechet, kernel
from hyperdreambooth.avatars.build.fit import StageConfig
from hyperdreambooth.avatars.build.looks import (
    LABELS,
    LooksConfig,
    faces,
    is_soft,
    new_evenness_reader,
    read_evenness,
    targets,
    train_evenness,
)
from hyperdreambooth.avatars.build.pictures import Pictures, Pixels, from_bytes, to_bytes
from hyperdreambooth.avatars.build.readers import new_reader
from hyperdreambooth.avatars.build.selfsup import features, train_selfsup
from hyperdreambooth.avatars.build.untyped import diffusers
from hyperdreambooth.avatars.captions import caption
from hyperdreambooth.avatars.draw.people import SPLITS, Context, identity, photo_context
from hyperdreambooth.base.fingerprint import files_fingerprint
from hyperdreambooth.base.load import EMBEDDED, Base, load_base
from hyperdreambooth.evaluate.base_scorers import Reader
from hyperdreambooth.files import load_tensors, save_tensors, write_json
from hyperdreambooth.generate import generate_images
from hyperdreambooth.grid import grid
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import environment

ROOT = Path(__file__).resolve().parents[1]
RESULT, WORK = ROOT / "benchmarks" / "results" / "looks.json", ROOT / "out" / "looks"
PROMPTS, RENDERED, OTHERS = 0, 100_000, 200_000  # where people of the validation split begin
CHUNK, SHEET = 50, 8  # pictures in a file of drawn ones; rows and columns of the sheet
STEPS, GUIDANCE = 25, 4.0  # the defaults of `hdb generate`
CONFIG = LooksConfig()

Read = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Judges:
    """The networks that judge, and sixteen hex digits of the weights of each."""

    evenness: Read
    features: Read
    names: dict[str, str]


def judges(work: Path, config: LooksConfig, device: str) -> tuple[Judges, Pictures]:
    """Returns the networks, which are trained if they are not there, and the faces held out from them."""
    cache = work / f"pictures-{files_fingerprint([EMBEDDED / 'vae'])}"
    vae = diffusers.AutoencoderKL.from_pretrained(EMBEDDED / "vae", torch_dtype=torch.float32)
    vae.requires_grad_(False).eval().to(device)

    files = {name: work / f"{name}.safetensors" for name in ("evenness", "features")}
    for name, train in (("evenness", train_evenness), ("features", train_selfsup)):
        if not files[name].is_file():
            stage: StageConfig = getattr(config, name)
            taught = faces("base", stage.people, cache, vae, device)
            model = train(taught, stage, work / "runs" / name, device)
            save_tensors(files[name], model.state_dict())
    reader, resnet = new_evenness_reader(0), new_reader(["unused"], 0).resnet
    for model, file in ((reader, files["evenness"]), (resnet, files["features"])):
        model.load_state_dict(load_tensors(file)[0])
        model.to(device).requires_grad_(False).eval()
    names = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}
    found = Judges(
        lambda pixels: read_evenness(reader, pixels), lambda pixels: features(resnet, pixels), names
    )
    return found, faces("val", config.held_out, cache, vae, device)


def scenes(first: int, count: int) -> list[Context]:
    """Returns the random contexts of `count` people of the validation split."""
    return [photo_context(person, 0, album=False) for person in SPLITS["val"][first : first + count]]


def rendered(first: int, count: int, cache: Path) -> Pixels:
    """Returns rendered pictures `(count, h, w, 3)`, one each of people of the validation split."""
    people = map(identity, SPLITS["val"][first : first + count])
    wanted = list(zip(people, scenes(first, count), strict=True))
    return np.concatenate(pictures.in_chunks(wanted, pictures.render, cache, f"val-{first}"))[:count]


def drawn(base: Base, prompts: Sequence[str], folder: Path) -> Pixels:
    """Returns the base's pictures `(m, h, w, 3)` of the prompts; the same call continues."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    with Progress("draw", len(prompts)) as bar:
        for start in range(0, len(prompts), CHUNK):
            files.append(folder / f"{start:05d}.npy")
            asked = prompts[start : start + CHUNK]
            if not pictures.complete(files[-1], len(asked)):
                seeds = list(range(start, start + len(asked)))
                made = generate_images(base, asked, seed=seeds, steps=STEPS, guidance=GUIDANCE)
                pictures.write_chunk(files[-1], np.stack([np.asarray(one, dtype=np.uint8) for one in made]))
            bar.update(len(asked))
    return np.concatenate([np.load(file) for file in files])[: len(prompts)]


@torch.no_grad()
def each(read: Read, some: Pixels, device: torch.device) -> torch.Tensor:
    """Returns what `read` makes of pictures `(m, h, w, 3)`, 64 at a time."""
    parts = (from_bytes(some[start : start + 64]) for start in range(0, len(some), 64))
    return torch.cat([read(part.to(device)).float().cpu() for part in parts])


def held_out(found: Judges, seen: Pictures, device: torch.device) -> dict[str, float]:
    """Returns how often the reader is right about whether a face is even, of even and of skewed faces."""
    rows = torch.arange(len(seen))
    said = torch.cat([found.evenness(seen.batch(some).to(device)).cpu() for some in rows.split(64)])
    even, soft = targets(seen)[:, 0] > 0.5, is_soft(rows)
    right = (said[:, 0] > 0.5) == even
    kinds = {
        "rendered": even & ~soft,
        "skewed": ~even & ~soft,
        "rendered, VAE": even & soft,
        "skewed, VAE": ~even & soft,
    }
    return {kind: share(right[these]) for kind, these in kinds.items()}


def distances(one: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Returns the distances of two sets of features."""
    return {"frechet": round(frechet(one, other), 4), "kernel": round(kernel(one, other), 6)}


def share(these: torch.Tensor) -> float:
    """Returns the share of true values."""
    return round(float(these.float().mean()), 4)


def evenness(read: torch.Tensor) -> dict[str, float]:
    """Returns the share of even faces, and the share on which each part is skewed."""
    return {label: share(read[:, k] > 0.5) for k, label in enumerate(LABELS)}


def attributes(reader: Reader, some: Pixels, prompts: Sequence[str]) -> dict[str, float]:
    """Returns the share of what the prompts ask for that the pictures show, of all and of each group."""
    read = reader.prompt([Image.fromarray(one) for one in some], prompts)
    known = {group: [value for value in values if value is not None] for group, values in read.items()}
    return {group: round(fmean(values), 4) for group, values in known.items() if values}


def measure(folder: Path, count: int, work: Path, config: LooksConfig) -> tuple[dict[str, Any], Image.Image]:
    """Returns the figures of a base, and the sheet of its first pictures."""
    base = load_base(str(folder))
    device = base.device
    found, seen = judges(work, config, str(device))
    prompts = [caption(scene, "face") for scene in scenes(PROMPTS, count)]
    name = files_fingerprint([folder / part for part in ("text_encoder", "unet", "vae")])
    sets = {
        "drawn": drawn(base, prompts, work / "drawn" / f"{name}-{STEPS}-{GUIDANCE:g}"),
        "rendered": rendered(RENDERED, count, work / "rendered"),
        "others": rendered(OTHERS, count, work / "rendered"),
    }
    sets["others, VAE"] = to_bytes(
        each(lambda pixels: through(base.pipe.vae, pixels), sets["others"], device)
    )
    felt = {name: each(found.features, some, device) for name, some in sets.items()}
    reader, captions = Reader(EMBEDDED / "scorers" / "attributes", device), scenes(RENDERED, count)
    figures = {
        "base": name,
        "pictures": count,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "judges": found.names,
        "distance_to_rendered": {
            name: distances(felt[name], felt["rendered"]) for name in ("drawn", "others", "others, VAE")
        },
        "evenness": {name: evenness(each(found.evenness, some, device)) for name, some in sets.items()},
        "reader_right": held_out(found, seen, device),
        "attributes": {
            "drawn": attributes(reader, sets["drawn"], prompts),
            "rendered": attributes(reader, sets["rendered"], [caption(scene, "face") for scene in captions]),
        },
        "made_by": environment(),
    }  # fmt: skip
    return figures, sheet(sets["drawn"])


def sheet(some: Pixels) -> Image.Image:
    """Returns the first 64 pictures in rows of eight."""
    shown = [Image.fromarray(one) for one in some[: SHEET * SHEET]]
    rows = [shown[start : start + SHEET] for start in range(0, len(shown), SHEET)]
    return grid(rows, cell=some.shape[1], gap=2, margin=4)


def main(arguments: Sequence[str] | None = None, config: LooksConfig = CONFIG) -> None:
    """Reads the command line, and writes the figures and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=Path, default=EMBEDDED, help="a folder with a pipeline of avatars")
    parser.add_argument(
        "--count", type=int, default=2000, help="pictures; Fréchet distances of few are too large"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="networks and pictures, which are kept")
    parser.add_argument(
        "--out", type=Path, default=RESULT, help="a JSON file; the sheet is beside it, a JPEG"
    )
    asked = parser.parse_args(arguments)
    figures, shown = measure(asked.base, asked.count, asked.work, config)
    print(json.dumps(figures, indent=2))
    if asked.count < 2000:
        print("Fréchet distances of few pictures are too large: compare equal counts, or kernel distances.")
    write_json(asked.out, figures)
    shown.save(asked.out.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main()
