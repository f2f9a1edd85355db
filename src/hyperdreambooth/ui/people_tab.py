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


def build(gr: Any, setting: Setting, key: Any, tick: Any) -> None:
    """Lays the part out, and keeps it up to date."""
    studio, prompts = setting.studio, setting.studio.maker.prompts
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
        head,
        stop,
        go_on,
        pictures,
        look,
        step,
        strip,
        curves,
        made,
        files,
        card,
        deleting,
        known,
        newest,
    ]

    def view(key: str | None, value: float, newest: float) -> list[Any]:
        now = state(setting, key)
        hidden = gr.update(visible=False)
        if not now or key is None:
            return [_NOBODY, *[hidden] * 3, "", gr.skip(), "", "", hidden, "", "", hidden, now, 0]
        folder = studio.person_folder(key)
        person, seen, history = read(folder, Person), looks(folder), losses(folder)
        done = max([0, *(step for step, _ in history)])
        idle = person.state in ("stopped", "failed")
        place = shown_step(person, seen, value, newest) if seen else 0
        last = max(person.last, seen[-1].step if seen else 0, 1)
        pitch = seen[1].step - seen[0].step if len(seen) > 1 else last
        slider = gr.update(maximum=last, step=pitch, value=place, label=f"Step, 0 to {last}")
        has = bool(person.files) and (folder / "README.md").is_file()
        return [
            html.person(person, studio.place(folder), done, seen),
            gr.update(visible=person.state in ("waiting", "running")),
            gr.update(visible=idle),
            gr.update(visible=bool(seen)),
            at_step(key, place) if seen else "",
            slider,
            html.strip(person, seen, address),
            chart(history, seen, last, person.kept),
            gr.update(visible=has),
            html.files(person, folder, address) if has else "",
            html.card(folder, address) if has else "",
            gr.update(visible=True),
            now,
            seen[-1].step if seen else 0,
        ]  # fmt: skip

    def at_step(key: str | None, value: float) -> str:
        if key is None or not state(setting, key):
            return ""
        folder = studio.person_folder(key)
        seen = nearest(looks(folder), value)
        return html.look(read(folder, Person), photo(folder), seen, prompts, address) if seen else ""

    def ticked(key: str | None, value: float, newest: float, known: str) -> Any:
        return gr.skip() if state(setting, key) == known else view(key, value, newest)

    def faces(key: str | None, known: str) -> Any:
        now = gallery(setting, key)
        return gr.skip() if now == known else [now, now]

    def chosen(event: Any) -> str:
        return event.key

    def to_step(event: Any) -> float:
        return float(event.key)

    @setting.sentence
    def stopped(key: str) -> None:
        studio.stop(studio.person_folder(key))

    @setting.sentence
    def went_on(key: str) -> None:
        studio.go_on(studio.person_folder(key))

    @setting.sentence
    def kept(key: str, value: float) -> None:
        seen = nearest(looks(studio.person_folder(key)), value)
        if seen is not None:
            studio.keep(key, seen.step)

    @setting.sentence
    def deleted(key: str) -> str | None:
        studio.delete(key)
        return next(iter(studio.people()), None)

    quiet = {"show_progress": "hidden"}
    now = [key, step, newest]
    everybody.select(picked(gr, chosen), None, key)
    strip.select(picked(gr, to_step), None, step).then(at_step, [key, step], look, **quiet)
    key.change(view, now, shows, **quiet)
    tick(ticked, [*now, known], shows)
    tick(faces, [key, people], [everybody, people])
    key.change(faces, [key, people], [everybody, people], **quiet)
    step.input(at_step, [key, step], look, **quiet)
    stop.click(stopped, key, None)
    go_on.click(went_on, key, None)
    keep.click(kept, [key, step], None).then(view, now, shows, **quiet)
    delete.click(deleted, key, key)
