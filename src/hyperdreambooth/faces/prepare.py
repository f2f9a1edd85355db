"""Photos of any source to a folder of crops, ahead of time: in parallel, resumable, whole files only.

The result is an ordinary photo folder, `IDENTITY/PHOTO.png` or flat as the source was, with captions beside
the photos and the landmarks in metadata.jsonl. Two runs on one folder are wasteful and harmless: both write
the same.
"""

from __future__ import annotations

import base64
import io
import json
import time
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from PIL import Image

from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.crop import crop_face
from hyperdreambooth.faces.dataset import SHEET, printable
from hyperdreambooth.faces.detect import Detector, check_opencv, fetch_yunet, yunet
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.faces.journal import Journal, Record
from hyperdreambooth.faces.sources import HUB, Item, read_items
from hyperdreambooth.files import InputError, check_apart, whole_file
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import Run, check_run, recorded_inputs
from hyperdreambooth.workers import pool, processes

THUMB = 160  # pixels of a dropped photo in the contact sheet
FEW = 16  # photos that are not worth starting processes for
_CROPPED = "--already-cropped for photos that are crops of faces"
_FORGOTTEN = 3600.0  # seconds after which a half-written hidden file is nobody's


@dataclass(frozen=True)
class PhotoTask:
    """One photo for a worker."""

    item: Item
    content: str
    out: Path
    config: PrepareConfig
    detect: Detector | None


def prepare_folder(
    source: str | Path,
    out: Path,
    config: PrepareConfig | None = None,
    workers: int | None = None,
    detect: Detector | None = None,
) -> list[Record]:
    """Crops all photos of a source; running it again continues, and follows a source that has changed.

    Args:
        source: what `read_items` takes.
        out: a new folder, or one of an earlier run of the same source and config.
        config: how.
        workers: processes; None for one a core.
        detect: finds faces; None for YuNet. It travels to the workers, so it must pickle.

    Returns:
        What became of every photo, in the source's order.

    Raises:
        InputError: an unusable or empty source, a folder of something else, or a detector that cannot be had.
    """
    config, source = config or PrepareConfig(), str(source)
    _check_out(source, out)
    journal, records = Journal(out / ".journal"), list[Record]()
    # a run of ours that came to nothing binds nobody to its source
    if not journal.known and (recorded_inputs(out) or {}).keys() == {"source"}:
        (out / "config.json").unlink()
    # by the path as it is spelled, so that source and crops may be moved together; not by a slash at its end
    Run(out, config, inputs={"source": printable(source if source.startswith(HUB) else str(Path(source)))})
    items = read_items(source, config)
    jobs = _jobs(items, journal.known, out, config, detect)
    with closing(journal), Progress("prepare", len(items) if isinstance(items, list) else None) as bar:
        for record in _each(jobs, processes(workers)):
            if record.content and record != journal.known.get(record.name):
                journal.add(record)
            records.append(record)
            bar.update(1)
    if not records:
        raise InputError(f"{source}: no photo found in it")
    kept = [record for record in records if record.kept]
    _remove(out, journal.ever_kept, {record.name for record in kept})
    _describe(out, kept)
    return records


def _check_out(source: str, out: Path) -> None:
    """Never among the photos themselves, and never over somebody else's folder."""
    if not source.startswith(HUB):
        check_apart(out, Path(source))
    check_run(out)


def _jobs(
    items: Iterable[Item],
    known: Mapping[str, Record],
    out: Path,
    config: PrepareConfig,
    detect: Detector | None,
) -> Iterator[PhotoTask | Record]:
    """What is still to be done, and the records of what is done."""
    names, depths = dict[str, str](), set[int]()
    for item in items:
        if item.refused:
            yield Record(item.name, item.origin, "", item.refused)
            continue
        depths.add(item.name.count("/"))
        if len(depths) > 1:
            raise InputError(f"{item.origin}: some photos name a person and some do not; name all or none")
        try:
            _claim(item, names)
            content = item.fingerprint()
        except InputError as error:
            yield Record(item.name, item.origin, "", _reason(error, item))
            continue
        record = known.get(item.name)
        if record and record.content == content and _is_there(record, out):
            yield record
            continue
        if detect is None and item.landmarks is None and not config.already_cropped:
            check_opencv(f", or pass {_CROPPED}")
            detect = yunet(
                config.detector or fetch_yunet(f"pass --detector FILE, or {_CROPPED}"), config.score
            )
        yield PhotoTask(item, content, out, config, detect)


def _claim(item: Item, names: dict[str, str]) -> None:
    """Notes a photo's name; refuses one that is taken."""
    name = _folded(item.name)
    if f"{name.rpartition('/')[2]}.png" == SHEET:
        raise InputError(f"its crop would have the name of prepare's own {SHEET}; rename it")
    if first := names.get(name):
        raise InputError(f"has the same name as {first}; rename one of them")
    names[name] = item.origin


def _folded(name: str) -> str:
    """A name as the file systems of Windows and Macs compare it."""
    return unicodedata.normalize("NFC", name).casefold()


def _reason(error: InputError, item: Item) -> str:
    """Why a photo is dropped, without its name, which the record has already."""
    return printable(str(error).removeprefix(f"{InputError(f'{_path(item)}:')} "))


def _path(item: Item) -> Path:
    """The photo's file, or what names a photo that is none."""
    return item.content if isinstance(item.content, Path) else Path(item.origin)


def _is_there(record: Record, out: Path) -> bool:
    return not record.kept or (out / f"{record.name}.png").is_file()


def prepare_photo(job: PhotoTask) -> Record:
    """Crops one photo and writes it: the caption first, so that no crop is ever without it."""
    item, image = job.item, None
    try:
        image = open_photo(_path(item), None if isinstance(item.content, Path) else item.content)
        crop, points = crop_face(image, item.landmarks, job.config, job.detect)
    except InputError as error:
        return Record(item.name, item.origin, job.content, _reason(error, item), thumb=_thumb(image))
    caption = item.caption or job.config.caption
    place = job.out / f"{item.name}.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    _write_caption(place, caption)
    with whole_file(place) as part:
        crop.save(part, format="PNG")
    return Record(item.name, item.origin, job.content, caption=caption, landmarks=points)


def _write_caption(place: Path, caption: str | None) -> None:
    words = place.with_suffix(".txt")
    if caption is None:
        words.unlink(missing_ok=True)
        return
    with whole_file(words) as part:
        part.write_text(caption + "\n", encoding="utf-8")


def _thumb(image: Image.Image | None) -> str:
    """A small JPEG in base64."""
    if image is None:
        return ""
    image.thumbnail((THUMB, THUMB))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


# ---- processes -----------------------------------------------------------------------------------------


def _each(jobs: Iterator[PhotoTask | Record], workers: int) -> Iterator[Record]:
    """Records in the order of the jobs."""
    first = list(islice(jobs, FEW))
    todo = chain(first, jobs)
    if workers == 1 or len(first) < FEW:
        yield from (job if isinstance(job, Record) else prepare_photo(job) for job in todo)
        return
    window: deque[Record | Future[Record]] = deque()
    with pool(workers) as side_by_side:
        try:
            for job in todo:
                window.append(job if isinstance(job, Record) else side_by_side.submit(prepare_photo, job))
                if len(window) > 4 * workers:
                    yield _result(window.popleft())
            yield from (_result(one) for one in window)
        except BrokenProcessPool:
            raise OSError(
                "a worker died, of too little memory perhaps; run again with fewer --workers"
            ) from None
        finally:
            side_by_side.shutdown(cancel_futures=True)


def _result(one: Record | Future[Record]) -> Record:
    return one if isinstance(one, Record) else one.result()


# ---- what else lies in the folder ----------------------------------------------------------------------


def _describe(out: Path, kept: Iterable[Record]) -> None:
    """A metadata.jsonl in every folder of crops whose landmarks are known."""
    lines: dict[Path, list[str]] = {}
    for record in kept:
        place = out / f"{record.name}.png"
        entry = {"file_name": place.name, "text": record.caption, "landmarks": record.landmarks}
        told = {name: value for name, value in entry.items() if value is not None}
        lines.setdefault(place.parent, [])
        if record.landmarks is not None:
            lines[place.parent].append(json.dumps(told, ensure_ascii=False) + "\n")
    for folder, known in lines.items():
        if not known:
            (folder / "metadata.jsonl").unlink(missing_ok=True)
            continue
        with whole_file(folder / "metadata.jsonl") as part:
            part.write_text("".join(known), encoding="utf-8")


def _remove(out: Path, ever: set[str], kept: set[str]) -> None:
    """Crops whose photo is gone or dropped by now, and what a killed run left half-written long ago."""
    folded = {_folded(name): out / f"{name}.png" for name in kept}
    for name in ever - kept:
        place = out / f"{name}.png"
        renamed = folded.get(_folded(name))
        if renamed and place.exists() and place.samefile(renamed):  # Ana.png to ana.png, where case is one
            continue
        place.unlink(missing_ok=True)
        place.with_suffix(".txt").unlink(missing_ok=True)
        if place.parent != out and not any(place.parent.glob("[!.]*.png")):
            (place.parent / "metadata.jsonl").unlink(missing_ok=True)
    for left in out.rglob(".*.tmp.*"):
        with suppress(OSError):  # another run may just have finished it
            if time.time() - left.stat().st_mtime > _FORGOTTEN:
                left.unlink()
