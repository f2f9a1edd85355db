"""`hdb`: the commands, and what a user sees when something is wrong.

Exit codes: 0 done, 1 failed, 2 bad input (one line), 130 interrupted. Torch and everything heavy is imported
inside the command functions, so `hdb --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import signal
import warnings
from typing import Any

import typer
import typer.core

from hyperdreambooth.apps import (
    demo,
    doctor,
    evaluate,
    files,
    inspect,
    prepare,
    teach,
    use,
    world,
)  # fmt: skip

UsageError: Any = typer.BadParameter.__base__  # typer carries its own click from 0.29 on
_interrupts: list[int] = []  # signals that came: what imports make of a KeyboardInterrupt may be anything


def explain(error: Any) -> tuple[str, int] | None:
    """One line and an exit code for what is not a bug; None for what is."""
    if isinstance(error, UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "hdb"
        return f"error: {' '.join(error.format_message().split()).rstrip('.')}; see {command} --help", 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; run the same command again, it goes on from what is kept", 130
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return "error: the disk is full; free some space and run the same command again", 1
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        return f"error: {' '.join(str(error).split())}", 1
    if any(kind.__module__.startswith("httpx") for kind in type(error).__mro__[:-1]):
        return f"error: the network: {' '.join(str(error).split()) or type(error).__name__}; try again", 1
    if type(error).__name__ == "OutOfMemoryError":
        return "error: the device has too little memory; take a smaller batch, or --device cpu", 1
    return _bad_input(error)


def _bad_input(error: BaseException) -> tuple[str, int] | None:
    from pydantic import ValidationError

    from hyperdreambooth.files import InputError

    if isinstance(error, InputError):
        return f"error: {error}", 2
    if isinstance(error, ValidationError):
        found = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return f"error: {'; '.join(found)}", 2
    return None


class Explained(typer.core.TyperGroup):
    """A group whose errors are one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; user errors become an exit code."""
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            said = KeyboardInterrupt() if _interrupts else error
            if isinstance(said, typer.Exit | typer.Abort) or (found := explain(said)) is None:
                raise
            typer.echo(found[0], err=True)
            raise typer.Exit(found[1]) from None


# transformers tells every user at every start that it does well without torchvision
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

app = typer.Typer(
    cls=Explained,
    name="hdb",
    help="One photo of a person to a LoRA, in seconds.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    demo.demo, prepare.prepare, use.personalize, use.predict, files.relax, teach.finetune, use.generate,
    files.export, files.merge, inspect.inspect, teach.dreambooth, teach.preoptimize, teach.train,
    evaluate.evaluate, doctor.doctor,
):  # fmt: skip
    app.command()(command)
app.add_typer(world.app, name="avatars", help="The embedded world of drawn faces.")


def _interrupt(number: int, _frame: Any) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


def main() -> None:
    """The entry point of `hdb` and `python -m hyperdreambooth`; a warning is one line too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _interrupt)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    app()
