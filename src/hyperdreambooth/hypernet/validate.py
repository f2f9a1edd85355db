"""Validation: how well predictions tell held-out people apart, on the same noise every time (training.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers.utils.pil_utils import make_image_grid
from PIL import Image
from torch import Tensor

from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.image import to_image, to_pixels
from hyperdreambooth.files import whole_file
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.data import Example, Faces, collect, person_losses, pick
from hyperdreambooth.hypernet.decoder import HyperNetwork
from hyperdreambooth.lidb.weights import factors
from hyperdreambooth.lora.inject import Worn
from hyperdreambooth.shapes import Factors

PersonSampler: TypeAlias = Callable[[Sequence[str], Factors], Sequence[Image.Image]]
"""Prompts and factors, one identity for each prompt → an image each. The base is bare when it is called."""

Score: TypeAlias = Callable[
    [Sequence[Image.Image], Sequence[str], Sequence[Sequence[Path]]], Mapping[str, float]
]
"""Images, their prompts, and photos of the same people other than the reference → named scores."""


def examples(faces: Faces, held: Sequence[int], config: HypernetConfig, draw: int) -> list[Example]:
    """Returns an example of every held-out identity; those of a draw are the same at every validation."""
    return [
        pick(faces, [one], config.photos, config.seed, "validation", faces.names[one], draw) for one in held
    ]


@torch.no_grad()
def tell_apart(
    base: Base, faces: Faces, held: Sequence[int], network: HyperNetwork, worn: Worn, config: HypernetConfig,
    together: int,
) -> dict[str, float]:  # fmt: skip
    """Returns the mean denoising losses of held-out people with their own and with other predictions.

    They are `own`, `mean` (everybody wears the mean) and `shuffled` (everybody wears another's prediction).
    `apart` = shuffled − own is above 0 once predictions say who it is, and `spread` is that between the
    predictions, in units of the spread of the numbers. Timesteps are drawn without the bias of the training.
    """
    config = config.model_copy(update={"timestep_bias": 1})
    parts = [held[first : first + together] for first in range(0, len(held), together)]
    totals: dict[str, list[Tensor]] = {"own": [], "mean": [], "shuffled": [], "spread": []}
    for draw in range(config.draws if held else 0):
        batches = [collect(base, faces, examples(faces, part, config, draw)) for part in parts]
        numbers = network(torch.cat([batch.features for batch in batches]))
        wearing = {"own": numbers, "mean": network.mean.expand_as(numbers), "shuffled": numbers.roll(1, 0)}
        for kind, rows in wearing.items():
            losses: list[Tensor] = []
            for batch, some in zip(batches, rows.split(together), strict=True):
                worn.set(factors(network.layout, network.basis(), some), images=config.photos)
                losses.append(person_losses(base, batch, config))
            totals[kind].append(torch.cat(losses).mean())
        totals["spread"].append(((numbers - numbers.mean(0)) / network.spread).square().mean().sqrt())
    figures = {name: float(torch.stack(values).mean()) for name, values in totals.items() if values}
    return {**figures, "apart": figures["shuffled"] - figures["own"]} if figures else {}


@torch.no_grad()
def pictures(
    base: Base, faces: Faces, held: Sequence[int], network: HyperNetwork, config: HypernetConfig, file: Path,
    sample: PersonSampler, score: Score | None,
) -> dict[str, float]:  # fmt: skip
    """Draws held-out people into `file`, below their reference photos, and scores them; the base is bare."""
    chosen = examples(faces, held, config, 0)
    numbers = network(collect(base, faces, chosen).features)
    texts = [text.replace("{class_word}", base.class_word) for text in config.prompts]
    prompts = [texts[k % len(texts)] for k in range(len(chosen))]
    drawn = list(sample(prompts, factors(network.layout, network.basis(), numbers)))
    photos = [faces.photos[example.reference].open() for example in chosen]
    shown = [to_image(to_pixels(image, base.resolution)) for image in [*photos, *drawn]]
    with whole_file(file) as temporary:
        make_image_grid(shown, rows=2, cols=len(chosen)).save(temporary)
    others = [[faces.photos[k].path for k in faces.rows(s.identity) if k != s.reference] for s in chosen]
    return dict(score(drawn, prompts, others)) if score else {}
