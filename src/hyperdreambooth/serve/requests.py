"""The shapes of requests, with a bound on everything that a caller sends."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Consent: TypeAlias = Literal["self", "consented", "synthetic"]


def _plain(text: str) -> str:
    """Refuses what no database stores and no person types: NUL, halves of characters, control characters."""
    if not all(letter.isprintable() or letter in "\n\t" for letter in text):
        raise ValueError("expected text that can be printed")
    return text


Text = Annotated[str, AfterValidator(_plain)]
PersonId = Annotated[str, Field(pattern=r"^person_[0-9a-f]{32}$")]
_SEED = 2**53 - 1  # the largest whole number that every JSON reader keeps


class Strict(BaseModel):
    """A request; unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class NewPerson(Strict):
    """A person who is to be made from photos, which come beside these fields.

    Attributes:
        consent: on what ground the photos may be used: they show the caller (`self`), somebody who agreed
            (`consented`), or nobody, because a machine made them (`synthetic`).
        steps: of the finetune; None for what the hypernetwork recommends.
        rank: of the LoRA; None likewise.
        seed: of the training.
        keep_photos: whether the photos are kept after the job.
        webhook: an https address that is told when the job ends.
    """

    consent: Consent
    steps: int | None = Field(default=None, ge=1, le=100_000)
    rank: int | None = Field(default=None, ge=1, le=256)
    seed: int = Field(default=0, ge=0, le=_SEED)
    keep_photos: bool = False
    webhook: Annotated[Text, Field(max_length=1000)] = ""


class Worn(Strict):
    """A person on a picture, with a weight."""

    person: PersonId
    weight: float = Field(default=1.0, ge=-2, le=2)


class Drawing(Strict):
    """Pictures, in the shape of OpenAI's images API with `adapters` and a few settings more.

    Attributes:
        prompt: `[V]` stands for the people in `adapters`.
        adapters: whom the pictures show; several are mixed by weight. Empty for the bare base.
        n: how many pictures.
        size: `512x512` or `auto`.
        response_format: pictures in the answer, or addresses of them.
        output_format: of the files.
        model: anything; there is one base.
        user: anything; it is not kept.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        negative_prompt: what the pictures should not show.
        seed: of the pictures.
        background: True to get the job at once, and the pictures later.
        webhook: an https address that is told when the job ends.
    """

    prompt: Annotated[Text, Field(min_length=1, max_length=4000)]
    adapters: list[Worn] = Field(default_factory=list[Worn], max_length=4)
    n: int = Field(default=1, ge=1, le=100)
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{1,4}x[1-9][0-9]{1,4})$")] = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg"] = "png"
    model: Annotated[Text, Field(max_length=200)] = ""
    user: Annotated[Text, Field(max_length=200)] = ""
    steps: int = Field(default=25, ge=1, le=1000)
    guidance: float = Field(default=4.0, ge=0, le=50)
    negative_prompt: Annotated[Text, Field(max_length=4000)] = ""
    seed: int = Field(default=0, ge=0, le=_SEED)
    background: bool = False
    webhook: Annotated[Text, Field(max_length=1000)] = ""
