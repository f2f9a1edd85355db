"""Small image classifiers: the two scorers, which only score, and the hypernetwork's image encoder.

All three are ordinary transformers ResNets in plain model folders, loaded by path like a user's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate, normalize

from hyperdreambooth.avatars.build.fit import StageConfig, Tensors, fit
from hyperdreambooth.avatars.build.pictures import Pictures, attribute_targets, trait_targets
from hyperdreambooth.avatars.build.untyped import transformers
from hyperdreambooth.avatars.draw.people import ATTRIBUTES, CATEGORICAL, CONTINUOUS
from hyperdreambooth.avatars.draw.render import SIZE
from hyperdreambooth.runs import rng

EMBEDDING = 64
TEMPERATURE = 0.1
ATTRIBUTE_LABELS = [f"{group}:{value}" for group, values in ATTRIBUTES.items() for value in values]
TRAIT_LABELS = [f"trait:{name}" for name in CONTINUOUS]
ATTRIBUTE_SIZES = [len(values) for values in ATTRIBUTES.values()]
KIND_SIZES = [len(values) for values in CATEGORICAL.values()]


def new_reader(labels: list[str], seed: int, sizes: tuple[int, ...] = (32, 64, 128, 160)) -> Any:
    """Returns a basic-block ResNet: 128 pixels → 4×4 maps → a logit for each label."""
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        embedding_size=32,
        hidden_sizes=list(sizes),
        depths=[1, 1, 1, 1],
        layer_type="basic",
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    config.image_size = SIZE
    return transformers.ResNetForImageClassification(config)


def blemish(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Adds what a scorer of generated pictures must ignore: softness, grain of two sizes, small shifts."""
    count, size = len(pixels), pixels.shape[-1]
    soft = interpolate(interpolate(pixels, size // 2, mode="area"), size, mode="bilinear")
    share = (1.6 * torch.rand(count, 1, 1, 1, generator=generator) - 0.4).clamp(0, 1)
    fine = torch.randn(count, 3, size, size, generator=generator)
    coarse = torch.randn(count, 3, size // 4, size // 4, generator=generator)
    shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
    grain = 0.04 * fine + 0.06 * interpolate(coarse, size, mode="bilinear")
    return torch.roll(torch.lerp(pixels, soft, share) + grain, shift, dims=(2, 3))


# Supervised contrastive loss (Khosla et al., arXiv 2004.11362, equation 2)
def contrastive(embedded: Tensor, people: Tensor) -> Tensor:
    """Pulls pictures of one person together and pushes others apart; embedded `(b, e)`, people `(b,)`."""
    unit = normalize(embedded.float())
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    logits = (unit @ unit.T / TEMPERATURE).masked_fill(itself, float("-inf"))
    chances = logits.log_softmax(dim=1).masked_fill(itself, 0.0)
    same = (people[:, None] == people[None]) & ~itself
    return -((chances * same).sum(dim=1) / same.sum(dim=1).clamp_min(1)).mean()


def grouped(logits: Tensor, targets: Tensor, sizes: list[int]) -> Tensor:
    """Returns the mean cross-entropy of groups; logits `(b, sum(sizes))`, targets `(b, groups)`."""
    groups = logits.float().split(sizes, dim=1)
    return torch.stack([cross_entropy(group, targets[:, g]) for g, group in enumerate(groups)]).mean()


def people_and_pictures(
    pictures: Pictures, config: StageConfig, purpose: str, step: int
) -> tuple[Tensor, torch.Generator]:
    """Returns rows of `batch / each` people with all their pictures, and the step's generator."""
    generator, each = rng(purpose, config.seed, step), pictures.each
    people = torch.randperm(len(pictures) // each, generator=generator)[: config.batch // each]
    return (people[:, None] * each + torch.arange(each)).flatten(), generator


def train_identity(pictures: Pictures, config: StageConfig, folder: Path, device: str) -> Any:
    """Trains the identity scorer, whose 64 numbers are close for one person in any context."""
    model = new_reader([f"embedding:{i}" for i in range(EMBEDDING)], config.seed).to(device)

    def batch_of(step: int) -> Tensors:
        rows, generator = people_and_pictures(pictures, config, "identity", step)
        return {"pixels": blemish(pictures.batch(rows), generator), "people": rows // pictures.each}

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        return {"loss": contrastive(model(batch["pixels"]).logits, batch["people"])}

    fit("scorer: identity", model, batch_of, loss_of, config, folder, device)
    return model


def train_attributes(pictures: Pictures, config: StageConfig, folder: Path, device: str) -> Any:
    """Trains the attribute reader, of what a caption names and of the person's continuous traits."""
    labels = ATTRIBUTE_LABELS + TRAIT_LABELS
    model = new_reader(labels, config.seed + 1).to(device)
    named, traits = attribute_targets(pictures.contexts), trait_targets(pictures.identities)[0]
    first = len(ATTRIBUTE_LABELS)

    def batch_of(step: int) -> Tensors:
        rows, generator = people_and_pictures(pictures, config, "attributes", step)
        pixels = blemish(pictures.batch(rows), generator)
        return {"pixels": pixels, "named": named[rows], "traits": traits[rows]}

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        logits = model(batch["pixels"]).logits
        read = grouped(logits[:, :first], batch["named"], ATTRIBUTE_SIZES)
        traits_read = binary_cross_entropy_with_logits(logits[:, first:].float(), batch["traits"])
        return {"loss": read + traits_read, "attributes": read, "traits": traits_read}

    fit("scorer: attributes", model, batch_of, loss_of, config, folder, device)
    return model


class ShapeReader(nn.Module):
    """A ResNet with a linear head over its whole last feature map, of pictures of `side` pixels.

    The head sees where things are. An average over the map, as in classifiers, hardly learns a face's width.
    """

    def __init__(self, labels: int, seed: int, side: int = SIZE) -> None:
        super().__init__()
        self.resnet = new_reader(["unused"], seed, sizes=(32, 64, 128, 192)).resnet
        self.head = nn.LazyLinear(labels)
        self(torch.zeros(2, 3, side, side))  # the head takes its size from the first batch

    def forward(self, pixels: Tensor) -> Tensor:
        """Maps pixels `(b, 3, side, side)` to logits `(b, labels)`."""
        return self.head(self.resnet(pixels).last_hidden_state.flatten(1))


def train_encoder(pictures: Pictures, config: StageConfig, folder: Path, device: str) -> ShapeReader:
    """Trains the hypernetwork's encoder to read every trait; it takes no part in scoring."""
    model = ShapeReader(len(TRAIT_LABELS) + sum(KIND_SIZES), config.seed + 2).to(device)
    continuous, kinds = trait_targets(pictures.identities)
    first = len(TRAIT_LABELS)

    def batch_of(step: int) -> Tensors:
        rows, _ = people_and_pictures(pictures, config, "encoder", step)
        return {"pixels": pictures.batch(rows), "traits": continuous[rows], "kinds": kinds[rows]}

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        logits = model(batch["pixels"]).float()
        # Cross-entropy towards a trait's value keeps a strong gradient where an absolute error stalls.
        traits = binary_cross_entropy_with_logits(logits[:, :first], batch["traits"])
        kind = grouped(logits[:, first:], batch["kinds"], KIND_SIZES)
        return {"loss": 4 * traits + kind, "traits": traits, "kinds": kind}

    fit("encoder", model, batch_of, loss_of, config, folder, device)
    return model
