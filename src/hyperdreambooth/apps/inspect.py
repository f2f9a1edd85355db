"""`hdb inspect`: what an adapter file is, whether it fits a base, and how far it is from another."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, echo

from hyperdreambooth.apps import checks
from hyperdreambooth.apps.checks import Check
from hyperdreambooth.apps.options import HypernetName, command

if TYPE_CHECKING:
    from hyperdreambooth.adapter import Adapter
    from hyperdreambooth.apps.settings import Job, NoConfig
    from hyperdreambooth.base.load import Base


@command("hyperdreambooth.apps.settings:NoConfig")
def inspect(
    job: Job[NoConfig],
    file: Annotated[Path, Argument(help="An adapter file."), Check(checks.adapters)],
    against: Annotated[
        Path | None, Option(help="Another adapter file to compare it with."), Check(checks.adapters)
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
    hypernet: HypernetName = None,
) -> None:
    """Show what an adapter file is, what each tool loads of it, and whether it fits a base.

    A LoRA needs no base for that; --base also checks whether it fits that base, and shows ΔW at each of its
    sites. A file that does not fit is reported; only a damaged file is an error.
    """
    from hyperdreambooth.lidb.file import lidb_header

    if job.base.base is None and against is None and lidb_header(file) is None:
        entries = _described(file) | {"fits": "not checked; name a base with --base"}
    else:
        entries = _on_base(job, file, against, hypernet)
    if as_json:
        finite = json.loads(json.dumps(entries), parse_constant=lambda _: None)  # JSON has no NaN
        return echo(json.dumps(finite, indent=2, ensure_ascii=False))
    _print(entries)


def _described(file: Path) -> dict[str, Any]:
    """Returns what a LoRA file says by itself."""
    from hyperdreambooth.lora.formats.describe import describe

    return {"file": str(file), "bytes": file.stat().st_size, **describe(file)}


def _on_base(job: Job[NoConfig], file: Path, against: Path | None, hypernet: str | None) -> dict[str, Any]:
    """Returns what a file is on a base, and how far it is from another file."""
    from hyperdreambooth.apps.loading import load, open_adapter
    from hyperdreambooth.lora.relax import norm

    base = load(job.base)
    entries, adapter = _open(file, base, hypernet)
    if adapter is None:
        return entries
    norms = {name: norm(pair) for name, pair in adapter.factors.items()}
    entries |= {**summary(adapter), "norms": norms}
    if against is not None:
        other = open_adapter(against, base, hypernet)
        entries["against"] = {"file": str(against), **_compare(adapter, other)}
    return entries


def summary(adapter: Adapter) -> dict[str, Any]:
    """What `hdb inspect` shows: kind, rank, trigger, base, and the norm of ΔW in each component."""
    from hyperdreambooth.lora.relax import norm

    norms: defaultdict[str, list[float]] = defaultdict(list)
    for name, pair in adapter.factors.items():
        norms[name.split(".")[0]].append(norm(pair))
    lidb = adapter.lidb
    held = [lidb.numbers] if lidb else [factor for pair in adapter.factors.values() for factor in pair]
    entries: dict[str, Any] = {
        "kind": adapter.kind, "rank": adapter.rank, "trigger": adapter.trigger,
        "resolution": adapter.resolution, "numbers": sum(tensor.numel() for tensor in held),
        "base_fingerprint": adapter.base_fingerprint, "base_source": adapter.base_source,
        "sites": dict(Counter(name.split(".")[0] for name in adapter.factors)),
        "delta_norm": {part: math.hypot(*own) for part, own in norms.items()},
    }  # fmt: skip
    if lidb:
        entries |= {
            "basis": lidb.basis_source,
            "down_dim": lidb.layout.down_dim,
            "up_dim": lidb.layout.up_dim,
        }
    return entries


def _open(file: Path, base: Base, hypernet: str | None) -> tuple[dict[str, Any], Adapter | None]:
    """Returns the metadata of the file, and the adapter if it fits the base."""
    from hyperdreambooth.apps.loading import open_adapter
    from hyperdreambooth.files import InputError, load_tensors
    from hyperdreambooth.lidb.file import lidb_header

    header = lidb_header(file)
    if header is None:
        entries = _described(file)
    else:
        load_tensors(file)
        entries = {"file": str(file), "bytes": file.stat().st_size, "format": "lidb", **header}
    here = f"{base.fingerprint} ({base.source})"
    made_for = entries.get("base_fingerprint")
    other = made_for not in (None, "", base.fingerprint)
    if other and header is not None:
        return {**entries, "fits": f"no: made for base {made_for}, this base is {here}"}, None
    warning = f", but made for base {made_for}: the person may look different" if other else ""
    try:
        return {**entries, "fits": f"yes: base {here}{warning}"}, open_adapter(file, base, hypernet)
    except InputError as error:
        if header is not None:
            raise
        entries.pop("norms")  # of the file's layers, which are no sites of this base
        return {**entries, "fits": f"no: {str(error).removeprefix(f'{file}: ')}; this base is {here}"}, None


def _compare(one: Adapter, other: Adapter) -> dict[str, Any]:
    """Returns the cosine and relative distance of two ΔW over all sites, and the distance at each site."""
    from hyperdreambooth.lora.relax import inner_product, norm, relative_distance

    shared = sorted(one.factors.keys() & other.factors.keys())
    here, there = (math.hypot(*map(norm, adapter.factors.values())) for adapter in (one, other))
    both = sum(inner_product(one.factors[name], other.factors[name]) for name in shared)
    return {
        "cosine": both / max(here * there, 1e-30),
        "relative_distance": max(here**2 + there**2 - 2 * both, 0.0) ** 0.5 / max(here, 1e-30),
        "shared_sites": len(shared),
        "distances": {name: relative_distance(one.factors[name], other.factors[name]) for name in shared},
    }


def _print(entries: Mapping[str, Any]) -> None:
    """Prints the entries, what tools load, the file's metadata, and every site with norm and distance."""
    against: dict[str, Any] = dict(entries.get("against", {}))
    distances = against.pop("distances", {})
    apart = ("norms", "against", "metadata", "tools", "warnings")
    lines = {key: value for key, value in entries.items() if key not in apart}
    lines |= {f"against {key}": value for key, value in against.items()}
    for key, value in lines.items():
        echo(f"{key.replace('_', ' '):26} {_text(value)[:120]}")
    for warning in entries.get("warnings", ()):
        echo(f"{'warning':26} {_text(warning)}")
    if tools := entries.get("tools"):
        echo("\nwhat tools load: layers, and the factor of ΔW at weight 1")
        for tool, reading in tools.items():
            echo(f"  {tool:24} {_text(reading['text'])[:120]}")
    if metadata := entries.get("metadata"):
        echo("\nmetadata of the file")
        for key, value in sorted(metadata.items()):
            echo(f"  {_text(key):32} {_text(value)[:120]}")
    if norms := entries.get("norms"):
        echo(f"\n{'norm':>9}  {'distance  ' if distances else ''}{'site' if 'sites' in entries else 'layer'}")
        for name, norm in norms.items():
            distance = f"{distances.get(name, math.nan):8.3g}  " if distances else ""
            echo(f"{norm:9.3g}  {distance}{_text(name)}")


def _text(value: Any) -> str:
    """Formats an entry on one line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    text = " ".join(str(value).split())
    # a stranger's file must not send commands to the terminal
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
