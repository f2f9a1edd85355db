"""`hdb doctor`: what is installed, which devices there are, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

NEEDED = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pydantic", "pyyaml", "typer",
    "rich", "pillow", "numpy", "jaxtyping",
)  # fmt: skip
EXTRAS = {
    "gradio": "ui", "ray": "cluster", "datasets": "data", "webdataset": "data", "cv2": "faces",
    "onnxruntime": "eval",
}  # fmt: skip
"""Module → the extra that brings it."""


def doctor(
    base: Annotated[
        Path | None, typer.Option("--base", help="Also look at this pipeline folder.", show_default=False)
    ] = None,
) -> None:
    """What is installed, and what is missing."""
    from hyperdreambooth import __version__

    _line("hyperdreambooth", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    missing = [name for name in NEEDED if not _package(name)]
    _devices()
    assets = Path(__file__).parent.parent / "avatars" / "assets"
    ready = _folder("avatars' base", assets / "base", "model_index.json")
    ready &= _folder("avatars' network", assets / "hypernet", "config.json")
    if base is not None:
        ready &= _folder("base", base, "model_index.json")
    for module, extra in EXTRAS.items():
        if find_spec(module) is None:
            _line(module, f"not installed (optional): pip install 'hyperdreambooth[{extra}]'")
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
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    _line("cpu", f"{os.cpu_count()} cores, {memory / 2**30:.0f} GiB memory")
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


def _folder(name: str, folder: Path, file: str) -> bool:
    there = (folder / file).is_file()
    advice = "get the whole repository, or make it: make reproduce"
    _line(name, str(folder) if there else f"MISSING: {folder / file}; {advice}")
    return there
