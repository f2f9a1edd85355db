"""README.md and docs/commands.md name only commands and options that exist, and links between pages work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from hyperdreambooth.apps import cli
from hyperdreambooth.apps.settings import PRESETS

ROOT = Path(__file__).parents[2]
PAGES = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/commands.md"))
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL))
LINES = re.findall(r"^hdb (.+)$", BLOCKS, re.MULTILINE)
INLINE = re.findall(r"`(?:hdb|[^`]*accelerate launch[^`]* -m hyperdreambooth) ([^`]+)`", PAGES)
COMPLETE = [line for line in [*LINES, *INLINE] if "…" not in line and " " in line.strip()]


def parse(words: list[str]) -> dict[str, Any]:
    """Parses the words of a command line and runs nothing."""
    command, name = typer.main.get_command(cli.app), "hdb"
    while hasattr(command, "commands"):
        name = words.pop(0)
        command = command.commands[name]
    return command.make_context(name, words).params


def test_the_pages_are_read() -> None:
    assert len(LINES) >= 9 and len(INLINE) >= 13


@pytest.mark.parametrize("line", COMPLETE)
def test_every_line_parses(line: str) -> None:
    found = parse(shlex.split(line, comments=True))
    assert found.get("config") is None or (PRESETS / f"{found['config']}.toml").is_file()


@pytest.mark.parametrize("line", [line for line in INLINE if line not in COMPLETE])
def test_every_shortened_line_names_options_that_exist(line: str) -> None:
    words = line.split()
    command = typer.main.get_command(cli.app).commands[words[0]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_an_option_that_does_not_exist_would_be_seen() -> None:
    with pytest.raises(cli.UsageError, match="--nonsense"):
        parse(["relax", "a", "--out", "b", "--nonsense", "1"])


TEXTS = {
    page.resolve(): page.read_text(encoding="utf-8") for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
}


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", TEXTS[page]):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(TEXTS[file]), f"{target}#{anchor}"
