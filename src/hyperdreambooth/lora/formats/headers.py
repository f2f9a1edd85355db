"""What a LoRA file says of itself: PEFT's fields for diffusers, kohya's and ModelSpec's for others."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor

from hyperdreambooth.lora.formats.names import SD2, LoraFamily
from hyperdreambooth.shapes import Site

BASE_FINGERPRINT = "hyperdreambooth.base_fingerprint"
"""Our own header field: bases of the same shapes would wear each other's people without a word."""
BASE_NAME = "hyperdreambooth.base"
"""Our own header field: the name of that base, for warnings that name both."""
CONSENT = "hyperdreambooth.consent"
"""Our own header field: on what ground the person's photos were used: `self`, `consented`, `synthetic`."""
_SIDES = {"sd1": 512, "sd2": 512}
"""Family → side in pixels of its pictures, where nobody knows better; 1024 for all others."""


@dataclass(frozen=True)
class LoraInfo:
    """What interfaces show of a LoRA."""

    trigger: str  # the word that means this person in prompts
    base: str  # the base it was made for
    resolution: int | None  # side of its pictures in pixels; None for the side that its family was made for
    title: str  # a name for people
    steps: int = 0  # of the finetune
    base_fingerprint: str = ""  # of the weights of that base; empty where nobody knows
    family: str = ""  # of that base, a key of `FAMILIES`; where nobody knows, the layers have to show it
    consent: str = ""  # on what ground the photos were used, see `CONSENT`; empty where nobody said


def peft_config(sites: Sequence[Site], rank: int) -> str:
    """Only fields that every PEFT knows: an unknown one is a TypeError in the reader."""
    fields: dict[str, Any] = {}
    for part in sorted({site.component for site in sites}):
        inside = [site.name.partition(".")[2] for site in sites if site.component == part]
        fields |= {f"{part}.r": rank, f"{part}.lora_alpha": rank, f"{part}.target_modules": inside}
    return json.dumps(fields, sort_keys=True)


def model_spec(info: LoraInfo, family: LoraFamily, implementation: str, digest: str) -> dict[str, str]:
    """ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec).

    `implementation` is whose names the keys are, `digest` the SHA-256 of everything behind the header.
    """
    side = info.resolution or _SIDES.get(family.name, 1024)
    architecture = "stable-diffusion-v2-768-v" if _is_768_v(family, side) else family.architecture
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
        "modelspec.title": info.title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.trigger_phrase": info.trigger,
        "modelspec.usage_hint": f"write {info.trigger} where the person is meant; base: {info.base}",
        "modelspec.hash_sha256": f"0x{digest}",
    }


def kohya_fields(info: LoraInfo, family: LoraFamily, name: str, rank: int, digest: str) -> dict[str, str]:
    """What A1111, Forge and kohya's own tools show; `name` is the file's stem, A1111's alias for it."""
    side = info.resolution or _SIDES.get(family.name, 1024)
    return {
        "ss_v2": str(family is SD2),
        "ss_base_model_version": f"{family.version}_v" if _is_768_v(family, side) else family.version,
        "ss_sd_model_name": info.base,
        "ss_network_module": family.network,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": "{}",
        "ss_output_name": name,
        "ss_resolution": f"({side}, {side})",
        "ss_steps": str(info.steps),
        "ss_tag_frequency": json.dumps({"person": {info.trigger: 1}}),
        "sshs_model_hash": digest,
    }


def _is_768_v(family: LoraFamily, side: int) -> bool:
    """Whether tools should take it for Stable Diffusion 2 at 768 pixels, which predicts a velocity."""
    return family is SD2 and side >= 768


def resolution_of(metadata: Mapping[str, str]) -> int | None:
    """The side in pixels that a LoRA's header names (`1024x1024`, `(512, 512)`); None where it names none."""
    for field in ("modelspec.resolution", "ss_resolution"):
        if found := re.search(r"\d{1,5}", metadata.get(field, "")):
            return int(found[0])
    return None


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what stands behind the header of the file these tensors make."""
    blob = memoryview(to_bytes(dict(tensors)))
    return hashlib.sha256(blob[8 + int.from_bytes(blob[:8], "little") :]).hexdigest()
