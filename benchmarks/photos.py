"""What `prepare` makes of real portraits, as JSON on standard output.

`tight`: 24 portraits of 24 people, each whole, cut to the face's box, cut in halves, with the face at an
edge, and turned; every crop goes through the detector again. `groups`: portraits side by side. `check`: the
folders of 12 people, crops of one portrait each, with planted strangers and copies. `speed`: photos a second.

    python benchmarks/photos.py --shared ../shared --photos 1000 > benchmarks/results/photos.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from hyperdreambooth.evaluate.face_encoders import face_encoder
from hyperdreambooth.faces import check
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.crop import choose, crop_face, main_faces
from hyperdreambooth.faces.detect import Detector, yunet
from hyperdreambooth.faces.frame import padded
from hyperdreambooth.faces.prepare import prepare_folder
from hyperdreambooth.files import InputError
from hyperdreambooth.runs import environment


def variants(image: Image.Image, detect: Detector) -> Iterator[tuple[str, Image.Image]]:
    """A portrait as people cut and turn it."""
    left, top, width, height = max(detect(image), key=lambda face: face.area).box
    right, bottom, far, low = left + width, top + height, image.width, image.height
    yield "whole", image
    for name, box in {
        "face box": (left, top, right, bottom),
        "30 % more right and below": (left, top, right + 0.3 * width, bottom + 0.3 * height),
        "face at the left edge": (left, 0, far, low),
        "face at the upper edge": (0, top, far, low),
        "face at the lower edge": (0, 0, far, bottom),
        "left half of the face": (0, 0, left + width / 2, low),
        "right half of the face": (left + width / 2, 0, far, low),
        "upper half of the face": (0, 0, far, top + height / 2),
        "lower half of the face": (0, top + height / 2, far, low),
    }.items():
        yield name, image.crop(tuple(map(round, box)))
    for degrees in (45, 90, 180):
        yield f"turned by {degrees}", image.rotate(degrees, expand=True)


def tight(images: Sequence[Image.Image], detect: Detector) -> dict[str, Any]:
    """For each way to cut: how many are kept, faces that the detector finds in their crops, padding."""
    config, found = PrepareConfig(), dict[str, dict[str, Any]]()
    for image in images:
        for name, photo in variants(image, detect):
            row = found.setdefault(name, {"kept": 0, "dropped": Counter(), "faces": Counter(), "padded": []})
            try:
                face = choose(main_faces(detect(photo), config), config)[0]
                crop = crop_face(photo, face.landmarks, config)
            except InputError as error:
                row["dropped"][str(error).partition(":")[0].partition(" by ")[0]] += 1
                continue
            row["kept"] += 1
            row["faces"][len(main_faces(detect(crop.picture), config))] += 1
            row["padded"].append(0.0 if crop.corners is None else round(padded(crop.corners), 3))
    for row in found.values():
        row["padded"] = [min(row["padded"]), max(row["padded"])] if row["padded"] else []
    return found


def groups(images: Sequence[Image.Image], detect: Detector) -> dict[str, Any]:
    """Two and three portraits side by side: how often they are refused, how many of their faces are taken."""
    found: dict[str, Any] = {}
    for size in (2, 3):
        refused = taken = total = 0
        for start in range(0, len(images) - size + 1, size):
            sheet = Image.new("RGB", (512 * size, 512))
            for place in range(size):
                sheet.paste(images[start + place].resize((512, 512)), (512 * place, 0))
            config = PrepareConfig(several="all")
            faces = main_faces(detect(sheet), config)
            taken += len(choose(faces, config))
            total += 1
            try:
                choose(faces, PrepareConfig())
            except InputError:
                refused += 1
        found[f"{size} people"] = {"groups": total, "refused": refused, "faces taken by all": taken}
    return found


def album(image: Image.Image) -> Iterator[Image.Image]:
    """Five photos of one person, as well as one portrait can give them."""
    width, height = image.size
    yield image
    yield image.crop((width // 8, 0, width, height))
    yield image.crop((0, height // 9, int(0.9 * width), height)).rotate(9, Image.Resampling.BICUBIC)
    darker = ImageEnhance.Brightness(image.crop((width // 16, height // 16, width, int(0.8 * height))))
    yield darker.enhance(0.6)
    yield ImageEnhance.Color(image.rotate(-11, Image.Resampling.BICUBIC)).enhance(0.3)


def planted(images: Sequence[Image.Image], home: Path) -> tuple[set[str], set[frozenset[str]]]:
    """Writes 12 people's folders with 12 strangers and 8 copies in them; returns which these are."""
    strangers, copies = set[str](), set[frozenset[str]]()
    for person in range(12):
        folder = home / f"p{person:02d}"
        folder.mkdir(parents=True)
        for number, photo in enumerate(album(images[person])):
            photo.save(folder / f"{number}.jpg", quality=92 - 12 * number)
        # somebody without a folder, or from another folder
        other = images[12 + person] if person % 2 else images[(person + 5) % 12]
        cut = other.crop((40, 20, other.width, other.height - 30)).rotate(4, Image.Resampling.BICUBIC)
        cut.save(folder / "stranger.jpg", quality=80)
        strangers.add(f"{folder.name}/stranger")
        if person < 8:
            small = images[person].resize((400 + 50 * person, 400 + 50 * person))
            copy = ImageOps.mirror(small) if person % 2 else small
            where = folder if person < 5 else home / f"p{person - 5:02d}"
            copy.save(where / f"copy-{person}.jpg", quality=30 + 5 * person)
            copies.add(frozenset((f"{folder.name}/0", f"{where.name}/copy-{person}")))
            if person >= 5:
                strangers.add(f"{where.name}/copy-{person}")
    return strangers, copies


def folder_check(images: Sequence[Image.Image], detector: Path) -> dict[str, Any]:
    """What the check finds of what was planted, and what else it reports."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        strangers, copies = planted(images, home / "photos")
        records = prepare_folder(home / "photos", home / "out", PrepareConfig(detector=detector), 1)
        kept = [one for one in records if one.kept]
        encoder = face_encoder("auto", check.only_face)
        vectors = check.vectors_of(home / "out", kept, encoder, home / "cache")
    people: dict[str, list[str]] = {}
    for one in kept:
        people.setdefault(one.person, []).append(one.name)
    scale = encoder.calibration.stranger, encoder.calibration.same
    named = {one.crop for one in check.strangers(people, vectors, scale)}
    pairs = set(map(frozenset, check.duplicates(kept)))
    return {
        "encoder": encoder.name, "photos": len(records), "kept": len(kept),
        "strangers": {"planted": len(strangers), "found": len(named & strangers),
                      "missed": sorted(strangers - named), "false alarms": sorted(named - strangers)},
        "copies": {"planted": len(copies), "found": len(pairs & copies),
                   "false alarms": sorted(map(sorted, pairs - copies))},
    }  # fmt: skip


def speed(images: Sequence[Image.Image], detector: Path, count: int) -> dict[str, Any]:
    """Photos a second of `prepare`, by the number of worker processes, their start included."""
    found: dict[str, Any] = {"photos": count, "pixels": images[0].width}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "photos" / "p"
        home.mkdir(parents=True)
        for number in range(count):
            images[number % len(images)].save(home / f"{number:04d}.jpg", quality=80 + number % 15)
        for workers in (1, 2):
            began = time.perf_counter()
            prepare_folder(home.parent, Path(name) / str(workers), PrepareConfig(detector=detector), workers)
            found[f"{workers} workers"] = round(count / (time.perf_counter() - began), 2)
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="the folder with photos/ and models/")
    parser.add_argument("--photos", type=int, default=1000, help="how many photos the speed is measured on")
    given = parser.parse_args()
    detector = given.shared / "models" / "face_detection_yunet_2023mar.onnx"
    images = [Image.open(file).convert("RGB") for file in sorted((given.shared / "photos").glob("*.jpg"))]
    detect = yunet(detector, PrepareConfig().score)
    result = {
        "tight": tight(images, detect), "groups": groups(images, detect),
        "check": folder_check(images, detector), "speed": speed(images, detector, given.photos),
        "environment": environment(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
