"""Which device a base computes on."""

from __future__ import annotations

import os
from contextlib import suppress

import torch

from hyperdreambooth.files import InputError


def pick_device(device: str = "auto") -> torch.device:
    """`auto` → CUDA (of several GPUs the one of this process), else MPS, else CPU."""
    found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    here = [kind for kind, count in found.items() if count]
    with suppress(RuntimeError):  # what torch says of a word that names none
        name = here[0] if device == "auto" else device
        if name == "cuda" and found["cuda"]:
            name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % found['cuda']}"
        asked = torch.device(name)
        if (asked.index or 0) < found.get(asked.type, 0):
            return asked
    raise InputError(f"device: expected auto or one of those here ({', '.join(here)}), got {device}")
