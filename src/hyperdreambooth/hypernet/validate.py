"""Does it tell people apart? The same held-out people and noise every time (docs/training.md)."""

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
"""Prompts and factors with one identity a prompt → a picture each; the base is bare when it is called."""

Score: TypeAlias = Callable[
    [Sequence[Image.Image], Sequence[str], Sequence[Sequence[Path]]], Mapping[str, float]
]
"""Pictures, their prompts, and photos of the same people other than the reference → named figures."""


def slots(faces: Faces, held: Sequence[int], config: HypernetConfig, number: int) -> list[Example]:
    """The slots of one draw: every held-out identity once, the same at every validation."""
    return [
        pick(faces, [[one]], 0.0, config.photos, config.seed, "validation", faces.names[one], number)
        for one in held
    ]


@torch.no_grad()
def tell_apart(
    base: Base, faces: Faces, held: Sequence[int], network: HyperNetwork, worn: Worn, config: HypernetConfig,
    together: int,
) -> dict[str, float]:  # fmt: skip
    """Denoising losses of held-out people wearing their own prediction, nobody's (the mean), and another's.

    `together` of them share a forward: no more than in a step of the training.

    Returns:
        `own`, `mean`, `shuffled`; `apart` = shuffled − own, above 0 once predictions say who it is; `spread`
        between the people's predictions, in units of the spread of the numbers. Nothing where nobody is held
        out.
    """
    totals: dict[str, list[Tensor]] = {"own": [], "mean": [], "shuffled": [], "spread": []}
    for number in range(config.draws if held else 0):
        chosen = slots(faces, held, config, number)
        numbers = network(collect(base, faces, chosen).features)
        kinds = {"own": numbers, "mean": network.mean.expand_as(numbers), "shuffled": numbers.roll(1, 0)}
        for kind, worn_numbers in kinds.items():
            totals[kind].append(
                _losses(base, faces, chosen, network, worn, worn_numbers, config, together).mean()
            )
        totals["spread"].append(((numbers - numbers.mean(0)) / network.spread).square().mean().sqrt())
    figures = {name: float(torch.stack(values).mean()) for name, values in totals.items() if values}
    return {**figures, "apart": figures["shuffled"] - figures["own"]} if figures else {}


def _losses(
    base: Base, faces: Faces, chosen: Sequence[Example], network: HyperNetwork, worn: Worn, numbers: Tensor,
    config: HypernetConfig, together: int,
) -> Tensor:  # fmt: skip
    """Losses `(n,)` of the slots wearing these numbers `(n, P)`."""
    parts: list[Tensor] = []
    for first in range(0, len(chosen), together):
        some = slice(first, first + together)
        worn.set(factors(network.layout, network.basis(), numbers[some]), images=config.photos)
        parts.append(person_losses(base, collect(base, faces, chosen[some]), config.weighting))
    return torch.cat(parts)


@torch.no_grad()
def pictures(
    base: Base, faces: Faces, held: Sequence[int], network: HyperNetwork, config: HypernetConfig, file: Path,
    sample: PersonSampler, score: Score | None,
) -> dict[str, float]:  # fmt: skip
    """Draws held-out people into `file`, reference photos above, and scores them; the base must be bare.

    Returns:
        The figures of `score`, if there is one.
    """
    chosen = slots(faces, held, config, 0)
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
