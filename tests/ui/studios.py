"""A studio on the micro base: real photos in, real files out, in a second or two."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hyperdreambooth.apps.ui import said
from hyperdreambooth.base.load import Base
from hyperdreambooth.evaluate.base_scorers import load_base_scorers
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.hypernet.predictor import load_hypernet
from hyperdreambooth.personalize import Personalizer
from hyperdreambooth.ui.crops import crop_photos
from hyperdreambooth.ui.making import Maker, look_prompts
from hyperdreambooth.ui.records import Person, read
from hyperdreambooth.ui.studio import Studio

CONFIG = FinetuneConfig(steps=4, rank=2, batch=2, save_every=1)
PROMPTS = ("a photo of a [V] {class_word}, smiling", "a [V] {class_word} in a red hat")


def maker_of(base: Base, hypernet: Path) -> Maker:
    personalizer = Personalizer(base, load_hypernet(hypernet, base.device))
    prompts = look_prompts(PROMPTS, base.class_word)
    return Maker(personalizer.base, CONFIG, prompts, 1.0, load_base_scorers(base), personalizer)


@contextmanager
def opened(out: Path, maker: Maker) -> Generator[Studio]:
    """A studio that is closed at the end, with its thread."""
    studio = Studio(out, maker, said)
    try:
        yield studio
    finally:
        studio.close()


def crops_of(photos: list[Path], home: Path, size: int = 32) -> Path:
    home.mkdir(parents=True)
    crop_photos(photos, home, size, None)
    return home


def add(studio: Studio, photo: Path, home: Path, name: str = "Ana", **changed: int) -> Path:
    """Asks for a person, and returns the folder."""
    crops = crops_of([photo], home / f"crops-{name}")
    return studio.person_folder(studio.add(crops, name, changed))


def finished(studio: Studio, folder: Path) -> Person:
    """Waits for the queue to be empty, and returns the person."""
    assert studio.idle(timeout=240)
    return read(folder, Person)


def without_scorers(maker: Maker) -> Maker:
    return replace(maker, scorers=None)
