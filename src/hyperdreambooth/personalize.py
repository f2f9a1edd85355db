"""One photo of a person → prediction → relaxed → finetuned: the whole method behind one class."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from hyperdreambooth.adapter import Adapter, check_rank, load_adapter
from hyperdreambooth.base.load import Base, is_embedded, load_base
from hyperdreambooth.config import load_config
from hyperdreambooth.faces.dataset import Photos, read_person
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.finetune.fast import finetune_adapters
from hyperdreambooth.generate import Drawn, generate_images, wearing
from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET, Predictor, hypernet_folder, load_hypernet
from hyperdreambooth.lidb.basis import Basis
from hyperdreambooth.training.looks import Look
from hyperdreambooth.training.loop import check_loss
from hyperdreambooth.training.warm import Warm


class Personalizer:
    """A base and the hypernetwork that was trained on it: photos in, adapters and pictures out.

    Example:
        >>> me = Personalizer.from_pretrained()
        >>> ana = me.personalize("ana.jpg")
        >>> ana.save("ana.safetensors", format="kohya")
        >>> me.generate("a painting of a [V] face", ana)[0].save("painting.png")

    Attributes:
        base: the frozen base, with the trigger and the class word of the hypernetwork's training.
        predictor: the hypernetwork.
        seconds: stage → seconds spent in it so far (`load`, `predict`, `relax`, `finetune`, `generate`).
    """

    def __init__(self, base: Base, predictor: Predictor) -> None:
        """Joins two that are loaded: `Personalizer(load_base(…), load_hypernet(…))`.

        Raises:
            InputError: the hypernetwork was trained on another base.
        """
        predictor.check_fits(base.fingerprint)
        self.predictor = predictor
        self.base = base.with_words(predictor.info.trigger, predictor.info.class_word)
        self.seconds: dict[str, float] = {}
        self._warm = Warm()

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None = None,
        hypernet: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        *,
        revision: str | None = None,
        hypernet_revision: str | None = None,
        token: str | None = None,
    ) -> Personalizer:
        """Loads a base and its hypernetwork. For further options of the base, see the constructor.

        Args:
            base: pipeline folder or hub id; None for the embedded avatars.
            hypernet: hypernetwork folder or hub id; None for the one of the embedded avatars.
            device: `auto`, `cpu`, `cuda`, `mps`.
            dtype: number format of the frozen base: `float32`, `bfloat16`, `float16`, or `auto` for bfloat16
                on GPUs that compute faster in it and float32 elsewhere.
            revision: branch, tag or commit of the base on the hub.
            hypernet_revision: of the hypernetwork on the hub.
            token: of the hub, for private repositories; None for the one that is logged in.

        Raises:
            InputError: another base without a hypernetwork, or two that do not belong together.
        """
        began = time.perf_counter()
        if hypernet is None and not is_embedded(base):  # said before gigabytes are loaded
            raise InputError(
                f"hypernet: expected the one trained for base {base}, got none; name its folder or hub id, "
                "or train the person without one: dreambooth(base, photo)"
            )
        folder = hypernet_folder(hypernet or EMBEDDED_HYPERNET, hypernet_revision, token)
        loaded = load_base(base, device, dtype, revision=revision, token=token)
        made = cls(loaded, load_hypernet(folder, loaded.device))
        made.seconds["load"] = time.perf_counter() - began
        return made

    @contextmanager
    def _stage(self, name: str) -> Generator[None]:
        with self.base.lock:  # what other threads take counts for their own stages
            began = time.perf_counter()
            yield
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def predict(self, photos: Photos) -> Adapter:
        """The hypernetwork's answer, without any training (paper, section 4.2).

        Args:
            photos: of one person: a path, a PIL image, or several of either; the predictions of several are
                averaged.

        Raises:
            InputError: no photo, or an unreadable one.
        """
        with self._stage("predict"):
            numbers = self.predictor.average(self._pixels(photos))
            factors = {k: (down.cpu(), up.cpu()) for k, (down, up) in self.predictor.factors(numbers).items()}
            return Adapter.made_on(self.base, factors, self.predictor.lidb(numbers))

    def distance(self, photos: Photos) -> float | None:
        """How far photos are from those that the hypernetwork was trained on: 1 is the limit.

        Beyond it expect a poor likeness: the photo shows something else, or in another style. None stands for
        a hypernetwork that does not know.

        Args:
            photos: of one person: a path, a PIL image, or several of either.

        Raises:
            InputError: no photo, or an unreadable one.
        """
        return self.predictor.distance(self._pixels(photos))

    def _pixels(self, photos: Photos) -> torch.Tensor:
        side = self.predictor.info.resolution
        return torch.stack([to_pixels(photo.open(), side) for photo in read_person(photos)])

    def personalize(
        self,
        photos: Photos,
        rank: int | None = None,
        steps: int | Literal["auto"] | None = None,
        seed: int | None = None,
        *,
        config: FinetuneConfig | None = None,
        prediction: Adapter | None = None,
        out: str | Path | None = None,
        callback: Callable[[int, float], bool | None] | None = None,
        look: Look | None = None,
    ) -> Adapter:
        """Predicts, relaxes and finetunes: a standard LoRA of the person.

        Args:
            photos: of one person: a path, a PIL image, or several of either; one is enough.
            rank: of the LoRA. What is left out is as `config` says, else as the hypernetwork's folder
                recommends, else the default of `FinetuneConfig`.
            steps: of the finetune; 25 to 40 are enough. `auto` stops when the loss on fixed noise stops
                falling.
            seed: of the relaxation and of the training.
            config: further settings of the finetune.
            prediction: what `predict` gave for these photos, to save its time.
            out: a run folder for the finetune's log and checkpoints, from which the same call goes on; None
                to keep everything in memory.
            callback: called with the step, from 1, and its loss; the finetune ends once it returns False.
            look: looks at pictures during the finetune; the number of steps must then be fixed.

        Raises:
            InputError: no photo or an unreadable one, or a rank below the prediction's.
        """
        given = {} if config is None else config.model_dump(exclude_unset=True)
        asked = {"rank": rank, "steps": steps, "seed": seed}
        given |= {name: value for name, value in asked.items() if value is not None}
        chosen = load_config(FinetuneConfig, **given).over(self.predictor.info.finetune)
        adapter = prediction or self.predict(photos)
        check_rank(chosen.rank, adapter.factors)
        with self._stage("relax"):
            if chosen.way == "complement":
                adapter = adapter.relax(chosen.rank, chosen.seed)
        with self._stage("finetune"):
            hooks: dict[str, Any] = {"out": out, "callback": callback, "look": look, "warm": self._warm}
            trained = finetune_adapters(self.base, [adapter], [photos], chosen, **hooks)[0]
            check_loss(trained.metadata)
            return trained

    def generate(
        self,
        prompts: str | Sequence[str],
        adapter: Adapter | Sequence[Adapter] | None = None,
        *,
        seed: int | Sequence[int] = 0,
        steps: int = 25,
        guidance: float = 4.0,
        images: int = 1,
        negative: str | None = None,
        size: int | None = None,
        batch: int = 8,
        drawn: Drawn | None = None,
    ) -> list[Image.Image]:
        """Draws a list of pictures; `generate_images` describes every argument.

        In a prompt, `[V]` stands for the person. One prompt gives one picture, several give one each;
        `adapter` is the person, or a list with a person for each prompt, or None for the bare base.
        """
        with self._stage("generate"):
            return generate_images(
                self.base, prompts, adapter, seed=seed, steps=steps, guidance=guidance, images=images,
                negative=negative, size=size, batch=batch, drawn=drawn,
            )  # fmt: skip

    @contextmanager
    def wearing(self, adapter: Adapter) -> Generator[Any]:
        """The diffusers pipeline itself, wearing an adapter in the block: for samplers and calls of one's
        own.

        Prompts of the pipeline name the person by `adapter.trigger`. Afterwards the pipeline is as before,
        bit for bit. Other pipelines share its networks: `StableDiffusionImg2ImgPipeline.from_pipe(pipe)`.

        Args:
            adapter: the person.

        Yields:
            The pipeline.

        Raises:
            InputError: an adapter that the base cannot wear.
        """
        with wearing(self.base, adapter):
            self.base.wake()
            yield self.base.pipe

    def load(
        self,
        source: str | Path,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> Adapter:
        """Reads an adapter of any format that this base can wear.

        Args:
            source: a LiDB, a LoRA in diffusers' or kohya's form, or a hub id.
            weight_name: the file in a repository; None for `pytorch_lora_weights.safetensors`.
            revision: branch, tag or commit of a repository.
            token: of the hub.

        Raises:
            InputError: damaged, not an adapter, made for other layers, or a LiDB of another base or
                hypernetwork.
        """
        return load_adapter(
            source, self.base, self._basis, weight_name=weight_name, revision=revision, token=token
        )

    def _basis(self, source: str) -> Basis:
        if self.predictor.basis.source != source:
            raise InputError(
                f"adapter: made over basis {source}, this hypernetwork has "
                f"{self.predictor.basis.source}; use the hypernetwork that predicted it"
            )
        return self.predictor.basis

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Uploads the hypernetwork as `Predictor.push_to_hub` does, so that others name it as
        `hypernet=repo_id`.

        Args:
            repo_id: `owner/name`; the repository is made where there is none.
            private: whether a new repository is private; None for the owner's default.
            token: of the hub; None for the one that is logged in.
            revision: the branch; None for `main`.
        """
        return self.predictor.push_to_hub(repo_id, private=private, token=token, revision=revision)
