"""The header of a LoRA file, checked before any tensor is read: files come from strangers.

safetensors itself refuses headers that do not fit the file, or are not JSON. It accepts a name that occurs
twice, integers, and headers that take fifty times their size in memory; these are refused here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from hyperdreambooth.files import InputError, broken_tensors, check_file, open_tensors

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""The number formats that matrices may have."""
NUMBERS = (*FLOATS, "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
"""The number formats that a single number may have: kohya's extraction tools write alpha as an integer."""
MAX_HEADER = 2**21  # bytes; larger than any header seen in the field, metadata of a training set included
_TENSOR = re.compile(rb'"data_offsets"\s*:\s*\[')  # once in each tensor's entry; metadata values are strings


@dataclass(frozen=True)
class Entry:
    """The header's entry of one tensor: its number format, as spelled in the file, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Reads a safetensors file's header: the entries of the tensors by name, and the metadata."""
    check_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise broken_tensors(path, f"the header has {length} bytes, expected at most {MAX_HEADER}")
        names = len(_TENSOR.findall(file.read(length)))
    with open_tensors(path) as tensors:
        views = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
        entries = {name: Entry(view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
        metadata = dict(tensors.metadata() or {})
    if len(entries) != names:
        raise broken_tensors(path, "a tensor name occurs twice in the header")
    for name, entry in entries.items():
        allowed = NUMBERS if prod(entry.shape) == 1 else FLOATS
        if entry.dtype not in allowed:
            wanted = f"expected one of {', '.join(allowed)}; convert the file"
            raise InputError(f"{path}: tensor {name[:80]!r} has number format {entry.dtype!r}, {wanted}")
    return entries, metadata
