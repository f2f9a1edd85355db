"""Which layers an adapter can change, by canonical name, and which of them a base adapts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hyperdreambooth.files import InputError
from hyperdreambooth.shapes import Site, canonical

# q, k, v and output of every attention, joint attention's second stream included (paper, section 4.1)
ATTENTION = r"attn.*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|(q|k|v|out)_proj)$"


def find_sites(
    components: Mapping[str, nn.Module], pattern: str, add: str | None = None, skip: str | None = None
) -> tuple[Site, ...]:
    """Returns the sites of a base, sorted by name: its family's pattern, unless a config says otherwise.

    The config's regular expressions add further linear layers, such as `ff\\.net`, and skip some, such as
    `^text_encoder`.
    """
    linears = linear_sites(components)
    wanted = {site for site in linears if re.search(pattern, site.name)}
    wanted.update(_matching("add_sites", add, linears))
    left = wanted.difference(_matching("skip_sites", skip, sorted(wanted)))
    if not left:
        raise InputError(f"skip_sites: {skip!r} leaves no site; use a narrower pattern")
    return tuple(sorted(left))


def wearable(components: Mapping[str, nn.Module], kind: type[nn.Module] = nn.Module) -> tuple[Site, ...]:
    """Returns every layer of a kind that a LoRA can change, sorted by name: linear ones and convolutions.

    Other people's LoRAs change more than the attention projections that ours do. A convolution counts as a
    linear layer of its patches, with `i·k·k` inputs.
    """
    found = (
        Site(canonical(part, path), *_features(layer))
        for part, component in components.items()
        for path, layer in _layers(component)
        if isinstance(layer, kind)
    )
    return tuple(sorted(found))


def _features(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Returns the inputs and outputs of a layer; a quantised weight has another shape."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.weight[0].numel(), layer.weight.shape[0]


def quantized(weight: Tensor) -> bool:
    """Returns whether a weight is stored in 8 or 4 bits, by torchao or bitsandbytes."""
    return hasattr(weight, "quant_state") or type(weight).__module__.startswith("torchao.")


def full_weight(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Returns the weight of a layer as plain numbers, which a quantised one only approximates."""
    if not quantized(layer.weight):
        return layer.weight
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer)


def linear_sites(components: Mapping[str, nn.Module]) -> tuple[Site, ...]:
    """Returns the sites that can be trained: a convolution wears one identity only, without gradients."""
    return wearable(components, nn.Linear)


def locate(part: str, component: nn.Module) -> dict[str, str]:
    """Maps the name of every layer that a LoRA can change to its path in the component."""
    return {canonical(part, path): path for path, _ in _layers(component)}


def weight_of(components: Mapping[str, nn.Module]) -> Callable[[str], Tensor]:
    """Returns what gives a layer's weight, `(o, i)` or `(o, i, k, k)`, by its name, without what is worn."""
    layers: dict[str, nn.Linear | nn.Conv2d] = {}

    def weight(site: str) -> Tensor:
        if not layers:  # few adapters ask, and looking through all modules takes a while
            for part, component in components.items():
                layers.update((canonical(part, path), layer) for path, layer in _layers(component))
        return full_weight(layers[site])

    return weight


def _layers(component: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yields path and layer. PEFT's wrappers have a `base_layer`: it counts, their factors do not."""
    wrapper = ""
    for path, module in component.named_modules():
        if wrapper and path.startswith(wrapper):
            continue
        layer: Any = module
        while hasattr(layer, "base_layer"):
            wrapper, layer = f"{path}.", layer.base_layer
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            yield path, layer


def _matching(field: str, pattern: str | None, sites: Sequence[Site]) -> list[Site]:
    """Returns the sites that a pattern of the config matches."""
    if not pattern:
        return []
    try:
        found = [site for site in sites if re.search(pattern, site.name)]
    except re.error as error:
        raise InputError(f"{field}: {pattern!r} is not a regular expression ({error}); correct it") from None
    if not found:
        raise InputError(f"{field}: {pattern!r} matches no layer; names look like {sites[0].name}")
    return found
