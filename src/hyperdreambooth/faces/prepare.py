"""Turning the photos of any source into a folder of crops: in parallel, resumable, whole files only.

The result is an ordinary photo folder, `IDENTITY/PHOTO.png` or flat like the source, with captions beside the
photos and the landmarks in metadata.jsonl. Two runs on one folder do no harm: both write the same.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from hyperdreambooth.faces.check import look
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.crop import choose, crop_face, main_faces
from hyperdreambooth.faces.dataset import SHEET
from hyperdreambooth.faces.detect import Detector, Face, check_opencv, fetch_yunet, yunet
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.faces.journal import Journal, Record
from hyperdreambooth.faces.landmarks import Landmarks, moved
from hyperdreambooth.faces.notes import folded, printable
from hyperdreambooth.faces.sources import HUB, Item, read_items
from hyperdreambooth.files import InputError, check_apart, whole_file
from hyperdreambooth.grid import mark
from hyperdreambooth.progress import Progress, logger
from hyperdreambooth.runs import Run, check_run, recorded_inputs
from hyperdreambooth.workers import pool, processes

THUMB = 160  # pixels per side of a dropped photo in the contact sheet
FEW = 16  # for fewer photos, no processes are started
_CROPPED = "--already-cropped for photos that are crops of faces"
_EFFORT = 3  # of PNG: a third of the time of level 6, and files 7 % larger
_FORGOTTEN = 3600.0  # seconds after which a half-written hidden file is left over from a kill
Outcome: TypeAlias = tuple[Record, ...]
"""The records of one photo: one, or one for each face where `several` is `all`."""
Task: TypeAlias = Callable[[], Outcome]
HandOut: TypeAlias = Callable[[Iterator[Task | Outcome]], Iterable[Outcome]]
"""Has tasks done and passes on the outcomes that are known; yields all in their order."""


def prepare_folder(
    source: str | Path,
    out: Path,
    config: PrepareConfig | None = None,
    workers: int | None = None,
    detect: Detector | None = None,
    hand_out: HandOut | None = None,
) -> list[Record]:
    """Crops all photos of a source; returns what became of each face, in the source's order.

    A second run continues the first, and follows changes of the source.

    Args:
        source: a source of photos, see `read_items`.
        out: a new folder, or one of an earlier run with the same source and config.
        config: the settings; None for the defaults.
        workers: number of processes; None for one per core.
        detect: finds faces; None for YuNet. It is pickled for the workers.
        hand_out: has the tasks done elsewhere; None for processes of this machine.
    """
    config, source = config or PrepareConfig(), str(source)
    _check_out(source, out)
    journal, records = Journal(out / ".journal.sqlite"), list[Record]()
    if not journal.known and (recorded_inputs(out) or {}).keys() == {"source"}:
        (out / "config.json").unlink()  # an earlier run without any record may have had another source
    _run(source, out, config)
    items = read_items(source, config)
    tasks = _tasks(items, journal.known, out, config, detect)
    with closing(journal), Progress("prepare", len(items) if isinstance(items, list) else None) as bar:
        for outcome in (hand_out or partial(_each, workers=processes(workers)))(tasks):
            if outcome[0].content and outcome != journal.known.get(outcome[0].item):
                journal.add(outcome)
            records += outcome
            bar.update(1)
    if not records:
        raise InputError(f"{source}: no photo found; pass a folder, shards or a data set with photos")
    kept = [record for record in records if record.kept]
    _remove(out, journal.ever_kept, {record.name for record in kept})
    describe(out, kept)
    return records


def _check_out(source: str, out: Path) -> None:
    """Refuses an output inside the source, or one that is no run folder."""
    if not source.startswith(HUB):
        check_apart(out, Path(source))
    check_run(out)


def _run(source: str, out: Path, config: PrepareConfig) -> None:
    """Opens the run folder; refuses one of another source or config."""
    # the path as the user spelled it, so that source and crops may be moved together; without a final slash
    Run(out, config, inputs={"source": printable(source if source.startswith(HUB) else str(Path(source)))})


def prepare_part(
    source: str, out: Path, config: PrepareConfig, part: tuple[int, int], workers: int | None = None
) -> list[str]:
    """Crops some photos of a source, as one of several processes; returns a name for each.

    The outcomes wait in a journal of their own for `merge_parts`, and then for `prepare_folder`.

    Args:
        source: a source of photos, see `read_items`.
        out: the folder that all parts share.
        config: the settings.
        part: which one, from 0, and of how many.
        workers: number of processes; None for one per core.
    """
    _check_out(source, out)
    _run(source, out, config)
    journal = Journal(out / f".journal-{part[0]}-of-{part[1]}.sqlite")
    whole = out / ".journal.sqlite"
    known = {**(_known(whole) if whole.is_file() else {}), **journal.known}
    names = part_names(source, config)[part[0] :: part[1]]
    tasks = _tasks(read_items(source, config), known, out, config, None, part)
    with closing(journal), Progress("prepare", len(names)) as bar:
        for outcome in _each(tasks, processes(workers)):
            if outcome[0].content:
                journal.add(outcome)
            bar.update(1)
    return names


def part_names(source: str, config: PrepareConfig) -> list[str]:
    """Returns a name for every photo of a source, by which parts say what they have done."""
    return [f"{number} {item.name}" for number, item in enumerate(read_items(source, config))]


def merge_parts(out: Path) -> None:
    """Moves the outcomes of all parts into the journal of the whole."""
    parts = sorted(out.glob(".journal-*-of-*.sqlite"))
    with closing(Journal(out / ".journal.sqlite")) as journal:
        for part in parts:
            for outcome in _known(part).values():
                journal.add(outcome)
            part.unlink()


def _known(file: Path) -> dict[str, Outcome]:
    with closing(Journal(file)) as journal:
        return journal.known


def _tasks(
    items: Iterable[Item],
    known: Mapping[str, Outcome],
    out: Path,
    config: PrepareConfig,
    detect: Detector | None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Task | Outcome]:
    """Yields a task for each photo to crop, and the outcome of each photo that is done or refused."""
    names = dict[str, str]()
    for number, item in enumerate(_named(items, config.person)):
        own = number % part[1] == part[0]
        if item.refused:
            if own:
                yield (Record(item.name, item.origin, "", item.refused),)
            continue
        try:
            _claim(item, names)
            if not own:
                continue
            content = item.fingerprint()
        except InputError as error:
            if own:
                yield (Record(item.name, item.origin, "", _reason(error, item)),)
            continue
        outcome = known.get(item.name, ())
        if outcome and outcome[0].content == content and all(_is_there(out, one) for one in outcome):
            yield outcome
            continue
        if detect is None and item.landmarks is None and not config.already_cropped:
            check_opencv(f", or pass {_CROPPED}")
            file = config.detector or fetch_yunet(f"pass --detector FILE, or {_CROPPED}")
            detect = yunet(file, config.score)
        yield partial(prepare_photo, item, content, out, config, detect)


def _named(items: Iterable[Item], person: str | None) -> Iterator[Item]:
    """Yields the photos; those of a flat source get the name of the person, or a note that they have none."""
    depths, flat = set[int](), 0
    for item in items:
        if not item.refused:
            depths.add(item.name.count("/"))
            if len(depths) > 1:
                advice = "give it for all or for none"
                raise InputError(f"{item.origin}: some photos have an identity and some do not; {advice}")
            if person is not None and depths != {0}:
                advice = "leave out --person, or pass the folder of one person"
                raise InputError(f"{item.origin}: the photo has an identity already; {advice}")
            flat += depths == {0}
            if flat == 2 and person is None:
                advice = "pass --person NAME if they all show one person"
                logger.info(f"no folders of people: each photo is taken as a person of its own; {advice}")
        yield item if person is None else replace(item, name=f"{person}/{item.name}")


def _is_there(out: Path, record: Record) -> bool:
    return not record.kept or _place(out, record.name).is_file()


def _claim(item: Item, names: dict[str, str]) -> None:
    """Records a photo's name; refuses a name that is taken."""
    name = folded(item.name)
    if f"{name.rpartition('/')[2]}.png" == SHEET:
        raise InputError(f"its crop would replace prepare's own {SHEET}; rename it")
    if first := names.get(name):
        raise InputError(f"has the same name as {first}; rename one of them")
    names[name] = item.origin


def _reason(error: InputError, item: Item) -> str:
    """Returns why a photo is dropped, without its path, which the record already has."""
    return printable(str(error).removeprefix(f"{InputError(f'{_path(item)}:')} "))


def _path(item: Item) -> Path:
    """Returns the photo's file, or the name of a photo that has no file."""
    return item.content if isinstance(item.content, Path) else Path(item.origin)


def _place(out: Path, name: str) -> Path:
    return out / f"{name}.png"


def prepare_photo(
    item: Item, content: str, out: Path, config: PrepareConfig, detect: Detector | None
) -> Outcome:
    """Crops the faces of one photo and writes the crops."""
    numbered = config.several == "all"
    start = Record(item.name, item.origin, content, caption=item.caption or config.caption)
    image, faces = None, list[Face]()
    try:
        image = open_photo(_path(item), None if isinstance(item.content, Path) else item.content)
        start = replace(start, look=look(image))
        if config.already_cropped or item.landmarks is not None:
            known = replace(start, landmarks=item.landmarks, corners=item.corners, number=int(numbered))
            return (_prepare_face(image, known, out, config),)
        faces = main_faces(detect(image), config) if detect else []
        chosen = choose(faces, config)
    except InputError as error:
        reason, thumb = _reason(error, item), "" if image is None else _thumb(image, faces)
        return (replace(start, reason=reason, faces=len(faces), thumb=thumb),)
    start = replace(start, faces=len(faces))
    seen = [
        replace(start, landmarks=face.landmarks, score=round(face.score, 3), number=number * numbered)
        for number, face in enumerate(chosen, start=1)
    ]
    return tuple(_prepare_face(image, one, out, config) for one in seen)


def _prepare_face(image: Image.Image, seen: Record, out: Path, config: PrepareConfig) -> Record:
    """Crops one face, whose landmarks are still those in the photo, and returns its final record.

    The crop is written after its caption, so that no crop is ever without it.
    """
    try:
        crop = crop_face(image, seen.landmarks, config, seen.corners)
    except InputError as error:
        which = f"face {seen.number} of {seen.faces}: " if seen.number and seen.faces > 1 else ""
        thumb = _thumb(image, () if seen.landmarks is None else (seen.landmarks,))
        return replace(seen, reason=f"{which}{error}", landmarks=None, corners=None, thumb=thumb)
    place = _place(out, seen.name)
    place.parent.mkdir(parents=True, exist_ok=True)
    _write(place.with_suffix(".txt"), "" if seen.caption is None else seen.caption + "\n")
    with whole_file(place) as part:
        crop.picture.save(part, format="PNG", compress_level=_EFFORT)
    sharp = round(crop.sharpness, 1)
    return replace(seen, landmarks=crop.landmarks, corners=crop.corners, sharpness=sharp)


def _write(file: Path, text: str) -> None:
    """Writes a file whole; without a text, there is to be no file."""
    if not text:
        file.unlink(missing_ok=True)
        return
    with whole_file(file) as part:
        part.write_text(text, encoding="utf-8")


def _thumb(image: Image.Image, faces: Iterable[Face | Landmarks]) -> str:
    """Returns a photo as a small base64 JPEG, with the points of the faces that were seen."""
    small = image.copy()
    small.thumbnail((THUMB, THUMB))
    for face in faces:
        points = face.landmarks if isinstance(face, Face) else face
        mark(small, moved(points, complex(small.width / image.width), 0j))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _each(tasks: Iterator[Task | Outcome], workers: int) -> Iterator[Outcome]:
    """Yields the outcomes in the order of the tasks."""
    first = list(islice(tasks, FEW))
    todo = chain(first, tasks)
    if workers == 1 or len(first) < FEW:
        yield from (task if isinstance(task, tuple) else task() for task in todo)
        return
    window: deque[Outcome | Future[Outcome]] = deque()
    with pool(workers) as side_by_side:
        try:
            for task in todo:
                window.append(task if isinstance(task, tuple) else side_by_side.submit(task))
                if len(window) > 4 * workers:
                    yield _result(window.popleft())
            yield from (_result(one) for one in window)
        except BrokenProcessPool:
            advice = "run again with fewer --workers"
            raise OSError(f"a worker process died, perhaps for lack of memory; {advice}") from None
        finally:
            side_by_side.shutdown(cancel_futures=True)


def _result(one: Outcome | Future[Outcome]) -> Outcome:
    return one if isinstance(one, tuple) else one.result()


def describe(out: Path, kept: Iterable[Record]) -> None:
    """Writes metadata.jsonl into every folder of crops whose landmarks are known."""
    lines: dict[Path, list[str]] = {}
    for record in kept:
        place = _place(out, record.name)
        known = lines.setdefault(place.parent, [])
        if record.landmarks is not None or record.corners is not None:
            text = {} if record.caption is None else {"text": record.caption}
            corners = {} if record.corners is None else {"corners": record.corners}
            entry = {"file_name": place.name, **text, "landmarks": record.landmarks, **corners}
            known.append(json.dumps(entry, ensure_ascii=False) + "\n")
    for folder, known in lines.items():
        _write(folder / "metadata.jsonl", "".join(known))


def _remove(out: Path, ever: set[str], kept: set[str]) -> None:
    """Deletes crops whose photo is gone or dropped by now, and old half-written files of a killed run."""
    kept_as = {folded(name): _place(out, name) for name in kept}
    for name in ever - kept:
        place, renamed = _place(out, name), kept_as.get(folded(name))
        if renamed and place.exists() and place.samefile(renamed):
            continue  # Ana.png is ana.png where case does not count
        place.unlink(missing_ok=True)
        place.with_suffix(".txt").unlink(missing_ok=True)
        if place.parent != out and not any(place.parent.glob("[!.]*.png")):
            (place.parent / "metadata.jsonl").unlink(missing_ok=True)
    for left in out.rglob(".*.tmp.*"):
        with suppress(OSError):  # another run may have finished it in the meantime
            if time.time() - left.stat().st_mtime > _FORGOTTEN:
                left.unlink()
