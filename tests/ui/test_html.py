"""What the page shows: alternative texts, names that are no markup, curves that are also words."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from hyperdreambooth.ui import html
from hyperdreambooth.ui.chart import chart
from hyperdreambooth.ui.records import Drawing, Person, Seen, looks, losses
from hyperdreambooth.ui.theme import theme

EVIL = "<script>alert(1)</script>\" onload='x"


class Tags(HTMLParser):
    """Collects every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found = list[tuple[str, dict[str, str | None]]]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def picture(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / name)
    return folder / name


def test_names_and_prompts_are_no_markup(tmp_path: Path) -> None:
    photo = picture(tmp_path, "0.png")
    one = Person(name=EVIL, state="failed", message=EVIL, kept=5, proposed=5, why="x", notes=(EVIL,))
    seen = [Seen(step, {"identity": 0.5, "prompt": None}, (photo,)) for step in (0, 5)]
    drawing = Drawing(weights={}, prompts=(EVIL,), seeds=(0,), labels=(EVIL,))
    picture(tmp_path, "0-00.png")
    shown = [
        html.person(one, 0, 5, seen),
        html.look(one, photo, seen[0], [EVIL], str),
        html.strip(one, seen, str),
        html.drawing(drawing, tmp_path, 0, str),
        html.faces([("ana", "a.png", EVIL)]),
        html.error(EVIL),
    ]
    for text in shown:
        tags = Tags(text).found
        assert tags and all(tag != "script" for tag, _ in tags)
        assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
        assert all("alt" in attributes for tag, attributes in tags if tag == "img")


def test_the_curves_are_also_words() -> None:
    seen = [Seen(0, {"identity": 0.2, "prompt": 1.0}, ()), Seen(4, {"identity": 1.1, "prompt": 0.5}, ())]
    text = chart([(1, 0.5), (2, 0.4), (3, 0.2)], seen, 4, 4)
    labels = [attributes["aria-label"] for tag, attributes in Tags(text).found if tag == "svg"]
    assert labels[0] == (
        "Likeness and prompt, from 0: likeness from 0.20 to 1.10; prompt from 1.00 to 0.50, over 4 of 4 steps"
    )
    assert labels[1] is not None and labels[1].startswith("Loss: loss from 0.50 to 0.37, over 3 of 4")
    for points in re.findall(r'points="([^"]+)"', text):
        for x, y in (map(float, point.split(",")) for point in points.split()):
            assert 0 <= x <= 460 and 0 <= y <= 150
    assert chart([], [], 4, None) == ""


def test_a_log_that_a_kill_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    lines = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n{"step": 1, "loss": 0.4}\n{"step": 3, "lo'
    (tmp_path / "training" / "log.jsonl").write_text(lines)
    assert losses(tmp_path) == [(1, 0.4)]
    picture(tmp_path / "looks", "00002-0.png")
    assert looks(tmp_path) == []  # the scores come last
    (tmp_path / "looks" / "00002.json").write_text('{"identity": null, "prompt": 1.0}')
    assert [one.step for one in looks(tmp_path)] == [2]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_texts_have_enough_contrast_in_light_and_dark() -> None:
    """WCAG 2 AA: 4.5 to 1 for text, 3 to 1 for borders of fields and for sliders."""
    made = theme()
    pairs = {
        "body_text_color": ("body_background_fill", 4.5),
        "body_text_color_subdued": ("body_background_fill", 4.5),
        "block_info_text_color": ("block_background_fill", 4.5),
        "block_label_text_color": ("block_background_fill", 4.5),
        "input_placeholder_color": ("input_background_fill", 4.5),
        "button_primary_text_color": ("button_primary_background_fill", 4.5),
        "button_secondary_text_color": ("button_secondary_background_fill", 4.5),
        "button_cancel_text_color": ("button_cancel_background_fill", 4.5),
        "link_text_color": ("body_background_fill", 4.5),
        "input_border_color": ("block_background_fill", 3.0),
        "slider_color": ("block_background_fill", 3.0),
    }
    for ending in ("", "_dark"):
        for text, (ground, least) in pairs.items():
            found = contrast(getattr(made, text + ending), getattr(made, ground + ending))
            assert found >= least, (text + ending, round(found, 2))
