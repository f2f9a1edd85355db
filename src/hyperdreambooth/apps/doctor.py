"""`hdb doctor`: what is installed, which devices there are, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from hyperdreambooth.apps.options import BaseName, ConfigFile, Device, Sets, resolve

NEEDED = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pydantic", "pyyaml", "typer",
    "rich", "pillow", "numpy", "jaxtyping",
)  # fmt: skip
EXTRAS = {"datasets": "data", "cv2": "faces", "onnxruntime": "eval", "matplotlib": "plots"}
"""Module → the extra that brings it."""


def doctor(
    base: BaseName = None,
    task: Annotated[
        Literal["train", "personalize"] | None,
        typer.Option("--task", help="Also tell the memory that this takes on --base.", show_default=False),
    ] = None,
    hypernet: Annotated[
        Path | None,
        typer.Option("--hypernet", help="Folder; counted too [the embedded avatars'].", show_default=False),
    ] = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """What is installed, what is missing, and what a task takes.

    `--task` counts a base's memory from its configs, and names what to set where it does not fit.
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
        ready &= _memory(task, base, hypernet, device, config, sets)
    if missing or not ready:
        raise typer.Exit(1)


def _line(name: str, text: str) -> None:
    typer.echo(f"{name:18} {text}")


def _package(name: str) -> bool:
    try:
        _line(name, version(name))
    except PackageNotFoundError:
        _line(name, "MISSING: pip install hyperdreambooth")
        return False
    return True


def _devices() -> None:
    """Processors and accelerators, with their memory."""
    memory = _installed()
    _line("cpu", f"{os.cpu_count()} cores" + (f", {memory / 2**30:.0f} GiB memory" if memory else ""))
    _line("disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here")
    if find_spec("torch") is None:
        return
    import torch

    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        _line(f"cuda:{index}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        _line("mps", "available")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        _line("accelerator", "none found; the avatars need none")


def _memory(
    task: Literal["train", "personalize"], base: str | None, hypernet: Path | None, device: str | None,
    config: Path | None, sets: list[str] | None,
) -> bool:  # fmt: skip
    """A line on what the task takes, and one for each setting that saves; whether it fits as it is set."""
    from hyperdreambooth.apps.memory import advise
    from hyperdreambooth.apps.show import ShowConfig
    from hyperdreambooth.base.load import is_embedded
    from hyperdreambooth.hypernet.config import HypernetConfig
    from hyperdreambooth.personalize import EMBEDDED_HYPERNET

    model = HypernetConfig if task == "train" else ShowConfig
    settings = resolve(task, model, config, sets, base=base, device=device)
    predicts = hypernet or (EMBEDDED_HYPERNET if is_embedded(settings.place.base) else None)
    place, room, verdicts = *_room(settings.place.device), list[bool]()
    for words, needs in advise(settings.place, task, settings.own, room or 0, predicts):
        verdicts.append(room is None or sum(needs.values()) <= room)
        _line(words or task, _told(needs, place, room))
    if not verdicts[-1]:
        _line(task, "too large even so: take a device with more memory, a smaller base or resolution")
    return verdicts[0]


def _told(needs: Mapping[str, int], place: str, room: int | None) -> str:
    """What a task takes on a device, and of what."""
    total = sum(needs.values())
    parts = ", ".join(f"{name} {_gib(part)}" for name, part in needs.items() if part > 2**20)
    parts += "" if needs["encoder"] else "; without the image encoder, whose config is not at hand"
    if room is None:
        return f"{_gib(total)} GiB on {place}, where nobody knows what is free ({parts})"
    verdict = "fits" if total <= room else "does not fit"
    return f"{_gib(total)} of {_gib(room)} GiB on {place}, {verdict} ({parts})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _room(device: str) -> tuple[str, int | None]:
    """A device, and the bytes that are free on it now; None where it is not here: counting needs none.

    Raises:
        InputError: the word names no device.
    """
    import torch

    from hyperdreambooth.base.load import pick_device
    from hyperdreambooth.files import InputError

    try:
        place = pick_device(device)
    except InputError:
        if device.partition(":")[0] not in ("cuda", "mps"):
            raise
        return device, None
    return place.type, torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else _available()


def _available() -> int | None:
    """Bytes of the machine's own memory that are free, or all there are; None where nobody tells."""
    told = Path("/proc/meminfo")
    if told.is_file():
        return next(
            int(line.split()[1]) * 1024
            for line in told.read_text().splitlines()
            if line.startswith("MemAvailable")
        )
    return _installed()


def _installed() -> int | None:
    """Bytes of memory the machine has; None where the system does not tell (Windows)."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def _base(place: str) -> bool:
    """Says where a base lies; whether it is there, as far as this machine can tell (not of a hub id)."""
    path = Path(place)
    there = (path / "model_index.json").is_file() or (path.is_file() and path.suffix == ".safetensors")
    if not there and not path.exists() and not path.is_absolute():
        return True
    missing = path / "model_index.json" if path.is_dir() else path
    advice = "name a diffusers pipeline folder, a .safetensors file or a hub id"
    _line("base", place if there else f"MISSING: {missing}; {advice}")
    return there


def _folder(name: str, folder: Path, file: str) -> bool:
    there = (folder / file).is_file()
    advice = "get the whole repository, or make it: make reproduce"
    _line(name, str(folder) if there else f"MISSING: {folder / file}; {advice}")
    return there
