"""A pipeline from a folder, the hub or a single file, never from a pickle; or its skeleton, to measure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    load_single_file_checkpoint,
)
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError

from hyperdreambooth.files import InputError, read_json

_INDEX = "model_index.json"
_CONFIGS = ["*.json", "*.txt", "*.model"]  # of networks, tokenizers and schedulers
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3")
# what half-copied files and weights that do not fit their config make the libraries raise
DAMAGED = (OSError, ValueError, RuntimeError, LookupError, SafetensorError)
_library: Any = diffusers  # its classes are found by name


def open_pipeline(
    place: str,
    families: Collection[str],
    dtype: str = "float32",
    variant: str | None = None,
    offline: bool = False,
    base_config: str | None = None,
    leave_out: Collection[str] = (),
    revision: str | None = None,
    token: str | None = None,
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
        revision: branch, tag or commit on the hub.
        token: of the hub.

    Raises:
        InputError: nothing there, or another class; nothing large is downloaded before that is known.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": offline, "revision": revision, "token": token}
    try:
        source = _like(place, base_config)
        index = _index(source, offline, revision if source == place else None, token)
        loader, absent = _class(place, index, families), dict.fromkeys(_absent(index, leave_out))
        if Path(place).is_file():
            options |= {"config": source, "torch_dtype": getattr(torch, dtype)}
            pipe = loader.from_single_file(place, **options, **absent)
        else:
            options |= {"dtype": getattr(torch, dtype), "variant": variant, "use_safetensors": True}
            pipe = loader.from_pretrained(place, **options, **absent)
        _check_whole(place, pipe)
    except (*DAMAGED, SingleFileComponentError) as error:
        raise _refusal(place, error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_whole(place: str, pipe: Any) -> None:
    """diffusers leaves what a file lacks on the meta device."""
    for part, network in pipe.components.items():
        for name, tensor in network.named_parameters() if isinstance(network, torch.nn.Module) else ():
            if tensor.is_meta:
                raise InputError(f"base {place}: {part} has no {name}; get the pipeline again")


def _like(place: str, base_config: str | None) -> str:
    """Whose configs tell how a base is built: its own, or of a single file those of a pipeline like it."""
    if not Path(place).is_file():
        return place
    if not place.endswith(".safetensors"):
        raise InputError(f"base {place}: expected a .safetensors file; convert it, pickles are never opened")
    told = base_config or fetch_diffusers_config(load_single_file_checkpoint(place))
    return told if isinstance(told, str) else told["pretrained_model_name_or_path"]


def _index(
    source: str, offline: bool, revision: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """A pipeline's `model_index.json`."""
    file = Path(source) / _INDEX
    if not file.is_file():
        if file.parent.is_dir() or file.is_absolute():
            raise InputError(f"base {source}: expected a diffusers pipeline folder with {_INDEX}, found none")
        file = Path(hf_hub_download(source, _INDEX, local_files_only=offline, revision=revision, token=token))
    index = read_json(file)
    if not isinstance(index, dict) or "_class_name" not in index:
        raise InputError(f"{file}: expected a table with _class_name, found none; get the pipeline again")
    return index


def _class(place: str, index: Mapping[str, Any], families: Collection[str]) -> Any:
    """The pipeline's class."""
    if (name := index["_class_name"]) not in families:
        raise InputError(f"base {place}: {name} is not one of {', '.join(families)}")
    return getattr(_library, name)


def _absent(index: Mapping[str, Any], leave_out: Collection[str]) -> list[str]:
    """The components that the index says it has not, and those of it that are left out."""
    if odd := sorted(set(leave_out) - set(_OPTIONAL)):
        raise InputError(f"leave_out: expected some of {', '.join(_OPTIONAL)}, got {odd[0]}; correct it")
    if "tokenizer_3" in leave_out and "text_encoder_3" not in leave_out:
        raise InputError("leave_out: tokenizer_3 serves text_encoder_3; leave out both")
    return [part for part, entry in index.items() if part in leave_out or entry == [None, None]]


def _refusal(place: str, error: Exception) -> InputError:
    """One line for whatever the libraries say."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        told, advice = "not on this machine", "pass a pipeline folder, or get it once while online"
        if Path(place).is_file():
            told, advice = (
                "configs of its kind are not here",
                "set base_config to a pipeline folder like it",
            )
        return InputError(f"base {place}: {told}, and the hub is out of reach; {advice}")
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(
        f"base {place}: cannot be loaded ({first}); pass a pipeline folder, a hub id or a .safetensors file"
    )


def folder_of(place: str, revision: str | None = None) -> Path | None:
    """The folder of a loaded pipeline's files; None where it came from a single file."""
    if Path(place).exists():
        return Path(place) if Path(place).is_dir() else None
    return Path(snapshot_download(place, revision=revision, local_files_only=True))


def open_skeleton(
    place: str,
    families: Collection[str],
    dtype: str = "float32",
    offline: bool = False,
    base_config: str | None = None,
    leave_out: Collection[str] = (),
) -> Any:
    """The same pipeline without weights, on the meta device: from its configs, which are all that is fetched.

    Raises:
        InputError: nothing there, or another class.
    """
    try:
        folder = _like(place, base_config)
        index = _index(folder, offline)
        loader, absent = _class(place, index, families), _absent(index, leave_out)
        if Path(place).is_file():
            absent.append("safety_checker")  # such files are loaded without one
        if not Path(folder).is_dir():
            folder = snapshot_download(folder, allow_patterns=_CONFIGS, local_files_only=offline)
        number = getattr(torch, dtype)
        parts = {
            name: None if name in absent else _part(Path(folder) / name, entry[0], entry[1], number)
            for name, entry in index.items()
            if isinstance(entry, list) and len(entry) == 2
        }
        settings = {name: value for name, value in index.items() if isinstance(value, bool)}
        return loader(**parts, **settings)
    except DAMAGED as error:
        raise _refusal(place, error) from error


def _part(folder: Path, library: str, name: str, dtype: torch.dtype) -> Any:
    """A component by its entry in `model_index.json`; networks without weights."""
    homes: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    # a pipeline's own: the safety checker
    kind: Any = getattr(homes.get(library) or getattr(diffusers.pipelines, library), name)
    if hasattr(kind, "parameters"):
        with torch.device("meta"):
            if library == "diffusers":
                made = kind.from_config(kind.load_config(folder))
            else:
                made = kind(kind.config_class.from_pretrained(folder))
        return torch.nn.Module.to(made, dtype)
    return kind.from_pretrained(folder)
