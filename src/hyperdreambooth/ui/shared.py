"""What the three parts of the page share: the studio, addresses of files, errors as sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hyperdreambooth.faces.detect import Detector
from hyperdreambooth.ui.studio import Studio


@dataclass(frozen=True)
class Setting:
    """What the page is built from.

    Attributes:
        studio: the work.
        samples: photos to try, which belong to the base's own world; perhaps none.
        detect: returns what finds faces, or None to take the centre of every photo; asked for when needed.
        world: a sentence that says what the base draws.
        warning: a sentence about who can see this page; empty where only its user can.
    """

    studio: Studio
    samples: Sequence[Path] = ()
    detect: Callable[[], Detector | None] = lambda: None
    world: str = ""
    warning: str = ""

    def sentence(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """Makes a handler of the page say its errors in one sentence."""

        @wraps(handler)
        def said(*values: Any) -> Any:
            from gradio import Error

            try:
                return handler(*values)
            except Exception as error:
                words = escape(self.studio.said(error))
                message = f"{words[:1].upper()}{words[1:]}."
                raise Error(message, duration=None, title="", print_exception=False) from None

        return said


PICK = """element.addEventListener('click', event => {
  const button = event.target.closest('button[data-key]');
  if (button) trigger('select', {key: button.dataset.key});
});"""
"""What makes the buttons of `html.faces` tell their key."""


def picked(gr: Any, handler: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a handler to which Gradio passes the event; `event.key` is that of the button."""

    @wraps(handler)
    def told(*values: Any) -> Any:
        return handler(*values)

    told.__annotations__ = {"event": gr.EventData}
    return told


def address(file: Path) -> str:
    """Returns the address of a file; another one once the file has changed, so that browsers load it anew."""
    changed = file.stat().st_mtime_ns if file.is_file() else 0
    return f"gradio_api/file={quote(file.absolute().as_posix())}?v={changed}"
