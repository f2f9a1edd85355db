"""Several people in one picture: in each region the denoiser wears that person's adapter.

A sum of adapters makes one blended face, because every layer wears both people everywhere. Here a picture is
drawn as a batch: the bare base, and every person, from the same noise. After each call of the denoiser the
predictions are put together by masks, and all samples go on from the whole. So it works on every base, and a
picture costs as much as one more than it has people.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hyperdreambooth.adapter import Adapter, check_wearable
from hyperdreambooth.base.alone import alone
from hyperdreambooth.base.load import PLACEHOLDER, Base
from hyperdreambooth.files import InputError
from hyperdreambooth.generate import wearing_each
from hyperdreambooth.runs import rng


@dataclass(frozen=True)
class Region:
    """A box in a picture, in shares of its side from the upper left corner.

    The left half is `Region(0, 0, 0.5, 1)`.
    """

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        """Refuses a box that is empty or lies outside the picture."""
        if not (0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1):
            raise InputError(
                "region: expected left,top,right,bottom from 0 to 1 with left < right and top < bottom, got "
                f"{self.left:g},{self.top:g},{self.right:g},{self.bottom:g}"
            )

    def mask(self, side: int) -> Tensor:
        """Returns `(side, side)`: 1 inside, 0 outside, rounded to whole cells, and at least one cell."""
        made = torch.zeros(side, side)
        (left, right), (top, bottom) = (
            (min(round(low * side), side - 1), round(high * side))
            for low, high in ((self.left, self.right), (self.top, self.bottom))
        )
        made[top : max(bottom, top + 1), left : max(right, left + 1)] = 1
        return made


def read_region(text: str) -> Region:
    """Reads `left,top,right,bottom`."""
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError:
        raise InputError(f"region: expected left,top,right,bottom such as 0,0,0.5,1, got {text!r}") from None
    return Region(left, top, right, bottom)


@alone
def draw_together(
    base: Base,
    prompt: str,
    people: Sequence[tuple[Adapter, Region]],
    *,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 4.0,
    negative: str | None = None,
    size: int | None = None,
) -> Image.Image:
    """Draws one picture of several people, each in a region; the base is as before afterwards.

    Args:
        base: the frozen base.
        prompt: of the whole picture. In each region `[V]` stands for the person there; outside it stands for
            nobody.
        people: adapters and their regions. Where regions overlap, the predictions are averaged.
        seed: of the starting noise.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 or less for none.
        negative: what the picture should not show.
        size: side in pixels; None for the base's own.

    Raises:
        InputError: no people, an adapter that the base cannot wear or that changes convolutions, a bad
            size, or a number of steps that the base's scheduler cannot make.
    """
    if not people:
        raise InputError("regions: expected one or more people, got none; use generate_images instead")
    side = base.resolution if size is None else size
    base.check_side("size", side)
    if steps < 1:
        raise InputError(f"steps: expected 1 or more, got {steps}")
    base.check_steps("steps", steps)
    worn = [0.0 * people[0][0], *(adapter for adapter, _ in people)]  # the first one is the bare base
    check_wearable(base, *worn)
    texts = [base.prompt(prompt.replace(PLACEHOLDER, one.trigger or base.trigger)) for one in worn]
    texts[0] = base.prompt(" ".join(prompt.replace(PLACEHOLDER, "").split()))
    with wearing_each(base, worn) as put, _composed(base, [region for _, region in people]):
        put(list(range(len(worn))))
        return base.draw(
            texts, [base.prompt(negative)] * len(worn) if negative else None,
            [rng(seed, "regions", prompt) for _ in worn], steps=steps, guidance=guidance, side=side,
        )[0]  # fmt: skip


def shares(regions: Sequence[Region], side: int) -> Tensor:
    """Returns the samples' shares of every cell, `(1 + k, side, side)`, whose sum is 1; the base is first."""
    masks = torch.stack([region.mask(side) for region in regions])
    covered = masks.sum(0, keepdim=True)
    return torch.cat([(covered == 0).float(), masks / covered.clamp_min(1)])


@contextmanager
def _composed(base: Base, regions: Sequence[Region]) -> Generator[None]:
    """In the block, all samples of a batch get the prediction that their regions make up together."""

    def compose(_module: Any, _given: Any, output: Any) -> Any:
        if isinstance(output[0], list):  # Z-Image answers with a map for each sample
            return ([*together(torch.stack(output[0]), regions)], *output[1:])
        return (together(output[0], regions), *output[1:])

    hook = base.denoiser.register_forward_hook(compose)
    try:
        yield
    finally:
        hook.remove()


def together(predicted: Tensor, regions: Sequence[Region]) -> Tensor:
    """Puts predictions `(g·(1 + k), …)` together, `g` times for guidance.

    They are maps `(…, c, h, w)` or, of Flux, tokens `(…, h·w, c)`; the pictures are square.
    """
    tokens = predicted.ndim == 3
    weights = shares(regions, math.isqrt(predicted.shape[1]) if tokens else predicted.shape[-1])
    weights = weights.flatten(1)[..., None] if tokens else weights[:, None]
    split = predicted.unflatten(0, (-1, len(weights)))
    whole = (split * weights.to(predicted)).sum(1, keepdim=True)
    return whole.expand_as(split).flatten(0, 1)
