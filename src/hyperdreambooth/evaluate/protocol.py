"""The paper's experiment (section 5): people × prompts × seeds, a row a method, judged and kept.

A picture is a cell. It is named by everything that it came out of (base, hypernetwork, settings, photo,
prompt, seed), so a finished cell is never made again, a changed input is never mistaken for an old one, and a
run with more people, prompts or rows adds to what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import Base, weights_fingerprint
from hyperdreambooth.evaluate.config import EvaluateConfig, Method, methods_of
from hyperdreambooth.evaluate.judges import Judges
from hyperdreambooth.evaluate.methods import Cost, Makers, diverged, keep, kept
from hyperdreambooth.evaluate.statistics import PLACES
from hyperdreambooth.faces.dataset import Photo, photo_hash
from hyperdreambooth.faces.image import open_photo, to_image, to_pixels
from hyperdreambooth.files import InputError, read_json, whole_file, write_json
from hyperdreambooth.finetune.dreambooth import TrainedPerson
from hyperdreambooth.generate import generate
from hyperdreambooth.progress import Progress
from hyperdreambooth.shapes import site_fingerprint
from hyperdreambooth.training.loop import in_half
from hyperdreambooth.training.trainable import together

FORMAT = 1  # raise it when what a cell means changes

BOUNDS = ("photo", "stranger")
"""Kinds of rows that are photos, not drawn."""


@dataclass(frozen=True)
class Cell:
    """One picture.

    Attributes:
        person: whose.
        prompt: as drawn; None for a bound, which is a photo.
        seed: of the noise; the person's own, the same for every method.
        file: where it lies or will lie.
    """

    person: str
    prompt: str | None
    seed: int
    file: Path


@dataclass(frozen=True)
class Row:
    """A finished row.

    Attributes:
        cells: person → pictures.
        scores: person → score → a value a picture.
        costs: person → what making the person cost.
        settings: of the method, defaults included.
        diverged: people whose training ended in NaN or infinity: no pictures, no scores, no costs.
    """

    cells: dict[str, list[Cell]]
    scores: dict[str, dict[str, list[float | None]]]
    costs: dict[str, Cost]
    settings: dict[str, Any]
    diverged: tuple[str, ...] = ()


class Protocol:
    """One experiment in one folder.

    Args:
        makers: what people are made with.
        judges: who scores the pictures.
        people: name → photos: the first is the reference (the first few, where a row takes several), the last
            a bound where two or more are left, and those between judge.
        config: what is compared.
        out: keeps everything.
    """

    def __init__(
        self,
        makers: Makers,
        judges: Judges,
        people: Mapping[str, Sequence[Photo]],
        config: EvaluateConfig,
        out: Path,
    ) -> None:
        self.makers, self.judges, self.config, self.out = makers, judges, config, out
        self.base: Base = makers.base
        self.drawn_by = _drawn_by(self.base)
        self.everybody, self.people = dict(people), dict(list(people.items())[: config.identities])
        self.prompts = [text.replace("{class_word}", self.base.class_word) for text in config.prompts]
        self.methods = methods_of(config)
        self.settings = {name: makers.settings(method) for name, method in self.methods.items()}
        self.references = max(method.photos for method in self.methods.values())
        if few := [name for name, photos in self.people.items() if len(photos) < self.references]:
            raise InputError(f"rows: one takes {self.references} photos a person, {few[0]} has fewer")

    def others(self, person: str) -> list[Path]:
        """The photos that likeness is judged by: never any row's reference, never the bound's own."""
        photos = [photo.path for photo in self.people[person][self.references :]]
        return photos[:-1] if len(photos) > 1 else photos

    def run(self) -> dict[str, Row]:
        """Makes what is missing, row by row, and judges everything."""
        return {name: self.row(name) for name in self.methods}

    def row(self, name: str) -> Row:
        """One row, finished."""
        method, who = self.methods[name], list(self.people)
        cells = {person: self.cells(name, person) for person in who}
        costs: dict[str, Cost] = {}
        size = 1 if self._alone(name) else self.config.together
        missing = sum(not cell.file.is_file() for some in cells.values() for cell in some)
        with Progress(name, missing) as bar:
            for at in range(0, len(who), size):
                part = {person: cells[person] for person in who[at : at + size]}
                costs |= (
                    self._bounds(method, part, bar) if method.kind in BOUNDS else self._made(name, part, bar)
                )
        lost = () if method.kind in BOUNDS else tuple(person for person in who if person not in costs)
        cells |= {person: [] for person in lost}
        scores = {person: self._judged(cells[person]) for person in who}
        settings = self.settings[name]
        return Row(cells, scores, costs, settings.model_dump(mode="json") if settings else {}, lost)

    def _alone(self, name: str) -> bool:
        """Whether a row's people train one by one, as all of a base's weights do.

        So does float16, whose scaler passes over everybody's step where one person's gradient overflows.
        """
        settings = self.settings[name]
        half = settings is not None and in_half(self.base, settings)
        return half or self.methods[name].settings.get("method") == "full"

    def cells(self, name: str, person: str) -> list[Cell]:
        """The pictures of a row and person, whether they are there or not."""
        home, method = self.out / "pictures" / person, self.methods[name]
        if method.kind in BOUNDS:
            source = self._bound(method, person)
            key = _key(base=self.drawn_by, photo=photo_hash(source)) if source else None
            return [Cell(person, None, 0, home / f"{key}.png")] if key else []
        drawing = {
            "steps": self.config.draw_steps,
            "guidance": self.config.guidance,
            "made": self.key(name, person),
        }
        return [
            Cell(person, prompt, noise, home / f"{_key(**drawing, prompt=prompt, seed=noise)}.png")
            for seed in self.config.seeds
            for noise in [_noise(person, seed)]
            for prompt in self.prompts
        ]

    def key(self, name: str, person: str) -> str:
        """Names a person as a row makes it: of what, by what, with which settings."""
        method, settings = self.methods[name], self.settings[name]
        network = self.makers.source(method) if method.kind in ("prediction", "finetune") else None
        brought = self.makers.adapter if method.kind == "file" else None
        references = () if method.kind == "base" else self.people[person][: method.photos]
        return _key(
            format=FORMAT,
            base=self.drawn_by,
            kind=method.model_dump(mode="json", exclude={"settings", "photos", "network"}),
            settings=settings.model_dump(mode="json") if settings else None,
            network=network and [network.fingerprint, network.info.trigger, network.info.class_word],
            photos=[[photo.hash(), photo.caption, photo.landmarks] for photo in references],
            adapter=_probe(brought) if brought else None,
        )

    def _made(self, name: str, part: Mapping[str, list[Cell]], bar: Progress) -> dict[str, Cost]:
        """Makes and draws those who lack a picture, side by side; what each cost, but for the diverged."""
        stems = {person: self.out / "made" / person / self.key(name, person) for person in part}
        found = {person: kept(stem, self.base) for person, stem in stems.items()}
        lacking = [p for p, cells in part.items() if not all(cell.file.is_file() for cell in cells)]
        absent = [p for p in part if (one := found[p]) is None or (p in lacking and not one[2])]
        there = {p: one for p, one in found.items() if one is not None and p not in absent}
        made: dict[str, TrainedPerson | None] = {p: one[0] for p, one in there.items()}
        costs = {p: one[1] for p, one in there.items()}
        if absent:
            method = self.methods[name]
            fresh, spent = self.makers.make(method, [self.people[p][: method.photos] for p in absent])
            for person, one, cost in zip(absent, fresh, spent, strict=True):
                if not diverged(one):
                    made[person], costs[person] = one, cost
                    keep(one, cost, stems[person])
        if lacking:
            self._draw(made, [cell for person in part if person in made for cell in part[person]], bar)
        return costs

    def _draw(self, made: Mapping[str, TrainedPerson | None], cells: Sequence[Cell], bar: Progress) -> None:
        """Draws what is missing, a batch at a time; batches do not depend on what was interrupted."""
        for at in range(0, len(cells), self.config.batch):
            wanted = [cell for cell in cells[at : at + self.config.batch] if not cell.file.is_file()]
            if not wanted:
                continue
            drawn = draw_people(self.base, [made[c.person] for c in wanted], wanted, self.config)
            for cell, picture in zip(wanted, drawn, strict=True):
                _save(picture, cell.file)
            bar.update(len(wanted))

    def _bound(self, method: Method, person: str) -> Path | None:
        """The photo that a bound shows: another one of the person, or of the next person."""
        if method.kind == "stranger":
            who = list(self.everybody)
            other = who[(who.index(person) + 1) % len(who)]
            return self.everybody[other][-1].path if len(who) > 1 else None
        photos = self.people[person]
        return photos[-1].path if len(photos) > self.references + 1 else None

    def _bounds(self, method: Method, part: Mapping[str, list[Cell]], bar: Progress) -> dict[str, Cost]:
        """Photos as the base's autoencoder gives them back: no picture of the base can be nearer."""
        for person, cells in part.items():
            source = self._bound(method, person)
            for cell in cells:
                if source is not None and not cell.file.is_file():
                    pixels = to_pixels(open_photo(source), self.base.resolution)[None]
                    _save(to_image(self.base.decode_latents(self.base.encode_images(pixels))[0]), cell.file)
                    bar.update(1)
        return {}

    def _judged(self, cells: Sequence[Cell]) -> dict[str, list[float | None]]:
        """The scores of one person's pictures, kept beside them under the name of judges and pictures."""
        if not cells:
            return {}
        person, others = cells[0].person, self.others(cells[0].person)
        reference = self.people[person][0].path
        key = _key(
            judges=self.judges.names,
            cells=[cell.file.stem for cell in cells],
            photos=[photo_hash(path) for path in (reference, *others)],
        )
        file = self.out / "scores" / person / f"{key}.json"
        if not file.is_file():
            images = [open_photo(cell.file) for cell in cells]
            prompts = [cell.prompt for cell in cells]
            found = self.judges(images, prompts, open_photo(reference), [open_photo(path) for path in others])
            write_json(file, {name: [_rounded(v) for v in values] for name, values in found.items()})
        return read_json(file)


def draw_people(
    base: Base, people: Sequence[TrainedPerson | None], cells: Sequence[Cell], config: EvaluateConfig
) -> list[Image.Image]:
    """A picture a cell, each of another person if need be; adapters of one shape are drawn in one batch.

    Args:
        base: the frozen base.
        people: whom each cell shows; None for the bare base.
        cells: what it shows.
        config: how it is drawn.
    """
    if all(isinstance(person, Adapter) and person.trigger == base.trigger for person in people):
        factors = [person.factors for person in people if isinstance(person, Adapter)]
        return _drawn(base, cells, config, per_prompt=together(factors))
    done: list[Image.Image] = []
    for _, group in groupby(zip(people, cells, strict=True), key=lambda pair: id(pair[0])):
        same = list(group)
        person, own = same[0][0], [cell for _, cell in same]
        if person is None or isinstance(person, Adapter):
            done += _drawn(base, own, config, adapters=() if person is None else (person,))
            continue
        with person.worn(base):
            done += _drawn(base, own, config)
    return done


def _drawn(base: Base, cells: Sequence[Cell], config: EvaluateConfig, **worn: Any) -> list[Image.Image]:
    prompts, seeds = [str(cell.prompt) for cell in cells], [cell.seed for cell in cells]
    how: dict[str, Any] = {"steps": config.draw_steps, "guidance": config.guidance, "batch": config.batch}
    return generate(base, prompts, seed=seeds, **how, **worn)


def _drawn_by(base: Base) -> str:
    """Names a base as it was loaded: everything but the adapter that a picture of it depends on."""
    pipe = base.pipe
    # a default says the same whether its file spells it out or not
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if key != "_use_default_values"}
    return _key(
        base=base.fingerprint,
        vae=weights_fingerprint({"vae": pipe.vae}),
        scheduler=scheduler,
        words=[base.trigger, base.class_word],
        resolution=base.resolution,
        sites=site_fingerprint(base.sites),
        dtype=base.dtype,
        components=sorted(name for name, part in pipe.components.items() if part is not None),
    )


def _key(**inputs: Any) -> str:
    """Sixteen hex digits of everything that something came out of."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _noise(person: str, seed: int) -> int:
    """A person's own seed: intervals over people would be too narrow if all shared their noise."""
    return int(hashlib.sha256(f"{person}/{seed}".encode()).hexdigest()[:12], 16)


def _probe(adapter: Adapter) -> str:
    """Names an adapter that the user brought by its numbers."""
    sums = [
        [float(f.double().sum()), float(f.double().square().sum())]
        for p in adapter.factors.values()
        for f in p
    ]
    return _key(sites=list(adapter.factors), sums=sums)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, PLACES)


def _save(picture: Image.Image, file: Path) -> None:
    with whole_file(file) as part:
        picture.save(part, format="PNG")
