"""Where photos come from: folders, Hugging Face data sets, webdataset shards; all become one stream.

Only `prepare` reads these: what it writes is an ordinary photo folder, which every other stage knows.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.dataset import EXTENSIONS, Note, note_of, photo_hash, read_faces, read_person
from hyperdreambooth.faces.landmarks import Landmarks
from hyperdreambooth.runs import InputError

HUB = "hf:"
IDENTITIES = ("identity", "person", "person_id", "celeb_id", "label")
CAPTIONS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Item:
    """One photo of a stream.

    Attributes:
        name: of the crop to be made, `IDENTITY/PHOTO`, or `PHOTO` where each is an identity of its own.
        origin: what messages call the photo.
        content: the file, or the bytes of a photo that is no file.
        caption: or None.
        landmarks: or None.
    """

    name: str
    origin: str
    content: Path | bytes
    caption: str | None
    landmarks: Landmarks | None = None

    def fingerprint(self) -> str:
        """32 hex digits of all that the crop depends on.

        Raises:
            InputError: the photo cannot be read.
        """
        photo = self.content
        content = photo_hash(photo) if isinstance(photo, Path) else hashlib.sha256(photo).hexdigest()[:32]
        return hashlib.sha256(repr((content, self.caption, self.landmarks)).encode()).hexdigest()[:32]


def read_items(source: str, config: PrepareConfig) -> Iterable[Item]:
    """The photos of any source, in its own order; a list where they are files.

    Args:
        source: a photo, a folder of photos (`identity/*.jpg` or flat), a shard or a folder of shards
            (`*.tar`), a folder made by `datasets` (`save_to_disk`, or Parquet files), or `hf:NAME[:split]`.
        config: names the columns of data sets and keys of shards.

    Raises:
        InputError: nothing usable there.
    """
    folder = Path(source)
    if source.startswith(HUB):
        return _of_hub(source, config)
    if folder.suffix == ".tar":
        return _of_shards([folder], config)
    if shards := _within(folder, "*.tar"):
        return _of_shards(shards, config)
    if (
        _within(folder, "state.json")
        or _within(folder, "dataset_dict.json")
        or _within(folder, "**/*.parquet")
    ):
        return _of_saved(folder, config)
    return _of_folder(folder)


def _within(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder, sorted; none where it is no folder."""
    return sorted(folder.glob(pattern)) if folder.is_dir() else []


def _of_folder(folder: Path) -> list[Item]:
    """A photo folder, or one photo."""
    if folder.is_file():
        home, photos = folder.parent, read_person([folder])
    else:
        home, photos = folder, [photo for group in read_faces(folder).values() for photo in group]
    return [
        Item(_stem(photo.path, home), str(photo.path), photo.path, photo.caption, photo.landmarks)
        for photo in photos
    ]


def _stem(path: Path, home: Path) -> str:
    return path.relative_to(home).with_suffix("").as_posix()


# ---- webdataset: a tar whose neighbouring files of one stem are one sample -------------------------------


def _of_shards(shards: Iterable[Path], config: PrepareConfig) -> Generator[Item]:
    """Samples of shards in order; pickles and whatever else lies in them are not looked at."""
    for shard in shards:
        try:
            with tarfile.open(shard, "r:*") as tar:
                for key, files in _samples(tar):
                    if item := _sample(shard, key, files, config):
                        yield item
        except (OSError, tarfile.TarError, EOFError) as error:
            raise InputError(f"{shard}: not a whole tar file, get it again ({error})") from None


def _samples(tar: tarfile.TarFile) -> Generator[tuple[str, dict[str, bytes]]]:
    """Key → extension → content; the key ends at the first dot of the file's name, as webdataset has it."""
    wanted = {*(ending[1:] for ending in EXTENSIONS), "txt", "caption", "json", "cls"}
    key, files = "", dict[str, bytes]()
    for member in tar:
        path = PurePosixPath(member.name)
        stem, _, ending = path.name.partition(".")
        now, ending = str(path.parent / stem), ending.lower()
        if not member.isfile() or not stem or ending not in wanted:
            continue
        if now != key and files:
            yield key, files
            files = {}
        opened = tar.extractfile(member)
        key, files[ending] = now, opened.read() if opened else b""
    if files:
        yield key, files


def _sample(shard: Path, key: str, files: Mapping[str, bytes], config: PrepareConfig) -> Item | None:
    """One sample; None where it has no picture."""
    pictures = [content for ending, content in sorted(files.items()) if f".{ending}" in EXTENSIONS]
    if not pictures:
        return None
    origin, path = f"{shard}:{key}", PurePosixPath(key)
    try:
        facts = json.loads(files.get("json", b"{}"))
        words = files.get("txt", files.get("caption", b"")).decode("utf-8-sig") or _pick(
            facts, CAPTIONS, config.caption_column
        )
        note = note_of(words, facts.get("landmarks"))
        named = _pick(facts, IDENTITIES, config.identity_column)
        identity = files["cls"].decode() if named is None and "cls" in files else named
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{origin}: expected UTF-8 text and a JSON object beside the photo ({error})"
        ) from None
    folder = str(path.parent) if identity is None and len(path.parts) > 1 else identity
    return _item(folder, path.name, origin, pictures[0], note)


# ---- Hugging Face datasets -----------------------------------------------------------------------------


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            "data sets: run pip install 'hyperdreambooth[data]', or prepare a folder of photos"
        ) from None
    return datasets


def _of_hub(source: str, config: PrepareConfig) -> Iterator[Item]:
    """`hf:NAME[:split]`, streamed: nothing is kept but the crops."""
    name, _, split = source.removeprefix(HUB).partition(":")
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the network, the hub, a split: each has errors of its own
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"{source}: cannot be loaded ({why}); expected hf:NAME or hf:NAME:split") from None
    return _streamed(_rows(rows, source, split or "train", config), source)


def _streamed(rows: Iterator[Item], source: str) -> Iterator[Item]:
    """A stream that breaks off is no bug: the same command goes on from there."""
    try:
        yield from rows
    except InputError:
        raise
    except Exception as error:  # whatever the network's libraries raise today
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise OSError(
            f"{source}: the stream broke off ({why}); run the same command again to go on"
        ) from error


def _of_saved(folder: Path, config: PrepareConfig) -> Iterator[Item]:
    """A folder that `save_to_disk` made, or of Parquet files."""
    datasets = _datasets()
    try:
        if files := _within(folder, "**/*.parquet"):
            names = [str(file) for file in files]
            loaded = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
        else:
            loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputError(f"{folder}: cannot be read as a data set ({str(error).strip()[:160]})") from None
    parts: Mapping[str, Any] = loaded if isinstance(loaded, dict) else {str(loaded.split or "data"): loaded}
    return (item for split, part in parts.items() for item in _rows(part, str(folder), split, config))


def _rows(rows: Any, source: str, split: str, config: PrepareConfig) -> Iterator[Item]:
    """Rows as items; the pictures' bytes are taken as they are stored."""
    image_type = _datasets().Image
    features: Mapping[str, Any] = rows.features or {}
    column = next((name for name, kind in features.items() if isinstance(kind, image_type)), None)
    if column is None:
        raise InputError(
            f"{source}: expected a column of images, found {', '.join(features) or 'no columns'}"
        )
    for wish in (config.identity_column, config.caption_column):
        if wish is not None and wish not in features:
            raise InputError(f"{source}: no column '{wish}'; expected one of {', '.join(features)}")
    for number, row in enumerate(rows.cast_column(column, image_type(decode=False))):
        origin = f"{source}:{split}:{number}"
        try:
            note = note_of(_pick(row, CAPTIONS, config.caption_column), row.get("landmarks"))
        except ValueError as error:
            raise InputError(f"{origin}: {error}") from None
        stored = row[column] or {}
        content = stored.get("bytes") or (Path(stored["path"]) if stored.get("path") else b"")
        yield _item(_person(row, features, config), f"{split}-{number:08d}", origin, content, note)


def _person(row: Mapping[str, Any], features: Mapping[str, Any], config: PrepareConfig) -> Any:
    """Whose photo a row is; classes by their names."""
    named = {name: getattr(kind, "int2str", str) for name, kind in features.items()}
    told = {
        name: named[name](value)
        for name, value in row.items()
        if name in IDENTITIES or name == config.identity_column
        if value is not None
    }
    return _pick(told, IDENTITIES, config.identity_column)


def _pick(facts: Mapping[str, Any], usual: Iterable[str], wish: str | None) -> Any:
    """The value of the wished key, else of the first usual one that is there."""
    return next((facts[name] for name in ((wish,) if wish else usual) if facts.get(name) is not None), None)


def _item(identity: Any, photo: str, origin: str, content: Path | bytes, note: Note) -> Item:
    name = safe_name(photo) if identity is None else f"{safe_name(str(identity))}/{safe_name(photo)}"
    return Item(name, origin, content, note.caption, note.landmarks)


def safe_name(text: str) -> str:
    """A name that every file system takes; one that had to change gets a mark of what it was."""
    safe = re.sub(r"[^\w-]+", "_", text)[:80]
    reserved = re.fullmatch(r"con|prn|aux|nul|com\d|lpt\d", safe, re.IGNORECASE)
    if safe and safe == text and not reserved:
        return safe
    return f"{safe.strip('_')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
