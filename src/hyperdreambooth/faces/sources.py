"""The sources of photos: folders, Hugging Face data sets, webdataset shards; each becomes a stream of items.

Only `prepare` reads them. It writes an ordinary photo folder, the one form that every other stage reads.
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
from hyperdreambooth.faces.dataset import EXTENSIONS, Album, person_album, photo_hash, read_album
from hyperdreambooth.faces.frame import Corners
from hyperdreambooth.faces.landmarks import Landmarks
from hyperdreambooth.faces.notes import CAPTIONS, Note, Unused, note_of, pick, printable
from hyperdreambooth.files import InputError, decode_text, first_line

HUB = "hf:"
IDENTITIES = ("identity", "person", "person_id", "celeb_id", "label")
LARGEST = 2**30  # bytes read of one file in an archive, which may claim any size


@dataclass(frozen=True)
class Item:
    """One photo of a stream."""

    name: str  # of its crop: `IDENTITY/PHOTO`, or `PHOTO` if each photo is an identity of its own
    origin: str  # the photo's name in messages
    content: Path | bytes  # the file, or the bytes of a photo without a file
    caption: str | None
    landmarks: Landmarks | None = None
    refused: str = ""  # why the photo is not available; empty if it is
    corners: Corners | None = None  # of the true photo in a padded crop

    def fingerprint(self) -> str:
        """Returns 32 hex digits of everything that the crop depends on."""
        photo = self.content
        content = photo_hash(photo) if isinstance(photo, Path) else hashlib.sha256(photo).hexdigest()[:32]
        return hashlib.sha256(
            repr((content, self.caption, self.landmarks, self.corners)).encode()
        ).hexdigest()[:32]


def read_items(source: str, config: PrepareConfig) -> Iterable[Item]:
    """Returns the photos of any source in its own order; a list if they are files, else a stream.

    A source is a photo, a folder of photos (`identity/*.jpg` or flat), a shard or a folder of them (`*.tar`),
    a folder made by `datasets` (`save_to_disk`, or Parquet files), or `hf:NAME[:split]`.
    """
    folder = Path(source)
    if source.startswith(HUB):
        return _of_hub(source, config)
    if shards := _shards(folder):
        return _of_shards(shards, config)
    if _is_saved(folder):
        return _of_saved(folder, config)
    return _of_folder(folder)


def not_used(source: str) -> tuple[Unused, ...]:
    """Returns what lies in a folder of photos and is not used; nothing for other sources."""
    folder = Path(source)
    if source.startswith(HUB) or _shards(folder) or _is_saved(folder):
        return ()
    album = _album(folder)
    return album.unused + album.others


def _shards(folder: Path) -> list[Path]:
    return [folder] if folder.suffix == ".tar" else _within(folder, "*.tar")


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote a folder."""
    return any(_within(folder, name) for name in ("state.json", "dataset_dict.json", "**/*.parquet"))


def _within(folder: Path, pattern: str) -> list[Path]:
    """Returns a folder's visible files, sorted (macOS's `._0.tar` is no shard); empty without a folder."""
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    return [file for file in found if not any(part[0] == "." for part in file.relative_to(folder).parts)]


def _album(folder: Path) -> Album:
    return person_album(folder, folder.stem) if folder.is_file() else read_album(folder)


def _of_folder(folder: Path) -> list[Item]:
    """Returns the photos of a folder, or one photo."""
    home, album = folder.parent if folder.is_file() else folder, _album(folder)
    items: list[Item] = []
    for photo in (photo for group in album.people.values() for photo in group):
        name, origin = photo.path.relative_to(home).with_suffix("").as_posix(), printable(str(photo.path))
        refused = "" if name == printable(name) else "the file's name is not UTF-8; rename it"
        refused = refused or album.refused.get(photo.path, "")
        own = photo.caption, photo.landmarks, refused, photo.corners
        items.append(Item(printable(name), origin, photo.path, *own))
    return items


def _of_shards(shards: Sequence[Path], config: PrepareConfig) -> Generator[Item]:
    """Yields the samples of shards in order; pickles and other files in them are not read."""
    for shard in shards:
        prefix = f"{shard.stem}-" if len(shards) > 1 else ""  # several shards may number their photos from 0
        try:
            with tarfile.open(shard, "r:*") as tar:
                for key, files in _samples(tar):
                    if item := _sample(f"{shard}:{key}", PurePosixPath(key), files, config, prefix):
                        yield item
        except (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise InputError(f"{shard}: not a whole tar file; get it again ({error})") from None


def _samples(tar: tarfile.TarFile) -> Generator[tuple[str, dict[str, bytes]]]:
    """Yields key, and extension → content, of consecutive files with one key.

    As in webdataset, a key ends at the file name's first dot.
    """
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
    """Returns one sample; None if it has no picture."""
    pictures = [content for ending, content in sorted(files.items()) if f".{ending}" in EXTENSIONS]
    if not pictures:
        return None
    try:
        fields = json.loads(decode_text(files.get("json", b"{}")))
        text = decode_text(files.get("txt") or files.get("caption", b""))
        note = note_of(text or pick(fields, CAPTIONS, config.caption_column), fields.get("landmarks"))
        identity = pick(fields, IDENTITIES, config.identity_column)
        if identity is None and "cls" in files:
            identity = decode_text(files["cls"]).strip()
    except (ValueError, AttributeError, RecursionError) as error:
        return _refused(str(key), origin, f"expected text and a JSON object beside the photo ({error})")
    folder = str(key.parent) if identity is None and len(key.parts) > 1 else identity
    return _item(folder, prefix + key.name, origin, pictures[0], note)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        advice = "run pip install 'hyperdreambooth[data]', or prepare a folder of photos"
        raise InputError(f"data sets: {advice}") from None
    return datasets


def _of_hub(source: str, config: PrepareConfig) -> Iterator[Item]:
    """Streams `hf:NAME[:split]`; only the crops are stored."""
    name, _, split = source.removeprefix(HUB).partition(":")
    if not name:
        raise InputError(f"{source}: the name of the data set is missing; expected hf:NAME or hf:NAME:split")
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # network, hub and splits raise errors of their own
        advice = "expected hf:NAME or hf:NAME:split"
        raise InputError(f"{source}: cannot be loaded ({first_line(error)}); {advice}") from None
    items = _rows(rows, source, split or "train", config)
    return _streamed(items, source, "run the same command again to go on")


def _streamed(rows: Iterator[Item], source: str, advice: str) -> Iterator[Item]:
    """Turns any error in the middle of a stream, or of a broken file, into an OSError."""
    try:
        yield from rows
    except InputError:
        raise
    except Exception as error:  # the libraries for networks and formats raise nearly anything
        raise OSError(f"{source}: the stream broke off ({first_line(error)}); {advice}") from error


def _of_saved(folder: Path, config: PrepareConfig) -> Iterator[Item]:
    """Reads a folder made by `save_to_disk`, or of Parquet files."""
    datasets = _datasets()
    try:
        if files := _within(folder, "**/*.parquet"):
            names = [glob.escape(str(file)) for file in files]  # `datasets` takes patterns
            loaded = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
        else:
            loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        reason = f"cannot be read as a data set ({first_line(error)})"
        raise InputError(f"{folder}: {reason}; get it again") from None
    parts: Mapping[str, Any] = loaded if isinstance(loaded, dict) else {str(loaded.split or "data"): loaded}
    rows = (item for split, part in parts.items() for item in _rows(part, str(folder), split, config))
    return _streamed(rows, str(folder), "get its files again")


def _rows(rows: Any, source: str, split: str, config: PrepareConfig) -> Iterator[Item]:
    """Yields rows as items; the bytes of a picture are taken as they are stored."""
    image_type = _datasets().Image
    features: Mapping[str, Any] = rows.features or {}
    column = next((name for name, kind in features.items() if isinstance(kind, image_type)), None)
    if column is None:
        found = ", ".join(features) or "no columns"
        raise InputError(f"{source}: expected a column of images, found {found}")
    for asked in (config.identity_column, config.caption_column):
        if asked is not None and asked not in features:
            raise InputError(f"{source}: no column '{asked}'; expected one of {', '.join(features)}")
    for number, row in enumerate(rows.cast_column(column, image_type(decode=False))):
        name, origin = f"{split}-{number:08d}", f"{source}:{split}:{number}"
        try:
            note = note_of(pick(row, CAPTIONS, config.caption_column), row.get("landmarks"))
            person, content = _person(row, features, config), _stored(row[column] or {})
        except ValueError as error:
            yield _refused(name, origin, str(error))
            continue
        yield _item(person, name, origin, content, note)


def _stored(picture: Mapping[str, Any]) -> Path | bytes:
    """Returns a picture's bytes or file. In a stream, files have URLs, such as `zip://1.png::https://…`."""
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
    """Returns the identity of a row; a class label by its name."""
    column = config.identity_column
    names = [name for name in ((column,) if column else IDENTITIES) if row.get(name) is not None]
    return getattr(features[names[0]], "int2str", str)(row[names[0]]) if names else None


def _item(identity: Any, photo: str, origin: str, content: Path | bytes, note: Note) -> Item:
    name = safe_name(photo) if identity is None else f"{safe_name(str(identity))}/{safe_name(photo)}"
    return Item(name, printable(origin), content, note.caption, note.landmarks)


def _refused(name: str, origin: str, reason: str) -> Item:
    return Item(printable(name), printable(origin), b"", None, refused=reason)


def safe_name(text: str) -> str:
    """Returns a name that every file system accepts; a changed name gets a hash of the original."""
    safe = re.sub(r"[^\w-]+", "_", text)[:80]
    reserved = re.fullmatch(r"con|prn|aux|nul|com\d|lpt\d", safe, re.IGNORECASE)
    if safe and safe == text and not reserved:
        return safe
    return f"{safe.strip('_')}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"
