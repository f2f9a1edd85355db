"""The settings of `prepare`: how photos are cropped, and which are dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from hyperdreambooth.faces.detect import LEAST_SCORE


class PrepareConfig(BaseModel):
    """How photos become crops."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(default=512, ge=32, le=4096)  # pixels per side of the crops
    person: str | None = None  # the name of the one person of a flat source
    already_cropped: bool = False  # take the centre square of each photo, without detecting a face
    # extra surroundings on every edge, in sides of the tightest crop around a head with its hair; less where
    # the photo has less
    margin: float = Field(default=0.1, ge=0, le=2)
    several: Literal["refuse", "largest", "all"] = "refuse"  # what to do with a photo of several people
    # a face counts from this share of the largest one's side on; smaller ones are passers-by
    second_face: float = Field(default=0.33, gt=0, le=1)
    most_padded: float = Field(default=0.4, ge=0, le=1)  # the share of a crop that lies outside the photo
    most_turned: float = Field(default=100.0, ge=0, le=180)  # degrees by which a face is turned upright
    most_enlarged: float = Field(default=4.0, gt=0)  # times; a face of few pixels is no target to train on
    sharpness: float = Field(default=10.0, ge=0)  # the least of `crop.sharpness`; 0 keeps blurred photos too
    score: float = Field(default=LEAST_SCORE, gt=0, le=1)  # the detector's least confidence
    detector: Path | None = None  # YuNet's ONNX file; None downloads it from the hub once
    check: Literal["auto", "off"] = "auto"  # whether an installed face encoder looks for strangers
    caption: str | None = None  # for photos without one; None leaves them to the `prompt` of training
    # of a data set, or a key of a shard's JSON; None tries the usual names
    identity_column: str | None = None
    caption_column: str | None = None

    @field_validator("person")
    @classmethod
    def _folder_name(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or name[0] == "." or set(name) & set('/\\:*?"<>|')):
            raise PydanticCustomError("name", "expected a name that a folder can have")
        return name
