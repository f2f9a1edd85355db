"""`hdb doctor`: what is installed, which devices there are, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Option, echo

from hyperdreambooth.apps.options import BaseName, ConfigFile, Device, Sets

if TYPE_CHECKING:
    from hyperdreambooth.base.load import Base
    from hyperdreambooth.hypernet.config import HypernetConfig

NEEDED = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pydantic", "pyyaml", "typer",
    "rich", "pillow", "numpy", "jaxtyping", "jinja2",
)  # fmt: skip
EXTRAS = {
    "datasets": "data", "cv2": "faces", "pillow_heif": "heic", "onnxruntime": "eval", "dlib": "judge",
    "matplotlib": "plots", "torchao": "quantize", "bitsandbytes": "quantize", "gradio": "ui",
    "fastapi": "serve", "ray": "cluster",
}  # fmt: skip
"""Module → the extra that installs it."""
Task = Literal["train", "personalize"]
_TASK_HELP = "Also estimate the memory that this task needs on --base."
_ONLINE = "or look for its configs on the hub with --set offline=false"
_HYPERNET_HELP = "The hypernetwork's folder, for the estimate [the one of the embedded avatars]."


def doctor(
    base: BaseName = None,
    task: Annotated[Task | None, Option(help=_TASK_HELP)] = None,
    hypernet: Annotated[Path | None, Option(help=_HYPERNET_HELP)] = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """Show what is installed and what is missing.

    `--task` estimates the memory of a task from the configs of the base, and names settings that reduce it;
    of a training on a GPU also the time.
    """
    from hyperdreambooth import __version__

    _line("hyperdreambooth", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    missing = [name for name in NEEDED if not _package(name)]
    _devices()
    assets = Path(__file__).parent.parent / "avatars" / "assets"
    ready = _folder("avatars' base", assets / "base", "model_index.json")
    ready &= _folder("avatars' network", assets / "hypernet", "config.json")
    ready &= base is None or _base(base)
    for module, extra in EXTRAS.items():
        if find_spec(module) is None:
            _line(module, f"not installed (optional): pip install 'hyperdreambooth[{extra}]'")
    if task is not None and not missing:
        ready &= _memory(task, hypernet, config, sets, base=base, device=device)
    if missing or not ready:
        raise typer.Exit(1)


def _line(name: str, text: str) -> None:
    echo(f"{name:18} {text}")


def _package(name: str) -> bool:
    """Prints the version of a package, and returns whether it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        _line(name, version(name))
    except PackageNotFoundError:
        _line(name, "MISSING: pip install hyperdreambooth")
        return False
    return True


def _devices() -> None:
    """Prints processors and accelerators with their memory."""
    memory = _total_memory()
    _line("cpu", f"{os.cpu_count()} cores" + (f", {memory / 2**30:.0f} GiB memory" if memory else ""))
    _line("disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free in the current folder")
    if find_spec("torch") is None:
        return
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        _line(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        _line("mps", "available")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        _line("accelerator", "none found; the avatars need none")


def _memory(
    task: Task, hypernet: Path | None, file: Path | None, sets: list[str] | None, **flags: str | None
) -> bool:
    """Prints what a task needs, also with settings that save memory; returns whether it fits as it is set."""
    from functools import partial

    from hyperdreambooth.apps.person_config import PersonalizeConfig
    from hyperdreambooth.apps.settings import resolve
    from hyperdreambooth.base.load import is_embedded
    from hyperdreambooth.base.quantize import Quantize
    from hyperdreambooth.files import InputError
    from hyperdreambooth.hypernet.config import HypernetConfig
    from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET
    from hyperdreambooth.memory import advise, skeleton

    model = HypernetConfig if task == "train" else PersonalizeConfig
    job = resolve(task, model, file, sets, flags)
    loading = job.base
    # asking the hub is for users to decide: the answer of a doctor must not wait for a network
    offline = loading.offline or "offline" not in loading.model_fields_set
    without = {"base", "device", "variant", "trigger", "class_word", "offline"}  # which change no size
    place, free = _free_memory(loading.device)
    told = loading.model_dump(exclude=without) | {"dtype": _format(loading.dtype, place, free)}
    build = partial(skeleton, loading.base, **told, offline=offline)
    predictor = hypernet or (EMBEDDED_HYPERNET if is_embedded(loading.base) else None)
    fits = list[bool]()
    try:
        bits: tuple[Quantize, ...] = ("int8",) if place == "cpu" else ("int8", "nf4")
        for options, needs in advise(build, task, job.own, free or 0, predictor, offline, bits):
            fits.append(free is None or sum(needs.values()) <= free)
            estimate = _estimate(needs, place, free)
            _line(task, f"with {options}: {estimate}" if options else estimate)
        if isinstance(job.own, HypernetConfig):
            _line(task, _time(build, job.own, place))
    except InputError as error:
        if loading.offline or not offline or "not on this machine" not in str(error):
            raise
        reason = str(error).replace(", and the hub cannot be reached", "")  # it was not asked
        raise InputError(f"{reason}; {_ONLINE}") from None
    if not fits[-1]:
        _line(task, "does not fit; use a device with more memory, a smaller base or a lower resolution")
    return fits[0]


def _estimate(needs: Mapping[str, int], place: str, free: int | None) -> str:
    """Formats what a task needs on a device, in all and part by part."""
    total = sum(needs.values())
    parts = ", ".join(f"{name} {_gib(part)}" for name, part in needs.items() if part > 2**20)
    parts += "" if needs["encoder"] else "; without the image encoder, whose config was not found here"
    if free is None:
        return f"needs {_gib(total)} GiB on {place}, whose free memory is unknown ({parts})"
    verdict = "fits" if total <= free else "does not fit"
    return f"needs {_gib(total)} of {_gib(free)} GiB free on {place}: {verdict} ({parts})"


def _time(build: Callable[[], Base], config: HypernetConfig, place: str) -> str:
    """Says how long a training takes on a GPU and what that rests on; other devices have to be measured."""
    import torch

    from hyperdreambooth.apps.watch import duration
    from hyperdreambooth.plan import RATES, kind_of, step_seconds

    if not place.startswith("cuda"):
        return f"how long it takes on this {place}, `hdb plan` measures with a few steps"
    name = torch.cuda.get_device_name(place) if torch.cuda.is_available() else ""
    kind = kind_of(name) or "H200"
    speed = RATES[kind]
    seconds = config.steps * step_seconds(build(), config, speed, config.batch * config.photos)
    rests = f"by its arithmetic and the speed of {speed.source}; bases smaller than SD 1.5 take longer"
    return f"{config.steps} steps of {config.batch} take about {duration(seconds)} on one {kind} ({rests})"


def _format(dtype: str, place: str, free: int | None) -> str:
    """Returns what `auto` stands for; a GPU that is not here is taken for one that is faster in bfloat16."""
    import torch

    from hyperdreambooth.precision import resolved_dtype

    absent = free is None and place.startswith("cuda") and dtype == "auto"
    return "bfloat16" if absent else resolved_dtype(dtype, torch.device(place))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _free_memory(device: str) -> tuple[str, int | None]:
    """Returns a device and its free bytes; None where the device is not here, which an estimate allows."""
    import torch

    from hyperdreambooth.base.device import pick_device
    from hyperdreambooth.files import InputError

    try:
        found = pick_device(device)
    except InputError:
        if device.partition(":")[0] not in ("cuda", "mps"):
            raise
        return device, None
    return found.type, torch.cuda.mem_get_info(found)[0] if found.type == "cuda" else _available_memory()


def _available_memory() -> int | None:
    """Returns the free bytes of the machine's memory, or all of its bytes where that is unknown."""
    file = Path("/proc/meminfo")
    if file.is_file() and (found := re.search(r"MemAvailable: *(\d+)", file.read_text())):
        return int(found[1]) * 1024
    return _total_memory()


def _total_memory() -> int | None:
    """Returns the bytes of the machine's memory; None where the system does not report them (Windows)."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def _base(name: str) -> bool:
    """Prints where a base is, and returns whether it is there. A hub id counts as there."""
    path = Path(name)
    found = (path / "model_index.json").is_file() or (path.is_file() and path.suffix == ".safetensors")
    if not found and not path.exists() and not path.is_absolute():
        return True
    missing = path / "model_index.json" if path.is_dir() else path
    advice = "name a diffusers pipeline folder, a .safetensors file or a hub id"
    _line("base", name if found else f"MISSING: {missing}; {advice}")
    return found


def _folder(name: str, folder: Path, file: str) -> bool:
    found = (folder / file).is_file()
    advice = "get the whole repository, or make it with `make reproduce`"
    _line(name, str(folder) if found else f"MISSING: {folder / file}; {advice}")
    return found
