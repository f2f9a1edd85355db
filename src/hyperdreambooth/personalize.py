"""One photo of a person → prediction → relaxed → finetuned: the whole method behind one class."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from hyperdreambooth.adapter import Adapter, check_rank
from hyperdreambooth.base.load import EMBEDDED, Base, is_embedded, load_base
from hyperdreambooth.config import load_config
from hyperdreambooth.faces.dataset import Photos, read_person
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.finetune.fast import finetune
from hyperdreambooth.generate import generate
from hyperdreambooth.hypernet.predictor import Predictor, hypernet_folder, load_hypernet, load_info
from hyperdreambooth.progress import Progress

EMBEDDED_HYPERNET = EMBEDDED.parent / "hypernet"


class Personalizer:
    """A base and the hypernetwork trained on it.

    Attributes:
        base: the frozen base.
        predictor: the hypernetwork.
        seconds: stage → seconds spent in it so far (`load`, `predict`, `relax`, `finetune`, `generate`).
    """

    def __init__(self, base: Base, predictor: Predictor) -> None:
        predictor.check_fits(base.fingerprint)
        self.predictor = predictor
        # captions and prompts must use the words of the hypernetwork's training
        self.base = base.with_words(predictor.info.trigger, predictor.info.class_word)
        self.seconds: dict[str, float] = {}

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None = None,
        hypernet: str | Path | None = None,
        device: str = "auto",
        dtype: str = "float32",
        **loading: Any,
    ) -> Personalizer:
        """Loads both.

        Args:
            base: pipeline folder or hub id; None for the embedded avatars.
            hypernet: hypernetwork folder or hub id; None for the one of the embedded base.
            device: `auto`, `cpu`, `cuda`, `mps`.
            dtype: number format of the frozen base.
            loading: others of `hyperdreambooth.base.load.load_base`.

        Raises:
            InputError: another base without a hypernetwork, two that do not belong together, or another
                trigger or class word than the training's.
        """
        began = time.perf_counter()
        if hypernet is None and not is_embedded(base):  # said before gigabytes are loaded, as is all below
            raise InputError(
                f"hypernet: expected the one trained for base {base}, got none; name its folder or hub id"
            )
        folder = hypernet_folder(hypernet or EMBEDDED_HYPERNET)
        facts = load_info(folder)
        for word in ("trigger", "class_word"):
            own, asked = getattr(facts, word), loading.get(word)
            if asked not in (None, own):
                raise InputError(
                    f"{word}: the hypernetwork was trained with {own!r}, got {asked!r}; leave it out"
                )
        loaded = load_base(base, device, dtype, **loading)
        person = cls(loaded, load_hypernet(folder, loaded.device))
        person.seconds["load"] = time.perf_counter() - began
        return person

    @contextmanager
    def _stage(self, name: str) -> Generator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def predict(self, photos: Photos) -> Adapter:
        """The hypernetwork's answer, nothing trained (paper, section 4.2).

        Args:
            photos: of one person; the predictions of several are averaged.

        Raises:
            InputError: no photo, or an unreadable one.
        """
        with self._stage("predict"):
            facts = self.predictor.info
            pixels = torch.stack([to_pixels(p.open(), facts.resolution) for p in read_person(photos)])
            numbers = self.predictor.average(pixels)
            made = {k: (down.cpu(), up.cpu()) for k, (down, up) in self.predictor.factors(numbers).items()}
            lidb = self.predictor.lidb(numbers)
            return Adapter(made, facts.trigger, self.base.fingerprint, self.base.source, lidb)

    def personalize(
        self,
        photos: Photos,
        rank: int | None = None,
        steps: int | Literal["auto"] | None = None,
        seed: int = 0,
        *,
        prediction: Adapter | None = None,
        **fields: Any,
    ) -> Adapter:
        """Predict, relax, finetune: a standard LoRA of the person.

        Args:
            photos: of one person; one will do.
            rank: of the LoRA. What is left out is as the hypernetwork's folder recommends, else as
                `FinetuneConfig` says.
            steps: of the finetune; 25 to 40 do. `auto` stops when the loss on fixed noise stops falling.
            seed: of the relaxation and the training.
            prediction: what `predict` gave for these photos, if it is at hand.
            fields: other fields of `FinetuneConfig`.

        Raises:
            InputError: no photo or an unreadable one, an unknown field, or a rank below the prediction's.
        """
        chosen = load_config(FinetuneConfig, rank=rank, steps=steps, seed=seed, **fields)
        config = chosen.over(self.predictor.info.finetune)
        adapter = prediction or self.predict(photos)
        check_rank(config.rank, adapter.factors)
        with self._stage("relax"):
            if config.way == "complement":
                adapter = adapter.relax(config.rank, seed)
        with self._stage("finetune"):
            return finetune(self.base, adapter, read_person(photos), config, sample=self._class_images)

    def _class_images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """What prior preservation trains beside the person: the bare base's own pictures."""
        return generate(self.base, prompts, seed=seeds)

    def generate(
        self,
        prompts: Sequence[str],
        adapter: Adapter | None = None,
        seed: int = 0,
        **options: Any,
    ) -> list[Image.Image]:
        """Pictures of the prompts; `[V]` stands for the person.

        Args:
            prompts: what to draw.
            adapter: the person; None for the bare base.
            seed: of the starting noise, which is the same for every adapter.
            options: others of `hyperdreambooth.generate.generate`.
        """
        with self._stage("generate"):
            worn = () if adapter is None else (adapter,)
            return generate(self.base, prompts, worn, seed=seed, **options)

    def stages(
        self, prompts: Sequence[str], prediction: Adapter, finetuned: Adapter, seed: int = 0, **options: Any
    ) -> dict[str, list[Image.Image]]:
        """The same prompts from the same noise by `base`, `prediction` and `finetuned`."""
        worn = {"base": None, "prediction": prediction, "finetuned": finetuned}
        total = len(worn) * len(prompts) * options.get("images", 1)
        with Progress("generate", total) as bar:
            options["drawn"] = lambda _at, _picture: bar.update(1)
            return {name: self.generate(prompts, one, seed, **options) for name, one in worn.items()}


def predict(photos: Photos, **loading: Any) -> Adapter:
    """`Personalizer.from_pretrained(**loading).predict(photos)`."""
    return Personalizer.from_pretrained(**loading).predict(photos)


def personalize(
    photos: Photos, rank: int | None = None, steps: int | None = None, seed: int = 0, **loading: Any
) -> Adapter:
    """`Personalizer.from_pretrained(**loading).personalize(photos, rank, steps, seed)`."""
    return Personalizer.from_pretrained(**loading).personalize(photos, rank, steps, seed)
