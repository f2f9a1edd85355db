"""`hdb inspect`: what an adapter file is, whether it fits a base, how far it is from another."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperdreambooth.apps.options import (
    BaseName,
    ConfigFile,
    Device,
    DryRun,
    HypernetName,
    Nothing,
    Sets,
    must_exist,
    resolve,
)

if TYPE_CHECKING:
    from hyperdreambooth.adapter import Adapter
    from hyperdreambooth.base.load import Base


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter file.")],
    against: Annotated[
        Path | None, typer.Option("--against", help="Another one to compare.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    base: BaseName = None,
    hypernet: HypernetName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """What an adapter file is, and if it fits.

    A base it does not fit is said, not an error; a damaged file is.
    """
    settings = resolve("inspect", Nothing, config, sets, base=base, device=device)
    if dry_run:
        return settings.show()
    must_exist(file, *([against] if against else []))
    from hyperdreambooth.adapter import summary
    from hyperdreambooth.apps import job
    from hyperdreambooth.lora.relax import inner_product

    frozen = job.load(settings.place)
    told, adapter = _open(file, frozen, hypernet)
    if adapter is not None:
        norms = {name: max(inner_product(pair, pair), 0.0) ** 0.5 for name, pair in adapter.factors.items()}
        told |= {**summary(adapter), "norms": norms}
        if against is not None:
            other = job.open_adapter(against, frozen, hypernet)
            told["against"] = {"file": str(against), **_compare(adapter, other)}
    if as_json:
        return typer.echo(json.dumps(_plain(told), indent=2, ensure_ascii=False))
    _tell(told)


def _open(file: Path, base: Base, hypernet: str | None) -> tuple[dict[str, Any], Adapter | None]:
    """What the file says of itself, and the adapter where it fits the base."""
    from hyperdreambooth.apps import job
    from hyperdreambooth.files import InputError, load_tensors
    from hyperdreambooth.lidb.file import lidb_header
    from hyperdreambooth.lora.formats.describe import describe

    header = lidb_header(file)
    if header is not None:
        load_tensors(file)
    told = {"format": "lidb", **header} if header is not None else describe(file)
    told = {"file": str(file), "bytes": file.stat().st_size, **told}
    here = f"{base.fingerprint} ({base.source})"
    if (made_for := told.get("base_fingerprint")) not in (None, "", base.fingerprint):
        return {**told, "fits": f"no: made for base {made_for}, this base is {here}"}, None
    try:
        return {**told, "fits": f"yes: base {here}"}, job.open_adapter(file, base, hypernet)
    except InputError as error:
        if header is not None:
            raise
        return {**told, "fits": f"no: {str(error).removeprefix(f'{file}: ')}; this base is {here}"}, None


def _plain(told: Any) -> Any:
    """The same with null for NaN and infinity, which JSON has not."""
    if isinstance(told, dict):
        return {name: _plain(value) for name, value in told.items()}
    return None if isinstance(told, float) and not math.isfinite(told) else told


def _compare(one: Adapter, other: Adapter) -> dict[str, Any]:
    """Cosine and relative distance of two ΔW over all sites, and the distance a site."""
    from hyperdreambooth.lora.relax import inner_product, relative_distance

    shared = sorted(one.factors.keys() & other.factors.keys())
    here, there = (
        sum(max(inner_product(pair, pair), 0.0) for pair in a.factors.values()) for a in (one, other)
    )
    both = sum(inner_product(one.factors[name], other.factors[name]) for name in shared)
    return {
        "cosine": both / max((here * there) ** 0.5, 1e-30),
        "relative_distance": max(here + there - 2 * both, 0.0) ** 0.5 / max(here**0.5, 1e-30),
        "shared_sites": len(shared),
        "distances": {name: relative_distance(one.factors[name], other.factors[name]) for name in shared},
    }


def _tell(told: Mapping[str, Any]) -> None:
    """Facts, a line each; then every site with its norm, and its distance from the other adapter."""
    facts = {key: value for key, value in told.items() if key not in ("norms", "against", "metadata")}
    against: Mapping[str, Any] = told.get("against", {})
    facts |= {f"against {key}": value for key, value in against.items() if key != "distances"}
    facts |= {f"  {key}": value for key, value in told.get("metadata", {}).items()}
    for key, value in facts.items():
        typer.echo(f"{key:26} {_said(value)[:120]}")
    distances: Mapping[str, float] = against.get("distances", {})
    for name, norm in told.get("norms", {}).items():
        apart = f"  {distances[name]:9.3g}" if name in distances else ""
        typer.echo(f"{norm:9.3g}{apart}  {name}")


def _said(value: Any) -> str:
    """A fact as people read it, on one line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return " ".join(str(value).split())
