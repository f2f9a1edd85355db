"""The page: three parts, one clock, and the server that shows it. The work is in `studio.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hyperdreambooth.files import discard
from hyperdreambooth.ui import draw_tab, html, new_tab, people_tab
from hyperdreambooth.ui.shared import Setting
from hyperdreambooth.ui.theme import CSS, TITLE, theme

_EVERY = 0.5  # seconds between two looks at the studio
_UPLOAD = "50mb"  # of one photo


def build(setting: Setting) -> Any:
    """Lays the page out."""
    import gradio as gr

    studio = setting.studio
    discard(new_tab.drafts(setting))
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(_header(setting))
        timer = gr.Timer(_EVERY)

        def tick(handler: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
            for event in (timer.tick, page.load):
                event(handler, inputs, outputs, show_progress="hidden", trigger_mode="once")

        with gr.Tabs() as tabs:
            with gr.Tab("New person", id="new"):
                asked, key = new_tab.build(gr, setting)
            with gr.Tab("People", id="people"):
                people_tab.build(gr, setting, key, tick)
            with gr.Tab("Draw", id="draw"):
                draw_tab.build(gr, setting, tick)
        asked.success(lambda: gr.update(selected="people"), None, tabs)
        page.load(lambda: next(iter(studio.people()), None), None, key)
        page.load(lambda: gr.update(selected="people" if studio.people() else "new"), None, tabs)
    return page


def _header(setting: Setting) -> str:
    """Returns what this is, what its base draws, and who can see it."""
    title = (
        f'<div class="hdb-title"><h1>{TITLE}</h1><p>A LoRA of a person from one photo, in seconds.</p></div>'
    )
    world = f'<p class="hdb-quiet">{html.words(setting.world)}</p>' if setting.world else ""
    return title + world + html.notes([setting.warning] if setting.warning else [])


def serve(setting: Setting, host: str, port: int) -> tuple[Any, str]:
    """Starts the server in threads of its own; returns the page, to be closed, and its address.

    Raises:
        OSError: the port is in use.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build(setting)
    folders = [str(setting.studio.out.absolute()), *{str(file.parent) for file in setting.samples}]
    _, local, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
        allowed_paths=folders, max_file_size=_UPLOAD, footer_links=[], run_history=False, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, theme=theme(), css=CSS,
    )  # fmt: skip
    return page, local
