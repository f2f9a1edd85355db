"""The options that commands share, and the decorator that adds them to a command.

Typer builds a command line from a function's signature. `command` makes it from the function's own
parameters, flags that stand for keys of the command's config, and the options that every command has.
"""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from typer import Argument, BadParameter, Option

from hyperdreambooth.apps import checks
from hyperdreambooth.apps.checks import Check, checks_of
from hyperdreambooth.files import InputError
from hyperdreambooth.storage import Store

if TYPE_CHECKING:
    from hyperdreambooth.apps.settings import Job

Function = Callable[..., None]
Adjust: TypeAlias = "Callable[[Job[Any], Mapping[str, Any]], Job[Any]]"


def steps_or_auto(text: str) -> str:
    """Checks a number of steps, or `auto`; pydantic's message would name its own types."""
    if text != "auto" and not text.isdecimal():
        raise BadParameter(f"expected a whole number or auto, got {text!r}")
    return text


def named_path(text: str) -> Path:
    """Makes a path; refuses an empty text, which a shell makes of an unset variable."""
    if not text:
        raise BadParameter("expected a file or a folder, got ''")
    return Path(text)


def named_store(text: str) -> Store:
    """Opens a folder or the URL of an object store."""
    named_path(text)
    try:
        return Store(text)
    except InputError as error:
        raise BadParameter(str(error)) from None


ConfigFile = Annotated[
    Path | None, Option("--config", help="A TOML, YAML or JSON file, or the name of a preset.")
]
Sets = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Override a key of the config; may be repeated."),
]
DryRun = Annotated[bool, Option("--dry-run", help="Print the resolved config and stop.")]
BaseName = Annotated[
    str | None,
    Option("--base", help="The base: a pipeline folder or a hub id [the embedded avatars]."),
    Check(checks.base),
]
Device = Annotated[str | None, Option(help="auto, cpu, cuda or mps.")]
HypernetName = Annotated[
    str | None,
    Option(help="The hypernetwork: a folder or a hub id [the one of the embedded avatars]."),
    Check(checks.hypernet),
]
Photos = Annotated[
    list[Path],
    Argument(help="Photos of one person: files or folders.", parser=named_path),
    Check(checks.person),
]
People = Annotated[
    Path,
    Argument(help="A folder of photos with one sub-folder a person.", parser=named_path),
    Check(checks.people),
]
SomePhotos = Annotated[
    list[Path],
    Argument(help="Photos of one person, or a folder with one sub-folder a person.", parser=named_path),
    Check(checks.somebody),
]
Weights = Annotated[
    list[float] | None, Option("--weight", help="The weight of each adapter, in the same order [1].")
]
BankStore = Annotated[
    Store | None,
    Option("--bank", help="The bank that preoptimize made.", parser=named_store, metavar="PLACE"),
    Check(checks.bank),
]
Workers = Annotated[int | None, Option(min=1, help="Worker processes [one a core].")]
Cluster = Annotated[
    str | None, Option(help="Work on a Ray cluster: auto, local, or the address of its head.")
]
ShardOf = Annotated[
    str | None,
    Option("--shard", metavar="I/N|merge", help="Do part I (from 0) of N parts; then merge them."),
    Check(checks.shard),
]

PROMPT_HELP = "A prompt; [V] stands for the person; may be repeated."
_STEPS_HELP = "Training steps; auto chooses them by scores, or by the loss."
_CROPPED_HELP = "Skip face detection and take the centre square."
FLAGS: Mapping[str, Any] = {
    "base": BaseName,
    "device": Device,
    "rank": Annotated[int | None, Option(help="The rank of the LoRA.")],
    "seed": Annotated[int | None, Option(min=0, help="The seed of all random numbers.")],
    "seeds": Annotated[
        list[int] | None, Option("--seed", min=0, help="A seed of the pictures; may be repeated.")
    ],
    "steps": Annotated[int | None, Option(help="Training steps.")],
    "steps|auto": Annotated[
        str | None, Option(help=_STEPS_HELP, parser=steps_or_auto, metavar="INTEGER|auto")
    ],
    "method": Annotated[str | None, Option(help="lidb, lora, full or textual-inversion.")],
    "method|person": Annotated[str | None, Option(help="hypernetwork, or lora or lidb, which need none.")],
    "prompts": Annotated[list[str] | None, Option("--prompt", help=PROMPT_HELP)],
    "identities": Annotated[int | None, Option(help="How many people.")],
    "photos": Annotated[int | None, Option(help="How many photos of each person.")],
    "split": Annotated[str | None, Option(help="base, train, val or test.")],
    "size": Annotated[int | None, Option(help="The side of the crops in pixels [512].")],
    "detector": Annotated[Path | None, Option(help="The ONNX file of YuNet [downloaded once].")],
    "person": Annotated[str | None, Option(help="The person's name, if a flat folder shows one person.")],
    "several": Annotated[str | None, Option(help="A photo of several people: refuse, largest or all.")],
    "people": Annotated[int | None, Option(min=1, help="How many people the photos show [15000].")],
    "gpus": Annotated[str | None, Option(help="How many of which, such as 8xH100 [this machine].")],
    "price": Annotated[float | None, Option(min=0, help="The price of an hour of one GPU.")],
    "already_cropped": Annotated[bool | None, Option("--already-cropped", help=_CROPPED_HELP)],
}
"""Key of a config → the flag that sets it. What follows a bar tells apart two flags of one key."""


def command(
    config: str,
    *flags: str,
    name: str | None = None,
    adjust: Adjust | None = None,
    on_base: bool = True,
    config_option: Any = ConfigFile,
) -> Callable[[Function], Function]:
    """Makes a command of a function `f(job, **own)`: it resolves the settings and calls the function.

    Args:
        config: `package.module:Class` of the command's config. It is imported when the command runs, because
            configs import torch and `--help` must not.
        flags: the keys of the config that have flags, as `FLAGS` names them.
        name: the command's name in reports, if it is not the function's.
        adjust: `(job, own) → job`, called before `--dry-run` prints them.
        on_base: whether the command loads a base, and so has `--base` and `--device`.
        config_option: the type of the `--config` option.
    """
    kinds = {key.partition("|")[0]: FLAGS[key] for key in (*flags, *(("base", "device") if on_base else ()))}

    def decorate(function: Function) -> Function:
        _, *parameters = inspect.signature(function).parameters.values()
        # annotations are text here; that of `job` names classes which only type checkers import
        own = {p.name: p.replace(annotation=eval(p.annotation, function.__globals__)) for p in parameters}
        optional = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY, default=None)
        shared = {key: optional(key, annotation=kind) for key, kind in kinds.items()}
        shared |= {"hypernet": own.pop("hypernet")} if "hypernet" in own else {}
        shared |= {
            "config_file": optional("config_file", annotation=config_option),
            "sets": optional("sets", annotation=Sets),
            "dry_run": optional("dry_run", annotation=DryRun, default=False),
        }

        checked = checks_of({p.name: p.annotation for p in (own | shared).values()})

        def run(config_file: Path | None, sets: list[str] | None, dry_run: bool, **given: Any) -> None:
            began = time.perf_counter()
            from hyperdreambooth.apps.settings import resolve  # pydantic takes longer than the whole --help

            for key, check in {} if dry_run else checked.items():
                if given[key] not in (None, []):
                    check.of(given[key])
            chosen = {key: value for key in kinds if (value := given.pop(key)) != []}
            if on_base and not dry_run and sys.stderr.isatty():  # elsewhere it would only be one line more
                logging.getLogger("hyperdreambooth").info("loading …")
            model = resolve_name(config)
            job = resolve(name or function.__name__, model, config_file, sets, chosen, on_base=on_base)
            job = replace(adjust(job, given) if adjust else job, began=began)
            return job.show() if dry_run else function(job, **given)

        every = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (own | shared).values()]
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__name__, run.__doc__, run.__annotations__ = function.__name__, function.__doc__, {}
        return run

    return decorate


def as_recommended(job: Job[Any], own: Mapping[str, Any]) -> Job[Any]:
    """Uses what the hypernetwork's folder recommends for the finetune wherever the user set nothing."""
    from hyperdreambooth.base.load import is_embedded
    from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET, load_info

    hypernet = own["hypernet"]
    if hypernet is None and not is_embedded(job.base.base):
        return job  # an adapter from elsewhere, for which nobody recommends anything
    return replace(job, own=job.own.over(load_info(hypernet or EMBEDDED_HYPERNET).finetune))


def one_way(job: Job[Any], own: Mapping[str, Any]) -> Job[Any]:
    """Refuses --cluster and --shard together."""
    if own["cluster"] and own["shard"]:
        from hyperdreambooth.files import InputError

        raise InputError(
            "--shard: processes that know nothing of each other need no --cluster; leave one out"
        )
    return job


def by_method(job: Job[Any], own: Mapping[str, Any]) -> Job[Any]:
    """Uses the hypernetwork's recommendations, or for another method the config from scratch."""
    if job.own.method == "hypernetwork":
        return as_recommended(job, own)
    from hyperdreambooth.apps.person_config import ScratchConfig
    from hyperdreambooth.config import load_config
    from hyperdreambooth.files import InputError

    if own["hypernet"] is not None:
        raise InputError(f"hypernet: method {job.own.method} trains without one; leave one of them out")
    return replace(job, own=load_config(ScratchConfig, **job.own.model_dump(exclude_unset=True)))
