"""The settings of `prepare`: what becomes of a photo, and what is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hyperdreambooth.faces.detect import LEAST_SCORE


class PrepareConfig(BaseModel):
    """How photos become crops.

    Attributes:
        size: pixels a side of the crops.
        already_cropped: take the centre square as it is; no face is looked for.
        margin: surroundings on every edge, in sides of the tightest crop around a head with its hair.
        several: of several faces take the `largest`, or `refuse` the photo.
        min_side: pixels of the photo that a crop must have a side; smaller faces are dropped.
        sharpness: least variance of the Laplacian (`crop.sharpness`); 0 keeps blurred photos too.
        score: least confidence of the detector, 0 to 1.
        detector: YuNet's ONNX file; None fetches it from the hub, once.
        caption: of photos that come without one; None leaves them so, and the training's `prompt` serves.
        identity_column, caption_column: of a data set, or keys of a shard's JSON; None tries the usual names.
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
