"""Opens pipelines from a folder, the hub or a single file, never from pickles, and their skeletons."""

from __future__ import annotations

import logging
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

from hyperdreambooth.base.family import Family
from hyperdreambooth.base.quantize import Quantize, quantization, spare_backward
from hyperdreambooth.base.readers import Readers, read_lazily
from hyperdreambooth.base.recognise import INDEX, VARIANTS, check_base
from hyperdreambooth.files import InputError, first_line, read_json

# transformers warns of every image processor that it runs without torchvision, which nothing here needs
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in str(record.msg)
)

_CONFIGS = ["*.json", "*.txt", "*.model"]  # of networks, tokenizers and schedulers
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3")
# what the libraries raise for half-copied files and for weights that do not fit their config
DAMAGED = (OSError, ValueError, RuntimeError, LookupError, SafetensorError)


def open_pipeline(
    place: str,
    families: Mapping[str, Family],
    dtype: str = "float32",
    variant: str | None = None,
    offline: bool = False,
    base_config: str | None = None,
    leave_out: Collection[str] = (),
    revision: str | None = None,
    token: str | None = None,
    quantize: Quantize | None = None,
) -> Any:
    """Loads a pipeline of a family on the CPU; another class is refused before a large download.

    Of a folder or a hub id, the text encoders that stay frozen are not read yet, see `readers.py`.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": offline, "revision": revision, "token": token}
    try:
        check_base(place)
        source = _like(place, base_config)
        index = _index(source, offline, revision if source == place else None, token)
        absent = dict.fromkeys(_absent(place, index, families, leave_out))
        loader: Any = getattr(diffusers, index["_class_name"])
        if Path(place).is_file():
            options |= {"config": source, "torch_dtype": getattr(torch, dtype)}
            pipe = loader.from_single_file(place, **options, **absent)
            _check_whole(place, pipe)
        else:
            named: dict[str, Any] = {"variant": variant, "use_safetensors": True}
            folder = place if Path(place).is_dir() else loader.download(place, **options, **named, **absent)
            family = families[index["_class_name"]]
            pipe = _open_folder(place, Path(folder), index, family, dtype, variant, [*absent], quantize)
    except (*DAMAGED, SingleFileComponentError) as error:
        raise _refusal(place, error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _open_folder(
    place: str,
    folder: Path,
    index: Mapping[str, Any],
    family: Family,
    dtype: str,
    variant: str | None,
    absent: Collection[str],
    quantize: Quantize | None,
) -> Any:
    """Loads all of a pipeline's components but the frozen text encoders, which are read when needed."""
    parts = {name: entry[0] for name, entry in index.items() if _is_part(entry) and name not in absent}
    frozen = {name for name in parts if name.startswith("text_encoder")} - {*family.TEXT_ENCODERS}
    loader: Any = getattr(diffusers, index["_class_name"])
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "variant": variant, "use_safetensors": True}

    def load(wanted: Collection[str]) -> Any:
        without = dict.fromkeys(name for name in index if _is_part(index[name]) and name not in wanted)
        small = {name: parts[name] for name in wanted if name in {family.DENOISER, *frozen}}
        packed = quantization(quantize, small, options["dtype"]) if quantize else None
        pipe = loader.from_pretrained(str(folder), **options, **without, quantization_config=packed)
        _check_whole(place, pipe)
        return pipe

    def read() -> dict[str, torch.nn.Module]:
        try:
            pipe = load(frozen)
        except DAMAGED as error:
            raise _refusal(place, error) from error
        return {name: getattr(pipe, name) for name in frozen}

    for name in frozen:  # a copy that was cut short is said at once, and not when the first text is read
        if not any((folder / name).glob("*.safetensors")):
            raise InputError(f"base {place}: found no .safetensors file of {name}; get the pipeline again")
    pipe = load(parts.keys() - frozen)
    if quantize == "int8":
        spare_backward(getattr(pipe, family.DENOISER))
    if frozen:
        read_lazily(pipe, Readers(tuple(sorted(frozen)), read, folder, variant))
    return pipe


def _is_part(entry: Any) -> bool:
    """Returns whether an entry of `model_index.json` is a component: its library and its class."""
    return isinstance(entry, list) and len(entry) == 2 and not isinstance(entry[0], int)


def _check_whole(place: str, pipe: Any) -> None:
    """Raises an InputError if weights are missing, which diffusers leaves on the meta device."""
    for part, network in pipe.components.items():
        for name, tensor in network.named_parameters() if isinstance(network, torch.nn.Module) else ():
            if tensor.is_meta:
                raise InputError(f"base {place}: the weights of {part} lack {name}; get the pipeline again")


def _like(place: str, base_config: str | None) -> str:
    """Returns the place of the configs: of a single file, that of a pipeline of the same architecture."""
    if not Path(place).is_file():
        return place
    if not place.endswith(".safetensors"):
        raise InputError(f"base {place}: expected a .safetensors file; convert it, pickles are never opened")
    found = base_config or fetch_diffusers_config(load_single_file_checkpoint(place))
    return found if isinstance(found, str) else found["pretrained_model_name_or_path"]


def _index(
    source: str, offline: bool, revision: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """Reads a pipeline's `model_index.json`."""
    file = Path(source) / INDEX
    if not file.is_file():
        if file.parent.is_dir() or file.is_absolute():
            raise InputError(f"base {source}: expected a diffusers pipeline folder with {INDEX}, found none")
        file = Path(hf_hub_download(source, INDEX, local_files_only=offline, revision=revision, token=token))
    index = read_json(file)
    if not isinstance(index, dict) or "_class_name" not in index:
        raise InputError(f"{file}: expected a table with _class_name, found none; get the pipeline again")
    return index


def _absent(
    place: str, index: Mapping[str, Any], families: Collection[str], leave_out: Collection[str]
) -> list[str]:
    """Checks the pipeline's class, and returns the components that it does not have or that are left out."""
    if (name := index["_class_name"]) not in families:
        found = VARIANTS.get(name, f"{name}; use another base")
        raise InputError(f"base {place}: expected one of {', '.join(families)}, got {found}")
    if odd := sorted(set(leave_out) - set(_OPTIONAL)):
        raise InputError(f"leave_out: expected any of {', '.join(_OPTIONAL)}, got {odd[0]}; correct it")
    if "tokenizer_3" in leave_out and "text_encoder_3" not in leave_out:
        raise InputError("leave_out: text_encoder_3 needs tokenizer_3; leave out both")
    return [part for part, entry in index.items() if part in leave_out or entry == [None, None]]


def _refusal(place: str, error: Exception) -> InputError:
    """Returns a one-line InputError for an exception of the libraries."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        missing, advice = "not on this machine", "pass a pipeline folder, or download it once while online"
        if Path(place).is_file():
            missing = "the configs of its architecture are not on this machine"
            advice = "set base_config to a pipeline folder of the same architecture"
        return InputError(f"base {place}: {missing}, and the hub cannot be reached; {advice}")
    reason = first_line(error)
    advice = "pass a pipeline folder, a hub id or a .safetensors file"
    if "no file named" in reason and not Path(place).exists():
        advice = f"if its files are named like model.fp16.safetensors, set variant=fp16; else {advice}"
    return InputError(f"base {place}: cannot be loaded ({reason}); {advice}")


def folder_of(place: str, revision: str | None = None) -> Path | None:
    """Returns the folder of a loaded pipeline's files; None if it came from a single file."""
    if Path(place).exists():
        return Path(place) if Path(place).is_dir() else None
    return Path(snapshot_download(place, revision=revision, local_files_only=True))


def facts_of(folder: Path) -> dict[str, Any]:
    """Reads what a base says of itself beyond diffusers' own files: trigger, class word, resolution.

    Raises:
        InputError: the file with these facts holds something else.
    """
    file = folder / "hyperdreambooth.json"
    if not file.is_file():
        return {}
    words, kinds = read_json(file), {"trigger": str, "class_word": str, "resolution": int}
    if isinstance(words, dict) and all(isinstance(words.get(k, kind()), kind) for k, kind in kinds.items()):
        return {name: words[name] for name in kinds if name in words}
    expected = '{"trigger": "sks", "class_word": "person", "resolution": 512}, or some of it'
    raise InputError(f"{file}: expected {expected}, got {str(words)[:60]}; correct it")


def open_skeleton(
    place: str,
    families: Collection[str],
    dtype: str = "float32",
    offline: bool = False,
    base_config: str | None = None,
    leave_out: Collection[str] = (),
) -> Any:
    """Builds the pipeline from its configs alone, without weights, on the meta device."""
    try:
        check_base(place)
        folder = _like(place, base_config)
        index = _index(folder, offline)
        absent = _absent(place, index, families, leave_out)
        if Path(place).is_file():
            absent.append("safety_checker")  # diffusers loads single files without one
        if not Path(folder).is_dir():
            folder = snapshot_download(folder, allow_patterns=_CONFIGS, local_files_only=offline)
        number = getattr(torch, dtype)
        parts = {
            name: None if name in absent else _part(Path(folder) / name, entry[0], entry[1], number)
            for name, entry in index.items()
            if _is_part(entry)
        }
        settings = {name: value for name, value in index.items() if name[0] != "_" and name not in parts}
        return getattr(diffusers, index["_class_name"])(**parts, **settings)
    except DAMAGED as error:
        raise _refusal(place, error) from error


def _part(folder: Path, library: str, name: str, dtype: torch.dtype) -> Any:
    """Builds a component by its entry in `model_index.json`; networks have no weights."""
    homes: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    # the safety checker comes from a pipeline's module
    kind: Any = getattr(homes.get(library) or getattr(diffusers.pipelines, library), name)
    if hasattr(kind, "parameters"):
        with torch.device("meta"):
            if library == "diffusers":
                made = kind.from_config(kind.load_config(folder))
            else:
                made = kind(kind.config_class.from_pretrained(folder))
        return torch.nn.Module.to(made, dtype)
    return kind.from_pretrained(folder)
