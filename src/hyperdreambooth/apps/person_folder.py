"""The folder of a person, as `demo`, `personalize` and `dreambooth` write it, step by step.

    config.json                     what the folder was made from: settings, photos, base and hypernetwork
    person.lidb.safetensors, …      the adapters, as soon as they are trained
    training/                       log, checkpoints and the pictures of the looks
    pictures/STAGE-NN.png           every picture, as soon as it is drawn
    picture.png, photo.png, README.md, report.json

The same command goes on from what is there. Another person's folder, or one of other settings, is refused.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hyperdreambooth.adapter import FILES, Adapter, Format
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.files import InputError, discard, write_bytes
from hyperdreambooth.runs import check_run, recorded_inputs
from hyperdreambooth.training.shots import person_key

PERSON = "person"  # the input of the run that names the person by the content of the photos
_MADE_FROM = "made_from"  # the text in a PNG file that names everything the picture depends on
_NEAR = 1e-3  # of the numbers: another photo differs by far more, another number of threads by far less


def check_person(out: Path, photos: Sequence[Photo]) -> None:
    """Refuses a folder of other files or of another person, before anything is loaded."""
    check_run(out)
    recorded = recorded_inputs(out)
    if recorded is not None and recorded.get(PERSON) != person_key(photos):
        raise InputError(
            f"out {out}: holds the result of other photos; pass another --out, or delete the folder first"
        )


def sweep(out: Path) -> None:
    """Deletes the unfinished files of a run that was killed."""
    for left in list(out.rglob(".*.tmp*")):
        discard(left)


def kept_prediction(out: Path, made: Adapter, load: Callable[[Path], Adapter]) -> Adapter:
    """Returns the prediction in the folder if it is the one that was made just now; else writes that.

    Both are compared, and the file is always read back, so that the finetune starts from the same bits even
    if another number of threads has rounded differently.
    """
    file = out / FILES["lidb"]
    with suppress(InputError):
        kept = load(file)
        if kept.lidb is not None and made.lidb is not None:
            near = (kept.lidb.numbers - made.lidb.numbers).norm() <= _NEAR * made.lidb.numbers.norm()
            if bool(near):
                return kept
    made.save(file, "lidb")
    return load(file)


def save_picture(file: Path, picture: Image.Image, made_from: str = "") -> None:
    """Writes a PNG, whole, and in it what it was made from."""
    content, info = io.BytesIO(), PngInfo()
    if made_from:
        info.add_text(_MADE_FROM, made_from)
    picture.save(content, format="PNG", pnginfo=info)
    write_bytes(file, content.getvalue())


def read_picture(file: Path, made_from: str | None = None) -> Image.Image | None:
    """Returns a picture of the folder; None if it is missing, damaged, or made from something else."""
    with suppress(OSError, SyntaxError, ValueError), Image.open(file) as image:  # of PNGs that are cut off
        image.load()
        if made_from is None or image.info.get(_MADE_FROM) == made_from:
            return image.convert("RGB")
    return None


def same_pictures(
    files: Sequence[Path], made_from: Sequence[str], draw: Callable[[], Sequence[Image.Image]]
) -> list[Image.Image]:
    """Returns the pictures of a batch from their files, or draws the whole batch and writes it.

    A part of a batch is not drawn alone, because a batch of another size rounds differently.
    """
    kept = [read_picture(file, key) for file, key in zip(files, made_from, strict=True)]
    whole = [picture for picture in kept if picture is not None]
    if len(whole) == len(files):
        return whole
    drawn = list(draw())
    for file, picture, key in zip(files, drawn, made_from, strict=True):
        save_picture(file, picture, key)
    return drawn


def save_photo(out: Path, photo: Photo) -> Mapping[str, str]:
    """Writes the photo and its caption; returns what → file name."""
    save_picture(out / "photo.png", photo.open())
    if not photo.caption:
        return {"photo": "photo.png"}
    write_bytes(out / "photo.txt", photo.caption.encode())
    return {"photo": "photo.png", "caption": "photo.txt"}


def save_card(out: Path, adapter: Adapter, class_word: str, forms: Collection[str]) -> Mapping[str, str]:
    """Writes the model card; returns what → file name."""
    named: list[Format] = [form for form in FILES if form in forms]
    write_bytes(out / "README.md", adapter.card("picture.png", class_word, named).encode())
    return {"card": "README.md"}


def weights_key(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns sixteen hex digits of the names and contents of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
