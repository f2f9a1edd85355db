"""How far a photo is from those that a hypernetwork was trained on.

The encoder's last layer was trained to ignore what a photo looks like; its early hidden states were not. So a
photo is described by the mean and the standard deviation of every channel of three early states
(`Encoder.texture`). A mixture of Gaussians describes the photos of the training: one Gaussian would have to
cover photographs and pencil sketches at once. The distance is that to the nearest Gaussian (Mahalanobis).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from hyperdreambooth.files import InputError, load_tensors, save_tensors
from hyperdreambooth.runs import rng

FILE = "familiar.safetensors"
FEWEST = 256  # photos; fewer do not say what is usual
_AXES, _GAUSSIANS, _ROUNDS = 64, 8, 20
_PER_AXIS, _PER_GAUSSIAN = 16, 1000  # photos
_LIMIT = 0.99  # the share of photos of other people that are nearer than the limit


@dataclass(frozen=True)
class Familiar:
    """A mixture of Gaussians over the textures `(c,)` of photos, along their `k` main axes.

    Attributes:
        centre: the mean texture, `(c,)`.
        axes: texture → coordinates of variance 1, `(c, k)`; each channel is divided by its own spread.
        back: coordinates → texture in units of the spread, `(k, c)`.
        spread: the standard deviation of every channel, `(c,)`.
        rest: the mean square of what the axes leave out, `()`.
        means: of the Gaussians, `(g, k)`.
        whiten: coordinates → standard deviations of each Gaussian, `(g, k, k)`.
        limit: the squared distance that counts as 1, `()`.
    """

    centre: Tensor
    axes: Tensor
    back: Tensor
    spread: Tensor
    rest: Tensor
    means: Tensor
    whiten: Tensor
    limit: Tensor

    def distance(self, textures: Tensor) -> Tensor:
        """Returns the distances `(b,)` of textures `(b, c)`; 1 is the limit of what is familiar."""
        scaled = (textures.float().cpu() - self.centre) / self.spread
        places = scaled @ self.axes
        left = (scaled - places @ self.back).square().sum(1) / self.rest
        return ((_squares(places, self.means, self.whiten).amin(1) + left) / self.limit).sqrt()

    def save(self, folder: Path) -> None:
        """Writes the numbers into a hypernetwork's folder, the matrices as float16."""
        large = ("axes", "back", "whiten")
        halved = {name: t.half() if name in large else t for name, t in asdict(self).items()}
        save_tensors(folder / FILE, {name: tensor.contiguous() for name, tensor in halved.items()})


def load_familiar(folder: Path) -> Familiar | None:
    """Reads the numbers of a hypernetwork's folder; None where there are none."""
    if not (folder / FILE).is_file():
        return None
    tensors, _ = load_tensors(folder / FILE)
    if tensors.keys() != (names := {field.name for field in fields(Familiar)}):
        raise InputError(
            f"{folder / FILE}: expected {', '.join(sorted(names))}, got {', '.join(sorted(tensors))}; "
            "delete it"
        )
    return Familiar(**{name: tensor.float() for name, tensor in tensors.items()})


def familiar_of(textures: Tensor, others: Tensor) -> Familiar | None:
    """Describes textures `(m, c)`; `others` `(h, c)`, of other people, set the limit. None for too few."""
    if len(textures) < FEWEST or not len(others):
        return None
    textures, others = textures.double(), others.double()
    centre, spread = textures.mean(0), textures.std(0).clamp_min(1e-6)
    scaled = (textures - centre) / spread
    values, vectors = torch.linalg.eigh(scaled.T @ scaled / len(scaled))
    kept = min(_AXES, len(textures) // _PER_AXIS, int((values > 1e-6).sum()))
    values, vectors = values[-kept:], vectors[:, -kept:]
    places = scaled @ vectors / values.sqrt()
    left = (scaled - scaled @ vectors @ vectors.T).square().sum(1)
    # at least 1e-3, as rounding to float16 leaves about 1e-5 besides the axes
    rest = (left.mean() / max(len(centre) - kept, 1)).clamp_min(1e-3)
    means, whiten = _mixture(places, min(_GAUSSIANS, 1 + len(textures) // _PER_GAUSSIAN))
    axes, back = vectors / values.sqrt(), values.sqrt()[:, None] * vectors.T
    parts = (centre, axes, back, spread, rest, means, whiten, torch.ones(()))
    made = Familiar(*(part.float() for part in parts))
    limit = made.distance(others).square().quantile(_LIMIT)
    return Familiar(**{**asdict(made), "limit": limit})


def _mixture(places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns means `(g, k)` and whitening matrices `(g, k, k)`; a place has one Gaussian, the likeliest."""
    chosen = torch.randperm(len(places), generator=rng("familiar"))[:count]
    nearest = torch.cdist(places, places[chosen]).argmin(1)
    means, whiten, sizes = _gaussians(places, nearest)
    for _ in range(_ROUNDS):
        # −2 log (share · density), but for a constant
        rarity = -2 * (sizes.log() + whiten.diagonal(dim1=1, dim2=2).log().sum(1))
        nearest = (_squares(places, means, whiten) + rarity).argmin(1)
        means, whiten, sizes = _gaussians(places, nearest)
    return means, whiten


def _gaussians(places: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean, whitening matrix and size of each group; small ones lean towards the whole's spread."""
    width = places.shape[1]
    whole = torch.eye(width, dtype=places.dtype)
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    for group in nearest.unique():
        own = places[nearest == group]
        lean = width / (width + len(own))
        own_spread = own.T.cov(correction=0).reshape(width, width)
        covariance = (1 - lean) * own_spread + lean * whole
        whiten = torch.linalg.cholesky(torch.linalg.inv(covariance))
        made.append((own.mean(0), whiten, torch.tensor(len(own)).double()))
    means, whitens, sizes = zip(*made, strict=True)
    return torch.stack(means), torch.stack(whitens), torch.stack(sizes)


def _squares(places: Tensor, means: Tensor, whiten: Tensor) -> Tensor:
    """Returns the squared distances `(b, g)` of places `(b, k)` from every Gaussian."""
    return torch.stack([((places - m) @ w).square().sum(1) for m, w in zip(means, whiten, strict=True)], 1)
