"""What a worker does for jobs: people are trained side by side, pictures are drawn side by side.

The jobs of a batch share their settings. A batch that fails is done again job by job, so that a caller's
mistake, or a person who does not fit into memory, fails alone.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeAlias, cast

from PIL import Image

from hyperdreambooth.adapter import FILES, Adapter, Format
from hyperdreambooth.config import load_config
from hyperdreambooth.evaluate.base_scorers import load_base_scorers
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.finetune.fast import finetune_adapters
from hyperdreambooth.lora.formats.headers import CONSENT
from hyperdreambooth.personalize import Personalizer
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.log import note_failure
from hyperdreambooth.serve.marks import MEDIA, encoded
from hyperdreambooth.serve.queue import Claim
from hyperdreambooth.serve.store import Made
from hyperdreambooth.training.loop import check_loss, in_half
from hyperdreambooth.training.warm import Warm

Tell: TypeAlias = Callable[[dict[str, Any]], bool]
"""Is told how far the jobs are, and returns whether anybody still wants them."""
Filter: TypeAlias = Callable[[str, Any], str | None]
"""The operator's content filter: (`prompt`, text), (`photo` or `picture`, image) → why not, or None."""

WRITERS = 8
"""Files that are written at a time: whoever writes one waits for the disk, several times."""
_JUDGED_STEPS = 10  # of the pictures that likeness is judged by


@dataclass(frozen=True)
class Task:
    """A claimed job with what it needs: a folder, and the person's photos or the people to draw."""

    claim: Claim
    folder: Path
    photos: Sequence[Image.Image] = ()
    people: Sequence[tuple[Path, float]] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a job; an error is a sentence for its caller."""

    made: Sequence[Made] = ()
    result: dict[str, Any] = field(default_factory=dict[str, Any])
    error: str = ""


class Studio:
    """A warm base with its hypernetwork, and all that is done with it."""

    def __init__(self, config: ServeConfig, device: str) -> None:
        self._config = config
        self.me = Personalizer.from_pretrained(config.base, config.hypernet, device, config.dtype)
        self._scorers = load_base_scorers(self.me.base) if config.likeness else None
        self.refuses = load_filter(config.content_filter)
        self._warm = Warm()

    @property
    def together(self) -> int:
        """The number of jobs in a batch; float16 trains one person at a time."""
        return 1 if in_half(self.me.base, self._finetune({})) else self._config.batch

    def _finetune(self, asked: dict[str, Any]) -> FinetuneConfig:
        """Returns the settings of a finetune: the caller's, else the operator's, else the hypernetwork's."""
        own = load_config(FinetuneConfig, **{**self._config.finetune, **asked})
        return own.over(self.me.predictor.info.finetune)

    def do(self, tasks: Sequence[Task], tell: Tell) -> list[Outcome]:
        """Does the jobs of a batch, which are of one kind."""
        work = self._train if tasks[0].claim.kind == "person" else self._draw
        try:
            return work(tasks, tell)
        except InputError as error:
            reason = str(error)
        except Exception as error:
            note_failure(error)
            reason = "the service failed at this job; try it again, or ask its operator"
        if len(tasks) == 1:
            return [Outcome(error=reason)]
        return [outcome for task in tasks for outcome in self.do([task], tell)]

    def _train(self, tasks: Sequence[Task], tell: Tell) -> list[Outcome]:
        for task in tasks:
            for photo in task.photos:
                self._check("photo", photo)
        config = self._finetune(json.loads(tasks[0].claim.settings))
        tell({"stage": "predict", "people": len(tasks)})
        predicted = [self.me.predict(list(task.photos)) for task in tasks]

        def step(number: int, loss: float) -> bool:
            steps = {"step": number, "steps": config.last}
            return tell({"stage": "finetune", **steps, "loss": round(loss, 5), "people": len(tasks)})

        photos = [list(task.photos) for task in tasks]
        hooks: dict[str, Any] = {"callback": step, "warm": self._warm}
        trained = finetune_adapters(self.me.base, predicted, photos, config, **hooks)
        with ThreadPoolExecutor(WRITERS) as pool:  # files are written while pictures are drawn
            files = [
                [pool.submit(_saved, task, form, before if form == "lidb" else after) for form in FILES]
                for task, before, after in zip(tasks, predicted, trained, strict=True)
            ]
            likeness = self._likeness(tasks, trained)
            return [self._person(*row) for row in zip(tasks, trained, likeness, files, strict=True)]

    def _likeness(self, tasks: Sequence[Task], trained: Sequence[Adapter]) -> list[float | None]:
        """Draws a picture of each person and compares it with the photo: 1 is like, 0 a stranger."""
        if self._scorers is None:
            return [None] * len(tasks)
        prompts = [f"a photo of a [V] {self.me.base.class_word}"] * len(tasks)
        drawn = self.me.generate(prompts, list(trained), steps=_JUDGED_STEPS, batch=len(tasks))
        return [
            self._scorers.identity([picture], list(task.photos))[0]
            for task, picture in zip(tasks, drawn, strict=True)
        ]

    def _person(
        self, task: Task, trained: Adapter, likeness: float | None, files: Sequence[Future[Made]]
    ) -> Outcome:
        try:
            check_loss(trained.metadata)
            made = [file.result() for file in files]
        except InputError as error:
            return Outcome(error=str(error))
        except FileNotFoundError:  # the person was deleted meanwhile, and the folder with it
            return Outcome(error="the folder of the job is gone")
        card = _agreed(task, trained).card(None, self.me.base.class_word).encode()
        distance = self.me.distance(list(task.photos))
        result = {
            "likeness": None if likeness is None else round(likeness, 4),
            "distance": None if distance is None else round(distance, 3), "trigger": trained.trigger,
            "rank": trained.rank, "steps": int(trained.metadata["steps"]),
            "loss": float(trained.metadata.get("loss", 0)),
        }  # fmt: skip
        return Outcome([*made, Made("card", card, "text/markdown")], result)

    def _draw(self, tasks: Sequence[Task], tell: Tell) -> list[Outcome]:
        each = [task for task in tasks for _ in range(task.claim.request["n"])]
        for task in tasks:
            self._check("prompt", task.claim.request["prompt"])
        worn = {task.claim.id: self._worn(task) for task in tasks}
        tell({"stage": "generate", "pictures": len(each), "drawn": 0})

        def drawn(place: int, _: Image.Image) -> None:
            tell({"stage": "generate", "pictures": len(each), "drawn": place + 1})

        settings = json.loads(tasks[0].claim.settings)
        settings.pop("job", None)
        pictures = self.me.generate(
            [task.claim.request["prompt"] for task in each],
            [worn[task.claim.id] for task in each] if tasks[0].people else None,
            seed=[task.claim.request["seed"] for task in each],
            batch=self._config.batch, drawn=drawn, **settings,
        )  # fmt: skip
        for picture in pictures:
            self._check("picture", picture)
        rest = iter(pictures)
        return [self._pictures(task, [next(rest) for _ in range(task.claim.request["n"])]) for task in tasks]

    def _worn(self, task: Task) -> Any:
        """Returns the weighted sum of the people of a picture; None for the bare base."""
        return sum(weight * self.me.load(file) for file, weight in task.people) or None

    def _pictures(self, task: Task, pictures: Sequence[Image.Image]) -> Outcome:
        form = task.claim.request["form"]
        made = [Made("picture", encoded(picture, form, self._config), MEDIA[form]) for picture in pictures]
        return Outcome(made, {"pictures": len(made)})

    def _check(self, kind: str, content: Any) -> None:
        """Asks the content filter."""
        if self.refuses is not None and (reason := self.refuses(kind, content)):
            raise InputError(f"{kind}: refused by the content filter ({reason})")


def _agreed(task: Task, adapter: Adapter) -> Adapter:
    """Returns an adapter whose header and card say on what ground the photos were used."""
    return replace(adapter, metadata={**adapter.metadata, CONSENT: task.claim.request["consent"]})


def _saved(task: Task, form: Format, adapter: Adapter) -> Made:
    """Writes a file of a person into the job's folder."""
    file = task.folder / FILES[form]
    _agreed(task, adapter).save(file, form)
    return Made(form, file.read_bytes(), "application/octet-stream", file)


def load_filter(name: str) -> Filter | None:
    """Returns the function that `module:function` names.

    Raises:
        InputError: there is none.
    """
    if not name:
        return None
    try:
        found = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"content_filter {name}: expected module:function ({error})") from None
    if not callable(found):
        raise InputError(f"content_filter {name}: expected a function")
    return cast("Filter", found)


def opened(content: bytes) -> Image.Image:
    """Opens a PNG that the decoder wrote."""
    return Image.open(io.BytesIO(content)).convert("RGB")
