"""The command that opens the page: it loads base, hypernetwork and scorers, and hands them to `ui/`."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option, echo

from hyperdreambooth.apps import checks
from hyperdreambooth.apps.checks import Check
from hyperdreambooth.apps.options import HypernetName, by_method, command, named_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hyperdreambooth.apps.person_config import PersonalizeConfig
    from hyperdreambooth.apps.settings import Job
    from hyperdreambooth.base.load import Base
    from hyperdreambooth.faces.detect import Detector
    from hyperdreambooth.ui.making import Maker

SAMPLES = 6
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_AVATARS = (
    "This base draws avatars, people of a drawn world, and a photograph becomes a drawn face. "
    "For photographic results, start with --base and --hypernet."
)
_SHARED = (
    "this page is shared: everybody who reaches its address sees the photos and people here, "
    "and can delete them"
)


@command("hyperdreambooth.apps.person_config:PersonalizeConfig", "method|person", adjust=by_method)
def ui(
    job: Job[PersonalizeConfig],
    out: Annotated[
        Path, Option(help="The folder that keeps people and drawings."), Check(checks.output_folder)
    ] = Path("people"),
    host: Annotated[str, Option(help="The address to listen at; 0.0.0.0 shares the page.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="The port to listen at.")] = 7860,
    detector: Annotated[
        Path | None, Option(help="The ONNX file of YuNet [downloaded once].", parser=named_path)
    ] = None,
    hypernet: HypernetName = None,
) -> None:
    """Open the page: photos in, pictures and LoRA files out, in a browser.

    It runs on this machine, and only this machine sees it unless --host says otherwise. Ctrl-C ends it.
    """
    from threading import Event

    from hyperdreambooth.ui.page import serve
    from hyperdreambooth.ui.shared import Setting
    from hyperdreambooth.ui.studio import Studio

    _check_gradio()
    _check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="hdb-ui-") as home:
        os.environ["GRADIO_TEMP_DIR"] = home  # uploads, which end with the page
        maker = load_maker(job, hypernet)
        samples = draw_samples(Path(home) / "samples") if avatars(maker.base) else []
        warning = "" if host in _LOOPBACK else _SHARED
        world = _AVATARS if avatars(maker.base) else f"The base is {maker.base.source}."
        studio = Studio(out, maker, said)
        page = None
        try:
            setting = Setting(studio, samples, lambda: find_detector(detector), world, warning)
            page, address = serve(setting, host, port)
            if warning:
                echo(f"warning: {warning}", err=True)
            echo(f"open {address} in a browser; Ctrl-C ends")
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends services ends it, too
            Event().wait()
        except KeyboardInterrupt:
            echo("ended; people and drawings are kept", err=True)
        finally:
            studio.close()
            if page is not None:
                page.close(verbose=False)


def avatars(base: Base) -> bool:
    """Returns whether a base draws the embedded world."""
    from hyperdreambooth.base.load import EMBEDDED_NAME

    return base.source == EMBEDDED_NAME


def _check_gradio() -> None:
    from importlib.util import find_spec

    from hyperdreambooth.files import InputError

    if find_spec("gradio") is None:
        raise InputError("the page needs Gradio; run pip install 'hyperdreambooth[ui]'")


def _check_port(host: str, port: int) -> None:
    """Refuses an address that cannot be listened at, before anything is loaded."""
    from hyperdreambooth.files import InputError

    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        why = error.strerror or error
        raise InputError(
            f"port {port} of {host}: cannot be listened at ({why}); pass another --port"
        ) from None


def load_maker(job: Job[PersonalizeConfig], hypernet: str | None) -> Maker:
    """Loads what makes people: by prediction, or from scratch with another method."""
    from hyperdreambooth.adapter import check_forms
    from hyperdreambooth.apps.familiarity import distance_words
    from hyperdreambooth.apps.loading import load, load_personalizer
    from hyperdreambooth.evaluate.base_scorers import load_base_scorers
    from hyperdreambooth.finetune.config import USUAL, DreamboothConfig, FinetuneConfig
    from hyperdreambooth.ui.making import Maker, look_prompts

    own = job.own
    if own.method == "hypernetwork":
        personalizer = load_personalizer(job.base, hypernet)
        base, kind, usual = personalizer.base, FinetuneConfig, FinetuneConfig().last
    else:
        personalizer, base = None, load(job.base)
        kind, usual = DreamboothConfig, USUAL[own.method]["steps"]
    check_forms(base, base.sites)
    config = kind(**own.model_dump(include=set(kind.model_fields)))
    if config.steps == "auto":  # on the page, a person chooses among the looks
        config = config.model_copy(update={"steps": min(config.most, usual)})
    prompts = look_prompts(own.prompts, base.class_word)
    distance = None if personalizer is None else lambda photos: distance_words(personalizer, photos)
    return Maker(base, config, prompts, own.guidance, load_base_scorers(base), personalizer, distance)


def draw_samples(folder: Path) -> Sequence[Path]:
    """Draws photos of a few avatars that no training has seen, with captions."""
    from hyperdreambooth.apps.inference import held_out

    folder.mkdir()
    return [held_out(seed, folder)[0] for seed in range(SAMPLES)]


def find_detector(file: Path | None) -> Detector | None:
    """Returns what finds faces; None where it is not installed or cannot be downloaded."""
    from hyperdreambooth.faces.detect import LEAST_SCORE, check_opencv, fetch_yunet, yunet
    from hyperdreambooth.files import InputError

    try:
        check_opencv()
        return yunet(file or fetch_yunet("pass --detector FILE"), LEAST_SCORE)
    except InputError as error:
        if file is not None:
            raise
        logging.getLogger("hyperdreambooth").warning(f"the centre of photos is taken: {error}")
        return None


def said(error: Exception) -> str | None:
    """Returns the sentence about an error for the page; None for a bug."""
    from hyperdreambooth.apps.cli import explain, visible

    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "the machine has too little memory for this; close other programs, and press Go on"
    found = explain(error)
    if found is None:
        return None
    return visible(found[0]).removeprefix("error: ").replace("run the same command again", "press Go on")
