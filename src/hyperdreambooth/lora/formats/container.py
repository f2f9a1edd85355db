"""The header of a safetensors file, read before anything in it is believed.

Files come from strangers. The header alone says which tensors there are, so everything that can be refused is
refused from it, before a tensor is touched, and no file costs more memory than a small multiple of its size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hyperdreambooth.files import InputError

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""The number formats a LoRA may have, and their bytes."""
MAX_HEADER = 2**21  # bytes; the largest seen in the field, all metadata of a training set included, is below
MAX_STRUCTURE = 2**18  # of these outside strings: parsed, every byte costs about thirty
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_CHUNK = 2**20


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor: its number format as in the file, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Checks the header of a safetensors file against the file.

    Args:
        path: the file.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        InputError: no file (or a link that leads nowhere), a truncated or damaged one, another kind of file,
            duplicate names, number formats that no adapter has.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'expected a file, found a folder' if path.is_dir() else 'no such file'}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _broken(path, f"{size} bytes hold no header of {length}")
        if length > MAX_HEADER:
            raise _broken(path, f"a header of {length} bytes, expected {MAX_HEADER} at most")
        raw = file.read(length)
    try:
        _check_structure(raw)
        header = json.loads(raw, object_pairs_hook=_unique)
        return _entries(header, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise _broken(path, str(error)) from None


@contextmanager
def open_tensors(path: Path) -> Generator[Any]:
    """The file as safetensors opens it; whatever it finds wrong is an InputError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _broken(path, str(error)) from None


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, looked at piece by piece: eight-bit floats cannot say it themselves."""
    return all(bool(piece.float().isfinite().all()) for piece in tensor.flatten().split(_CHUNK))


def _broken(path: Path, why: str) -> InputError:
    advice = "get it again, or convert it (pickles: .bin, .pt, .ckpt are never read)"
    return InputError(f"{path}: not a whole safetensors file; {advice}: {why[:200]}")


def _check_structure(raw: bytes) -> None:
    """A header may hold long texts, but only so many things: parsing is what would cost memory."""
    at = outside = 0
    while outside <= MAX_STRUCTURE and (quote := raw.find(b'"', at)) >= 0:
        found = _STRING.match(raw, quote)
        if found is None:
            raise ValueError("a text in the header does not end")
        outside, at = outside + quote - at + 2, found.end()
    if outside + len(raw) - at > MAX_STRUCTURE:
        raise ValueError("more tensors in the header than any adapter has")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in the header")
    return made


def _entries(header: Any, data: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """The header's tensors, which must fill the `data` bytes behind it without gap or overlap."""
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("the metadata are no texts")
    spans: list[tuple[int, int]] = []
    entries: dict[str, Entry] = {}
    for name, told in header.items():
        entries[name], span = _entry(name, told)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("tensors overlap or leave a gap")
        end = stop
    if end != data:
        raise ValueError(f"tensors of {end} bytes, {data} in the file")
    return entries, metadata


def _entry(name: str, told: Any) -> tuple[Entry, tuple[int, int]]:
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:80]!r}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FLOATS:
        raise ValueError(
            f"tensor {name[:80]!r}: number format {str(dtype)[:20]!r}, expected one of {[*FLOATS]}"
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name[:80]!r}: shape or data_offsets are no sizes")
    if offsets[1] - offsets[0] != math.prod(shape) * FLOATS[dtype]:
        raise ValueError(f"tensor {name[:80]!r}: its bytes do not make its shape")
    return Entry(dtype, tuple(shape)), (offsets[0], offsets[1])


def _sizes(numbers: Any) -> bool:
    """Whole numbers of a size that a file can have, few enough to multiply."""
    few: Sequence[Any] = numbers if isinstance(numbers, list) and len(numbers) <= 8 else [None]
    return all(type(number) is int and 0 <= number < 2**48 for number in few)
