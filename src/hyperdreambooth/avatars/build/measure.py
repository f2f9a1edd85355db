"""How good the world's judges and its encoder are, on people they never saw."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from hyperdreambooth.avatars.captions import ATTRIBUTES
from hyperdreambooth.avatars.build.pictures import Pictures, attribute_targets, trait_targets
from hyperdreambooth.avatars.build.readers import ATTRIBUTE_LABELS, KIND_LABELS, TRAIT_LABELS, columns


@torch.no_grad()
def read(model: nn.Module, pictures: Pictures, device: str) -> Tensor:
    """The reader's numbers `(m, labels)` for all pictures."""
    parts = [model(pictures.batch(rows).to(device)) for rows in torch.arange(len(pictures)).split(64)]
    return torch.cat([getattr(part, "logits", part) for part in parts]).float().cpu()


def identity_figures(model: nn.Module, pictures: Pictures, device: str) -> dict[str, float]:
    """Cosine of pairs of one person and of two people, and the chance that the first is higher (AUC)."""
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
    """Share of right answers a caption group, their mean, and the mean error of the continuous traits."""
    logits, first = read(model, pictures, device), len(ATTRIBUTE_LABELS)
    named, groups = attribute_targets(pictures.contexts), columns(ATTRIBUTE_LABELS)
    right = {
        g: float((logits[:, groups[g]].argmax(1) == named[:, i]).float().mean())
        for i, g in enumerate(ATTRIBUTES)
    }
    off = (logits[:, first:].sigmoid() - trait_targets(pictures.identities)[0]).abs().mean()
    mean = sum(right.values()) / len(right)
    return {
        **{g: round(v, 4) for g, v in right.items()},
        "mean": round(mean, 4),
        "trait_error": round(float(off), 4),
    }


def encoder_figures(model: nn.Module, pictures: Pictures, device: str) -> dict[str, float]:
    """Mean error of continuous traits (0.25 is guessing) and share of right categorical ones."""
    logits, first = read(model, pictures, device), len(TRAIT_LABELS)
    continuous, kinds = trait_targets(pictures.identities)
    off = (logits[:, :first].sigmoid() - continuous).abs().mean()
    groups = columns(KIND_LABELS).values()
    right = [
        (logits[:, first:][:, cols].argmax(1) == kinds[:, g]).float().mean() for g, cols in enumerate(groups)
    ]
    return {"trait_error": round(float(off), 4), "kinds_right": round(float(torch.stack(right).mean()), 4)}
