"""`hdb serve`: the service, its keys, its people, and its workers."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Context, Option

from hyperdreambooth.apps.options import ConfigFile, DryRun, Sets

app = typer.Typer(no_args_is_help=False)
keys = typer.Typer(no_args_is_help=True)
people = typer.Typer(no_args_is_help=True)
app.add_typer(keys, name="keys", help="Make, list and revoke API keys.")
app.add_typer(people, name="people", help="List and delete the people of every key.")

_MISSING = "run pip install 'hyperdreambooth[serve]'"
_HELP_HOST = "The address to listen on; any but a loopback address needs API keys [127.0.0.1]."
_HELP_DATABASE = "postgresql+psycopg://USER:PASSWORD@HOST/NAME [a SQLite file in --data]."
Scopes = Annotated[list[str] | None, Option("--scope", help="people, images or metrics; repeatable [all].")]


@app.callback(invoke_without_command=True)
def serve(
    ctx: Context,
    data: Annotated[Path | None, Option(help="The folder of everything that is kept [hdb-serve].")] = None,
    database: Annotated[str | None, Option(envvar="HDB_DATABASE", help=_HELP_DATABASE)] = None,
    host: Annotated[str | None, Option(help=_HELP_HOST)] = None,
    port: Annotated[int | None, Option(help="The port [8000].")] = None,
    base: Annotated[str | None, Option(help="The base: a folder or a hub id [the avatars].")] = None,
    hypernet: Annotated[str | None, Option(help="The hypernetwork of that base.")] = None,
    device: Annotated[list[str] | None, Option(help="A worker runs on each; repeatable [auto].")] = None,
    batch: Annotated[int | None, Option(help="People trained side by side, at most [8].")] = None,
    config_file: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Serve people and pictures over HTTP: docs/serve.md. The options stand before every subcommand, too."""
    ServeConfig = _imported("config").ServeConfig
    from hyperdreambooth.config import load_config

    given = {"data": data, "database": database, "host": host, "port": port, "base": base}
    given |= {"hypernet": hypernet, "devices": device or None, "batch": batch}
    ctx.obj = load_config(ServeConfig, config_file, sets or [], **given)
    if dry_run:
        typer.echo(ctx.obj.model_dump_json(indent=2))
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        _imported("run").serve(ctx.obj)


@app.command()
def worker(ctx: Context) -> None:
    """Run a worker by itself, on the first --device, for a server with `--set devices=[]`."""
    _imported("run").check(ctx.obj.model_copy(update={"host": "127.0.0.1"}))
    name = _imported("tables").new_id("worker")
    _imported("worker").run_worker(ctx.obj, ctx.obj.devices[0] if ctx.obj.devices else "auto", name)


@keys.command()
def add(
    ctx: Context,
    name: Annotated[str, typer.Argument(help="A name by which to find it again.")],
    scopes: Scopes = None,
    per_minute: Annotated[int, Option(min=1, help="Requests a minute.")] = 600,
    quota: Annotated[int, Option(min=0, help="The people whom it may keep.")] = 1000,
) -> None:
    """Make a key and print it, once."""
    auth = _imported("auth")
    with _database(ctx).write() as session:
        key = auth.add_key(session, name, scopes or list(auth.SCOPES), per_minute, quota)
    typer.echo(f"key: {key}")
    typer.echo(f"webhook secret: {auth.webhook_secret(ctx.obj.data, key.split('_')[1])}")


@keys.command("list")
def show(ctx: Context) -> None:
    """List the keys."""
    with _database(ctx).read() as session:
        for key in _imported("auth").keys(session):
            state = "revoked" if key.revoked else f"{key.per_minute} a minute, {key.people} people"
            typer.echo(f"{key.id}  {key.name:20} {key.scopes:24} {state}")


@keys.command()
def revoke(ctx: Context, name: Annotated[str, typer.Argument(help="Its name or id.")]) -> None:
    """Revoke a key at once; its people stay until they are deleted."""
    with _database(ctx).write() as session:
        typer.echo(f"revoked {_imported('auth').revoke_key(session, name)}")


@people.command("list")
def show_people(ctx: Context) -> None:
    """List everybody, with the key of each: also those of revoked keys, and those made without a key."""
    with _database(ctx).read() as session:
        for person, key in _imported("delete").everybody(session):
            made = datetime.fromtimestamp(person.created, UTC)
            typer.echo(f"{person.id}  {made:%Y-%m-%d %H:%M} UTC  {person.consent:10} {key}")


@people.command("delete")
def delete_people(ctx: Context, ids: Annotated[list[str], typer.Argument(help="person_…")]) -> None:
    """Delete everything of people, whosever they are; the service may be running."""
    from hyperdreambooth.files import InputError

    database, store = _database(ctx), _imported("store").Store(ctx.obj.data)
    for one in ids:
        removed = _imported("delete").delete_person(database, store, one, None)
        if removed is None:
            raise InputError(f"person {one}: no such person; hdb serve people list shows all")
        rows, left = sum(removed["rows"].values()), sum(removed["left"].values())
        typer.echo(f"deleted {one}: {len(removed['files'])} files, {rows} rows; left: {left}")


def _database(ctx: Context) -> Any:
    """Returns the database, whose tables are made where there are none."""
    _imported("store").Store(ctx.obj.data)
    database = _imported("database").Database(ctx.obj.url)
    database.migrate()
    return database


def _imported(module: str) -> Any:
    """Returns a module of the service, or says what is not installed."""
    from importlib import import_module

    from hyperdreambooth.files import InputError

    try:
        return import_module(f"hyperdreambooth.serve.{module}")
    except ModuleNotFoundError as error:
        raise InputError(f"serve: {error.name} is not installed; {_MISSING}") from None
