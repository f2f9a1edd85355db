"""How well the shipped hypernetwork's encoder tells avatars from everything else; --fit makes its numbers.

python benchmarks/strangeness.py --out benchmarks/results/strangeness.json
python benchmarks/strangeness.py --fit    # writes familiar.safetensors beside the shipped hypernetwork

Avatars are those of the split `test`, with every style and expression. Photographs are the portraits in
--photos, objects are the pictures that scikit-image and matplotlib install. What is absent is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from hyperdreambooth.avatars.draw.people import SPLITS
from hyperdreambooth.avatars.folder import photo
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.hypernet.familiar import familiar_of
from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET, Predictor, load_hypernet

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "photos"
DESCRIBED, OTHERS, SHOTS = 2500, 600, 4  # people of `train` and of `val`, photos of each


def textures(predictor: Predictor, pictures: Iterable[Image.Image]) -> torch.Tensor:
    """Returns the textures of pictures, as a prediction sees them."""
    side = predictor.info.resolution
    pixels = (to_pixels(one.convert("RGB"), side)[None] for one in pictures)
    return torch.cat([predictor.encoder.texture(each) for each in pixels])


def avatars(split: str, people: int, shots: int = SHOTS) -> Iterator[Image.Image]:
    """Draws the photos of the first people of a split."""
    for person in SPLITS[split][:people]:
        yield from (photo(person, number)[0] for number in range(shots))


def objects() -> Iterator[Image.Image]:
    """Yields a cat, a coffee cup, an astronaut, a rocket, pages, coins, … as far as they are installed."""
    for package, folder in (("skimage", "data"), ("matplotlib", "mpl-data/sample_data")):
        found = find_spec(package)
        home = Path(str(found.origin)).parent / folder if found else Path("nowhere")
        for file in sorted(home.glob("*")):
            if file.suffix in (".png", ".jpg", ".jpeg"):
                yield Image.open(file).convert("RGB")


def shapes(count: int = 60) -> Iterator[Image.Image]:
    """Draws a few ellipses and rectangles on one colour."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        image = Image.new("RGB", (256, 256), tuple(rng.integers(0, 256, 3).tolist()))
        pen = ImageDraw.Draw(image)
        for number in range(int(rng.integers(1, 6))):
            (left, right), (top, bottom) = (sorted(rng.integers(0, 255, 2).tolist()) for _ in "xy")
            figure = (pen.ellipse, pen.rectangle)[number % 2]
            figure((left, top, right + 1, bottom + 1), fill=tuple(rng.integers(0, 256, 3).tolist()))
        yield image


def noise(count: int = 40) -> Iterator[Image.Image]:
    """Draws noise whose dots are 1 to 32 pixels wide."""
    rng = np.random.default_rng(0)
    for number in range(count):
        side = 128 >> (number % 6)
        dots = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        yield Image.fromarray(dots).resize((128, 128), Image.Resampling.NEAREST)


def blank(count: int = 32) -> Iterator[Image.Image]:
    """Fills pictures with one colour each."""
    rng = np.random.default_rng(0)
    yield from (Image.new("RGB", (128, 128), tuple(rng.integers(0, 256, 3).tolist())) for _ in range(count))


def auc(usual: torch.Tensor, strange: torch.Tensor) -> float:
    """Returns the chance that a strange picture is further away than a usual one."""
    further = (strange[:, None] > usual[None]).double() + 0.5 * (strange[:, None] == usual[None])
    return float(further.mean())


def measure(predictor: Predictor, people: int, photos: Path) -> dict[str, object]:
    """Returns for each kind: how many, the AUC against avatars, and the share beyond the limit."""
    familiar = predictor.familiar
    assert familiar is not None, "run --fit first"
    portraits = (Image.open(file) for file in sorted(photos.glob("*.jpg")))
    usual = familiar.distance(textures(predictor, avatars("test", people, 8)))
    rows: dict[str, object] = {
        "avatars": {"n": len(usual), "beyond": round(float((usual > 1).float().mean()), 4)}
    }
    kinds = {
        "photographs": portraits,
        "objects": objects(),
        "shapes": shapes(),
        "noise": noise(),
        "blank": blank(),
    }
    for kind, pictures in kinds.items():
        if shown := list(pictures):
            far = familiar.distance(textures(predictor, shown))
            beyond = round(float((far > 1).float().mean()), 4)
            rows[kind] = {"n": len(far), "auc": round(auc(usual, far), 4), "beyond": beyond}
    return rows


def main() -> None:
    """Measures, or describes the photos of the training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="describe avatars and write the numbers")
    parser.add_argument("--people", type=int, default=64, help="avatars to measure, 8 photos of each")
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="a folder of portraits")
    parser.add_argument("--out", type=Path, help="a JSON file")
    asked = parser.parse_args()
    predictor = load_hypernet(EMBEDDED_HYPERNET)
    if asked.fit:
        described, others = (
            textures(predictor, avatars(split, people))
            for split, people in (("train", DESCRIBED), ("val", OTHERS))
        )
        made = familiar_of(described, others)
        assert made is not None
        made.save(EMBEDDED_HYPERNET)
        return
    rows = measure(predictor, asked.people, asked.photos)
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}
    text = json.dumps({"kinds": rows, **machine}, indent=2)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
