"""Makes one person in one folder: prediction, finetune with looks, a proposal, files.

`Personalizer.personalize` and `dreambooth` do the work; this only looks on and writes down what it sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any

from PIL import Image

from hyperdreambooth.adapter import FILES, Adapter, Format, load_adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.evaluate.base_scorers import BaseScorers
from hyperdreambooth.faces.dataset import Photo, read_person
from hyperdreambooth.files import InputError, write_bytes, write_json
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig
from hyperdreambooth.finetune.dreambooth import dreambooth
from hyperdreambooth.generate import generate_images
from hyperdreambooth.personalize import Personalizer
from hyperdreambooth.runs import environment
from hyperdreambooth.shapes import Factors
from hyperdreambooth.training.looks import Look
from hyperdreambooth.ui.records import Person, Seen, look_file, looks, read, write

LOOK_STEPS, LOOK_PROMPTS = 10, 3  # of the pictures of a look: few and fast ones
_LOOKS = 6  # besides the one before the first step
_PICTURE = "picture.png"

Distance = Callable[[Sequence[Photo]], tuple[float | None, str]]
"""Photos → how far they are from the hypernetwork's training, and a line about it."""


@dataclass(frozen=True)
class Maker:
    """What makes people on one base.

    Attributes:
        base: the base, with the words for the person.
        config: the settings of the finetune, or of a training from scratch; the steps are a number.
        prompts: of the looks.
        guidance: of the looks.
        scorers: what judges the looks; None if the base has none.
        personalizer: base and hypernetwork; None trains from scratch.
        distance: judges photos; None without a hypernetwork.
    """

    base: Base
    config: FinetuneConfig | DreamboothConfig
    prompts: Sequence[str]
    guidance: float = 4.0
    scorers: BaseScorers | None = None
    personalizer: Personalizer | None = None
    distance: Distance | None = None

    @property
    def judged(self) -> bool:
        """Whether both likeness and prompt are scored; only then may scores choose a step."""
        return self.scorers is not None and self.scorers.reader is not None

    def make(self, folder: Path, stop: Event) -> None:
        """Makes the person of a folder, or goes on with it; `stop` ends it after the step in progress."""
        person, began = read(folder, Person), time.perf_counter()
        config = self.config.model_copy(update=person.changed)
        photos, judges = self._photos(folder)
        distance = None if self.distance is None or person.anyway else self.distance(photos)[0]
        strange = distance is not None and distance > 1
        last = 0 if strange else config.last
        write(folder, person := person.model_copy(update={"last": last}))
        watch = _Watch(self, folder, judges, config.seed, config.rank)
        if strange:
            self._only_predict(folder, photos, config, watch)
        else:
            self._train(folder, photos, config, watch, stop)
        self._finish(folder, strange, round(time.perf_counter() - began, 3))

    def _photos(self, folder: Path) -> tuple[Sequence[Photo], Sequence[Image.Image]]:
        """Returns the photos to train on, and those that judge: the last of several is left out to judge."""
        photos = read_person(folder / "photos")
        if self.scorers is None or len(photos) == 1:
            return photos, [photos[0].open()]
        return photos[:-1], [photos[-1].open()]

    def _train(self, folder: Path, photos: Sequence[Photo], config: Any, watch: _Watch, stop: Event) -> None:
        look = Look(look_steps(config.last), watch.look, keep=watch.keep)
        more: dict[str, Any] = {"look": look, "callback": lambda step, loss: not stop.is_set()}
        run = folder / "training"
        if self.personalizer is None:
            dreambooth(self.base, photos, run, config, **more)
        else:
            start = self._prediction(folder, photos)
            self.personalizer.personalize(photos, config=config, prediction=start, out=run, **more)

    def _only_predict(self, folder: Path, photos: Sequence[Photo], config: Any, watch: _Watch) -> None:
        prediction = self._prediction(folder, photos)
        adapter = prediction.relax(max(config.rank, prediction.rank), config.seed)
        watch.keep(0, adapter.factors)
        watch.look(0, adapter)

    def _prediction(self, folder: Path, photos: Sequence[Photo]) -> Adapter:
        """Predicts, or reads what an earlier try predicted: the finetune goes on from the same bits."""
        assert self.personalizer is not None
        file = folder / FILES["lidb"]
        if not file.is_file():
            self.personalizer.predict(photos).save(file, "lidb")
        return self.personalizer.load(file)

    def _finish(self, folder: Path, strange: bool, seconds: float) -> None:
        """Proposes a step, and writes the files of it."""
        seen, person = looks(folder), read(folder, Person)
        if not seen:
            return
        step, why = propose(seen, self.judged)
        if strange:
            why = (
                "the finetune was left out, because the photo is unlike those of the hypernetwork's training"
            )
        spent = {"make": round(person.seconds.get("make", 0.0) + seconds, 3)}
        write(folder, person.model_copy(update={"proposed": step, "why": why, "seconds": spent}))
        self.keep(folder, step)

    def open(self, folder: Path, step: int | None = None) -> Adapter:
        """Reads the person of a folder as it was after a step; None for the step that is kept."""
        person = read(folder, Person)
        step = person.kept if step is None else step
        if step is None:
            raise InputError(f"{person.name} is not made yet; wait for the first pictures")
        adapter = load_adapter(look_file(folder, step, ".safetensors"), self.base)
        return replace(adapter, metadata={**adapter.metadata, "steps": str(step)})

    def keep(self, folder: Path, step: int) -> None:
        """Writes the files of the person as it was after a step: adapters, picture, card, report."""
        adapter, person = self.open(folder, step), read(folder, Person)
        forms: list[Format] = ["kohya", "diffusers"]
        for form in forms:
            adapter.save(folder / FILES[form], form)
        if (folder / FILES["lidb"]).is_file():
            forms.append("lidb")
        write_bytes(folder / _PICTURE, look_file(folder, step, "-0.png").read_bytes())
        write_bytes(folder / "README.md", adapter.card(_PICTURE, self.base.class_word, forms).encode())
        files = {str(form): FILES[form] for form in forms} | {"card": "README.md", "report": "report.json"}
        person = person.model_copy(update={"kept": step, "files": files})
        self._report(folder, person, adapter)
        write(folder, person)

    def _report(self, folder: Path, person: Person, adapter: Adapter) -> None:
        config = self.config.model_copy(update=person.changed).model_dump(mode="json")
        scores = {str(one.step): one.scores for one in looks(folder)}
        entries = {"steps": person.kept, "proposed": person.proposed, "why": person.why, "scores": scores}
        made = {"trigger": self.base.trigger, "rank": adapter.rank, "base": self.base.source}
        stamp = {"command": "ui", "name": person.name, "config": config, "seed": config["seed"]}
        more = {"files": person.files, "seconds": person.seconds, "environment": environment()}
        write_json(folder / "report.json", {**stamp, **made, **entries, **more})


@dataclass(frozen=True)
class _Watch:
    """Draws, scores and keeps a person at a step of the training."""

    maker: Maker
    folder: Path
    judges: Sequence[Image.Image]
    seed: int
    rank: int

    def keep(self, step: int, factors: Factors) -> None:
        """Writes the person of a step."""
        adapter = Adapter.made_on(self.maker.base, factors)
        if adapter.rank > self.rank:  # a frozen prediction and what is trained beside it
            adapter = adapter.truncate(self.rank)[0]
        file = look_file(self.folder, step, ".safetensors")
        file.parent.mkdir(exist_ok=True)
        adapter.save(file)

    def look(self, step: int, adapter: Adapter | None = None) -> None:
        """Draws and scores; the base wears the person already unless an adapter is given."""
        maker, prompts = self.maker, self.maker.prompts

        def save(number: int, picture: Image.Image) -> None:
            save_png(look_file(self.folder, step, f"-{number}.png"), picture)

        pictures = generate_images(
            maker.base, prompts, adapter,
            seed=self.seed, steps=LOOK_STEPS, guidance=maker.guidance, drawn=save,
        )  # fmt: skip
        nothing: dict[str, float | None] = {"identity": None, "prompt": None}
        scores = maker.scorers.summary(pictures, prompts, self.judges) if maker.scorers else nothing
        write_json(look_file(self.folder, step, ".json"), scores)


def save_png(file: Path, picture: Image.Image) -> None:
    """Writes a picture, whole."""
    content = BytesIO()
    picture.save(content, format="PNG")
    write_bytes(file, content.getvalue())


def look_steps(last: int) -> tuple[int, ...]:
    """Returns the steps at which a finetune is looked at, evenly spread from 0 to the last."""
    pitch = max(1, -(-last // _LOOKS))
    fits = [one for one in range(pitch, 2 * pitch) if last % one == 0]  # so that the slider meets the last
    return tuple(sorted({*range(0, last, fits[0] if fits else pitch), last}))


def propose(seen: Sequence[Seen], judged: bool) -> tuple[int, str]:
    """Returns the step to keep, and why.

    One point of likeness is worth one of following the prompt. Likeness alone would favour the last step, so
    the last step is proposed where only one of the two can be scored.
    """
    sums = {one.step: sum(s for s in one.scores.values() if s is not None) for one in seen}
    if not judged:
        return seen[-1].step, "the last step; this base has no scorers that could choose another"
    best = max(sums, key=lambda step: (round(sums[step], 6), -step))
    return best, f"the best sum of likeness and prompt, {sums[best]:.2f}, among {len(seen)} looks"


def look_prompts(prompts: Sequence[str], class_word: str) -> list[str]:
    """Returns a few prompts, evenly spread over those of the config."""
    count = min(LOOK_PROMPTS, len(prompts))
    places = [round(k * (len(prompts) - 1) / max(1, count - 1)) for k in range(count)]
    return [prompts[place].replace("{class_word}", class_word) for place in places]
