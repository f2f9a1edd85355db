"""A pipeline from a folder, the hub or a single file, never from a pickle; or its skeleton, to measure."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from huggingface_hub import hf_hub_download, snapshot_download

from hyperdreambooth.runs import InputError, read_json

_INDEX = "model_index.json"
_CONFIGS = ["*.json", "*.txt", "*.model"]  # of networks, tokenizers and schedulers
_library: Any = diffusers  # its classes are found by name


def open_pipeline(
    place: str,
    families: Collection[str],
    dtype: str = "float32",
    variant: str | None = None,
    offline: bool = False,
    base_config: str | None = None,
    leave_out: Collection[str] = (),
) -> Any:
    """Loads a pipeline on the CPU.

    Args:
        place: folder, hub id, or a `.safetensors` file of a whole checkpoint.
        families: the pipeline classes that are driven.
        dtype: number format of the weights.
        variant: of the files, such as `fp16`.
        offline: only what is on this machine.
        base_config: folder or hub id of a pipeline like the one in a single file.
        leave_out: components that the pipeline can do without.

    Raises:
        InputError: nothing there, or another class; nothing large is downloaded before that is known.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": offline}
    try:
        if Path(place).is_file():
            config = base_config or _config_of(place)
            loader, absent = _class(place, config, families, offline)
            options |= {"config": config, "torch_dtype": getattr(torch, dtype)}
            pipe = loader.from_single_file(place, **options, **dict.fromkeys([*absent, *leave_out]))
        else:
            loader, absent = _class(place, place, families, offline)
            options |= {"dtype": getattr(torch, dtype), "variant": variant, "use_safetensors": True}
            pipe = loader.from_pretrained(place, **options, **dict.fromkeys([*absent, *leave_out]))
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise _refusal(place, error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _config_of(file: str) -> str:
    """The hub id of a pipeline like the one in a checkpoint, told from its weights."""
    if not file.endswith(".safetensors"):
        raise InputError(f"base {file}: expected a .safetensors file; convert it, pickles are never opened")
    return fetch_diffusers_config(load_single_file_checkpoint(file))["pretrained_model_name_or_path"]


def _class(place: str, config: str, families: Collection[str], offline: bool) -> tuple[Any, list[str]]:
    """The pipeline's class, by its `model_index.json`, and the components it says it has not."""
    if Path(config).is_absolute() and not (Path(config) / _INDEX).is_file():
        raise InputError(f"base {config}: expected a diffusers pipeline folder with {_INDEX}, found none")
    file = Path(config) / _INDEX
    if not file.is_file():
        file = Path(hf_hub_download(config, _INDEX, local_files_only=offline))
    index = read_json(file)
    if (name := index["_class_name"]) not in families:
        raise InputError(f"base {place}: {name} is not one of {', '.join(families)}")
    return getattr(_library, name), [part for part, entry in index.items() if entry == [None, None]]


def _refusal(place: str, error: Exception) -> InputError:
    """One line for whatever the libraries say."""
    if isinstance(error, InputError):
        return error
    first = str(error).strip().splitlines()[0]
    return InputError(
        f"base {place}: cannot be loaded ({first}); pass a pipeline folder, a hub id or a .safetensors file"
    )


def folder_of(place: str) -> Path | None:
    """Where the files of a loaded pipeline lie; None where it came from a single one."""
    if Path(place).exists():
        return Path(place) if Path(place).is_dir() else None
    return Path(snapshot_download(place, local_files_only=True))


def open_skeleton(
    place: str, families: Collection[str], dtype: str = "float32", offline: bool = False
) -> Any:
    """The same pipeline without weights, on the meta device: from its configs, which are all that is fetched.

    Raises:
        InputError: nothing there, or another class.
    """
    try:
        folder = place
        if not Path(place).is_dir():
            folder = snapshot_download(place, allow_patterns=_CONFIGS, local_files_only=offline)
        loader, _ = _class(place, folder, families, offline)
        index = read_json(Path(folder) / _INDEX)
        parts = {
            name: _part(Path(folder) / name, entry[0], entry[1], getattr(torch, dtype))
            for name, entry in index.items()
            if isinstance(entry, list) and len(entry) == 2
        }
        settings = {name: value for name, value in index.items() if isinstance(value, bool)}
        return loader(**parts, **settings)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise _refusal(place, error) from error


def _part(folder: Path, library: str | None, name: str | None, dtype: torch.dtype) -> Any:
    """A component by its entry in `model_index.json`; networks without weights."""
    if library is None or name is None:
        return None
    kind: Any = getattr(diffusers if library == "diffusers" else transformers, name)
    if hasattr(kind, "parameters"):
        with torch.device("meta"):
            if library == "diffusers":
                made = kind.from_config(kind.load_config(folder))
            else:
                made = kind(kind.config_class.from_pretrained(folder))
        return torch.nn.Module.to(made, dtype)
    return kind.from_pretrained(folder)
