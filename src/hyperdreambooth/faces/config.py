"""The settings of `prepare`: how photos are cropped, and which are dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hyperdreambooth.faces.detect import LEAST_SCORE


class PrepareConfig(BaseModel):
    """How photos become crops.

    Attributes:
        size: pixels per side of the crops.
        already_cropped: take the centre square of each photo, without detecting a face.
        margin: extra surroundings on every edge, in sides of the tightest crop around a head with its hair.
        several: with several faces in a photo, take the `largest` or `refuse` the photo.
        min_side: the least number of the photo's own pixels per side of a crop; smaller faces are dropped.
        sharpness: the least variance of the Laplacian (`crop.sharpness`); 0 keeps blurred photos too.
        score: the least confidence of the detector, 0 to 1.
        detector: YuNet's ONNX file; None downloads it from the hub once.
        caption: for photos without a caption; None leaves them without, and training uses its `prompt`.
        identity_column: of a data set, or a key of a shard's JSON; None tries the usual names.
        caption_column: likewise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(default=512, ge=32, le=4096)
    already_cropped: bool = False
    margin: float = Field(default=0.1, ge=0, le=2)
    several: Literal["largest", "refuse"] = "largest"
    min_side: int = Field(default=64, ge=1)
    sharpness: float = Field(default=10.0, ge=0)
    score: float = Field(default=LEAST_SCORE, gt=0, le=1)
    detector: Path | None = None
    caption: str | None = None
    identity_column: str | None = None
    caption_column: str | None = None
