"""The names that tools read LoRA files by."""

from __future__ import annotations

from pathlib import Path

from hyperdreambooth.files import InputError

UNFIT_NAMES = ("checkpoint", "optimizer", "scheduler")  # diffusers ignores files with these in their names


def check_name(path: Path) -> None:
    """Refuses a file name that tools ignore; to be called before long work as well."""
    if path.suffix != ".safetensors" or any(word in path.name.lower() for word in UNFIT_NAMES):
        unfit = ", ".join(UNFIT_NAMES)
        raise InputError(f"{path}: expected a name that ends in .safetensors, without {unfit} in it")
