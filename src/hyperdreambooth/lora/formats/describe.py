"""What a LoRA file says of itself, whatever base it was made for."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from hyperdreambooth.lora.formats.container import open_tensors
from hyperdreambooth.lora.formats.headers import BASE_FINGERPRINT
from hyperdreambooth.lora.formats.read import check_finite, open_lora


def describe(path: Path) -> dict[str, Any]:
    """What a LoRA file is, whatever base it is for.

    Returns:
        `format` (whose names), `base`, `base_fingerprint` and `trigger` as the header tells them, `ranks`,
        `alphas` of the file's own tensors, `layers` a part of the pipeline, number formats and `metadata`.

    Raises:
        InputError: no LoRA file, or a damaged one.
    """
    file = open_lora(path)
    modules, told = file.modules, file.metadata
    with open_tensors(path) as tensors:
        check_finite(file, tensors)
        alphas = {float(tensors.get_tensor(module.alpha)) for module in modules.values() if module.alpha}
    parts = Counter(
        "_".join(re.split(r"[._]", name)[: 2 if name.startswith("lora_") else 1]) for name in modules
    )
    return {
        "format": _form(next(iter(modules.values())).down),
        "base": told.get("ss_base_model_version") or told.get("modelspec.architecture") or "not told",
        "base_fingerprint": told.get(BASE_FINGERPRINT, ""),
        "trigger": told.get("modelspec.trigger_phrase", ""),
        "ranks": sorted({file.rank(module) for module in modules.values()}),
        "alphas": sorted(alphas),
        "layers": dict(parts),
        "dtypes": sorted({entry.dtype for entry in file.entries.values()}),
        "metadata": told,
    }


def _form(key: str) -> str:
    """Whose way of naming a key follows."""
    if key.startswith("lora_"):
        return "kohya"
    return (
        "diffusers"
        if key.startswith(("unet.", "transformer.", "text_encoder"))
        else "PEFT or the original model"
    )
