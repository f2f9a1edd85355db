"""The page in a real browser, headless, as `hdb ui` serves it: what a person does, sees and saves.

Without Chromium these are skipped. The processes listen on loopback only, and end with the tests.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hyperdreambooth.files import load_tensors

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium"),
]
_LONG = 100_000  # milliseconds, of a busy machine
SMALL = ["--set", "batch=2", "--set", "save_every=1", "--set", "steps=4", "--set", "rank=2"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Door:
    """A running `hdb ui`."""

    def __init__(self, world: Path, out: Path, *more: str) -> None:
        self.port = free_port()
        on = ["--base", str(world / "base"), "--hypernet", str(world / "made"), "--device", "cpu"]
        words = ["ui", "--out", str(out), "--port", str(self.port), *on, *SMALL, *more]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hyperdreambooth", *words],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = f"http://127.0.0.1:{self.port}/"

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        with self.process:
            return self.process.wait(timeout=240)


@contextmanager
def door(world: Path, out: Path, *more: str) -> Generator[Door]:
    opened = Door(world, out, *more)
    try:
        yield opened
    finally:
        if opened.process.poll() is None:
            opened.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def tab(browser: Any, url: str, **options: Any) -> Generator[Any]:
    """A tab of its own; whatever it asks of other machines fails the test."""
    context = browser.new_context(**options)
    context.set_default_timeout(_LONG)
    page, elsewhere = context.new_page(), list[str]()
    page.on("request", lambda one: elsewhere.append(one.url))
    page.goto(url)
    page.get_by_role("tab", name="People").wait_for()
    yield page
    context.close()
    assert not [one for one in elsewhere if not one.startswith((url, "data:", "blob:"))]


def ask_for(page: Any, photo: Path, name: str = "Ana") -> None:
    page.get_by_role("tab", name="New person").click()
    page.set_input_files("#photos input[type=file]", [str(photo)])
    page.wait_for_selector("#crops figure img")
    page.get_by_label("Name", exact=True).fill(name)
    page.locator("#make").click()
    page.wait_for_selector(f"#person h2:has-text('{name}')")


def test_from_a_photo_to_files_and_drawings(
    browser: Any, world: Path, micro_photos: Path, tmp_path: Path
) -> None:
    """Upload, run, reload in the middle, slider, keep, download, draw, error, delete."""
    with door(world, tmp_path / "out") as opened:
        assert opened.line.startswith("open http://127.0.0.1:")
        with tab(browser, opened.url) as page:
            ask_for(page, micro_photos / "person-0" / "0.png")
            page.wait_for_selector("#look figure img")
            page.reload()
            page.wait_for_selector("#person .hdb-done")
            assert page.locator("#person h2").inner_text() == "Ana"
            page.wait_for_selector("#strip button")
            assert page.locator("#strip button").count() == 5
            page.locator("#step input[type=range]").focus()
            for _ in range(4):
                page.keyboard.press("ArrowLeft")
            page.wait_for_selector("#look :text('The prediction, before any step')")
            page.locator("#keep").click()
            page.wait_for_selector("#person :text('after 0 steps')")
            with page.expect_download() as started:
                page.locator("#files a").first.click()
            assert started.value.suggested_filename == "person.safetensors"
            tensors, _ = load_tensors(Path(started.value.path()))
            assert any("lora_down" in key for key in tensors)
            _draw(page)
            _no_picture(page, micro_photos / "person-0" / "0.png", tmp_path)
            page.get_by_role("tab", name="People").click()
            page.get_by_role("button", name="Delete this person").click()
            page.locator("#delete").click()
            page.wait_for_selector("#person :text('Nobody yet')")
            assert not page.locator("#delete").is_visible()
        assert not list((tmp_path / "out" / "people").iterdir())
        assert opened.end(signal.SIGTERM) == 0


def _draw(page: Any) -> None:
    """Draws somebody beside the base; the first try has seeds that are none, and says so."""
    page.get_by_role("tab", name="Draw").click()
    page.locator("#who input").click()
    page.get_by_role("option", name="Ana").click()
    page.keyboard.press("Escape")
    page.wait_for_selector("label:has-text('Weight of Ana'), span:has-text('Weight of Ana')")
    page.locator("#beside input").click()
    page.get_by_role("option", name="the base model").click()
    seeds = page.locator("#seeds input, #seeds textarea")
    seeds.fill("three")
    page.locator("#draw").click()
    toast = page.wait_for_selector("[data-testid=toast-body]")
    assert "Seeds: expected whole numbers" in toast.inner_text() and "Traceback" not in page.content()
    seeds.fill("3")
    page.locator("#draw").click()
    page.wait_for_selector("#drawing .hdb-done")
    assert page.locator("#drawing figure img").count() == 4


def _no_picture(page: Any, photo: Path, home: Path) -> None:
    """A file that is no picture is one sentence, and makes nobody; the next photo brings its own name."""
    (home / "notes.png").write_text("buy milk")
    page.get_by_role("tab", name="New person").click()
    page.set_input_files("#photos input[type=file]", [str(home / "notes.png")])
    alert = page.wait_for_selector("#crops [role=alert]").inner_text()
    assert alert.startswith("No photo can be used: notes.png: ") and str(home) not in alert
    assert page.locator("#make").is_disabled()
    name = page.get_by_label("Name", exact=True)
    assert name.input_value() == "Notes"
    page.get_by_label("Clear").first.click()
    page.wait_for_selector("#crops :text('appears here')")
    page.set_input_files("#photos input[type=file]", [str(photo)])
    page.wait_for_selector("#crops figure img")
    assert name.input_value() == "0"


def test_a_killed_program_loses_nothing(
    browser: Any, world: Path, micro_photos: Path, tmp_path: Path
) -> None:
    """Kill -9 in the middle: the next program shows what there is, says what to do, and goes on."""
    out = tmp_path / "out"
    with door(world, out, "--set", "steps=4000") as opened, tab(browser, opened.url) as page:
        ask_for(page, micro_photos / "person-0" / "0.png")
        page.wait_for_selector("#look figure img")
        page.wait_for_function("document.querySelector('#person progress').value >= 2")
        opened.end(signal.SIGKILL)
    with door(world, out, "--set", "steps=4000") as opened, tab(browser, opened.url) as page:
        page.wait_for_selector("#person :text('press Go on')")
        assert page.locator("#look figure img").count() >= 2
        page.locator("#go-on").click()
        page.wait_for_function("document.querySelector('#person progress')?.value >= 3")
        page.locator("#stop").click()
        page.wait_for_selector("#person .hdb-stopped")
        page.wait_for_selector("#files a")


def test_on_a_phone_in_the_dark_by_keyboard(
    browser: Any, world: Path, micro_photos: Path, tmp_path: Path
) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "is_mobile": True}
    with door(world, tmp_path / "out") as opened, tab(browser, opened.url, **phone) as page:
        ask_for(page, micro_photos / "person-0" / "0.png")
        page.wait_for_selector("#person .hdb-done")
        page.wait_for_selector("#files a")
        page.locator("#strip button").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#look :text('The prediction, before any step')")
        for name in ("People", "New person", "Draw"):
            page.get_by_role("tab", name=name).click()
            page.wait_for_selector("#curves svg" if name == "People" else "button:visible")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
        assert page.evaluate("document.body.classList.contains('dark')")
        assert page.evaluate("[...document.images].every(image => image.hasAttribute('alt'))")
