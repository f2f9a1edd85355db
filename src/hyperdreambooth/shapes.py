"""The types that every folder shares: sites, factors, and array types with named axes.

The letters in docstrings and array types: `b` batch, `n` identities, `s` sites, `r` rank, `a` down_dim, `d`
up_dim, `i`/`o` in and out features of a site, `t` tokens, `c h w` image or latent, `P` the numbers of one
identity, `K` refinements. Within a signature a letter is always the same size; after an underscore it is only
a name. Tests check the array types (`tests/conftest.py`); otherwise they cost nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

_WRAPPERS = {"text_model", "base_layer", "_orig_mod", "module"}


@dataclass(frozen=True, order=True)
class Site:
    """One adapted layer with its canonical name, as `unet.mid_block.attentions.0…attn1.to_q`."""

    name: str
    in_features: int
    out_features: int

    @property
    def component(self) -> str:
        """The pipeline's component with the site: `unet`, `text_encoder`, …"""
        return self.name.split(".", 1)[0]


Numbers: TypeAlias = Float[Tensor, "n P"]
Features: TypeAlias = Float[Tensor, "b t c"]
Down: TypeAlias = Float[Tensor, "n r i"]
Up: TypeAlias = Float[Tensor, "n o r"]
Factors: TypeAlias = dict[str, tuple[Float[Tensor, "n _r _i"], Float[Tensor, "n _o _r"]]]
"""Site name → (down `(n, r, i)`, up `(n, o, r)`), with `ΔW[n] = up[n] @ down[n]` and no further scale."""


def canonical(component: str, path: str) -> str:
    """Returns a module's name, the same for every library version and wrapper.

    transformers 5.6 dropped `text_model.` from module paths, and compilation and DDP add prefixes. Seeds and
    file keys must not depend on that.
    """
    return ".".join([component, *(part for part in path.split(".") if part not in _WRAPPERS)])


def site_fingerprint(sites: Sequence[Site]) -> str:
    """Returns sixteen hex digits that change when a site is added, removed or resized."""
    lines = "\n".join(f"{s.name}:{s.in_features}:{s.out_features}" for s in sorted(sites))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def alike(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Returns the names of tensors of equal shape together, so that one kernel may serve all of them."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(tuple(tensor.shape), []).append(name)
    return list(groups.values())
