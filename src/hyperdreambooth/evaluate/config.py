"""The settings of the protocol, and the methods that are its rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hyperdreambooth.config import literal, load_config
from hyperdreambooth.files import InputError

Kind: TypeAlias = Literal["photo", "stranger", "base", "prediction", "finetune", "scratch", "file"]

PROMPTS = (
    "a photo of a [V] {class_word}, laughing",
    "a photo of a [V] {class_word}, surprised, on a beach",
    "a photo of a [V] {class_word}, wearing sunglasses, in a city",
    "a photo of a [V] {class_word}, wearing a golden crown",
    "a photo of a [V] {class_word}, wearing headphones, under a starry night sky",
    "a photo of a [V] {class_word}, wearing a red scarf, in the snow",
    "a pencil sketch of a [V] {class_word}",
    "a watercolour painting of a [V] {class_word}, smiling",
)


class Method(BaseModel):
    """How a row makes its people.

    Attributes:
        kind: `photo` and `stranger` are bounds (another real photo of the person, and one of somebody else,
            both through the base's autoencoder), `base` is the bare base, `prediction` the hypernetwork
            alone, `finetune` starts from its prediction, `scratch` is DreamBooth, `file` the user's adapter.
        start: of a finetune: the prediction, or the shared start of all training, where ΔW = 0.
        refinements: of the hypernetwork; None for the number it was trained with.
        photos: reference photos a person.
        settings: of the finetune or of DreamBooth; those left out have their usual defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    start: Literal["prediction", "shared"] = "prediction"
    refinements: int | None = None
    network: Literal["own", "second"] = "own"
    photos: int = Field(default=1, ge=1)
    settings: dict[str, Any] = {}


# The paper's rows (its table 1 and its ablation) and their bounds. Learning rates and steps that are not
# given here are those of `finetune.config.USUAL`; presets have others.
METHODS: Mapping[str, Method] = {
    "another-photo": Method(kind="photo"),
    "somebody-else": Method(kind="stranger"),
    "base": Method(kind="base"),
    "prediction": Method(kind="prediction"),
    "hyperdreambooth": Method(kind="finetune"),
    "no-hypernetwork": Method(kind="finetune", start="shared"),
    "no-refinement": Method(kind="finetune", refinements=1),
    "second": Method(kind="prediction", network="second"),
    "dreambooth": Method(
        kind="scratch", settings={"method": "full", "prior_weight": 1.0, "prior_images": 100}
    ),
    "dreambooth-agg-400": Method(kind="scratch", settings={"method": "full", "steps": 400, "lr": 1e-5}),
    "dreambooth-agg-40": Method(kind="scratch", settings={"method": "full", "steps": 40, "lr": 5e-5}),
    "dreambooth-lora": Method(kind="scratch", settings={"method": "lora"}),
    "lidb": Method(kind="scratch", settings={"method": "lidb"}),
    "textual-inversion": Method(kind="scratch", settings={"method": "textual-inversion"}),
    "adapter": Method(kind="file"),
}
_ROW = re.compile(r"(?P<method>[\w-]+)(?::(?P<changes>[^@]+))?(?:@(?P<steps>\d+))?")
_OWN = Method.model_fields.keys() - {"kind", "settings"}


class EvaluateConfig(BaseModel):
    """The config of `evaluate`.

    Attributes:
        identities: how many people of the folder take part, beginning with the first.
        prompts: of every person; `[V]` is the person, `{class_word}` the hypernetwork's or the base's.
        seeds: one picture a seed for each prompt and person; a seed is the same noise for every method.
        rows: names of methods. `NAME@STEPS` is a method with that many steps, for a curve; `NAME:key=value,…`
            is a method with other settings, for an ablation.
        methods: method → settings that override those of `METHODS`; they may include fields of `Method`.
        against: the row that all others are compared with, person by person; None for the first finetune.
        second: another hypernetwork to compare with, for the row of that name.
        batch: pictures drawn together.
        together: people trained together.
        shown: people in the report's picture grids.
        clip: folder or hub id of a CLIP model, for `clip_i` and `clip_t`.
        dino: folder or hub id of a DINOv2 model.
        face: the encoder of real faces that judges identity: `auto` for the first that is at hand, on bases
            that have no identity scorer of their own; `dlib`, `auraface`, or a folder or hub id that has
            `glintr100.onnx`, on every base; None for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    identities: int = Field(4, ge=1)
    prompts: tuple[str, ...] = Field(PROMPTS, min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    rows: tuple[str, ...] = Field(
        ("another-photo", "somebody-else", "base", "prediction", "hyperdreambooth", "no-hypernetwork"),
        min_length=1,
    )
    methods: dict[str, dict[str, Any]] = {}
    against: str | None = None
    second: str | None = None
    draw_steps: int = Field(25, ge=1)
    guidance: float = Field(4.0, ge=0)
    batch: int = Field(16, ge=1)
    together: int = Field(16, ge=1)
    shown: int = Field(4, ge=0)
    clip: str | None = None
    dino: str | None = None
    face: str | None = "auto"

    @field_validator("prompts", "seeds")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Refuses a repeated value, which would count twice, and an empty prompt, which asks for nothing."""
        if not all(str(value).strip() for value in values):
            raise ValueError("expected text, one is empty")
        if len(set(values)) < len(values):
            raise ValueError("expected each once, one is repeated")
        return values

    def compared(self) -> str | None:
        """Returns the row that the others are compared with; None if there is none."""
        finetunes = [name for name in self.rows if method_of(name, self).kind == "finetune"]
        finetunes.sort(key=lambda name: name not in METHODS)  # the method itself before its variants
        return self.against or next(iter(finetunes), None)


def method_of(name: str, config: EvaluateConfig) -> Method:
    """Returns the method of a row, with the config's settings for it; refuses an unknown one."""
    found = _ROW.fullmatch(name)
    if found is None or found["method"] not in METHODS:
        forms = f"{', '.join(METHODS)}, NAME@STEPS or NAME:key=value,key=value"
        raise InputError(f"rows: expected one of {forms}, got {name!r}")
    method = METHODS[found["method"]]
    settings = {**method.settings, **config.methods.get(found["method"], {})}
    for change in filter(None, (found["changes"] or "").split(",")):
        key, _, value = change.partition("=")
        settings[key.strip()] = literal(value.strip())
    if found["steps"]:
        settings["steps"] = int(found["steps"])
    own = {key: settings.pop(key) for key in _OWN & settings.keys()}
    return load_config(Method, **{**method.model_dump(), **own, "settings": settings})


def methods_of(config: EvaluateConfig) -> dict[str, Method]:
    """Returns row → method, in order.

    Raises:
        InputError: a row or a table of settings names no method, or `against` is not one of the rows.
    """
    if strays := sorted(set(config.methods) - set(METHODS)):
        raise InputError(f"methods: expected one of {', '.join(METHODS)}, got {strays[0]!r}")
    if config.against is not None and config.against not in config.rows:
        rows = ", ".join(config.rows)
        raise InputError(f"against: expected one of the rows {rows}, got {config.against!r}")
    return {name: method_of(name, config) for name in config.rows}
