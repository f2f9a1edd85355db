"""What the page shows of a crop, a person and a drawing, as HTML with alternative texts."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from hyperdreambooth.files import read_text
from hyperdreambooth.ui.crops import Crop
from hyperdreambooth.ui.records import Drawing, Person, Record, Seen

Address = Callable[[Path], str]
"""A file → the address at which the page's server has it."""

_THUMB = 192
STATES = {
    "waiting": "waiting", "running": "working", "done": "done", "stopped": "stopped", "failed": "failed",
}  # fmt: skip
_USES = {
    "kohya": "for ComfyUI, A1111 and Forge",
    "diffusers": "for diffusers: pipe.load_lora_weights",
    "lidb": "the prediction alone, a LiDB",
    "card": "the model card, to publish with it",
    "report": "settings, scores and seconds",
}


def crops(found: Sequence[Crop]) -> str:
    """Shows the crops that will be used, with the points of the faces, and why photos are left out."""
    return f'<div class="hdb-row">{"".join(map(_crop, found))}</div>' if found else ""


def _crop(crop: Crop) -> str:
    picture = crop.shown()
    if picture is None:
        return f'<p class="hdb-left-out"><b>{escape(crop.name)}</b> is left out: {escape(crop.words)}</p>'
    side = min(_THUMB, picture.width)
    content = io.BytesIO()
    picture.resize((side, side)).save(content, "JPEG", quality=88)
    data = base64.b64encode(content.getvalue()).decode()
    alt = f"The crop of {crop.name}: {crop.words}"
    return _figure(f"data:image/jpeg;base64,{data}", alt, crop.words)


def _figure(source: str, alt: str, caption: str = "") -> str:
    image = f'<img src="{source}" alt="{escape(alt)}">'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>"


def faces(people: Sequence[tuple[str, str, str]], chosen: str | None = None) -> str:
    """Shows buttons with a face and a name: key, address and name of each."""
    buttons = [
        f'<button type="button" data-key="{escape(key)}" aria-pressed="{str(key == chosen).lower()}">'
        f'<img src="{source}" alt=""><span>{escape(name)}</span></button>'
        for key, source, name in people
    ]
    return f'<div class="hdb-faces">{"".join(buttons)}</div>' if buttons else ""


def notes(lines: Sequence[str]) -> str:
    """Shows sentences that a user should read."""
    return "".join(f'<p class="hdb-note">{words(line[:1].upper() + line[1:])}.</p>' for line in lines)


def words(text: str) -> str:
    """Returns a text with the options of the command in it as code, which no line break tears apart."""
    return re.sub(r"(--[a-z-]+)", r"<code>\1</code>", escape(text))


def error(sentence: str) -> str:
    """Shows one sentence that says what is wrong."""
    return f'<p class="hdb-error" role="alert">{escape(sentence[:1].upper() + sentence[1:])}.</p>'


def _state(record: Record, place: int) -> str:
    text = STATES[record.state]
    if record.state == "waiting" and place:
        text = f"waiting behind {place} other{'s' if place > 1 else ''}"
    return f'<span class="hdb-chip hdb-{record.state}">{text}</span>'


def person(one: Person, place: int, done: int, seen: Sequence[Seen]) -> str:
    """Shows who it is, how far the work is, and what went wrong."""
    head = f"<h2>{escape(one.name)}</h2>{_state(one, place)}"
    parts = [f'<div class="hdb-head">{head}</div>']
    if one.state == "failed":
        parts.append(error(one.message))
    elif one.message:
        parts.append(f'<p class="hdb-note">{escape(one.message)}.</p>')
    if one.state == "running":
        last = max(one.last, 1)
        parts.append(f'<progress max="{last}" value="{done}" aria-label="Steps of the finetune"></progress>')
    return "".join([*parts, f'<p role="status">{escape(_progress(one, done, seen))}</p>', notes(one.notes)])


def _progress(one: Person, done: int, seen: Sequence[Seen]) -> str:
    scores = [f"{name} {score:.2f}" for name, score in _scores(seen[-1])] if seen else []
    if one.state == "running":
        step = f"Step {done} of {one.last}" if one.last else "Predicting"
        return ", ".join([step, *scores])
    if one.kept is None:
        return ""
    held = f"The files hold the person after {one.kept} steps"
    if one.proposed == one.kept:
        return f"{held}: {one.why}."
    return f"{held}. Proposed were {one.proposed}: {one.why}."


def _scores(look: Seen) -> list[tuple[str, float]]:
    names = (("likeness", "identity"), ("prompt", "prompt"))
    return [(name, score) for name, key in names if (score := look.scores.get(key)) is not None]


def look(one: Person, photo: Path, seen: Seen, prompts: Sequence[str], address: Address) -> str:
    """Shows the person after some steps, beside the photo."""
    scores = ", ".join(f"{name} {score:.2f}" for name, score in _scores(seen))
    when = "The prediction, before any step" if seen.step == 0 else f"After {seen.step} steps"
    kept = " This step is kept." if seen.step == one.kept else ""
    figures = [_figure(address(photo), f"The photo of {one.name}", "the photo")]
    for prompt, file in zip(prompts, seen.pictures, strict=False):
        alt = f"{one.name} after {seen.step} steps: {prompt}"
        figures.append(_figure(address(file), alt, _short(prompt)))
    head = f"<p><b>{when}</b>{': ' + scores if scores else ''}.{kept}</p>"
    return f'{head}<div class="hdb-row">{"".join(figures)}</div>'


def _short(prompt: str) -> str:
    """Drops the words that every prompt has."""
    parts = re.sub(r"(\ba photo)?( of)? an? \[V\] ?\w*", "", f" {prompt}").split(",")
    return ", ".join(part.strip() for part in parts if part.strip()) or prompt


def strip(one: Person, seen: Sequence[Seen], address: Address) -> str:
    """Shows the same picture after more and more steps."""
    people = [
        (str(each.step), address(each.pictures[0]), f"{each.step}{' kept' if each.step == one.kept else ''}")
        for each in seen
        if each.pictures
    ]
    kept = None if one.kept is None else str(one.kept)
    return faces(people, kept).replace("hdb-faces", "hdb-faces hdb-strip") if len(people) > 1 else ""


def files(one: Person, folder: Path, address: Address) -> str:
    """Lists the files to download, and what each is for."""
    lines = [
        f'<li><a href="{address(folder / name)}" download>'
        f"{escape(name)}</a> <span>{_USES[what]}, {_size(folder / name)}</span></li>"
        for what, name in one.files.items()
        if (folder / name).is_file()
    ]
    return f'<ul class="hdb-files">{"".join(lines)}</ul>' if lines else ""


def _size(file: Path) -> str:
    size = file.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{max(1, round(size / 1e3))} kB"


def card(folder: Path, address: Address) -> str:
    """Returns the model card as Markdown, without its table for the hub; its picture has an address."""
    text = re.sub(r"\A---\n.*?\n---\n", "", read_text(folder / "README.md"), flags=re.DOTALL)
    return text.replace("](picture.png)", f"]({address(folder / 'picture.png')})")


def drawing(one: Drawing, folder: Path, place: int, address: Address) -> str:
    """Shows the pictures of a drawing, a row for each person; what is not drawn yet is an empty frame."""
    parts = [f'<div class="hdb-head">{_state(one, place)}</div>']
    if one.message:
        parts.append(error(one.message) if one.state == "failed" else notes([one.message.rstrip(".")]))
    for row, label in enumerate(one.labels):
        figures = list[str]()
        for number, (prompt, seed) in enumerate(one.columns):
            file = folder / f"{row}-{number:02d}.png"
            caption = f"{_short(prompt)}, seed {seed}"
            if file.is_file():
                figures.append(_figure(address(file), f"{label}: {prompt}, seed {seed}", caption))
            else:
                figures.append(
                    f'<figure class="hdb-empty"><figcaption>{escape(caption)}</figcaption></figure>'
                )
        parts.append(f"<h3>{escape(label)}</h3><div class='hdb-row'>{''.join(figures)}</div>")
    return "".join(parts)
