"""Files from and to the Hugging Face hub, with one clear line where it cannot be reached."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from hyperdreambooth.files import InputError, first_line


def is_hub_id(name: str | Path) -> bool:
    """Whether a name has the form `owner/name` and is not that of a file or folder on this machine."""
    here = Path(name).exists() or Path(name).suffix == ".safetensors"
    return not here and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) is not None


def fetch_file(repo_id: str, file: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Fetches one file of a repository, from the hub or from its cache on this machine."""
    with _one_line(repo_id, f"{file} of {repo_id}"):
        return Path(hf_hub_download(repo_id, file, revision=revision, token=token))


def fetch_folder(
    repo_id: str, patterns: Sequence[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """Fetches the files of a repository whose names match one of the patterns; returns their folder."""
    with _one_line(repo_id, repo_id):
        return Path(snapshot_download(repo_id, allow_patterns=[*patterns], revision=revision, token=token))


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str,
) -> str:
    """Uploads a folder to a model repository, which is made where there is none; returns the commit's
    address.

    Raises:
        InputError: a bad name, no permission, or the hub cannot be reached, as in the other functions here.
    """
    with _one_line(repo_id, repo_id):
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message
        )
    return str(done.commit_url)


@contextmanager
def _one_line(repo_id: str, wanted: str) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = first_line(error)
        raise InputError(f"hub {wanted}: {reason}; check the name, the token and the network") from error
