"""The folder of a person, as `demo` and `personalize` write it: adapters, pictures, model card and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from hyperdreambooth.adapter import FILES, Adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.files import InputError, check_writable, read_json, whole_folder, write_json
from hyperdreambooth.runs import environment

COMMANDS = ("demo", "personalize")  # that write such folders, as their reports name them
_OF_FILE_MANAGERS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # they leave these in every folder they show


def check_out(folder: Path) -> None:
    """Refuses to replace a folder that is not an earlier result. Commands ask before the work, too."""
    if folder.exists() and not _is_replaceable(folder):
        raise InputError(
            f"out {folder}: expected a new or empty folder, or one of an earlier run; pass another --out"
        )
    if folder.resolve().is_mount():
        raise InputError(f"out {folder}: a mounted folder cannot be replaced; pass a folder inside it")
    if folder.resolve() == Path.cwd():  # the shell would stay in a folder that no longer exists
        raise InputError(f"out {folder}: the current folder cannot be replaced; pass another --out")
    check_writable(folder.parent)


def _is_replaceable(folder: Path) -> bool:
    """Whether it is an empty folder, or holds an earlier person and nothing else."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()} - _OF_FILE_MANAGERS
    try:
        report = read_json(folder / "report.json") if names else {}
        earlier = report.get("command") in COMMANDS and names <= {"report.json", *report["files"].values()}
    except (InputError, LookupError, AttributeError, TypeError):
        return False
    return not names or earlier


def save_person(
    out: Path,
    base: Base,
    prediction: Adapter,
    adapter: Adapter,
    /,
    *,
    photo: Photo,
    picture: Image.Image,
    seconds: Mapping[str, float],
    **entries: Any,
) -> dict[str, Any]:
    """Writes a personalization as one folder, whole or not at all; an earlier result there is replaced.

    The prediction becomes a LiDB, and the adapter a LoRA in kohya's form and in that of diffusers. The total
    of the seconds is their sum if it is missing. The entries are what else belongs in the report (config,
    prompts, scores, …), which is returned as it is written.
    """
    check_out(out)
    files: dict[str, str] = {**FILES, "picture": "picture.png", "photo": "photo.png", "card": "README.md"}
    if photo.caption:
        files["caption"] = "photo.txt"
    totalled = {**seconds, "total": seconds.get("total", sum(seconds.values()))}
    report: dict[str, Any] = {
        "seconds": {stage: round(value, 3) for stage, value in totalled.items()},
        "files": files,
        "steps": int(adapter.metadata.get("steps", 0)),
        "rank": adapter.rank,
        "trigger": adapter.trigger,
        "command": "personalize",
        **entries,
        "environment": environment(),
    }
    with whole_folder(out) as part:
        for form, name in FILES.items():
            (prediction if form == "lidb" else adapter).save(part / name, form)
        picture.save(part / "picture.png")
        photo.open().save(part / "photo.png")
        if photo.caption:
            (part / "photo.txt").write_text(photo.caption, encoding="utf-8")
        (part / "README.md").write_text(adapter.card("picture.png", base.class_word), encoding="utf-8")
        write_json(part / "report.json", report)
    return report
