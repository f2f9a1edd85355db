"""How the page looks: system fonts, two sets of colours, frames for pictures, and nothing from elsewhere."""

from __future__ import annotations

from typing import Any

TITLE = "HyperDreamBooth"
_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def theme() -> Any:
    """Returns Gradio's plain theme with colours whose contrast is at least 4.5 to 1 on either ground."""
    from gradio import themes

    made = themes.Base(
        primary_hue="indigo", neutral_hue="stone", radius_size="md", font=_SANS, font_mono=_MONO
    )
    return made.set(
        layout_gap="12px", input_border_width="1px", block_padding="12px 14px",
        body_background_fill="#faf9f6", body_background_fill_dark="#16171b",
        block_background_fill="#ffffff", block_background_fill_dark="#1f2026",
        block_border_color="#dcd9d2", block_border_color_dark="#3a3c45",
        body_text_color="#1c1e24", body_text_color_dark="#eceae5",
        body_text_color_subdued="#5b5e68", body_text_color_subdued_dark="#b3b1ab",
        block_label_text_color="#43464f", block_label_text_color_dark="#d0cec8",
        block_title_text_color="#1c1e24", block_title_text_color_dark="#eceae5",
        block_info_text_color="#5b5e68", block_info_text_color_dark="#b3b1ab",
        input_background_fill="#ffffff", input_background_fill_dark="#17181d",
        input_border_color="#85837c", input_border_color_dark="#7d808c",
        input_placeholder_color="#6a6c74", input_placeholder_color_dark="#a3a19b",
        button_primary_background_fill="#3b46b8", button_primary_background_fill_dark="#aab4ff",
        button_primary_background_fill_hover="#2d3796", button_primary_background_fill_hover_dark="#c3caff",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="#14162b",
        button_primary_text_color_hover="#ffffff", button_primary_text_color_hover_dark="#14162b",
        button_secondary_background_fill="#ecebe6", button_secondary_background_fill_dark="#30323b",
        button_secondary_text_color="#1c1e24", button_secondary_text_color_dark="#eceae5",
        button_cancel_background_fill="#ffffff", button_cancel_background_fill_dark="#1f2026",
        button_cancel_text_color="#a3231b", button_cancel_text_color_dark="#ff9c92",
        button_cancel_border_color="#a3231b", button_cancel_border_color_dark="#ff9c92",
        slider_color="#3b46b8", slider_color_dark="#aab4ff",
        link_text_color="#3b46b8", link_text_color_dark="#aab4ff",
        checkbox_background_color_selected="#3b46b8", checkbox_background_color_selected_dark="#5f6be0",
    )  # fmt: skip


CSS = """
:root { --hdb-ink: #1c1e24; --hdb-quiet: #5b5e68; --hdb-line: #dcd9d2; --hdb-empty: #ecebe6;
  --hdb-accent: #3b46b8; --hdb-prompt: #a0560b; --hdb-good: #1d6b3a; --hdb-bad: #a3231b;
  --hdb-warn: #fdf3d7; --hdb-warn-line: #d9b44a; --hdb-alarm: #fdeceb; }
.dark { --hdb-ink: #eceae5; --hdb-quiet: #b3b1ab; --hdb-line: #3a3c45; --hdb-empty: #2a2b32;
  --hdb-accent: #aab4ff; --hdb-prompt: #f0b26b; --hdb-good: #8fdba8; --hdb-bad: #ff9c92;
  --hdb-warn: #332c17; --hdb-warn-line: #8a7230; --hdb-alarm: #3a1f1d; }
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
.gradio-container :focus-visible { outline: 3px solid var(--hdb-accent) !important; outline-offset: 2px; }
.hdb-title { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 1rem; padding: .6rem 0 .2rem; }
.hdb-title h1 { font-size: 1.6rem; font-weight: 650; letter-spacing: -.02em; margin: 0; }
.hdb-title p { color: var(--hdb-quiet); margin: 0; }
.hdb-head { display: flex; flex-wrap: wrap; align-items: center; gap: .7rem; margin-bottom: .4rem; }
.hdb-head h2 { font-size: 1.3rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
.hdb-chip { border: 1px solid currentColor; border-radius: 999px; padding: .05rem .6rem; font-size: .85rem;
  color: var(--hdb-quiet); }
.hdb-running { color: var(--hdb-accent); } .hdb-done { color: var(--hdb-good); }
.hdb-failed { color: var(--hdb-bad); }
.hdb-note, .hdb-error, .hdb-left-out {
  border-left: 4px solid var(--hdb-warn-line); background: var(--hdb-warn);
  color: var(--hdb-ink); padding: .5rem .8rem; margin: .4rem 0; border-radius: 0 6px 6px 0;
  overflow-wrap: anywhere; }
.hdb-error { border-color: var(--hdb-bad); background: var(--hdb-alarm); }
.hdb-row { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.hdb-row figure { margin: 0; min-width: 0; }
.hdb-row img, .hdb-empty::before { width: 100%; aspect-ratio: 1; object-fit: cover;
  border-radius: 8px; background: var(--hdb-empty); display: block; margin: 0; }
.hdb-empty::before { content: ""; }
.hdb-row figcaption { color: var(--hdb-quiet); font-size: .85rem; line-height: 1.3;
  padding-top: .25rem; overflow-wrap: anywhere; }
.hdb-faces { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .6rem; padding: 4px; }
.hdb-faces button { flex: 0 0 84px; padding: 0; border: 0; background: none; cursor: pointer;
  color: var(--hdb-quiet); font-size: .85rem; line-height: 1.3; text-align: center; overflow-wrap: anywhere;
  font-weight: 400; }
.hdb-faces span { display: block; padding-top: .3rem; }
.hdb-faces img { width: 84px; height: 84px; object-fit: cover; border-radius: 8px; display: block; margin: 0;
  background: var(--hdb-empty); }
.hdb-faces button:hover img { opacity: .85; }
.hdb-faces button[aria-pressed=true] { color: var(--hdb-ink); font-weight: 650; }
.hdb-faces button[aria-pressed=true] img { outline: 3px solid var(--hdb-accent); }
.hdb-charts { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); }
.hdb-chart { width: 100%; max-width: 540px; height: auto; }
.hdb-chart polyline { fill: none; stroke-width: 2.5; stroke-linejoin: round; stroke: var(--hdb-accent); }
.hdb-chart polyline.prompt { stroke: var(--hdb-prompt); stroke-dasharray: 6 4; }
.hdb-chart polyline.faint { stroke-width: 1; opacity: .45; }
.hdb-chart circle { fill: var(--hdb-accent); } .hdb-chart circle.prompt { fill: var(--hdb-prompt); }
.hdb-chart text { font-size: 14px; fill: var(--hdb-accent); }
.hdb-chart text.prompt { fill: var(--hdb-prompt); }
.hdb-chart text.title { fill: var(--hdb-quiet); }
.hdb-chart .axis { stroke: var(--hdb-line); }
.hdb-chart .kept { stroke: var(--hdb-good); stroke-dasharray: 3 3; }
.hdb-files { list-style: none; padding: 0; margin: 0; }
.hdb-files li { padding: .45rem 0; border-bottom: 1px solid var(--hdb-line); }
.hdb-files li:last-child { border: 0; }
.hdb-files a { color: var(--hdb-accent); font-weight: 600; text-decoration: underline;
  overflow-wrap: anywhere; }
.hdb-files span { color: var(--hdb-quiet); }
.gradio-container progress { appearance: none; display: block; width: 100%; height: .5rem; border: 0;
  border-radius: 99px; overflow: hidden; background: var(--hdb-line); }
progress::-webkit-progress-bar { background: var(--hdb-line); }
progress::-webkit-progress-value { background: var(--hdb-accent); }
progress::-moz-progress-bar { background: var(--hdb-accent); }
.gradio-container button.selected[role=tab] { color: var(--hdb-accent) !important; font-weight: 650; }
.gradio-container code { white-space: nowrap; }
.hdb-quiet { color: var(--hdb-quiet); }
@media (max-width: 640px) {
  .hdb-row { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .hdb-title h1 { font-size: 1.35rem; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""
