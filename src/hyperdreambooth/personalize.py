"""One photo of a person → prediction → relaxed → finetuned: the whole method behind one class."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from hyperdreambooth.adapter import Adapter, Format, check_rank
from hyperdreambooth.base.load import EMBEDDED, EMBEDDED_NAME, Base, is_embedded, load_base
from hyperdreambooth.config import load_config
from hyperdreambooth.faces.dataset import Photo, Photos, read_person
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError, check_writable, read_json, whole_folder, write_json
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.finetune.fast import finetune_adapter
from hyperdreambooth.generate import generate
from hyperdreambooth.hypernet.predictor import Predictor, hypernet_folder, load_hypernet, load_info
from hyperdreambooth.lora.formats.card import licence_of, model_card
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import environment

EMBEDDED_HYPERNET = EMBEDDED.parent / "hypernet"
FILES: dict[Format, str] = {
    "lidb": "person.lidb.safetensors",
    "kohya": "person.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
}
"""What each form of a person is called in a folder of its own."""
COMMANDS = ("demo", "personalize")
"""What the reports of such folders name as their maker."""

_OF_FILE_MANAGERS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # they leave these wherever one has looked


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
            return finetune_adapter(self.base, adapter, photos, config)

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


def check_out(folder: Path) -> None:
    """Refuses to replace a folder that is not an earlier result; ask before the work too.

    Raises:
        InputError: a file, a folder with other things in it, the current or a mounted folder, or no place to
            write.
    """
    if folder.exists() and not _is_replaceable(folder):
        raise InputError(
            f"out {folder}: expected a new or empty folder, or one of an earlier run; pass another --out"
        )
    if folder.resolve().is_mount():
        raise InputError(f"out {folder}: a mounted folder cannot be replaced; pass a folder inside it")
    if folder.resolve() == Path.cwd():  # whoever stands in it would be left in a folder that is gone
        raise InputError(f"out {folder}: the current folder cannot be replaced; pass another --out")
    check_writable(folder.parent)


def _is_replaceable(folder: Path) -> bool:
    """Whether it is an empty folder, or holds an earlier person and nothing else."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()} - _OF_FILE_MANAGERS
    try:
        report = read_json(folder / "report.json") if names else {}
        earlier = report.get("command") in COMMANDS and names <= {"report.json", *report["files"].values()}
    except (InputError, LookupError, AttributeError, TypeError):
        return False
    return not names or earlier


def save_person(
    out: Path,
    base: Base,
    prediction: Adapter,
    adapter: Adapter,
    *,
    photo: Photo,
    picture: Image.Image,
    seconds: Mapping[str, float],
    scores: Mapping[str, Any],
    seed: int,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes a personalization as one folder, whole or not at all: adapters, pictures, card and report.

    Args:
        out: the folder; an earlier result there is replaced.
        base: the base it was made for.
        prediction: saved as LiDB.
        adapter: the finetuned LoRA, saved in kohya and in diffusers form.
        photo: of the person, saved as `photo.png`, with what it shows beside it in `photo.txt`.
        picture: what was drawn, saved as `picture.png`.
        seconds: stage → seconds; their sum becomes `total` where none is given.
        scores: `identity` and `prompt`, of `base`, `prediction`, `finetuned`; null where nothing can judge.
        seed: of it all.
        facts: what else belongs in the report (config, prompts, …).

    Returns:
        The report, as written to `report.json`.

    Raises:
        InputError: `out` holds something else.
    """
    check_out(out)
    files: dict[str, str] = {**FILES, "picture": "picture.png", "photo": "photo.png", "card": "README.md"}
    if photo.caption:
        files["caption"] = "photo.txt"
    report: dict[str, Any] = {
        "seconds": {
            k: round(v, 3)
            for k, v in {**seconds, "total": seconds.get("total", sum(seconds.values()))}.items()
        },
        "scores": dict(scores),
        "files": files,
        "steps": int(adapter.metadata.get("steps", 0)),
        "rank": adapter.rank,
        "trigger": adapter.trigger,
        "seed": seed,
        "command": "personalize",
        **facts,
        "environment": environment(),
    }
    with whole_folder(out) as part:
        for form, name in FILES.items():
            (prediction if form == "lidb" else adapter).save(part / name, form, base.resolution)
        picture.save(part / "picture.png")
        photo.open().save(part / "photo.png")
        if photo.caption:
            (part / "photo.txt").write_text(photo.caption, encoding="utf-8")
        (part / "README.md").write_text(_card(base, adapter), encoding="utf-8")
        write_json(part / "report.json", report)
    return report


def _card(base: Base, adapter: Adapter) -> str:
    """The folder's README: the embedded base is found by its import, any other by its name."""
    facts = adapter.lora_info("A person", base.resolution)
    files = {str(form): name for form, name in FILES.items()}
    if base.source == EMBEDDED_NAME:
        place, licence = "from hyperdreambooth.base.load import EMBEDDED as base", "apache-2.0"
    else:
        place, licence = f"base = {json.dumps(facts.base)}", licence_of(Path(base.source))
    subject = f"{adapter.trigger} {base.class_word}"
    return model_card(facts, subject, files, adapter.rank, ["picture.png"], place, licence)
