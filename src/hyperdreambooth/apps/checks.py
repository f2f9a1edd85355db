"""What a command checks before it imports what takes seconds: files, folders, photos, names of models.

The type of a parameter names its check, so a new command has it by using the type:
`Annotated[Path, Option(…), Check(output_file)]`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from hyperdreambooth.cluster.shards import finished_shards
from hyperdreambooth.files import InputError, check_writable, read_json
from hyperdreambooth.storage import Store


@dataclass(frozen=True)
class Check:
    """The check of a parameter, part of its type. It raises an `InputError`."""

    of: Callable[[Any], None]


def checks_of(annotations: Mapping[str, Any]) -> dict[str, Check]:
    """Returns the checks that the types of parameters name."""
    return {
        name: part
        for name, kind in annotations.items()
        if get_origin(kind) is Annotated
        for part in get_args(kind)
        if isinstance(part, Check)
    }


def person(photos: Path | Sequence[Path]) -> None:
    """Refuses photos of one person that are missing, unreadable or too small."""
    from hyperdreambooth.faces.dataset import read_person

    for photo in read_person(photos):
        photo.open()


def somebody(photos: Sequence[Path]) -> None:
    """Refuses unusable photos of one person; those of a folder of people are too many to be opened here."""
    if not are_people(photos):
        person(photos)


def are_people(photos: Sequence[Path]) -> bool:
    """Returns whether these photos are one folder with a sub-folder for each person."""
    from hyperdreambooth.faces.dataset import holds_people

    return len(photos) == 1 and holds_people(photos[0])


def people(folder: Path) -> None:
    """Refuses what is no folder; the photos in it are too many to be opened here."""
    if not folder.is_dir():
        what = "expected a folder of photos, found a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}")


def source(photos: str) -> None:
    """Refuses a source of `prepare` that is not there, or an empty folder; data sets may be the hub's."""
    from hyperdreambooth.faces.notes import printable

    path = Path(photos)
    if path.is_dir() and not any(path.iterdir()):
        raise InputError(f"{printable(photos)}: expected photos, found an empty folder")
    if not path.exists() and not photos.startswith("hf:"):
        raise InputError(f"{printable(photos)}: no such photo or folder of photos")


def adapters(files: Path | Sequence[Path]) -> None:
    """Refuses files that are missing or no whole safetensors files."""
    from safetensors import SafetensorError, safe_open

    from hyperdreambooth.files import broken_tensors, check_file

    for file in [files] if isinstance(files, Path) else files:
        check_file(file)
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise broken_tensors(file, str(error)) from None


def bank(store: Store) -> None:
    """Refuses what is no bank's folder."""
    if not store.exists("manifest.json"):
        raise InputError(f"{store}: expected a bank, found no manifest.json; make one with hdb preoptimize")


def adapter_or_bank(source: Store) -> None:
    """Refuses what is neither an adapter's file nor a bank's folder."""
    if source.local is None or source.local.is_dir():
        bank(source)
    else:
        adapters(source.local)


def shard(text: str) -> None:
    """Refuses what is neither I/N nor merge."""
    from hyperdreambooth.cluster.shards import Shard

    Shard.parse(text)


def hypernet(name: str) -> None:
    """Refuses what is neither a hypernetwork's folder nor a hub id."""
    from hyperdreambooth.hub import is_hub_id

    folder = Path(name)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or "facts" not in config:
            raise InputError(f"hypernetwork {name}: its config.json is not that of a hypernetwork")
    elif folder.is_dir():
        raise InputError(f"hypernetwork {name}: expected a folder with config.json, found none")
    elif folder.exists() or not is_hub_id(name):
        raise InputError(f"hypernetwork {name}: no such folder, and not a hub id (owner/name)")


def base(name: str) -> None:
    """Refuses what is recognised as something other than a base, and a path that leads nowhere."""
    from hyperdreambooth.base.recognise import check_base
    from hyperdreambooth.hub import is_hub_id

    check_base(name)
    if not Path(name).exists() and not is_hub_id(name):
        raise InputError(f"base {name}: no such file or folder, and not a hub id (owner/name)")


def output_file(out: Path) -> None:
    """Refuses an output that cannot become a safetensors file."""
    from hyperdreambooth.lora.formats.filename import check_name

    check_name(out)
    if out.is_dir():
        raise InputError(f"out {out}: expected a file to write, found a folder; pass another --out")
    check_writable(out.parent)


def output_folder(out: Path) -> None:
    """Refuses a file, and a folder that cannot be written to."""
    if out.is_file():
        raise InputError(f"out {out}: expected a folder to write, found a file; pass another --out")
    check_writable(out)


def file_or_folder(out: Path) -> None:
    """Refuses what its name says it cannot become: a safetensors file, or a folder."""
    (output_file if out.suffix == ".safetensors" else output_folder)(out)


def output_store(out: Store) -> None:
    """Refuses a file, and a folder on a disk that cannot be written to."""
    if out.local is not None:
        output_folder(out.local)


def run_folder(out: Path) -> None:
    """Refuses a folder that cannot hold a run, see `runs.check_run`."""
    from hyperdreambooth.runs import check_run

    check_run(out)


def run_events(run: Store) -> None:
    """Refuses a folder in which no run has written its events, and no shard has finished."""
    told = any((run.here / part / "events.jsonl").is_file() for part in (".", "run"))
    if not told and not finished_shards(run.here):
        expected = "expected the --out of a run, found no events.jsonl in it and no finished shard"
        raise InputError(f"{run}: {expected}; a shard shows here when it has finished")


def result_of(command: str) -> Check:
    """Returns the check of a folder that may hold the command's own report only: another would be lost."""

    def check(out: Path) -> None:
        check_writable(out)
        file = out / "report.json"
        report = read_json(file) if file.is_file() else {"command": command}
        maker = report.get("command") if isinstance(report, dict) else None
        if maker != command:
            raise InputError(
                f"out {out}: expected a new folder or a result of {command}, found a result of "
                f"{maker or 'another program'}; pass another --out"
            )

    return Check(check)
