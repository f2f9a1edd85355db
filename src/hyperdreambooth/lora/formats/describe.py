"""A summary of a LoRA file, whatever base it was made for."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from hyperdreambooth.files import open_tensors
from hyperdreambooth.lora.formats.change import rank_of
from hyperdreambooth.lora.formats.headers import BASE_FINGERPRINT
from hyperdreambooth.lora.formats.keys import open_lora
from hyperdreambooth.lora.formats.read import check_numbers


def describe(path: Path) -> dict[str, Any]:
    """Summarises a LoRA file, whatever base it is for; refuses one that is damaged, or no LoRA.

    `format` tells whose names it uses. `base`, `base_fingerprint`, `trigger` and `metadata` are the header's;
    `kinds`, `ranks`, `alphas` and number formats (`dtypes`) are those of the tensors; `layers` counts them by
    part of the pipeline.
    """
    file = open_lora(path)
    modules, metadata = file.modules, file.metadata
    with open_tensors(path) as tensors:
        check_numbers(file, tensors)
        keys = [layer.parts["alpha"] for layer in modules.values() if "alpha" in layer.parts]
        alphas = {float(tensors.get_tensor(key)) for key in keys}
    words = [re.split(r"[._]", name)[: 2 if name.startswith("lora_") else 1] for name in modules]
    first = next(iter(modules.values())).spelled
    ours = first.startswith(("unet.", "transformer.", "text_encoder"))
    form = "kohya" if first.startswith("lora_") else "diffusers" if ours else "PEFT or the original model"
    ranks = {rank_of(file.shapes(layer)) for layer in modules.values()}
    return {
        "format": form,
        "kinds": sorted({f"DoRA ({layer.kind})" if layer.dora else layer.kind for layer in modules.values()}),
        "base": metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture") or "unknown",
        "base_fingerprint": metadata.get(BASE_FINGERPRINT, ""),
        "trigger": metadata.get("modelspec.trigger_phrase", ""),
        "ranks": sorted(rank for rank in ranks if rank is not None),
        "alphas": sorted(alphas),
        "layers": dict(Counter("_".join(part) for part in words)),
        "dtypes": sorted({entry.dtype for entry in file.entries.values()}),
        "metadata": metadata,
    }
