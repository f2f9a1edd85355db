"""The settings of `prepare`: how photos are cropped, and which are dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hyperdreambooth.faces.detect import LEAST_SCORE


class PrepareConfig(BaseModel):
    """How photos become crops."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(default=512, ge=32, le=4096)  # pixels per side of the crops
    already_cropped: bool = False  # take the centre square of each photo, without detecting a face
    # extra surroundings on every edge, in sides of the tightest crop around a head with its hair
    margin: float = Field(default=0.1, ge=0, le=2)
    several: Literal["largest", "refuse"] = "largest"  # with several faces in a photo, or refuse the photo
    min_side: int = Field(default=64, ge=1)  # the least of the photo's own pixels per side of a crop
    sharpness: float = Field(default=10.0, ge=0)  # the least of `crop.sharpness`; 0 keeps blurred photos too
    score: float = Field(default=LEAST_SCORE, gt=0, le=1)  # the detector's least confidence
    detector: Path | None = None  # YuNet's ONNX file; None downloads it from the hub once
    caption: str | None = None  # for photos without one; None leaves them to the `prompt` of training
    # of a data set, or a key of a shard's JSON; None tries the usual names
    identity_column: str | None = None
    caption_column: str | None = None
