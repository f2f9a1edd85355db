"""PEFT's configuration of a LoRA: every field of it is honoured, or refused by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperdreambooth.files import InputError, read_json
from hyperdreambooth.lora.formats.keys import Layer, LoraFile

ADAPTER_METADATA = "lora_adapter_metadata"  # the header field that diffusers hands to LoraConfig, unfiltered
MAX_ALPHA = 1e6  # far above any in use: the largest ranks are a few thousand
MAX_CONFIG = 2**18  # characters of JSON: parsed, each costs about thirty bytes
_BESIDE = "adapter_config.json"
# initialisations that change the base's weights
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED = {
    "modules_to_save": "whole layers besides the LoRA",
    "target_parameters": "parameters that are no layer's weight",
    "trainable_token_indices": "embeddings of words",
    "layer_replication": "repeated layers",
    "lora_bias": "biases",
    "alora_invocation_tokens": "a LoRA that some words switch on",
    "use_qalora": "a LoRA of a quantised base",
    "use_bdlora": "a block-diagonal LoRA",
    "kasa_config": "a base with changed weights",
    "arrow_config": "a choice among several LoRAs",
    "monteclora_config": "a random LoRA",
}
"""Fields of PEFT 0.21 that mean more than `up @ down` if they hold something, and what they mean."""
# What patterns of names need. Some regular expressions take for ever, and files come from strangers.
_HARMLESS = re.compile(r"(?:[\w^$|-]|\\[.]|(?:\.|\\[dw]|\[[\w-]+\])[*+]?|\((?:\?:)?[\w.|\\]+\))*")
_MAX_CHOICES = 12
_MAX_REPEATS = 3  # of `*` and `+`: each makes a search longer by the length of a name


def config_of(file: LoraFile) -> dict[str, Any]:
    """Reads PEFT's configuration of a file: diffusers keeps it in the header, PEFT in a file beside it.

    A file with PEFT's own names (`base_model.model.`) has its configuration beside it under any name.

    Raises:
        InputError: not JSON, too long, or a field that changes more than `up @ down`.
    """
    path = file.path
    beside, where = path.with_name(_BESIDE), f"{path}: header field {ADAPTER_METADATA}"
    own = path.name == "adapter_model.safetensors" or all(
        layer.module.startswith("base_model.model.") for layer in file.modules.values()
    )
    if own and beside.is_file() and ADAPTER_METADATA not in file.metadata:
        config, where = read_json(beside), str(beside)
    else:
        config = _parsed(file.metadata.get(ADAPTER_METADATA, "{}"), where)
    if not isinstance(config, dict):
        raise InputError(f"{where}: expected an object, got {str(config)[:80]}; get the file again")
    _check(config, where)
    asks = any(key.rpartition(".")[2] == "use_dora" and value for key, value in config.items())
    if asks and not any(layer.dora for layer in file.modules.values()):
        raise InputError(f"{where}: use_dora is true, but the file has no magnitudes; get the file again")
    return config


def scale_of(
    file: LoraFile,
    config: Mapping[str, Any],
    component: str,
    layer: Layer,
    rank: int | None,
    alpha: float | None,
) -> float:
    """Returns the factor of ΔW: the layer's own alpha over the rank, or what PEFT's configuration says.

    Args:
        file: the file, for messages.
        config: PEFT's configuration, from `config_of`.
        component: the part of the pipeline that the layer belongs to.
        layer: the layer, as the file spells it: patterns are matched against that.
        rank: by which alpha is divided; None for a kind without one, where only PEFT scales.
        alpha: of the layer's own tensor; None if it has none.

    Raises:
        InputError: an alpha that cannot be right, or another rank than the configuration says.
    """
    if alpha is not None and rank is not None:
        if not abs(alpha) <= MAX_ALPHA:
            raise InputError(f"{file.path}: {layer.module[:200]}: alpha is {alpha:g}; get the file again")
        return alpha / rank
    fields = {key.removeprefix(f"{component}."): value for key, value in config.items()}
    name = layer.module.removeprefix("base_model.model.").removeprefix(f"{component}.")
    try:
        expected = int(_chosen(file.path, fields, "rank_pattern", name, fields.get("r", rank or 1)))
        usual = fields.get("lora_alpha", fields.get("alpha", expected))
        alpha = float(_chosen(file.path, fields, "alpha_pattern", name, usual))
        if not abs(alpha) <= MAX_ALPHA:
            raise ValueError
    except (TypeError, AttributeError, OverflowError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        what = (
            "r, lora_alpha, rank_pattern or alpha_pattern holds no usable number; correct the configuration"
        )
        raise InputError(f"{file.path}: {component}: {what}") from None
    if expected != (rank or expected) or expected < 1:
        ranks = f"PEFT's configuration has rank {expected}, the matrices have {rank}"
        raise InputError(f"{file.path}: {name[:200]}: {ranks}; get the file and its configuration again")
    return alpha / (expected**0.5 if fields.get("use_rslora") else expected)


def _parsed(text: str, where: str) -> Any:
    if len(text) > MAX_CONFIG:
        limit = f"expected at most {MAX_CONFIG} characters, got {len(text)}; get the file again"
        raise InputError(f"{where}: {limit}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); get the file again") from None


def _check(config: Mapping[str, Any], where: str) -> None:
    """Refuses fields that mean more than `up @ down`; diffusers' header puts a component before the names."""
    for key, value in config.items():
        field = key.rpartition(".")[2]
        if field in _REFUSED and value:
            raise _refusal(where, key, value, _REFUSED[field])
        if field == "bias" and value not in (None, False, "none"):
            raise _refusal(where, key, value, "changed biases")
        if field == "peft_type" and str(value).upper() not in ("LORA", "LOHA", "LOKR", "NONE"):
            raise _refusal(where, key, value, "another kind of adapter")
        if field == "init_lora_weights" and str(value).lower().startswith(_OTHER_BASE):
            advice = "save it with PEFT's path_initial_model_for_weight_conversion: then it fits the base"
            raise InputError(f"{where}: {key} = {value!r} means a base with changed weights; {advice}")


def _refusal(where: str, key: str, value: Any, meaning: str) -> InputError:
    advice = "which cannot be worn; merge it into the base with PEFT"
    return InputError(f"{where}: {key} = {str(value)[:60]} means {meaning}, {advice}")


def _chosen(path: Path, fields: Mapping[str, Any], field: str, name: str, otherwise: Any) -> Any:
    """Returns the value of the first pattern that fits a layer, as PEFT 0.21 does (`get_pattern_key`)."""
    patterns: Mapping[str, Any] = fields.get(field) or {}
    return next((value for key, value in patterns.items() if fits(path, field, key, name)), otherwise)


def fits(path: Path, field: str, key: str, name: str) -> bool:
    """Whether a regular expression fits the whole name of a layer, or the end of it that follows a dot."""
    if re.fullmatch(r"[\w.]+", key):  # thousands of full names are usual, for every layer of thousands
        start = len(name) - len(key)
        alike = start >= 0 and all(a in (".", b) for a, b in zip(key, name[start:], strict=True))
        return alike and (start == 0 or name[start - 1] == ".")
    safe = len(re.findall("[*+]", key)) <= _MAX_REPEATS and key.count("|") <= _MAX_CHOICES
    if len(key) > 200 or not safe or not _HARMLESS.fullmatch(key):
        wanted = "expected names, digits, '.*' and groups of alternatives; write the layers' names in full"
        raise InputError(f"{path}: {field} has the pattern {key[:80]!r}: {wanted}")
    try:
        return re.match(rf"(.*\.)?({key})$", name) is not None
    except re.error as error:
        what = f"{field} has the pattern {key[:80]!r}, which is no regular expression ({error})"
        raise InputError(f"{path}: {what}; correct it") from None
