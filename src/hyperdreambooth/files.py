"""Whole files: everything is written under a hidden name and renamed, so that nobody ever sees half a file.

Nothing is ever unpickled. `InputError` is for mistakes of the user; a full disk stays an `OSError`.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor


class InputError(ValueError):
    """The user's input is wrong. One line says what is wrong with which file or field, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class DiskFull(OSError):
    """The disk is full. One line says which file or folder did not fit, and its size where that is known."""

    def __init__(self, path: Path, needed: int | None = None) -> None:
        size = f"{needed / 1e6:.1f} MB" if needed and needed >= 1e6 else f"{(needed or 0) / 1e3:.1f} kB"
        size = f", which needs {size}," if needed else ""
        super().__init__(errno.ENOSPC, f"the disk is full: {path}{size} did not fit")
        self.needed = needed


@contextmanager
def room_for(path: Path, needed: int | None = None) -> Generator[None]:
    """Names the path, and the bytes that it needs, where a block ends because the disk or a quota is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(path, getattr(error, "needed", None) or needed) from None


def _beside(path: Path) -> Path:
    """Returns a hidden, unique name in the same folder; writers recognise the format by its suffix."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path.parent}: expected a folder, found a file; choose another output") from None
    stem = path.stem.encode(errors="surrogateescape")[:100].decode(errors="ignore")  # at most 255 in all
    return path.parent / f".{stem}.{uuid.uuid4().hex[:12]}.tmp{path.suffix}"


def _sync(path: Path) -> None:
    """Flushes a path to the disk, so that a rename cannot become durable before the content."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # Windows cannot open folders, and syncs only files opened for writing
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(path: Path) -> None:
    """Deletes a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be written to, without creating it."""
    place = folder.absolute()
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"out {folder}: {place}: {error.strerror}; pass another --out") from None


def check_apart(out: Path, photos: Path) -> None:
    """Refuses an output inside the folder of photos, where the next run would read it as photos."""
    if out.resolve().is_relative_to(photos.resolve()):
        raise InputError(f"out {out}: lies in {photos}, where it would be read as photos; pass another --out")


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """Yields a path to write to; the file appears at `path` whole when the block ends, or not at all."""
    if path.is_dir():
        raise InputError(f"{path}: expected a file to write, found a folder; choose another output")
    with room_for(path):
        temporary = _beside(path)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            discard(temporary)
        _sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """Yields an empty folder to fill; it replaces `path` when the block ends, or is deleted on an error."""
    if path.is_file():
        raise InputError(f"{path}: expected a folder to write, found a file; choose another output")
    with room_for(path):
        temporary, old = _beside(path), _beside(path)
        temporary.mkdir()
        try:
            yield temporary
            for inside in [*temporary.rglob("*"), temporary]:
                _sync(inside)
            if path.exists():  # a folder cannot be renamed over a full one, so this takes two renames
                os.replace(path, old)
            os.replace(temporary, path)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)
            discard(temporary)
            discard(old)
        _sync(path.parent)


def cache_home() -> Path:
    """Returns the folder of the cache that all runs share: `HDB_CACHE`, or `~/.cache/hyperdreambooth`.

    A user without a home, as in some containers, has it in the folder for temporary files.
    """
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir())
    return Path(os.environ.get("HDB_CACHE") or home / ".cache" / "hyperdreambooth")


def write_json(path: Path, data: Any) -> None:
    """Writes data as indented JSON, whole; paths become strings."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=os.fspath) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # names that are not UTF-8


def write_bytes(path: Path, content: bytes) -> None:
    """Writes bytes, whole."""
    with room_for(path, len(content)), whole_file(path) as temporary:
        temporary.write_bytes(content)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its kind where it says nothing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else f"{line[:159]}…"


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Decodes what a person wrote with any editor, and makes every line break a line feed.

    A mark at the start decides (UTF-8 or UTF-16, which PowerShell writes). Without a mark the text is UTF-8.
    A line that is not UTF-8 is read as Windows-1252, so that one old line changes no other.

    Args:
        content: the bytes of a file.
        errors: as `bytes.decode` takes it, for bytes that no encoding here explains.

    Raises:
        ValueError: with `errors="strict"`, if the bytes are not text.
    """
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            text = content[len(mark) :].decode(encoding, errors)
            break
    else:
        text = "".join(_decoded(line, errors) for line in content.splitlines(keepends=True))
    if errors == "strict" and "\0" in text:
        raise ValueError("the text has NUL characters; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def _decoded(line: bytes, errors: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("cp1252", errors)


def read_text(path: Path) -> str:
    """Reads a text file that a person wrote, in any encoding of `decode_text`.

    Raises:
        InputError: the file is missing, cannot be read, or is not text.
    """
    try:
        return decode_text(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: expected a text file, in UTF-8 for example ({error})") from None


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises `InputError` if it is missing or not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON file ({error})") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = {}) -> None:
    """Writes tensors of any type as one safetensors file, whole; copies views and shared memory."""
    from safetensors.torch import save_file  # imports torch

    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        storage = copy.untyped_storage()
        if storage.nbytes() != copy.nbytes or storage.data_ptr() in storages:
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        own[name] = copy
    size = sum(tensor.nbytes for tensor in own.values())
    with room_for(path, size), whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(own, temporary, metadata=dict(metadata) or None)
        except SafetensorError as error:  # it hides a full disk, which must stay an OSError
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, f"{os.strerror(number)} ({error})", str(path)) from None
        temporary.chmod(mode)  # safetensors writes files that only their owner may read


def check_file(path: Path) -> None:
    """Refuses a path that does not lead to a file."""
    if not path.is_file():
        raise InputError(f"{path}: {'expected a file, found a folder' if path.is_dir() else 'no such file'}")


def broken_tensors(path: Path, reason: str) -> InputError:
    """Returns the error for a file that is not a safetensors file, or not all of one."""
    advice = "get it again, or convert it (pickles: .bin, .pt, .ckpt are never read)"
    return InputError(f"{path}: not a whole safetensors file; {advice}: {reason[:200]}")


@contextmanager
def open_tensors(path: Path) -> Generator[Any]:
    """Yields a safetensors file as `safetensors.safe_open` opens it; refuses a broken one."""
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise broken_tensors(path, str(error)) from None


def load_tensors(path: Path, finite: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file, with `finite` refusing NaN: CPU tensors by name, and the metadata."""
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = dict(file.metadata() or {})
    for name, tensor in tensors.items() if finite else ():
        check_finite(path, name, tensor)
    return tensors, metadata


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Refuses NaN and infinity; looks at a piece at a time, as float32, which eight-bit floats need."""
    pieces = tensor.flatten().split(2**20) if tensor.is_floating_point() else ()
    if not all(bool(piece.float().isfinite().all()) for piece in pieces):
        raise InputError(f"{path}: tensor '{name}' holds NaN or infinite numbers; get the file again")
