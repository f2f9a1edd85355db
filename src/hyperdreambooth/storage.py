"""A folder of files that appear whole and never change: on a disk, on a share, or in an object store.

Object stores (s3://, gs://, hf://, …) have no rename. So files that several writers may write are named by
their content: whoever writes a name writes the same bytes. A file appears by one rename on a disk, and by
one upload in a store, which shows nothing before the upload is complete. fsspec reaches every kind of store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from hyperdreambooth.files import InputError, cache_home, first_line, write_bytes

Piece: TypeAlias = tuple[str, int, int]
"""A file's name, the first byte and the number of bytes."""

_PACKAGES = {"s3": "'hyperdreambooth[cluster]'", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}


def digest(content: bytes) -> bytes:
    """Returns the 16 bytes that name a file by its content."""
    return hashlib.sha256(content).digest()[:16]


class Store:
    """A folder, wherever it is.

    Attributes:
        local: the folder on this machine's disks or shares; None for an object store.
    """

    def __init__(self, place: str | Path | Store) -> None:
        """Opens a path or a URL such as `s3://bucket/folder`; nothing has to be there yet."""
        self._place = str(place)
        self.local = None if "://" in self._place else Path(self._place)
        self._files, self._root = _file_system(self._place)

    def __str__(self) -> str:
        return self._place

    def __truediv__(self, name: str) -> Store:
        return Store(self._place.rstrip("/") + "/" + name if self.local is None else self.local / name)

    @property
    def here(self) -> Path:
        """The folder itself, or for an object store a folder of this machine that belongs to it."""
        name = hashlib.sha256(self._place.rstrip("/").encode()).hexdigest()[:32]
        return self.local or cache_home() / "stores" / name

    def names(self, suffix: str = "") -> list[str]:
        """Returns the sorted names of the files that end so; hidden ones are no files yet."""
        with self._reached(), suppress(FileNotFoundError, NotADirectoryError):
            paths: list[str] = self._files.ls(self._root, detail=False)
            found = (path.rstrip("/").replace("\\", "/").rpartition("/")[2] for path in paths)
            return sorted(n for n in found if n[:1] != "." and n.endswith(suffix))
        return []

    def exists(self, name: str) -> bool:
        """Returns whether there is a file of that name."""
        with self._reached():
            return bool(self._files.exists(self._path(name)))

    def read(self, name: str) -> bytes:
        """Returns a file's content.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return self.pieces([(name, 0, -1)])[0]

    def pieces(self, pieces: Sequence[Piece]) -> list[bytes]:
        """Reads pieces of files, many at a time from an object store; a length of -1 means to the end.

        Raises:
            FileNotFoundError: there is no such file.
        """
        paths = [self._path(name) for name, _, _ in pieces]
        starts = [start or None for _, start, _ in pieces]  # stores refuse the range 0- of an empty file
        ends = [None if length < 0 else start + length for _, start, length in pieces]
        with self._reached():
            return self._files.cat_ranges(paths, starts, ends, on_error="raise")

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, whole; it replaces one of that name."""
        if self.local is not None:
            write_bytes(self.local / name, content)
            return
        try:
            with self._reached():
                self._files.pipe_file(self._path(name), content)
        except FileNotFoundError as error:
            raise InputError(f"{self}: {first_line(error)}; make it first, or use another place") from None

    def add(self, content: bytes, suffix: str = ".safetensors") -> str:
        """Writes a file that is named by its content, if it is not there yet, and returns the name."""
        name = f"{digest(content).hex()}{suffix}"
        if self.local is None or not (self.local / name).exists():
            self.write(name, content)
        return name

    def delete(self, names: Sequence[str]) -> None:
        """Deletes files; those that another process has deleted or holds open do not matter."""
        for name in names:
            with self._reached(), suppress(FileNotFoundError, PermissionError):
                self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _reached(self) -> Generator[None]:
        """Turns all errors of a store's own client, except a missing file, into one that names the place."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise
        except Exception as error:
            if self.local is not None:
                raise
            raise OSError(f"{self}: {type(error).__name__}: {first_line(error)}") from error


def _file_system(place: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a place, and the folder's path in it."""
    if "://" not in place:
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(), Path(place).absolute().as_posix()
    from fsspec.core import url_to_fs

    protocol = place.partition("://")[0]
    try:
        return url_to_fs(place, use_listings_cache=False)
    except ImportError as error:
        hint = f"pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else first_line(error)
        raise InputError(f"{place}: {protocol}:// needs a package that is not there; {hint}") from None
    except ValueError as error:
        raise InputError(f"{place}: expected a folder or a URL ({first_line(error)})") from None
