"""The third part of the page: pictures of the people who were made here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hyperdreambooth.files import InputError
from hyperdreambooth.ui import html
from hyperdreambooth.ui.records import BASE, Drawing, read, told_apart
from hyperdreambooth.ui.shared import Setting, address

MOST = 4  # people in one picture: a slider for the weight of each
_PROMPTS = "a photo of a [V] {class_word}, smiling\na watercolour painting of a [V] {class_word}"
_NOTHING = '<p class="hdb-quiet">The pictures appear here.</p>'


def seeds_of(text: str) -> tuple[int, ...]:
    """Reads seeds such as `0, 1, 5`.

    Raises:
        InputError: something else, or a negative number.
    """
    words = re.split(r"[\s,;]+", text.strip())
    if not all(re.fullmatch(r"\d{1,18}", word) for word in words):
        raise InputError(f"seeds: expected whole numbers such as 0, 1, 2, got {text.strip()!r}")
    return tuple(dict.fromkeys(map(int, words)))


def request(keys: Sequence[str], weights: Sequence[float], prompts: str, seeds: str, beside: str) -> Drawing:
    """Returns the drawing that the form asks for.

    Raises:
        InputError: no prompt, or seeds that are none.
    """
    lines = tuple(line.strip() for line in prompts.splitlines() if line.strip())
    if not lines:
        raise InputError("prompts: expected one a line, such as: a photo of a [V] face, smiling")
    chosen = dict(zip(keys, weights, strict=False))
    return Drawing(weights=chosen, beside=beside, prompts=lines, seeds=seeds_of(seeds))


class _Handlers:
    """What the controls of this part do."""

    def __init__(self, gr: Any, setting: Setting) -> None:
        self.gr, self.studio = gr, setting.studio

    def names(self) -> dict[str, str]:
        """Returns everybody who can be drawn."""
        people = self.studio.people()
        names = told_apart({key: person.name for key, person in people.items()})
        return {key: names[key] for key, person in people.items() if person.kept is not None}

    def choices(self, known: str, who: list[str], beside: str) -> Any:
        """Keeps the lists up to date."""
        people, drawn = self.names(), self.studio.drawings()
        now = repr((people, {key: one.state for key, one in drawn.items()}))
        if now == known:
            return self.gr.skip()
        named = [(name, key) for key, name in people.items()]
        others = [("nobody", ""), (BASE, BASE), *named]
        titles = {key: f"{' and '.join(one.labels)}: {one.prompts[0]}" for key, one in drawn.items()}
        old = [(title, key) for key, title in told_apart(titles).items()]
        still = [key for key in who if key in people]
        return [
            self.gr.update(choices=named, value=still),
            self.gr.update(choices=others, value=beside if beside in dict(others).values() else ""),
            self.gr.update(choices=old, visible=bool(old)),
            now,
        ]

    def sliders(self, who: list[str]) -> list[Any]:
        """Shows a weight for each person who is chosen, at first the mean of all, and the mix of two."""
        people, share = self.names(), round(1 / max(1, len(who)), 2)
        shown = [
            self.gr.update(visible=True, label=f"Weight of {people.get(key, key)}", value=share)
            for key in who
        ]
        hidden = [self.gr.update(visible=False, value=1)] * (MOST - len(who))
        two = len(who) == 2
        label = f"Mix: 0 is {people.get(who[0])}, 1 is {people.get(who[1])}" if two else "Mix"
        return [self.gr.update(visible=two, label=label, value=0.5), *shown, *hidden]

    def mixed(self, share: float) -> list[float]:
        """Returns the weights of two people."""
        return [round(1 - share, 2), round(share, 2)]

    def asked(self, who: list[str], beside: str, prompts: str, seeds: str, *weights: float) -> str:
        """Asks for a drawing, and returns its key."""
        return self.studio.draw(request(who, weights, prompts, seeds, beside))

    def stopped(self, key: str) -> None:
        """Stops a drawing."""
        self.studio.stop(self.studio.drawing_folder(key))

    def view(self, key: str | None, known: str) -> Any:
        """Shows a drawing if something of it has changed."""
        now, text, busy = "", _NOTHING, False
        if key is not None and key in self.studio.drawings():
            folder = self.studio.drawing_folder(key)
            one = read(folder, Drawing)
            text = html.drawing(one, folder, self.studio.place(folder), address)
            now, busy = text, one.state in ("waiting", "running")
        return self.gr.skip() if now == known else [text, now, self.gr.update(visible=busy)]


def build(gr: Any, setting: Setting, tick: Any) -> None:
    """Lays the part out, and keeps it up to date."""
    do, word = _Handlers(gr, setting), setting.studio.maker.base.class_word
    drawing, known, people = gr.State(None), gr.State(""), gr.State("")
    with gr.Row():
        with gr.Column(min_width=300):
            who = gr.Dropdown(
                [], label="Who", multiselect=True,
                info=f"One person, or up to {MOST} whose sum is drawn; nobody is the base model.",
                max_choices=MOST, value=[], elem_id="who",
            )  # fmt: skip
            mix = gr.Slider(0, 1, 0.5, step=0.05, label="Mix", visible=False, elem_id="mix", buttons=[])
            weights = [
                gr.Slider(0, 1.5, 1, step=0.05, label=f"Weight {k + 1}", visible=False, buttons=[],
                          elem_id=f"weight-{k}")
                for k in range(MOST)
            ]  # fmt: skip
            beside = gr.Dropdown(
                [("nobody", "")], value="", label="Side by side with", elem_id="beside",
                info="From the same seeds: the base model, or another person.",
            )  # fmt: skip
        with gr.Column(min_width=300):
            prompts = gr.Textbox(
                _PROMPTS.replace("{class_word}", word), lines=3, label="Prompts, one a line",
                info=f"[V] stands for the person; say what it is: a [V] {word}.", elem_id="prompts",
            )  # fmt: skip
            seeds = gr.Textbox("0, 1", label="Seeds", elem_id="seeds")
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", visible=False, elem_id="stop-drawing")
    shown = gr.HTML(_NOTHING, elem_id="drawing")
    earlier = gr.Dropdown([], label="Earlier drawings", elem_id="earlier", visible=False)
    quiet = {"show_progress": "hidden"}
    who.change(do.sliders, who, [mix, *weights], **quiet)
    mix.input(do.mixed, mix, weights[:2], **quiet)
    go.click(setting.sentence(do.asked), [who, beside, prompts, seeds, *weights], drawing)
    stop.click(setting.sentence(do.stopped), drawing, None)
    earlier.input(lambda key: key, earlier, drawing, **quiet)
    drawing.change(do.view, [drawing, known], [shown, known, stop], **quiet)
    tick(do.choices, [people, who, beside], [who, beside, earlier, people])
    tick(do.view, [drawing, known], [shown, known, stop])
