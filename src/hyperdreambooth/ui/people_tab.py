"""The second part of the page: everybody who was made here, and one of them in full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperdreambooth.files import InputError
from hyperdreambooth.ui import html
from hyperdreambooth.ui.chart import chart
from hyperdreambooth.ui.records import Person, Seen, look_file, looks, losses, nearest, read
from hyperdreambooth.ui.shared import PICK, Setting, address, picked

_NOBODY = '<p class="hdb-quiet">Nobody yet. Make the first person from a photo.</p>'


def gallery(setting: Setting, key: str | None) -> str:
    """Shows everybody, the newest first."""
    shown = list[tuple[str, str, str]]()
    for one, person in setting.studio.people().items():
        folder = setting.studio.out / "people" / one
        state = "" if person.state == "done" else f" ({html.STATES[person.state]})"
        shown.append((one, address(_face(folder, person)), f"{person.name}{state}"))
    return html.faces(shown, key)


def _face(folder: Path, person: Person) -> Path:
    """Returns the picture that stands for a person: of the step that is kept, else the photo."""
    file = look_file(folder, person.kept, "-0.png") if person.kept is not None else None
    return file if file is not None and file.is_file() else photo(folder)


def photo(folder: Path) -> Path:
    """Returns the first crop of a person."""
    return min((folder / "photos").glob("*.png"), default=folder / "photos")


def state(setting: Setting, key: str | None) -> str:
    """Returns a text that changes whenever there is something new to show of a person."""
    if key is None:
        return ""
    try:
        folder = setting.studio.person_folder(key)
        return repr(
            (key, read(folder, Person), len(losses(folder)), looks(folder), setting.studio.place(folder))
        )
    except InputError:
        return ""


def shown_step(person: Person, seen: Sequence[Seen], value: float, newest: float) -> float:
    """Returns where the slider stands: it follows the newest look unless the user has moved it back.

    When the work ends, it goes to the step that is kept.
    """
    if person.state != "running":
        return person.kept if person.kept is not None else value
    return seen[-1].step if value == newest else value


class _Handlers:
    """What the controls of this part do."""

    def __init__(self, gr: Any, setting: Setting) -> None:
        self.gr, self.setting, self.studio = gr, setting, setting.studio

    def view(self, key: str | None, value: float, newest: float) -> list[Any]:
        """Returns everything that the part shows of a person."""
        now = state(self.setting, key)
        hidden = self.gr.update(visible=False)
        if not now or key is None:
            return [_NOBODY, *[hidden] * 3, "", self.gr.skip(), "", "", hidden, "", "", hidden, now, 0]
        folder = self.studio.person_folder(key)
        person, seen, history = read(folder, Person), looks(folder), losses(folder)
        done = max([0, *(step for step, _ in history)])
        idle = person.state in ("stopped", "failed")
        place = shown_step(person, seen, value, newest) if seen else 0
        last = max(person.last, seen[-1].step if seen else 0, 1)
        pitch = seen[1].step - seen[0].step if len(seen) > 1 else last
        slides = person.last > 0 or len(seen) > 1  # a prediction alone has one step
        slider = self.gr.update(
            maximum=last, step=pitch, value=place, label=f"Step, 0 to {last}", visible=slides
        )
        has = bool(person.files) and (folder / "README.md").is_file()
        return [
            html.person(person, self.studio.place(folder), done, seen),
            self.gr.update(visible=person.state in ("waiting", "running")),
            self.gr.update(visible=idle),
            self.gr.update(visible=bool(seen)),
            self.at_step(key, place) if seen else "",
            slider,
            html.strip(person, seen, address),
            chart(history, seen, last, person.kept),
            self.gr.update(visible=has),
            html.files(person, folder, address) if has else "",
            html.card(folder, address) if has else "",
            self.gr.update(visible=True),
            now,
            seen[-1].step if seen else 0,
        ]  # fmt: skip

    def at_step(self, key: str | None, value: float) -> str:
        """Shows the person after the step of the slider."""
        if key is None or not state(self.setting, key):
            return ""
        folder = self.studio.person_folder(key)
        seen = nearest(looks(folder), value)
        if seen is None:
            return ""
        prompts = self.studio.maker.prompts
        return html.look(read(folder, Person), photo(folder), seen, prompts, address)

    def ticked(self, key: str | None, value: float, newest: float, known: str) -> Any:
        """Looks whether there is something new."""
        return self.gr.skip() if state(self.setting, key) == known else self.view(key, value, newest)

    def faces(self, key: str | None, known: str) -> Any:
        """Shows everybody if something has changed."""
        now = gallery(self.setting, key)
        return self.gr.skip() if now == known else [now, now]

    def chosen(self, event: Any) -> str:
        """Returns the person whose button was pressed."""
        return event.key

    def to_step(self, event: Any) -> float:
        """Returns the step whose button was pressed."""
        return float(event.key)

    def stopped(self, key: str) -> None:
        """Stops the work on a person."""
        self.studio.stop(self.studio.person_folder(key))

    def went_on(self, key: str) -> None:
        """Goes on with it."""
        self.studio.go_on(self.studio.person_folder(key))

    def kept(self, key: str, value: float) -> None:
        """Keeps the step of the slider."""
        seen = nearest(looks(self.studio.person_folder(key)), value)
        if seen is not None:
            self.studio.keep(key, seen.step)

    def deleted(self, key: str) -> str | None:
        """Deletes a person; returns the one to show next."""
        self.studio.delete(key)
        return next(iter(self.studio.people()), None)


def build(gr: Any, setting: Setting, key: Any, tick: Any) -> None:
    """Lays the part out, and keeps it up to date."""
    do, sentence = _Handlers(gr, setting), setting.sentence
    everybody = gr.HTML(js_on_load=PICK, elem_id="people")
    known, people = gr.State(""), gr.State("")
    newest = gr.State(0)
    head = gr.HTML(_NOBODY, elem_id="person")
    with gr.Row():
        stop = gr.Button("Stop", visible=False, elem_id="stop", size="sm", scale=0, min_width=160)
        go_on = gr.Button("Go on", visible=False, elem_id="go-on", variant="primary", size="sm", scale=0)
    with gr.Column(visible=False) as pictures:
        look = gr.HTML(elem_id="look")
        step = gr.Slider(0, 1, 0, step=1, label="Step", elem_id="step", buttons=[])
        strip = gr.HTML(js_on_load=PICK, elem_id="strip")
        with gr.Row():
            keep = gr.Button("Keep this step", elem_id="keep", size="sm", scale=0, min_width=160)
    curves = gr.HTML(elem_id="curves")
    with gr.Column(visible=False) as made:
        gr.HTML("<h3>Files</h3>")
        files = gr.HTML(elem_id="files")
        with gr.Accordion("Model card", open=False):
            card = gr.Markdown(elem_id="card")
    with gr.Accordion("Delete this person", open=False, visible=False) as deleting:
        gr.HTML("<p>Photos, pictures, adapters, and drawings of this person are deleted for good.</p>")
        delete = gr.Button("Delete for good", variant="stop", size="sm", elem_id="delete")
    shows = [
        head, stop, go_on, pictures, look, step, strip, curves, made, files, card, deleting, known, newest
    ]  # fmt: skip
    quiet = {"show_progress": "hidden"}
    now = [key, step, newest]
    everybody.select(picked(gr, do.chosen), None, key)
    strip.select(picked(gr, do.to_step), None, step).then(do.at_step, [key, step], look, **quiet)
    key.change(do.view, now, shows, **quiet)
    tick(do.ticked, [*now, known], shows)
    tick(do.faces, [key, people], [everybody, people])
    key.change(do.faces, [key, people], [everybody, people], **quiet)
    # a second press must not delete the person who is shown next
    key.change(lambda: gr.update(open=False), None, deleting, **quiet)
    step.input(do.at_step, [key, step], look, **quiet)
    stop.click(sentence(do.stopped), key, None)
    go_on.click(sentence(do.went_on), key, None)
    keep.click(sentence(do.kept), [key, step], None).then(do.view, now, shows, **quiet)
    delete.click(sentence(do.deleted), key, key)
