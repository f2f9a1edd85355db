"""An adapter merged into the weights of a pipeline folder, for tools that cannot load adapters."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperdreambooth.files import InputError, open_tensors, whole_folder, write_json
from hyperdreambooth.shapes import Factors, canonical
from hyperdreambooth.sites import locate


@contextmanager
def merged_into(components: Mapping[str, nn.Module], factors: Factors) -> Generator[dict[str, Tensor]]:
    """Adds one identity's ΔW to the weights inside the `with` block, and restores them bit for bit after it.

    Yields site → its weight `(o, i)` with ΔW in it.
    """
    weights = _weights(components, factors)
    before = {site: weight.clone() for site, weight in weights.items()}
    try:
        for site, (down, up) in factors.items():
            if len(down) != 1:
                raise ValueError(f"a merged pipeline holds one identity, not {len(down)}")
            weight = weights[site]
            delta = (up[0].detach().float() @ down[0].detach().float()).to(weight.device)
            weight.copy_((weight.float() + delta.view(weight.shape)).to(weight.dtype))
        yield weights
    finally:
        for site, weight in before.items():
            weights[site].copy_(weight)


def save_merged(
    folder: Path,
    pipe: Any,
    components: Mapping[str, nn.Module],
    factors: Factors,
    about: Mapping[str, str] = {},
) -> None:
    """Writes a pipeline with one identity merged in, and compares every adapted weight with the file's.

    Args:
        folder: the new pipeline folder; on an error, none is left.
        pipe: the diffusers pipeline; its weights are restored afterwards.
        components: its adaptable parts.
        factors: down `(1, r, i)`, up `(1, o, r)`.
        about: what a pipeline has no place for (trigger, class word); written to `hyperdreambooth.json`.
    """
    with whole_folder(folder) as part, merged_into(components, factors) as weights:
        if bad := [site for site, weight in weights.items() if not weight.isfinite().all()]:
            limit = "the merged weight is too large for the base's number format; pass --dtype float32"
            raise InputError(f"{bad[0]}: {limit}")
        pipe.save_pretrained(part)
        write_json(part / "hyperdreambooth.json", about)
        for name in sorted({site.partition(".")[0] for site in factors}):
            _check(part / name, name, {site: w for site, w in weights.items() if site.startswith(f"{name}.")})


def _weights(components: Mapping[str, nn.Module], factors: Factors) -> dict[str, Tensor]:
    layers: dict[str, Any] = {
        site: component.get_submodule(path)
        for part, component in components.items()
        for site, path in locate(part, component).items()
    }
    if unknown := sorted(factors.keys() - layers.keys()):
        raise ValueError(f"the base has no layer {unknown[0]} ({len(unknown)} of {len(factors)} unknown)")
    return {site: layers[site].weight.data for site in factors}


def _check(folder: Path, component: str, weights: Mapping[str, Tensor]) -> None:
    missing = set(weights)
    for file in sorted(folder.glob("*.safetensors")):
        with open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                site = canonical(component, key.removesuffix(".weight"))
                if key.endswith(".weight") and site in missing:
                    missing.remove(site)
                    if not torch.equal(tensors.get_tensor(key), weights[site].cpu()):
                        raise RuntimeError(f"{file}: {site} was read back as another weight")
    if missing:
        raise RuntimeError(f"{folder}: {min(missing)} is in none of its files")
