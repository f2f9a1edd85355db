"""The linear layers that an adapter changes: the attention projections, plus or minus what a config says."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from hyperdreambooth.files import InputError
from hyperdreambooth.shapes import Site, canonical

# q, k, v and output of every attention, also of joint attention's second stream (paper, section 4.1)
_ATTENTION = r"attn.*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|(q|k|v|out)_proj)$"


def find_sites(
    components: Mapping[str, nn.Module], add: str | None = None, skip: str | None = None
) -> tuple[Site, ...]:
    """Returns the sites of a base, sorted by name.

    Args:
        components: the networks that may wear an adapter.
        add: a pattern of further linear layers by canonical name, such as `ff\\.net`.
        skip: a pattern of sites to leave out, such as `^text_encoder`.

    Raises:
        InputError: a pattern is no regular expression, matches nothing, or leaves no site.
    """
    linears = [
        Site(canonical(part, path), layer.in_features, layer.out_features)
        for part, module in components.items()
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    wanted = {site for site in linears if re.search(_ATTENTION, site.name)} | set(
        _matching("add_sites", add, linears)
    )
    left = wanted - set(_matching("skip_sites", skip, sorted(wanted)))
    if not left:
        raise InputError(f"skip_sites: expected to leave a site, but {skip!r} matches all; make it narrower")
    return tuple(sorted(left))


def _matching(field: str, pattern: str | None, sites: list[Site]) -> list[Site]:
    """Returns the sites that a pattern of the config matches."""
    if not pattern:
        return []
    try:
        found = [site for site in sites if re.search(pattern, site.name)]
    except re.error as error:
        raise InputError(
            f"{field}: expected a regular expression, got {pattern!r} ({error}); correct it"
        ) from None
    if not found:
        raise InputError(f"{field}: {pattern!r} matches no layer such as {sites[0].name}; correct it")
    return found
