"""The paper's experiment (section 5): people × prompts × seeds, a method a row, scored and kept.

A picture is a cell. Its file is named by a hash of everything that it depends on: a finished cell is not made
again, a changed input makes a new one, and more people, prompts or rows add to what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.conditioning import class_caption
from hyperdreambooth.base.load import Base, weights_fingerprint
from hyperdreambooth.evaluate.config import EvaluateConfig, Method, methods_of
from hyperdreambooth.evaluate.methods import Cost, Makers, diverged, keep, kept
from hyperdreambooth.evaluate.scorers import Scorers, Values
from hyperdreambooth.evaluate.statistics import PLACES
from hyperdreambooth.faces.dataset import Photo, photo_hash
from hyperdreambooth.faces.image import open_photo, to_image, to_pixels
from hyperdreambooth.files import InputError, read_json, whole_file, write_json
from hyperdreambooth.finetune.dreambooth import TrainedPerson
from hyperdreambooth.generate import generate_images
from hyperdreambooth.progress import Progress
from hyperdreambooth.shapes import site_fingerprint
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.step import in_half

FORMAT = 1  # raise it when the meaning of a cell changes
TRAINING = 2
"""Raise it when the same settings train other weights. 2: each person has training noise of their own."""

UNNAMED = 4
"""One prompt in so many is also drawn without the word for the person, to score `leak`."""

BOUNDS = ("photo", "stranger")
"""The kinds of rows that are photos instead of generated pictures."""


@dataclass(frozen=True)
class Cell:
    """One picture.

    Attributes:
        prompt: the prompt it is drawn from; None for a bound, which is a photo.
        seed: of the noise; each person has seeds of their own, the same for every method.
        file: its path, whether the file exists yet or not.
    """

    person: str
    prompt: str | None
    seed: int
    file: Path


@dataclass(frozen=True)
class Row:
    """A finished row.

    Attributes:
        scores: person → score → a value a picture.
        settings: of the method, defaults included.
        diverged: people whose training ended in NaN or infinity; they have no pictures, scores or costs.
    """

    cells: dict[str, list[Cell]]
    scores: dict[str, dict[str, Values]]
    costs: dict[str, Cost]
    settings: dict[str, Any]
    diverged: tuple[str, ...] = ()


class Protocol:
    """One experiment in one folder.

    `people` are name → photos. The first photo is the reference (the first few, if a row takes several), the
    last one is the bound if two or more are left, and likeness is scored against those between.
    """

    def __init__(
        self,
        makers: Makers,
        scorers: Scorers,
        people: Mapping[str, Sequence[Photo]],
        config: EvaluateConfig,
        out: Path,
    ) -> None:
        self.makers, self.scorers, self.config, self.out = makers, scorers, config, out
        self.base: Base = makers.base_for()
        self.everybody, self.people = dict(people), dict(list(people.items())[: config.identities])
        self.prompts = _prompts(self.base, config)
        self.methods = methods_of(config)
        self.settings = {name: makers.settings(method) for name, method in self.methods.items()}
        vae = weights_fingerprint({"vae": self.base.pipe.vae})
        self.drawn_by = {n: _drawn_by(makers.base_for(method), vae) for n, method in self.methods.items()}
        self.references = max(method.photos for method in self.methods.values())
        if few := [name for name, photos in self.people.items() if len(photos) < self.references]:
            expected = f"rows: expected {self.references} photos a person for one of the rows"
            raise InputError(f"{expected}, {few[0]} has fewer; add photos, or leave that row out")

    def others(self, person: str) -> list[Path]:
        """Returns the photos that likeness is scored against: no row's reference, nor the bound."""
        photos = [photo.path for photo in self.people[person][self.references :]]
        return photos[:-1] if len(photos) > 1 else photos

    def run(self) -> dict[str, Row]:
        """Makes what is missing, row by row, and scores everything."""
        return {name: self.row(name) for name in self.methods}

    def row(self, name: str) -> Row:
        """Finishes one row."""
        method, settings, who = self.methods[name], self.settings[name], list(self.people)
        cells, costs = {person: self.cells(name, person) for person in who}, dict[str, Cost]()
        every = [cell for person in who for cell in (*cells[person], *self.unnamed(name, person))]
        missing = sum(not cell.file.is_file() for cell in every)
        with Progress(name, missing) as bar:
            for part in self.parts(name):
                costs |= self._finish(name, {person: cells[person] for person in part}, bar)
        lost = () if method.kind in BOUNDS else tuple(person for person in who if person not in costs)
        cells |= {person: [] for person in lost}
        scores = {person: self._scores(name, cells[person]) for person in who}
        return Row(cells, scores, costs, settings.model_dump(mode="json") if settings else {}, lost)

    def parts(self, name: str) -> list[tuple[str, ...]]:
        """Returns a row's people in the groups in which they are made."""
        who, size = tuple(self.people), 1 if self._alone(name) else self.config.together
        return [who[at : at + size] for at in range(0, len(who), size)]

    def part(self, name: str, who: Sequence[str]) -> list[Path]:
        """Makes and scores a part of a row, which then finds everything there; returns the pictures."""
        cells = {person: self.cells(name, person) for person in who}
        with Progress(name, None) as bar:
            costs = self._finish(name, cells, bar)
        if self.methods[name].kind not in BOUNDS:
            cells = {person: cells[person] for person in costs}
        for some in cells.values():
            self._scores(name, some)
        every = ((*some, *self.unnamed(name, person)) for person, some in cells.items())
        return [cell.file for some in every for cell in some]

    def _finish(self, name: str, part: Mapping[str, list[Cell]], bar: Progress) -> dict[str, Cost]:
        """Makes the missing pictures of some people; returns everybody's cost, without the diverged."""
        if self.methods[name].kind not in BOUNDS:
            return self._made(name, part, bar)
        self._write_bounds(self.methods[name], part, bar)
        return {}

    def _alone(self, name: str) -> bool:
        """Returns whether a row's people are trained one by one.

        All of a base's weights can be trained for one person only. In float16 a gradient of one person that
        overflows would make the scaler skip everybody's step.
        """
        settings = self.settings[name]
        half = settings is not None and in_half(self.base, settings)
        return half or self.methods[name].settings.get("method") == "full"

    def cells(self, name: str, person: str) -> list[Cell]:
        """Returns the cells of a row and person, whether their files exist or not."""
        home, method = self.out / "pictures" / person, self.methods[name]
        if method.kind in BOUNDS:
            source = self._bound(method, person)
            key = _key(base=self.drawn_by[name], photo=photo_hash(source)) if source else None
            return [Cell(person, None, 0, home / f"{key}.png")] if key else []
        return self._drawn_cells(name, person, _prompts(self.makers.base_for(method), self.config))

    def unnamed(self, name: str, person: str) -> list[Cell]:
        """Returns the cells whose prompts name the class and not the person; none for a bound.

        They are those of every `UNNAMED`th prompt, with all seeds, so that drawing takes a quarter longer and
        not twice as long.
        """
        if self.methods[name].kind in BOUNDS:
            return []
        base = self.makers.base_for(self.methods[name])
        prompts = [class_caption(base, text) for text in _prompts(base, self.config)[::UNNAMED]]
        return self._drawn_cells(name, person, prompts)

    def _drawn_cells(self, name: str, person: str, prompts: Sequence[str]) -> list[Cell]:
        home, made = self.out / "pictures" / person, self.key(name, person)
        drawing = {"steps": self.config.draw_steps, "guidance": self.config.guidance, "made": made}
        return [
            Cell(person, prompt, noise, home / f"{_key(**drawing, prompt=prompt, seed=noise)}.png")
            for seed in self.config.seeds
            for noise in [_noise(person, seed)]
            for prompt in prompts
        ]

    def key(self, name: str, person: str) -> str:
        """Names a person as a row makes it, by everything that the person depends on."""
        method, settings = self.methods[name], self.settings[name]
        network = self.makers.source(method) if method.kind in ("prediction", "finetune") else None
        brought = self.makers.adapter if method.kind == "file" else None
        references = () if method.kind == "base" else self.people[person][: method.photos]
        return _key(
            format=FORMAT,
            **({"training": TRAINING} if settings else {}),
            base=self.drawn_by[name],
            kind=method.model_dump(mode="json", exclude={"settings", "photos", "network"}),
            settings=_named(settings) if settings else None,
            network=network and [network.fingerprint, network.info.trigger, network.info.class_word],
            photos=[[photo.hash(), photo.caption, photo.landmarks] for photo in references],
            adapter=_probe(brought) if brought else None,
        )

    def _made(self, name: str, part: Mapping[str, list[Cell]], bar: Progress) -> dict[str, Cost]:
        """Makes and draws together who lacks a picture; returns everybody's cost, without the diverged."""
        stems = {person: self.out / "made" / person / self.key(name, person) for person in part}
        found = {person: kept(stem, self.base) for person, stem in stems.items()}
        unnamed = {person: self.unnamed(name, person) for person in part}
        lacking = [p for p, own in part.items() if not all(c.file.is_file() for c in (*own, *unnamed[p]))]
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
            base, drawn = self.makers.base_for(self.methods[name]), [p for p in part if p in made]
            self._draw(base, made, [cell for person in drawn for cell in part[person]], bar)
            made = {person: nameless(one) for person, one in made.items()}
            self._draw(base, made, [cell for person in drawn for cell in unnamed[person]], bar)
        return costs

    def _draw(
        self, base: Base, made: Mapping[str, TrainedPerson | None], cells: Sequence[Cell], bar: Progress
    ) -> None:
        """Draws the missing cells in batches, which are the same whether the run was interrupted or not."""
        for at in range(0, len(cells), self.config.batch):
            wanted = [cell for cell in cells[at : at + self.config.batch] if not cell.file.is_file()]
            drawn = draw_people(base, [made[c.person] for c in wanted], wanted, self.config) if wanted else []
            for cell, picture in zip(wanted, drawn, strict=True):
                _save(picture, cell.file)
            bar.update(len(wanted))

    def _bound(self, method: Method, person: str) -> Path | None:
        """Returns the photo that a bound shows: another one of the person, or one of the next person."""
        if method.kind == "stranger":
            who = list(self.everybody)
            other = who[(who.index(person) + 1) % len(who)]
            return self.everybody[other][-1].path if other != person else None
        photos = self.people[person]
        return photos[-1].path if len(photos) > self.references + 1 else None

    def _write_bounds(self, method: Method, part: Mapping[str, list[Cell]], bar: Progress) -> None:
        """Writes photos after the base's autoencoder: no picture of the base can be closer to the person."""
        for cell in (cell for cells in part.values() for cell in cells if not cell.file.is_file()):
            if source := self._bound(method, cell.person):
                pixels = to_pixels(open_photo(source), self.base.resolution)[None]
                _save(to_image(self.base.decode_latents(self.base.encode_images(pixels))[0]), cell.file)
                bar.update(1)

    def _scores(self, name: str, cells: Sequence[Cell]) -> dict[str, Values]:
        """Returns the scores of one person's pictures, with the identity of the unnamed ones as `leak`."""
        unnamed = self._scored(self.unnamed(name, cells[0].person) if cells else ())
        leak = {"leak": unnamed["identity"]} if "identity" in unnamed else {}
        return {**self._scored(cells), **leak}

    def _scored(self, cells: Sequence[Cell]) -> dict[str, Values]:
        """Returns the scores of one person's pictures, in a file named by scorers, pictures and photos."""
        if not cells:
            return {}
        person, others = cells[0].person, self.others(cells[0].person)
        reference = self.people[person][0].path
        key = _key(
            scorers=self.scorers.names,
            cells=[cell.file.stem for cell in cells],
            photos=[photo_hash(path) for path in (reference, *others)],
        )
        file = self.out / "scores" / person / f"{key}.json"
        if not file.is_file():
            images = [open_photo(cell.file) for cell in cells]
            prompts, photos = [cell.prompt for cell in cells], [open_photo(path) for path in others]
            found = self.scorers(images, prompts, open_photo(reference), photos)
            places = {n: [v if v is None else round(v, PLACES) for v in vs] for n, vs in found.items()}
            write_json(file, places)
        return read_json(file)


def nameless(person: TrainedPerson | None) -> TrainedPerson | None:
    """Returns a person without triggers, of whom no prompt is expected to name them."""
    return replace(person, trigger="", other_triggers=()) if isinstance(person, Adapter) else person


def draw_people(
    base: Base, people: Sequence[TrainedPerson | None], cells: Sequence[Cell], config: EvaluateConfig
) -> list[Image.Image]:
    """Draws each cell of its own person, None for the bare base; several adapters are drawn in one batch."""
    adapters = [person for person in people if isinstance(person, Adapter)]
    if len(adapters) == len(people):
        return _drawn(base, cells, config, adapters)
    done: list[Image.Image] = []
    for _, group in groupby(zip(people, cells, strict=True), key=lambda pair: id(pair[0])):
        (person, *_), own = zip(*group, strict=True)
        if person is None or isinstance(person, Adapter):
            done += _drawn(base, own, config, person)
            continue
        with person.worn(base):
            done += _drawn(base, own, config)
    return done


def _drawn(
    base: Base, cells: Sequence[Cell], config: EvaluateConfig, worn: Adapter | Sequence[Adapter] | None = None
) -> list[Image.Image]:
    prompts, seeds = [str(cell.prompt) for cell in cells], [cell.seed for cell in cells]
    how: dict[str, Any] = {"steps": config.draw_steps, "guidance": config.guidance, "batch": config.batch}
    return generate_images(base, prompts, worn, seed=seeds, **how)


def _prompts(base: Base, config: EvaluateConfig) -> list[str]:
    """Returns the prompts with a base's class word; its trigger is filled in when they are drawn."""
    return [text.replace("{class_word}", base.class_word) for text in config.prompts]


def _named(settings: TrainConfig) -> dict[str, Any]:
    """Returns settings as they name a person. Without the term of `class_weight`, as before there was one."""
    return settings.model_dump(mode="json", exclude=set() if settings.class_weight else {"class_weight"})


def _drawn_by(base: Base, vae: str) -> str:
    """Names a base as it was loaded, by everything that its pictures depend on except the adapter."""
    pipe = base.pipe
    # whether a file spells a default out or not makes no difference
    scheduler = {k: value for k, value in pipe.scheduler.config.items() if k != "_use_default_values"}
    return _key(
        base=base.fingerprint,
        vae=vae,
        scheduler=scheduler,
        words=[base.trigger, base.class_word],
        resolution=base.resolution,
        sites=site_fingerprint(base.sites),
        dtype=base.dtype,
        components=base.parts,
        **({"quantize": base.quantize} if base.quantize else {}),
    )


def _key(**inputs: Any) -> str:
    """Returns sixteen hex digits of a hash of the inputs."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _noise(person: str, seed: int) -> int:
    """Returns a person's own seed: with shared noise the intervals over people would be too narrow."""
    return int(hashlib.sha256(f"{person}/{seed}".encode()).hexdigest()[:12], 16)


def _probe(adapter: Adapter) -> str:
    """Names the user's adapter by its numbers."""
    factors = [factor.double() for pair in adapter.factors.values() for factor in pair]
    sums = [[float(factor.sum()), float(factor.square().sum())] for factor in factors]
    return _key(sites=list(adapter.factors), sums=sums)


def _save(picture: Image.Image, file: Path) -> None:
    with whole_file(file) as part:
        picture.save(part, format="PNG")
