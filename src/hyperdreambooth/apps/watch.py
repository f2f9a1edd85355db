"""The command that shows how a run is getting on, from its events alone."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, echo

from hyperdreambooth.apps.checks import Check, run_events
from hyperdreambooth.apps.options import named_store
from hyperdreambooth.storage import Store

if TYPE_CHECKING:
    from hyperdreambooth.events import Status

_EVERY = 1.0  # seconds between two looks


def watch(
    run: Annotated[
        Store,
        Argument(help="What the run writes to: its --out.", parser=named_store),
        Check(run_events),
    ],
) -> None:
    """Show what a run does, how fast, and when it will end.

    On a terminal the page renews itself until the run ends. A run that was killed is called so, and the exit
    code is 1 for every run that did not finish. Of shards it shows which have finished.
    """
    from rich.console import Console
    from rich.live import Live

    from hyperdreambooth.events import GOING, read_events, status_of

    run_events(run)
    file = events_file(run)
    shards = shard_rows(run.here)
    if not file.is_file():
        _print(shards)
        return
    console = Console()

    def look() -> Status | None:
        return status_of(read_events(file), time.time())

    status = look()
    if console.is_terminal:
        with Live(page(status), console=console, refresh_per_second=4) as live:
            while status is None or status.state in GOING or status.state.startswith("silent"):
                time.sleep(_EVERY)
                status = look()
                live.update(page(status))
    else:
        _print(rows(status))
    _print(shards)
    if status is not None and status.state not in ("finished", *GOING):
        raise Exit(1)


def _print(lines: Iterable[tuple[str, str]]) -> None:
    for name, value in lines:
        echo(f"{name:12} {value}")


def shard_rows(out: Path) -> list[tuple[str, str]]:
    """Returns what the shards that write to a folder have recorded, line by line; nothing after their merge.

    A shard records what it did at its end, so what it does meanwhile is known to whoever started it alone.
    """
    from hyperdreambooth.cluster.shards import finished_shards

    found: list[tuple[str, str]] = []
    for count, units in finished_shards(out).items():
        left = [f"{k}/{count}" for k in range(count) if k not in units]
        named = ", ".join(left[:10]) + (", …" if len(left) > 10 else "")
        advice = f"not finished: {named}; their own logs say more" if left else "now run --shard merge"
        found.append(("shards", f"{len(units)} of {count} finished, {sum(units.values()):,} units; {advice}"))
    return found


def events_file(run: Store) -> Path:
    """Returns the events of a run: in its folder, or in `run/` of a hypernetwork's."""
    inside = run.here / "run" / "events.jsonl"
    return inside if inside.is_file() else run.here / "events.jsonl"


def rows(status: Status | None) -> list[tuple[str, str]]:
    """Returns what is shown, line by line."""
    if status is None:
        return [("state", "not started")]
    total = "" if status.total is None else f" of {status.total:,}"
    share = f", {status.done / status.total:.0%}" if status.total else ""
    found = [
        ("run", f"{status.title} on {status.place}"),
        ("state", status.state),
        ("done", f"{status.done:,}{total}{share}"),
    ]
    if status.rate > 0:
        speed = f"{status.rate:.3g} a second" if status.rate >= 0.1 else f"{status.rate * 3600:.3g} an hour"
        found.append(("speed", speed))
    if status.left is not None:
        end = datetime.now() + timedelta(seconds=status.left)
        found.append(("ends", f"in {duration(status.left)}, at {end:%a %H:%M}"))
    if status.values:
        found.append(("figures", status.values))
    if status.checkpoint is not None:
        found.append(("checkpoint", f"step {status.checkpoint:,}"))
    if status.units:
        found.append(("units", f"{status.units:,} since the last start"))
    if status.lost:
        found.append(("lost", f"{len(status.lost)}, the last one: {status.lost[-1]}"))
    if status.starts > 1:
        found.append(("started", f"{status.starts} times"))
    return [*found, ("last word", f"{duration(status.silent)} ago")]


def duration(seconds: float) -> str:
    """Returns seconds in the two largest units, such as `2 h 5 min`."""
    whole = round(seconds)
    for unit, size, lower, step in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // step} {lower}"
    return f"{whole} s"


def page(status: Status | None) -> Any:
    """Returns a table with a bar for a terminal."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in rows(status):
        bad = name == "lost" or (name == "state" and value not in ("running", "finished"))
        table.add_row(Text(name, style="bold"), Text(value, style="red" if bad else ""))
    if status is None or not status.total:
        return table
    return Group(table, ProgressBar(status.total, status.done, width=60))
