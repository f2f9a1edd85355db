"""How well the encoder of real faces tells people apart, and what its cosines mean.

Every portrait is compared with variants of itself (crops, brightness, mirror, JPEG, compression that
grows old) and with the same variants of everybody else. Variants are not other photos of a person:
`--people` takes a folder with one sub-folder of photos for each person, and measures the calibration on it.

    python benchmarks/judge.py
    python benchmarks/judge.py --people dlib/examples/johns

Portraits and YuNet's file lie beside the project, in ../shared. Without them there is nothing to measure.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from hyperdreambooth.evaluate.face_encoders import FaceEncoder, Vectors, face_encoder
from hyperdreambooth.faces.detect import LEAST_SCORE, yunet
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.faces.landmarks import framed, laid_onto
from hyperdreambooth.runs import environment

Picture = Image.Image
ROOT = Path(__file__).resolve().parents[1]
SHARED = next((place for above in ROOT.parents[:2] if (place := above / "shared").is_dir()), ROOT / "shared")
YUNET = SHARED / "models" / "face_detection_yunet_2023mar.onnx"
RESULT = ROOT / "benchmarks" / "results" / "judge.json"


def jpeg(picture: Picture, quality: int) -> Picture:
    """Returns a picture after one compression."""
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=quality)
    return Image.open(held).convert("RGB")


def aged(picture: Picture, times: int) -> Picture:
    """Returns a picture after it was sent on several times: each time made smaller, cut and compressed."""
    for _ in range(times):
        smaller = picture.resize((round(picture.width * 0.95), round(picture.height * 0.95)))
        picture = jpeg(smaller.crop((1, 1, smaller.width, smaller.height)), 70)
    return picture


def crop(picture: Picture, side: int, margin: float) -> Picture:
    """Returns the crop of `prepare`; a negative margin cuts hair and chin off."""
    face = max(yunet(YUNET, LEAST_SCORE)(picture), key=lambda one: one.area)
    return laid_onto(picture, face.landmarks, framed(side, margin), side)[0]


def tight(picture: Picture) -> Picture:
    """Returns what lies in the face's box."""
    left, top, width, height = max(yunet(YUNET, LEAST_SCORE)(picture), key=lambda one: one.area).box
    return picture.crop((round(left), round(top), round(left + width), round(top + height)))


VARIANTS: Mapping[str, Callable[[Picture], Picture]] = {
    "crop of 512": lambda picture: crop(picture, 512, 0.0),
    "crop of 128": lambda picture: crop(picture, 128, 0.0),
    "crop of 256 without hair": lambda picture: crop(picture, 256, -0.2),
    "cut to the face's box": tight,
    "mirrored": ImageOps.mirror,
    "turned by 15 degrees": lambda picture: picture.rotate(15, Image.Resampling.BICUBIC),
    "half as bright": lambda picture: ImageEnhance.Brightness(picture).enhance(0.5),
    "1.5 times as bright": lambda picture: ImageEnhance.Brightness(picture).enhance(1.5),
    "grey": lambda picture: ImageOps.grayscale(picture).convert("RGB"),
    "JPEG of quality 50": lambda picture: jpeg(picture, 50),
    "JPEG of quality 20": lambda picture: jpeg(picture, 20),
    "JPEG of quality 5": lambda picture: jpeg(picture, 5),
    "sent on 5 times": lambda picture: aged(picture, 5),
    "sent on 20 times": lambda picture: aged(picture, 20),
    "96 pixels": lambda picture: picture.resize((96, 96)),
}


def auc(same: Vectors, different: Vectors) -> float:
    """Returns how often a pair of one person has the larger cosine than a pair of two people."""
    return round(float((same[:, None] > different[None]).mean()), 5)


def spread(values: Vectors, encoder: FaceEncoder) -> dict[str, Any]:
    """Returns pairs, cosines and calibrated scores of a set of pairs; the cosines' ends are 5 % and 95 %."""
    low, high = encoder.calibration.stranger, encoder.calibration.same
    ends = [round(float(value), 4) for value in np.quantile(values, (0.05, 0.95))] if len(values) else None
    mean = float(values.mean()) if len(values) else float("nan")
    return {
        "pairs": len(values), "cosine": round(mean, 4), "from_to": ends,
        "score": round((mean - low) / (high - low), 3),
    }  # fmt: skip


def compared(encoder: FaceEncoder, own: Vectors, changed: Vectors) -> tuple[Vectors, Vectors]:
    """Returns the cosines of pairs of one person and of two people; those without a face are left out."""
    cosines = changed @ own.T
    alone = np.eye(len(own), dtype=bool)
    same, different = cosines[alone], cosines[~alone]
    return same[np.isfinite(same)], different[np.isfinite(different)]


def variants(encoder: FaceEncoder, photos: list[Picture]) -> dict[str, Any]:
    """Compares every portrait with its variants, and with those of everybody else."""
    own, rows = encoder(photos), dict[str, Any]()
    every: list[tuple[Vectors, Vectors]] = []
    for name, change in VARIANTS.items():
        found = encoder([change(photo) for photo in photos])
        same, different = compared(encoder, own, found)
        every.append((same, different))
        rows[name] = {
            "without_a_face": int(np.isnan(found[:, 0]).sum()), "auc": auc(same, different),
            "same": spread(same, encoder), "different": spread(different, encoder),
        }  # fmt: skip
    same, different = (np.concatenate(side) for side in zip(*every, strict=True))
    untouched = (own @ own.T)[np.triu_indices(len(own), 1)]
    return {
        "auc": auc(same, different), "same": spread(same, encoder), "different": spread(different, encoder),
        "different_untouched": spread(untouched, encoder), "variants": rows,
    }  # fmt: skip


def calibration(encoder: FaceEncoder, folder: Path) -> dict[str, Any]:
    """Measures the cosines of real photos: of one person, which scores 1, and of two, which scores 0."""
    files = {hashlib.sha256(file.read_bytes()).digest(): file for file in sorted(folder.glob("*/*.jpg"))}
    vectors = encoder([open_photo(file) for file in files.values()])
    there = np.isfinite(vectors[:, 0])
    who = np.asarray([file.parent.name for file in files.values()])[there]
    one, other = np.triu_indices(int(there.sum()), 1)
    cosines, same = (vectors[there] @ vectors[there].T)[one, other], who[one] == who[other]
    return {
        "photos": len(files), "without_a_face": int((~there).sum()), "people": len(set(who)),
        "auc": auc(cosines[same], cosines[~same]),
        "same": spread(cosines[same], encoder), "different": spread(cosines[~same], encoder),
    }  # fmt: skip


def costs(encoder: FaceEncoder, photos: list[Picture], before: float) -> dict[str, Any]:
    """Measures the processor seconds of each photo alone, and the peak of the process's memory so far."""
    seconds: list[float] = []
    for photo in photos:
        began = time.process_time()  # another program on the machine does not count
        encoder([photo])
        seconds.append(time.process_time() - began)
    return {
        "seconds_a_photo": round(median(seconds), 4), "side": photos[0].width,
        "peak_megabytes": round(peak()), "of_them_before_the_encoder": round(before),
    }  # fmt: skip


def peak() -> float:
    """Returns the peak of this process's memory in MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Reads the command line and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--encoder", default="auto", help="auto, dlib, auraface, or a folder or hub id")
    parser.add_argument("--people", type=Path, help="real photos, a sub-folder a person")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    if not (SHARED / "photos").is_dir() or not YUNET.is_file():
        return print(f"skipped: no portraits and no YuNet in {SHARED}")
    before, began = peak(), time.process_time()
    encoder = face_encoder(asked.encoder)
    loaded = round(time.process_time() - began, 3)
    photos = [open_photo(file) for file in sorted((SHARED / "photos").glob("*.jpg"))]
    figures = {
        "encoder": encoder.name, "licence": encoder.licence, "calibration": encoder.calibration.model_dump(),
        "costs": {"seconds_to_load": loaded, **costs(encoder, photos, before)},
        "people": calibration(encoder, asked.people) if asked.people else None,
        "portraits": {"people": len(photos), **variants(encoder, photos)},
        "on": environment(),
    }  # fmt: skip
    asked.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {asked.out}")


if __name__ == "__main__":
    main()
