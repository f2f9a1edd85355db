"""The quality of the world's scorers and encoder, measured on people that they were not trained on."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from hyperdreambooth.avatars.build.pictures import Pictures, attribute_targets, trait_targets
from hyperdreambooth.avatars.build.readers import ATTRIBUTE_LABELS, ATTRIBUTE_SIZES, KIND_SIZES, TRAIT_LABELS
from hyperdreambooth.avatars.draw.people import ATTRIBUTES


@torch.no_grad()
def read(model: nn.Module, pictures: Pictures, device: str) -> Tensor:
    """Returns the reader's logits `(m, labels)` for all pictures."""
    parts = [model(pictures.batch(rows).to(device)) for rows in torch.arange(len(pictures)).split(64)]
    return torch.cat([getattr(part, "logits", part) for part in parts]).float().cpu()


def identity_figures(model: nn.Module, pictures: Pictures, device: str) -> dict[str, float]:
    """Measures the mean cosine of pairs of one person and of two people, and the AUC between the two."""
    unit = normalize(read(model, pictures, device))
    people = torch.arange(len(pictures)) // pictures.each
    upper = torch.triu(torch.ones(len(unit), len(unit), dtype=torch.bool), diagonal=1)
    cosine, same = unit @ unit.T, people[:, None] == people[None]
    pairs, strangers = cosine[upper & same], cosine[upper & ~same]
    ranks = torch.searchsorted(strangers.sort().values, pairs).double() / len(strangers)
    return {
        "auc": round(float(ranks.mean()), 4),
        "same": round(float(pairs.mean()), 4),
        "stranger": round(float(strangers.mean()), 4),
    }


def attribute_figures(model: nn.Module, pictures: Pictures, device: str) -> dict[str, float]:
    """Measures the accuracy in each caption group, its mean, and the mean error of the continuous traits."""
    logits, first = read(model, pictures, device), len(ATTRIBUTE_LABELS)
    right = _accuracies(logits[:, :first], attribute_targets(pictures.contexts), ATTRIBUTE_SIZES)
    off = (logits[:, first:].sigmoid() - trait_targets(pictures.identities)[0]).abs().mean()
    figures = {**dict(zip(ATTRIBUTES, right, strict=True)), "mean": fmean(right), "trait_error": float(off)}
    return {name: round(value, 4) for name, value in figures.items()}


def encoder_figures(model: nn.Module, pictures: Pictures, device: str) -> dict[str, float]:
    """Measures the mean error of continuous traits (0.25 for a guess) and the accuracy of the others."""
    logits, first = read(model, pictures, device), len(TRAIT_LABELS)
    continuous, kinds = trait_targets(pictures.identities)
    off = (logits[:, :first].sigmoid() - continuous).abs().mean()
    right = _accuracies(logits[:, first:], kinds, KIND_SIZES)
    return {"trait_error": round(float(off), 4), "kinds_right": round(fmean(right), 4)}


def _accuracies(logits: Tensor, targets: Tensor, sizes: list[int]) -> list[float]:
    """Returns the accuracy in each group of labels; logits `(m, sum(sizes))`, targets `(m, groups)`."""
    groups = enumerate(logits.split(sizes, dim=1))
    return [float((group.argmax(1) == targets[:, g]).float().mean()) for g, group in groups]
