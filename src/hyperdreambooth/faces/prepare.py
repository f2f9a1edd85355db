"""Photos of any source to a folder of crops, ahead of time: in parallel, resumable, whole files only.

The result is an ordinary photo folder, `IDENTITY/PHOTO.png` or flat as the source was, with captions beside
the photos and the landmarks in metadata.jsonl. Two runs on one folder are wasteful and harmless: both write
the same.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

from PIL import Image

from hyperdreambooth.faces.align import open_photo
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.crop import crop_face
from hyperdreambooth.faces.detect import Detector, check_opencv, fetch_yunet, yunet
from hyperdreambooth.faces.journal import Journal, Record
from hyperdreambooth.faces.sources import HUB, Item, read_items
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import InputError, Run, whole_file

THUMB = 160  # pixels of a dropped photo in the contact sheet
FEW = 16  # photos that are not worth starting processes for
_FORGOTTEN = 3600.0  # seconds after which a half-written hidden file is nobody's


@dataclass(frozen=True)
class Job:
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
        InputError: an unusable source, a folder of something else, or a detector that cannot be had.
    """
    config, source = config or PrepareConfig(), str(source)
    _check_out(source, out)
    Run(out, config, inputs={"source": source})
    journal, records = Journal(out / ".journal"), list[Record]()
    items = read_items(source, config)
    jobs = _jobs(items, journal.known, out, config, detect)
    with Progress("prepare", len(items) if isinstance(items, list) else None) as bar:
        for record in _each(jobs, workers or os.cpu_count() or 1):
            if record.content and record != journal.known.get(record.name):
                journal.add(record)
            records.append(record)
            bar.update(1)
    journal.close()
    kept = [record for record in records if record.kept]
    _remove(out, journal.ever_kept - {record.name for record in kept})
    _describe(out, kept)
    return records


def _check_out(source: str, out: Path) -> None:
    """Never among the photos themselves, and never over somebody else's folder."""
    if not source.startswith(HUB) and out.resolve().is_relative_to(Path(source).resolve()):
        raise InputError(f"out {out}: lies in {source}, where it would be read as photos; pass another --out")
    others = out.is_dir() and any(path.name[0] != "." for path in out.iterdir())
    if others and not (out / "config.json").is_file():
        raise InputError(
            f"out {out}: expected a new or empty folder, or one of an earlier run; pass another --out"
        )


def _jobs(
    items: Iterable[Item],
    known: Mapping[str, Record],
    out: Path,
    config: PrepareConfig,
    detect: Detector | None,
) -> Iterator[Job | Record]:
    """What is still to be done, and the records of what is done."""
    names, depths = dict[str, str](), set[int]()
    for item in items:
        depths.add(item.name.count("/"))
        if len(depths) > 1:
            raise InputError(f"{item.origin}: some photos name a person and some do not; name all or none")
        first = names.setdefault(item.name.casefold(), item.origin)  # some file systems know no upper case
        try:
            if first != item.origin:
                raise InputError(f"has the same name as {first}; rename one of them")
            content = item.fingerprint()
        except InputError as error:
            yield Record(item.name, item.origin, "", str(error))
            continue
        record = known.get(item.name)
        if record and record.content == content and _is_there(record, out):
            yield record
            continue
        if detect is None and item.landmarks is None and not config.already_cropped:
            check_opencv()
            detect = yunet(config.detector or fetch_yunet(), config.score)
        yield Job(item, content, out, config, detect)


def _is_there(record: Record, out: Path) -> bool:
    return not record.kept or (out / f"{record.name}.png").is_file()


def prepare_photo(job: Job) -> Record:
    """Crops one photo and writes it: the caption first, so that no crop is ever without it."""
    item, image = job.item, None
    path = item.content if isinstance(item.content, Path) else Path(item.origin)
    try:
        image = open_photo(path, None if isinstance(item.content, Path) else item.content)
        crop, points = crop_face(image, item.landmarks, job.config, job.detect)
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return Record(item.name, item.origin, job.content, reason, thumb=_thumb(image))
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


def _each(jobs: Iterator[Job | Record], workers: int) -> Iterator[Record]:
    """Records in the order of the jobs; spawned processes, so that it works the same on every system."""
    first = list(islice(jobs, FEW))
    todo = chain(first, jobs)
    if workers == 1 or len(first) < FEW:
        yield from (job if isinstance(job, Record) else prepare_photo(job) for job in todo)
        return
    window: deque[Record | Future[Record]] = deque()
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker) as pool:
        try:
            for job in todo:
                window.append(job if isinstance(job, Record) else pool.submit(prepare_photo, job))
                if len(window) > 4 * workers:
                    yield _result(window.popleft())
            yield from (_result(one) for one in window)
        except BrokenProcessPool:
            raise OSError(
                "a worker died, of too little memory perhaps; run again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _result(one: Record | Future[Record]) -> Record:
    return one if isinstance(one, Record) else one.result()


def _begin_worker() -> None:
    """Ctrl-C is the parent's to answer, and a worker whose parent was killed ends at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


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


def _remove(out: Path, names: Iterable[str]) -> None:
    """Crops whose photo is gone or dropped by now, and what a killed run left half-written long ago."""
    for name in names:
        place = out / f"{name}.png"
        place.unlink(missing_ok=True)
        place.with_suffix(".txt").unlink(missing_ok=True)
        if place.parent != out and not any(place.parent.glob("[!.]*.png")):
            (place.parent / "metadata.jsonl").unlink(missing_ok=True)
    for left in out.rglob(".*.tmp.*"):
        if time.time() - left.stat().st_mtime > _FORGOTTEN:
            left.unlink(missing_ok=True)
