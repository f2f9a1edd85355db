"""The first part of the page: photos → crops → a person who is asked for."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from hyperdreambooth.faces.dataset import EXTENSIONS, read_person
from hyperdreambooth.files import InputError, discard
from hyperdreambooth.ui import html
from hyperdreambooth.ui.crops import crop_photos, plainly
from hyperdreambooth.ui.shared import PICK, Setting, address, picked

Draft: TypeAlias = tuple[str, tuple[str, ...]]
"""The folder of the crops that are shown, and the sentences about them."""

_CONSENT = "Use photos of yourself, or of people who agreed. They stay on the machine that runs this page."


def drafts(setting: Setting) -> Path:
    """Returns the folder of crops that nobody has made a person of yet."""
    return setting.studio.out / ".drafts"


def draft(setting: Setting, photos: Sequence[Path], whole: bool) -> tuple[str, Draft | None, bool]:
    """Crops photos; returns what to show, the draft, and whether they are far from the training's."""
    drafts(setting).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=drafts(setting)))
    maker, drawn = setting.studio.maker, set(photos) <= set(setting.samples)
    try:
        detect = None if whole or drawn else setting.detect()
        found = crop_photos(photos, folder, maker.base.resolution, detect, whole or drawn)
        distance, words = maker.distance(read_person(folder)) if maker.distance else (None, "")
    except InputError as error:
        discard(folder)
        return html.error(plainly(str(error), [folder, *photos])), None, False
    strange = distance is not None and distance > 1
    said = (words,) if words and (strange or not drawn) else ()
    return html.crops(found) + html.notes(said), (str(folder), said), strange


def named(photos: Sequence[Path], name: str, last: str) -> list[str]:
    """Returns the name to show and the one that was proposed; what the user wrote is left alone.

    Args:
        photos: the first one's file gives the proposal.
        name: what stands in the field.
        last: the proposal before.
    """
    if name and name != last:
        return [name, ""]
    proposed = re.sub(r"[_-]+", " ", photos[0].stem).capitalize() if photos else ""
    return [proposed, proposed]


def build(gr: Any, setting: Setting) -> tuple[Any, Any]:
    """Lays the part out; returns the button's event and the key of the person who was asked for."""
    config = setting.studio.maker.config
    kept, key, proposed = gr.State(None), gr.State(None), gr.State("")
    with gr.Row():
        with gr.Column(min_width=300):
            kinds = [*sorted(EXTENSIONS)]
            photos = gr.File(
                label="Photos of one person (one is enough)",
                file_count="multiple",
                file_types=kinds,
                height=150,
                elem_id="photos",
            )
            gr.HTML(f'<p class="hdb-quiet">{_CONSENT}</p>')
            samples = gr.HTML(_samples(setting), js_on_load=PICK, elem_id="samples")
            whole = gr.Checkbox(label="The photos are crops of a face already; take them as they are")
        with gr.Column(min_width=300):
            preview = gr.HTML(_EMPTY, elem_id="crops")
            name = gr.Textbox(label="Name", placeholder="a name for this person", max_length=60)
            anyway = gr.Checkbox(
                label="Finetune although the photo is unlike those of the training", visible=False
            )
            with gr.Accordion("Settings", open=False):
                steps = gr.Slider(
                    1, max(200, 2 * config.last), config.last, step=1, label="Steps of the finetune"
                )
                rank = gr.Slider(1, 64, config.rank, step=1, label="Rank of the LoRA")
                seed = gr.Number(config.seed, precision=0, minimum=0, label="Seed")
            make = gr.Button("Make this person", variant="primary", interactive=False, elem_id="make")
    shows = [preview, kept, anyway, make, name, proposed]

    def cropped(files: Sequence[Path], whole: bool, before: Draft | None, names: list[str]) -> list[Any]:
        if before is not None:
            discard(Path(before[0]))
        if not files:
            return [_EMPTY, None, gr.update(visible=False), gr.update(interactive=False), *names]
        text, made, strange = draft(setting, files, whole)
        able = gr.update(interactive=made is not None)
        return [text, made, gr.update(visible=strange, value=False), able, *names]

    @setting.sentence
    def uploaded(
        files: list[str] | None, whole: bool, before: Draft | None, name: str, last: str
    ) -> list[Any]:
        photos = [Path(file) for file in files or []]
        return cropped(photos, whole, before, named(photos, name, last))

    @setting.sentence
    def sampled(before: Draft | None, event: Any) -> list[Any]:
        number = int(event.key)
        sample = f"Sample {number + 1}"
        return [*cropped([setting.samples[number]], True, before, [sample, sample]), None]

    @setting.sentence
    def asked(made: Draft | None, name: str, steps: int, rank: int, seed: int, anyway: bool) -> list[str]:
        if made is None:
            raise InputError("expected a photo; drop one, or choose a sample")
        changed = {"steps": steps, "rank": rank, "seed": seed or 0}
        own = {key: value for key, value in changed.items() if value != getattr(config, key)}
        return [setting.studio.add(Path(made[0]), name, own, anyway, made[1]), ""]

    gr.on(
        [photos.upload, photos.delete, photos.clear, whole.input],
        uploaded,
        [photos, whole, kept, name, proposed],
        shows,
    )
    samples.select(picked(gr, sampled), [kept], [*shows, photos])
    return make.click(asked, [kept, name, steps, rank, seed, anyway], [key, name]), key


def _samples(setting: Setting) -> str:
    if not setting.samples:
        return ""
    people = [(str(k), address(file), f"Sample {k + 1}") for k, file in enumerate(setting.samples)]
    return f"<p>Or try a drawn face:</p>{html.faces(people)}"


_EMPTY = '<p class="hdb-quiet">The crop that will be used appears here.</p>'
