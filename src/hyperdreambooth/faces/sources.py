"""Where photos come from: folders, Hugging Face data sets, webdataset shards; all become one stream.

Only `prepare` reads these: what it writes is an ordinary photo folder, which every other stage knows.
"""

from __future__ import annotations

import glob
import hashlib
import json
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.dataset import (
    EXTENSIONS,
    Note,
    Photo,
    note_of,
    photo_hash,
    printable,
    read_faces,
    read_person,
)
from hyperdreambooth.faces.landmarks import Landmarks
from hyperdreambooth.files import InputError

HUB = "hf:"
IDENTITIES = ("identity", "person", "person_id", "celeb_id", "label")
CAPTIONS = ("text", "caption", "prompt")
LARGEST = 2**30  # bytes read of what an archive calls a photo: a sparse one may promise any number


@dataclass(frozen=True)
class Item:
    """One photo of a stream.

    Attributes:
        name: of the crop to be made, `IDENTITY/PHOTO`, or `PHOTO` where each is an identity of its own.
        origin: what messages call the photo.
        content: the file, or the bytes of a photo that is no file.
        caption: or None.
        landmarks: or None.
        refused: why the photo cannot be had; empty where it can.
    """

    name: str
    origin: str
    content: Path | bytes
    caption: str | None
    landmarks: Landmarks | None = None
    refused: str = ""

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
    """Files of a folder, sorted, hidden ones left out (a Mac's `._0.tar` is no shard); none if it is none."""
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    return [file for file in found if not any(part[0] == "." for part in file.relative_to(folder).parts)]


def _of_folder(folder: Path) -> list[Item]:
    """A photo folder, or one photo."""
    if folder.is_file():
        home, photos = folder.parent, read_person([folder])
    else:
        home, photos = folder, [photo for group in read_faces(folder).values() for photo in group]
    return [_of_file(photo, home) for photo in photos]


def _of_file(photo: Photo, home: Path) -> Item:
    name = photo.path.relative_to(home).with_suffix("").as_posix()
    refused = "" if name == printable(name) else "the file's name is not UTF-8; rename it"
    origin = printable(str(photo.path))
    return Item(printable(name), origin, photo.path, photo.caption, photo.landmarks, refused)


# ---- webdataset: a tar whose neighbouring files of one stem are one sample -------------------------------


def _of_shards(shards: Sequence[Path], config: PrepareConfig) -> Generator[Item]:
    """Samples of shards in order; pickles and whatever else lies in them are not looked at."""
    for shard in shards:
        prefix = f"{shard.stem}-" if len(shards) > 1 else ""  # every shard may count its photos from 0
        try:
            with tarfile.open(shard, "r:*") as tar:
                for key, files in _samples(tar):
                    if item := _sample(f"{shard}:{key}", PurePosixPath(key), files, config, prefix):
                        yield item
        except (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
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
        key, files[ending] = now, opened.read(LARGEST) if opened else b""
    if files:
        yield key, files


def _sample(
    origin: str, key: PurePosixPath, files: Mapping[str, bytes], config: PrepareConfig, prefix: str
) -> Item | None:
    """One sample; None where it has no picture."""
    pictures = [content for ending, content in sorted(files.items()) if f".{ending}" in EXTENSIONS]
    if not pictures:
        return None
    try:
        identity, note = _told(files, config)
    except (ValueError, AttributeError, RecursionError) as error:
        reason = f"expected UTF-8 text and a JSON object beside the photo ({error})"
        return _refused(str(key), origin, reason)
    folder = str(key.parent) if identity is None and len(key.parts) > 1 else identity
    return _item(folder, prefix + key.name, origin, pictures[0], note)


def _told(files: Mapping[str, bytes], config: PrepareConfig) -> tuple[Any, Note]:
    """Who is in a sample's picture, and what is said of it."""
    facts = json.loads(files.get("json", b"{}"))
    written = files.get("txt", files.get("caption", b"")).decode("utf-8-sig")
    note = note_of(written or _pick(facts, CAPTIONS, config.caption_column), facts.get("landmarks"))
    named = _pick(facts, IDENTITIES, config.identity_column)
    return files["cls"].decode().strip() if named is None and "cls" in files else named, note


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
    if not name:
        raise InputError(f"{source}: no data set is named; expected hf:NAME or hf:NAME:split")
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the network, the hub, a split: each has errors of its own
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"{source}: cannot be loaded ({why}); expected hf:NAME or hf:NAME:split") from None
    items = _rows(rows, source, split or "train", config)
    return _streamed(items, source, "run the same command again to go on")


def _streamed(rows: Iterator[Item], source: str, advice: str) -> Iterator[Item]:
    """A stream that breaks off, or a file that is broken from some row on, is no bug."""
    try:
        yield from rows
    except InputError:
        raise
    except Exception as error:  # whatever the libraries of networks and formats raise today
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise OSError(f"{source}: the stream broke off ({why}); {advice}") from error


def _of_saved(folder: Path, config: PrepareConfig) -> Iterator[Item]:
    """A folder that `save_to_disk` made, or of Parquet files."""
    datasets = _datasets()
    try:
        if files := _within(folder, "**/*.parquet"):
            names = [glob.escape(str(file)) for file in files]  # `datasets` takes patterns
            loaded = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
        else:
            loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputError(f"{folder}: cannot be read as a data set ({str(error).strip()[:160]})") from None
    parts: Mapping[str, Any] = loaded if isinstance(loaded, dict) else {str(loaded.split or "data"): loaded}
    rows = (item for split, part in parts.items() for item in _rows(part, str(folder), split, config))
    return _streamed(rows, str(folder), "get its files again")


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
        name, origin = f"{split}-{number:08d}", f"{source}:{split}:{number}"
        try:
            note = note_of(_pick(row, CAPTIONS, config.caption_column), row.get("landmarks"))
            person, content = _person(row, features, config), _stored(row[column] or {})
        except ValueError as error:
            yield _refused(name, origin, str(error))
            continue
        yield _item(person, name, origin, content, note)


def _stored(picture: Mapping[str, Any]) -> Path | bytes:
    """A picture's bytes, else its file; a stream has addresses in place of files (`zip://1.png::https://…`).

    Raises:
        InputError: nothing whole is at the address.
    """
    path = picture.get("path") or ""
    if picture.get("bytes") or not path:
        return picture.get("bytes") or b""
    if "://" not in path:
        return Path(path)
    from datasets.download.streaming_download_manager import xopen

    try:
        with xopen(path, "rb") as file:
            return file.read(LARGEST)
    except (FileNotFoundError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"cannot read the photo ({error})") from None


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
    return Item(name, printable(origin), content, note.caption, note.landmarks)


def _refused(name: str, origin: str, reason: str) -> Item:
    return Item(printable(name), printable(origin), b"", None, refused=reason)


def safe_name(text: str) -> str:
    """A name that every file system takes; one that had to change gets a mark of what it was."""
    safe = re.sub(r"[^\w-]+", "_", text)[:80]
    reserved = re.fullmatch(r"con|prn|aux|nul|com\d|lpt\d", safe, re.IGNORECASE)
    if safe and safe == text and not reserved:
        return safe
    return f"{safe.strip('_')}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"
