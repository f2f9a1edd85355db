"""Several people in one picture, for `hdb generate --region`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.apps.settings import GenerateConfig
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.generate import Drawn
from hyperdreambooth.regions import Region, draw_together, read_region

BLENDED = (
    "adapters of two people are added up: pictures show one blended face; pass --region for each adapter to "
    "draw both people"
)


def regions_of(texts: Sequence[str], adapters: Sequence[Path]) -> list[Region]:
    """Reads the regions, one for each adapter or none."""
    if texts and len(texts) != len(adapters):
        raise InputError(f"--region: expected one for each of {len(adapters)} adapters, got {len(texts)}")
    return [read_region(text) for text in texts]


def draw_regions(
    base: Base,
    prompts: Sequence[str],
    people: Sequence[tuple[Adapter, Region]],
    own: GenerateConfig,
    drawn: Drawn,
) -> None:
    """Draws the pictures of all prompts one by one; further pictures of a prompt have further seeds."""
    settings = own.model_dump(include={"steps", "guidance", "negative", "size"})
    for place, prompt in enumerate(prompts):
        for number in range(own.images):
            picture = draw_together(base, prompt, people, seed=own.seed + number, **settings)
            drawn(place * own.images + number, picture)
