"""Fingerprints of a base's weights, which do not depend on the number format or bits it is loaded in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hyperdreambooth.shapes import canonical
from hyperdreambooth.sites import quantized

_HEAD = 64  # numbers of each weight that are hashed


def weights_fingerprint(
    components: Mapping[str, nn.Module], stored: Path | None = None, variant: str | None = None
) -> str:
    """Returns sixteen hex digits of the name, shape and first 64 numbers of every weight.

    The numbers are hashed as float16, so that float32 and float16 copies of a base accept the same adapters.
    bfloat16 is less precise than float16, so the numbers of a bfloat16 or quantised copy are read from its
    files in `stored`, the pipeline's folder; without it, such a copy has another fingerprint.
    """
    lines: list[str] = []
    probes: list[bytes] = []
    for part, module in sorted(components.items()):
        rounded = any(p.dtype == torch.bfloat16 or quantized(p) for p in module.parameters())
        files = _heads(stored / part, part, variant) if rounded and stored is not None else {}
        for name, p in sorted(module.named_parameters()):
            packed = getattr(p, "quant_state", None)
            lines.append(f"{part}.{name}:{tuple(p.shape if packed is None else packed.shape)}")
            if not p.is_meta:  # a skeleton has no numbers
                numbers = files.get(canonical(part, name))
                numbers = p.detach().flatten()[:_HEAD] if numbers is None else numbers
                probes.append(numbers.half().cpu().numpy().tobytes())
    return hashlib.sha256("\n".join(lines).encode() + b"".join(probes)).hexdigest()[:16]


def files_fingerprint(folders: Sequence[Path], variant: str | None = None) -> str:
    """Returns sixteen hex digits of the first numbers of every weight in the files of some components."""
    digest = hashlib.sha256()
    for folder in folders:
        for name, numbers in sorted(_heads(folder, folder.name, variant).items()):
            digest.update(name.encode() + numbers.half().numpy().tobytes())
    return digest.hexdigest()[:16]


def _heads(folder: Path, part: str, variant: str | None) -> dict[str, Tensor]:
    """Reads the first numbers of every weight in a component's files, by canonical name."""
    heads: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.stem.partition(".")[2].partition("-")[0] == (variant or ""):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    # mapped into memory, so that the rest is not read
                    heads[canonical(part, name)] = tensors.get_tensor(name).flatten()[:_HEAD]
    return heads
