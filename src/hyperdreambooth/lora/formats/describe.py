"""A summary of a LoRA file, whatever base it was made for."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from hyperdreambooth.files import open_tensors
from hyperdreambooth.lora.formats.headers import BASE_FINGERPRINT
from hyperdreambooth.lora.formats.read import check_numbers, open_lora


def describe(path: Path) -> dict[str, Any]:
    """Summarises a LoRA file, whatever base it is for; refuses one that is damaged, or no LoRA.

    `format` tells whose names it uses. `base`, `base_fingerprint`, `trigger` and `metadata` are the header's;
    `ranks`, `alphas` and number formats (`dtypes`) are those of the tensors; `layers` counts them by part of
    the pipeline.
    """
    file = open_lora(path)
    modules, metadata = file.modules, file.metadata
    with open_tensors(path) as tensors:
        check_numbers(file, tensors)
        alphas = {float(tensors.get_tensor(module.alpha)) for module in modules.values() if module.alpha}
    words = [re.split(r"[._]", name)[: 2 if name.startswith("lora_") else 1] for name in modules]
    first = next(iter(modules.values())).down
    ours = first.startswith(("unet.", "transformer.", "text_encoder"))
    form = "kohya" if first.startswith("lora_") else "diffusers" if ours else "PEFT or the original model"
    return {
        "format": form,
        "base": metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture") or "unknown",
        "base_fingerprint": metadata.get(BASE_FINGERPRINT, ""),
        "trigger": metadata.get("modelspec.trigger_phrase", ""),
        "ranks": sorted({file.entries[module.down].shape[0] for module in modules.values()}),
        "alphas": sorted(alphas),
        "layers": dict(Counter("_".join(part) for part in words)),
        "dtypes": sorted({entry.dtype for entry in file.entries.values()}),
        "metadata": metadata,
    }
