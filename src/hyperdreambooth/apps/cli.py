"""`hdb`: the commands, and what a user sees when something is wrong.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. Errors are one line. Torch and everything heavy is
imported inside the command functions, so `hdb --help` answers at once.
"""

from __future__ import annotations

import errno
import logging
import re
import signal
import warnings
from typing import Annotated, Any

import typer
import typer.core

from hyperdreambooth.apps import (
    adapters,
    avatars,
    doctor,
    evaluate,
    inference,
    inspect,
    plan,
    prepare,
    serve,
    training,
    ui,
    watch,
)
from hyperdreambooth.files import DiskFull, InputError

UsageError: Any = typer.BadParameter.__base__  # typer carries its own click from 0.29 on
_interrupts: list[int] = []  # signals that came: an import may turn a KeyboardInterrupt into any error


def explain(error: Any) -> tuple[str, int] | None:
    """Returns one line and an exit code for an error of the user or the machine; None for a bug."""
    if isinstance(error, UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "hdb"
        return f"error: {' '.join(error.format_message().split()).rstrip('.')}; see {command} --help", 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; run the same command again to continue from what was saved", 130
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        full = error.strerror if isinstance(error, DiskFull) else "the disk is full"
        return f"error: {full}; free some space and run the same command again", 1
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        return f"error: {' '.join(str(error).split())}", 1
    if any(kind.__module__.startswith("httpx") for kind in type(error).__mro__[:-1]):
        message = " ".join(str(error).split()) or type(error).__name__
        return f"error: the network failed: {message}; try again", 1
    if type(error).__name__ == "OutOfMemoryError":
        return "error: the device has too little memory; use a smaller batch, or --device cpu", 1
    from pydantic import ValidationError

    if isinstance(error, InputError):
        return f"error: {error}", 2
    if isinstance(error, ValidationError):
        mistakes = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return f"error: {'; '.join(mistakes)}", 2
    return None


def visible(line: str) -> str:
    """Replaces the hidden names under which files are written (files.py) by those that a user knows."""
    return re.sub(r"\.forms-\w+[/\\]|\.(?=[^/\\]+\.[0-9a-f]{12}\.tmp)|\.[0-9a-f]{12}\.tmp", "", line)


class OneLineErrors(typer.core.TyperGroup):
    """A group of commands whose errors are one line on standard error."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Reads the words before the command; a mistake in them becomes an exit code."""
        try:
            return super().make_context(*arguments, **options)
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # no words at all: the help is shown
                raise
            line, code = explain(error) or ("", 2)
            typer.echo(line, err=True)
            raise typer.Exit(code) from None

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; errors of the user become an exit code."""
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            cause = KeyboardInterrupt() if _interrupts else error
            if isinstance(cause, typer.Exit | typer.Abort) or (explained := explain(cause)) is None:
                raise
            typer.echo(visible(explained[0]), err=True)
            raise typer.Exit(explained[1]) from None


class ToStandardError(logging.Handler):
    """Prints log records as plain lines on what is standard error at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record."""
        typer.echo(self.format(record), err=True)


app = typer.Typer(
    cls=OneLineErrors,
    name="hdb",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from hyperdreambooth import __version__

        typer.echo(f"hyperdreambooth {__version__}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")


@app.callback()
def configure(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    version: Annotated[bool, _VERSION] = False,
) -> None:
    """Make a LoRA from one photo of a person, in seconds."""
    logger = logging.getLogger("hyperdreambooth")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    if not any(isinstance(handler, ToStandardError) for handler in logger.handlers):
        logger.addHandler(ToStandardError())


for command in (
    inference.demo, prepare.prepare, inference.personalize, inference.predict, adapters.relax,
    training.finetune, inference.generate, adapters.export, adapters.merge, inspect.inspect,
    training.dreambooth, training.preoptimize, training.train, evaluate.evaluate, watch.watch, plan.plan,
    doctor.doctor, ui.ui,
):  # fmt: skip
    app.command()(command)
app.add_typer(avatars.app, name="avatars", help="Make the embedded world of drawn faces.")
app.add_typer(serve.app, name="serve")


def _interrupt(number: int, _frame: Any) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


def main() -> None:
    """Runs `hdb` and `python -m hyperdreambooth`; warnings are one line, too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _interrupt)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    warnings.filterwarnings("ignore", module=r"PIL\.")  # why here: `workers.begin`
    app()
