"""The hypernetwork: image features → LiDB numbers, a token for each site, refined K times (paper, 4.2).

`θ_0 = 0`, `θ_k = θ_{k-1} + T(f, θ_{k-1})`, numbers = mean + spread · θ_K. Mean and spread of every site come
from a bank if there is one, so that `θ` is of order one at every site (training.md 2). Every site has its own
input and output projection of its own width. Padded to the widest site, each is one einsum instead of a loop.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from hyperdreambooth.lidb.basis import Basis, basis_fingerprint
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.shapes import Features

HEAD_START = 1e-3  # training.md 3: a zero head on top of zero factors would never get a gradient


@dataclass(frozen=True)
class NetworkShape:
    """The size of the network: `t` and `c` of the image features, the decoder's channels, …, and `K`."""

    tokens: int
    channels: int
    width: int
    layers: int
    heads: int
    refinements: int


class HyperNetwork(nn.Module):
    """Features `(b, t, c)` → numbers `(b, P)`.

    The aux bases are copied: parameters if they are learned (the published "pro" variant), or constants. The
    seed is that of the initial weights; the global random state stays as it is.
    """

    def __init__(
        self, layout: Layout, shape: NetworkShape, basis: Basis, learn_basis: bool = False, seed: int = 0
    ) -> None:  # fmt: skip
        super().__init__()
        self.layout, self.shape, self.learn_basis = layout, shape, learn_basis
        self.mean, self.spread = nn.Buffer(torch.zeros(layout.size)), nn.Buffer(torch.ones(layout.size))
        self.feature_mean = nn.Buffer(torch.zeros(shape.channels))
        self.feature_std = nn.Buffer(torch.ones(shape.channels))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._add_decoder(shape, len(layout.sites), max(layout.sizes))
        # the number's index at each place of the padded rows `(s, widest)`, and the inverse `(P,)`; padding
        # has the index after the last number, where a zero is appended
        rows = list(torch.arange(layout.size).split(layout.sizes))
        pack = pad_sequence(rows, batch_first=True, padding_value=layout.size)
        self._pack = nn.Buffer(pack, persistent=False)
        places = [k * pack.shape[1] + torch.arange(size) for k, size in enumerate(layout.sizes)]
        self._unpack = nn.Buffer(torch.cat(places), persistent=False)
        self._add_basis(basis)

    def _add_decoder(self, shape: NetworkShape, sites: int, widest: int) -> None:
        """Adds the projections of features and of θ, the embeddings of positions and sites, and the heads."""
        width = shape.width
        self.see = nn.Linear(shape.channels, width)
        self.position = nn.Parameter(torch.randn(shape.tokens, width) * 0.02)
        self.overall = nn.Linear(shape.channels, width)
        self.site = nn.Parameter(torch.randn(sites, width))
        self.believe = nn.Parameter(torch.randn(sites, widest, width) * widest**-0.5)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, shape.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(shape.layers)
        )
        self.seen_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Parameter(torch.randn(sites, width, widest) * HEAD_START)
        self.head_bias = nn.Parameter(torch.zeros(sites, widest))

    def _add_basis(self, basis: Basis) -> None:
        """Adds the bases of all sites in order: parameters, or constants that are not in checkpoints."""
        self._source = basis.source
        for side, matrices in (("down", basis.down), ("up", basis.up)):
            for k, site in enumerate(self.layout.sites):
                matrix = matrices[site.name].detach().clone()
                made = nn.Parameter(matrix) if self.learn_basis else nn.Buffer(matrix, persistent=False)
                setattr(self, f"basis_{side}_{k}", made)

    def basis(self) -> Basis:
        """Returns the current aux bases; they get gradients if they are learned."""
        sites = list(enumerate(self.layout.sites))
        down: dict[str, Tensor] = {site.name: getattr(self, f"basis_down_{k}") for k, site in sites}
        return Basis(self._source, down, {site.name: getattr(self, f"basis_up_{k}") for k, site in sites})

    @torch.no_grad()
    def named_basis(self) -> Basis:
        """Returns a copy of the bases with their source in files, `seed:N` or `hypernet:FINGERPRINT`."""
        now = self.basis()
        source = f"hypernet:{basis_fingerprint(now)}" if self.learn_basis else now.source
        return replace(now.mapped(lambda matrix: matrix.detach().clone()), source=source)

    @torch.no_grad()
    def normalise(self, mean: Float[Tensor, " P"], spread: Float[Tensor, " P"], features: Features) -> None:
        """Sets mean and spread of the output, `(P,)`, and those of the input by features `(m, t, c)`."""
        self.mean.copy_(mean)
        self.spread.copy_(spread)
        self.feature_mean.copy_(features.mean(dim=(0, 1), dtype=torch.float32))
        centre, square = self.feature_mean.cpu(), torch.zeros(self.shape.channels)
        for part in features.split(512):  # in parts, as all features in float32 may not fit into memory
            square += (part.float() - centre).square().sum((0, 1))
        self.feature_std.copy_((square / features[..., 0].numel()).sqrt().clamp_min(1e-4))

    # θ_0 = 0; θ_k = θ_{k-1} + T(f, θ_{k-1}), k = 1..K   (paper, section 4.2)
    def forward(self, features: Features) -> Float[Tensor, "b P"]:
        """Returns the numbers `(b, P)`, float32, of features `(b, t, c)`."""
        clean = (features - self.feature_mean) / self.feature_std
        seen = self.seen_norm(self.see(clean) + self.position)
        overall = self.overall(clean.mean(1))[:, None]
        theta = torch.zeros(len(features), self.layout.size, device=features.device)
        # fused attention on CPUs has a slow backward, which took 60 % of this network's time (docs/LOG.md)
        with sdpa_kernel(SDPBackend.MATH) if features.device.type == "cpu" else nullcontext():
            for _ in range(self.shape.refinements):
                theta = theta + self._delta(seen, overall, theta)
        return self.mean + self.spread * theta.float()

    def _delta(
        self, seen: Float[Tensor, "b t w"], overall: Float[Tensor, "b 1 w"], theta: Float[Tensor, "b P"]
    ) -> Float[Tensor, "b P"]:
        """Returns `T(f, θ)`, one pass of the decoder, float32.

        Differs from the paper: the mean of the features, `overall`, is added to every token, so that every
        site sees the photo before it has learned to attend.
        """
        padded = torch.cat([theta, theta.new_zeros(len(theta), 1)], dim=1)[:, self._pack]
        tokens = self.site + torch.einsum("bsp,spw->bsw", padded, self.believe) + overall
        for block in self.blocks:
            tokens = block(tokens, seen)
        wide = torch.einsum("bsw,swp->bsp", self.norm(tokens), self.head) + self.head_bias
        return wide.flatten(1)[:, self._unpack].float()
