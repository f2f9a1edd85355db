"""Loads what commands work on: the base, the hypernetwork, adapter files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

import diffusers
import huggingface_hub.utils
import transformers

from hyperdreambooth.adapter import Adapter, load_adapter
from hyperdreambooth.apps.settings import BaseConfig
from hyperdreambooth.base.load import Base, is_embedded, load_base
from hyperdreambooth.files import InputError
from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET, hypernet_folder, load_hypernet, load_info
from hyperdreambooth.lidb.basis import Basis
from hyperdreambooth.personalize import Personalizer


def load(config: BaseConfig) -> Base:
    """Loads the base that a command's config names."""
    _hide_loading_bars()
    return load_base(config.base, **config.model_dump(exclude={"base"}))


def load_personalizer(config: BaseConfig, hypernet: str | None) -> Personalizer:
    """Loads the base and its hypernetwork; None stands for the hypernetwork of the embedded avatars.

    Raises:
        InputError: no hypernetwork for another base than the embedded one, two that do not belong together,
            or another trigger or class word than that of the training.
    """
    if hypernet is None and not is_embedded(config.base):
        raise InputError(
            f"hypernet: expected the one trained for base {config.base}, got none; name its folder or hub id"
        )
    folder = hypernet_folder(hypernet or EMBEDDED_HYPERNET)
    info = load_info(folder)
    for key in ("trigger", "class_word"):  # before gigabytes are loaded
        trained, asked = getattr(info, key), getattr(config, key)
        if asked not in (None, trained):
            raise InputError(
                f"{key}: the hypernetwork was trained with {trained!r}, got {asked!r}; leave it out"
            )
    base = load(config)
    return Personalizer(base, load_hypernet(folder, base.device))


def _hide_loading_bars() -> None:
    """Hides the bars that other libraries show while they read local files; downloads keep theirs."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()


def open_adapter(file: Path, base: Base, hypernet: str | None = None) -> Adapter:
    """Opens an adapter file of any format and checks it against the base.

    Args:
        file: the adapter.
        base: the base that will wear it.
        hypernet: the hypernetwork that predicted it, which holds the aux bases if they were learned.

    Raises:
        InputError: the file is damaged, or was made for another base or other aux bases.
    """

    def basis_of(source: str) -> Basis:
        basis = load_hypernet(hypernet or EMBEDDED_HYPERNET, base.device).basis
        if basis.source != source:
            raise InputError(
                f"{file}: expected a LiDB over the aux bases {basis.source}, got one over {source}; "
                "pass the hypernetwork that predicted it with --hypernet"
            )
        return basis

    return load_adapter(file, base, basis_of)


def open_sum(
    files: Sequence[Path], weights: Sequence[float], base: Base, hypernet: str | None = None
) -> Adapter | None:
    """Opens adapter files and adds them up with their weights, which are 1 where none are given.

    Returns:
        The sum, or None where there are no files.

    Raises:
        InputError: the numbers of weights and files differ, a weight is not finite, or a file does not fit.
    """
    if strange := [weight for weight in weights if not math.isfinite(weight)]:
        raise InputError(f"--weight: expected finite numbers, got {strange[0]}")
    if len(weights) not in (0, len(files)):
        raise InputError(
            f"--weight: expected one for each of the {len(files)} adapters or none, got {len(weights)}"
        )
    adapters = [open_adapter(file, base, hypernet) for file in files]
    weighted = [weight * one for one, weight in zip(adapters, weights, strict=True)] if weights else adapters
    return reduce(add, weighted) if weighted else None
