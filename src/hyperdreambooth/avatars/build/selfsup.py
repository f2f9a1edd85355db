"""An image encoder that learns from pictures alone: what two views of one picture share, and others lack.

Nobody tells it what is on a picture, so it can learn from photographs as well as from avatars.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from hyperdreambooth.avatars.build.fit import StageConfig, Tensors, fit
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.avatars.build.readers import (
    EMBEDDING,
    blemish,
    contrastive,
    new_reader,
    people_and_pictures,
)

SHIFT = 8  # pixels that a gentle view moves at most

Augment: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Pixels `(b, 3, h, w)` and a generator → another view of each picture."""


def gentle(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts, mirrors and tints pictures `(b, 3, h, w)`, and keeps their layout and their crispness.

    Only whole pixels move, because what lies between them would be blurred.
    """
    count = len(pixels)
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    views = torch.where(mirrored, pixels.flip(3), pixels)
    shifts = torch.randint(-SHIFT, SHIFT + 1, (count, 2), generator=generator).tolist()
    views = torch.stack([view.roll(shift, dims=(1, 2)) for view, shift in zip(views, shifts, strict=True)])
    gain = 1 + 0.15 * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    lift = 0.15 * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1)
    return views * gain + lift


def strong(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Cuts out a part of pictures `(b, 3, h, w)`, at least half as wide, and mirrors, tints and blemishes it.

    What is left is what a person looks like; colours shift little, because skin and hair have them. Parts
    have three quarters of the picture's sides. A face is then about as large in them as in the whole pictures
    that the encoder reads later (arXiv 1906.06423), and a step takes less time.
    """
    count, height, width = len(pixels), *(side * 3 // 4 for side in pixels.shape[2:])
    mirrored = 1 - 2 * torch.randint(0, 2, (count,), generator=generator)
    scale = 0.5 + 0.5 * torch.rand(count, generator=generator)
    place = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - scale[:, None])
    cut = torch.zeros(count, 2, 3)
    cut[:, 0, 0], cut[:, 1, 1], cut[:, :, 2] = scale * mirrored, scale, place
    places = affine_grid(cut, [count, 3, height, width], align_corners=False)
    parts = grid_sample(pixels, places, align_corners=False)
    gain = 1 + 0.15 * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    return blemish(parts * gain, generator)


def features(resnet: Any, pixels: Tensor) -> Tensor:
    """Returns the features `(b, f)` of pixels `(b, 3, h, w)`: the mean of the last map."""
    return resnet(pixels).pooler_output.flatten(1)


class Projected(nn.Module):
    """The encoder with the two layers that only its training needs (arXiv 2002.05709, section 4.2)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.resnet = new_reader(["unused"], seed).resnet
        width = self.resnet.config.hidden_sizes[-1]
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, EMBEDDING))

    def forward(self, pixels: Tensor) -> Tensor:
        """Maps pixels `(b, 3, h, w)` to `(b, 64)`."""
        return self.head(features(self.resnet, pixels))


# NT-Xent (SimCLR, arXiv 2002.05709, equation 1): `contrastive` with two views of each picture as a "person"
def train_selfsup(
    pictures: Pictures, config: StageConfig, folder: Path, device: str, augment: Augment = gentle
) -> Any:
    """Trains an encoder without labels: two views of a picture are close, and all others are apart.

    Args:
        pictures: a batch has all pictures of a person, so the encoder also learns how these differ.
        config: of the training; `batch` pictures make twice as many views.
        folder: run folder; the same call continues an interrupted one.
        device: where it is trained.
        augment: makes a view. What it changes is what the encoder learns to ignore.

    Returns:
        A transformers `ResNetModel`; `features` reads it.
    """
    model = Projected(config.seed).to(device)

    def batch_of(step: int) -> Tensors:
        rows, generator = people_and_pictures(pictures, config, "selfsup", step)
        pixels = pictures.batch(rows)
        views = torch.cat([augment(pixels, generator), augment(pixels, generator)])
        return {"pixels": views, "pictures": torch.arange(len(rows)).repeat(2)}

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        return {"loss": contrastive(model(batch["pixels"]), batch["pictures"])}

    fit("self-supervised", model, batch_of, loss_of, config, folder, device)
    return model.resnet
