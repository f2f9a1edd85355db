"""Reading a LoRA in any spelling: first the file by itself, then what it means on a base."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hyperdreambooth.files import InputError, check_finite, open_tensors, read_json
from hyperdreambooth.lora.formats.container import Entry, read_header
from hyperdreambooth.lora.formats.names import Rows, lookup, plain
from hyperdreambooth.lora.relax import padded
from hyperdreambooth.shapes import Factors, Site

ADAPTER_METADATA = "lora_adapter_metadata"  # the header field that diffusers hands to LoraConfig, unfiltered
MAX_ALPHA = 1e6  # far above any in use: the largest ranks are a few thousand
MAX_CONFIG = 2**18  # characters of JSON: parsed, each costs about thirty bytes
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
    r"|(?P<up>lora_B|lora_up|lora\.up|lora_linear_layer\.up))(?:\.[^.]+)?\.weight"
)
_OLD = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")  # diffusers before PEFT


Matrices: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""Site name → (down `(r, i)`, up `(o, r)`), each of its own rank."""


@dataclass
class Module:
    """One adapted layer of a file: the keys of its matrices, and the key of its alpha if it has one."""

    down: str = ""
    up: str = ""
    alpha: str = ""


@dataclass
class LoraFile:
    """A LoRA file whose tensors have not been read yet: layers by name, without wrappers → their keys."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    modules: dict[str, Module] = field(default_factory=dict[str, Module])


def open_lora(path: Path) -> LoraFile:
    """Reads the header of a LoRA file and sorts its keys into layers; refuses keys that no LoRA has."""
    file = LoraFile(path, *read_header(path))
    unknown = [key for key, entry in file.entries.items() if not _sort(file, key, entry)]
    if unknown:
        raise InputError(f"{path}: not keys of a LoRA in a supported form: {_some(unknown)}")
    if not any(module.down or module.up for module in file.modules.values()):
        raise InputError(f"{path}: expected a LoRA (lora_A and lora_B, or lora_down and lora_up), found none")
    for name, module in file.modules.items():
        _check_halves(file, name, module)
    return file


def read_lora(path: Path, layers: Sequence[Site]) -> tuple[Factors, dict[str, str]]:
    """Reads a LoRA in diffusers', PEFT's, kohya's or the original models' spelling, alpha folded into `up`.

    Args:
        path: a safetensors file; for PEFT's `adapter_model`, `adapter_config.json` beside it gives alpha.
        layers: the base's layers. The file may adapt fewer of them; one that adapts others is refused.

    Returns:
        Float32 factors with n = 1 and one rank (smaller ones are zero-padded), and the file's metadata.
    """
    file = open_lora(path)
    places = lookup(layers)
    if strange := [name for name in file.modules if name not in places]:
        raise InputError(f"{path}: keys that fit no layer of this base: {_some(strange)}")
    _check_shapes(file, places)
    config = _config(path, file.metadata)
    with open_tensors(path) as tensors:
        check_numbers(file, tensors)
        matrices: Matrices = {}
        for name, module in file.modules.items():
            down, up = (tensors.get_tensor(key).flatten(1).float() for key in (module.down, module.up))
            _check_rest(path, name, up, places[name])
            alpha = float(tensors.get_tensor(module.alpha)) if module.alpha else None
            for site, rows in places[name]:
                scale = _scale(path, config, site.name, len(down), alpha)
                matrices[site.name] = _share(down, up * scale, site, rows)
    if overflown := [site for site, pair in matrices.items() if not pair[1].isfinite().all()]:
        too_large = "alpha times up is too large for float32"
        raise InputError(f"{path}: {overflown[0]}: {too_large}; get the file again")
    factors = {name: (down[None], up[None]) for name, (down, up) in sorted(matrices.items())}
    return padded([factors]), file.metadata


def check_numbers(file: LoraFile, tensors: Any) -> None:
    """Refuses a file, as opened by `open_tensors`, that holds NaN or infinite numbers."""
    for key in file.entries:
        check_finite(file.path, key, tensors.get_tensor(key))


def _sort(file: LoraFile, key: str, entry: Entry) -> bool:
    """Records a key under its layer; returns False if no LoRA has such a key."""
    old = _OLD.sub(r".to_\1.lora.\2.weight", key).replace(".to_out.lora.", ".to_out.0.lora.")
    match = _KEY.fullmatch(old if old != key else key)
    if match is None:
        if key.endswith(".alpha") and entry.shape in ((), (1,)):
            file.modules.setdefault(plain(key.removesuffix(".alpha")), Module()).alpha = key
            return True
        return False
    module = file.modules.setdefault(plain(match["module"]), Module())
    half = "down" if match["down"] else "up"
    if getattr(module, half):
        what = f"two {half} matrices for {match['module'][:200]}"
        raise InputError(f"{file.path}: {what}; expected one adapter per file")
    setattr(module, half, key)
    return True


def _check_halves(file: LoraFile, name: str, module: Module) -> None:
    if not (module.down and module.up):
        has = "down" if module.down else "up" if module.up else "alpha"
        raise InputError(f"{file.path}: {name[:200]} has only its {has} matrix; get the file again")
    down, up = (_matrix(file.entries[key].shape) for key in (module.down, module.up))
    if down is None or up is None or not 0 < down[0] == up[1]:
        got = f"{file.entries[module.down].shape} and {file.entries[module.up].shape}"
        raise InputError(f"{file.path}: {name[:200]}: expected down (r, i) and up (o, r), got {got}")


def _matrix(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the shape of a matrix, or of a 1×1 convolution as a matrix; None for anything else."""
    return (shape[0], shape[1]) if len(shape) in (2, 4) and set(shape[2:]) <= {1} else None


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(key[:120] for key in sorted(keys)[:5]) + more


def _check_shapes(file: LoraFile, places: Mapping[str, Sequence[tuple[Site, Rows]]]) -> None:
    taken: set[str] = set()
    for name, module in file.modules.items():
        down, up = file.entries[module.down].shape, file.entries[module.up].shape
        for site, rows in places[name]:
            where = f"{file.path}: {site.name}"
            if (down[1], up[0]) != (site.in_features, rows.total):
                fits = f"down (r, {site.in_features}) and up ({rows.total}, r)"
                raise InputError(
                    f"{where}: expected {fits}, got {down} and {up}; it was made for another base"
                )
            if down[0] > site.in_features + rows.total:
                raise InputError(f"{where}: rank {down[0]} exceeds the layer's size; get the file again")
            if site.name in taken:
                raise InputError(
                    f"{file.path}: two down matrices for {site.name}; expected one adapter per file"
                )
            taken.add(site.name)


def _share(down: Tensor, up: Tensor, site: Site, rows: Rows) -> tuple[Tensor, Tensor]:
    """Returns a site's part of a layer that several share: its rows, and the ranks that reach them."""
    if rows.total == site.out_features:
        return down, up
    own = up[rows.start : rows.start + site.out_features]
    used = own.abs().amax(0) > 0
    used[0] |= not used.any()
    return down[used], own[:, used]


def _check_rest(path: Path, name: str, up: Tensor, parts: Sequence[tuple[Site, Rows]]) -> None:
    """Refuses a fused layer that also changes rows for which the base has no layer."""
    rest = torch.ones(len(up), dtype=torch.bool)
    for site, rows in parts:
        rest[rows.start : rows.start + site.out_features] = False
    if bool(up[rest].any()):
        advice = "pass the base that it was made for"
        raise InputError(f"{path}: {name} changes rows that no layer of this base has; {advice}")


def _config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Reads PEFT's configuration of the file: diffusers keeps it in the header, PEFT in a file beside it."""
    beside, header = path.with_name("adapter_config.json"), f"{path}: header field {ADAPTER_METADATA}"
    if path.name == "adapter_model.safetensors" and beside.is_file():
        config = read_json(beside)
    else:
        text = metadata.get(ADAPTER_METADATA, "{}")
        if len(text) > MAX_CONFIG:
            limit = f"expected at most {MAX_CONFIG} characters, got {len(text)}; get the file again"
            raise InputError(f"{header}: {limit}")
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{header} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{header}: expected an object, got {str(config)[:80]}")
    return config


def _scale(path: Path, config: Mapping[str, Any], site: str, rank: int, alpha: float | None) -> float:
    """Returns the factor of ΔW: the layer's own alpha over the rank, or what PEFT's configuration says."""
    if alpha is not None:
        if abs(alpha) > MAX_ALPHA:
            raise InputError(f"{path}: {site}: alpha is {alpha:g}; get the file again")
        return alpha / rank
    part, _, inner = site.partition(".")
    fields = {key.removeprefix(f"{part}."): value for key, value in config.items()}
    patterns: Any = fields.get("alpha_pattern") or {}
    try:
        # PEFT reads the keys as regular expressions; only names are ever written, and they are cheap to match
        named = (v for key, v in patterns.items() if f".{inner}".endswith(f".{key.removeprefix('^')}"))
        alpha = float(next(named, fields.get("lora_alpha", rank)))
        if not abs(alpha) <= MAX_ALPHA:
            raise ValueError
    except (TypeError, ValueError, AttributeError, OverflowError):
        what = "lora_alpha or alpha_pattern holds no usable number; correct the header"
        raise InputError(f"{path}: {part}: {what}") from None
    return alpha / (rank**0.5 if fields.get("use_rslora") else rank)
