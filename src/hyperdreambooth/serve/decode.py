"""Photos of strangers are decoded in a process of their own, with bounds on memory and time.

What comes back is a plain PNG: upright, sRGB, without metadata (where it was taken, say), no larger than
needed. Nothing else of the service ever decodes what a caller sent.
"""

from __future__ import annotations

import io
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.files import InputError
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.workers import begin

_NAME = Path("photo")
_BEGINNING = 300.0  # seconds in which the process has to be ready, even on a machine that is very busy
_TOO_LARGE = "photo: decoding it takes too much memory; send a smaller JPEG or PNG"


class Decoder:
    """Decodes one photo at a time in a process that is started anew whenever it died or was too slow."""

    def __init__(self, config: ServeConfig) -> None:
        self._config, self._lock, self._ready = config, Lock(), False
        self.process: Any = None
        self._pipe: Any = None

    def decode(self, content: bytes) -> bytes:
        """Returns a photo as PNG.

        Raises:
            InputError: not a photo, too large, too small, or it took too much memory or time.
        """
        with self._lock:
            if self.process is None or not self.process.is_alive():
                self.start()
            answer = self._ask(content)
        if isinstance(answer, str):
            raise InputError(answer)
        return answer

    def _ask(self, content: bytes) -> bytes | str:
        try:
            if not self._ready and not self._begun():
                return "photo: nothing can be decoded at the moment; try again later"
            self._pipe.send_bytes(content)
            if not self._pipe.poll(self._config.decode_seconds):
                self.close()
                return "photo: decoding it takes too long; send a smaller JPEG or PNG"
            return self._pipe.recv()
        except (EOFError, OSError):
            self.close()
            return _TOO_LARGE

    def _begun(self) -> bool:
        """Waits for the process to be ready; ends one that never is."""
        self._ready = self._pipe.poll(_BEGINNING) and self._pipe.recv() == "ready"
        if not self._ready:
            self.close()
        return self._ready

    def start(self) -> None:
        """Starts the process. It imports libraries first, so that the first photo may have to wait."""
        self.close()
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        bounds = (self._config.photo_side, self._config.decode_bytes)
        self.process = context.Process(target=_serve, args=(theirs, *bounds), daemon=True)
        self.process.start()
        theirs.close()
        self._ready = False

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self._pipe.close()
            self.process = None


def _serve(pipe: Connection, side: int, memory: int) -> None:
    """Decodes what comes through the pipe until nobody is there any more."""
    begin()
    _bound(memory)
    with suppress(EOFError, OSError):  # the service was killed
        pipe.send("ready")
        while True:
            pipe.send(_decoded(pipe.recv_bytes(), side))


def _decoded(content: bytes, side: int) -> bytes | str:
    """Returns the PNG, or why there is none."""
    try:
        photo = open_photo(_NAME, content)
        photo.thumbnail((side, side), Image.Resampling.LANCZOS)
        clean = Image.frombytes("RGB", photo.size, photo.convert("RGB").tobytes())
        file = io.BytesIO()
        clean.save(file, "PNG", compress_level=1)
        return file.getvalue()
    except InputError as error:
        return _TOO_LARGE if isinstance(error.__context__, MemoryError) else str(error)
    except MemoryError:
        return _TOO_LARGE


def _bound(memory: int) -> None:
    """Bounds the memory of this process, beyond what it has, where the system can (not on Windows)."""
    if find_spec("resource") is None:
        return
    resource: Any = import_module("resource")
    used = Path("/proc/self/statm")
    now = int(used.read_text().split()[0]) * resource.getpagesize() if used.exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold the photo
