"""What of a bank must not depend on who made it, in what order, or on what was killed meanwhile."""

from __future__ import annotations

from pathlib import Path


def bank_files(folder: Path) -> dict[str, bytes]:
    """Every file of a finished bank, by its path; logs and cached latents beside it are no part of it."""
    files = [folder / "manifest.json", folder / "start.safetensors"]
    shards, index = ([*(folder / part).glob("[!.]*")] for part in ("shards", "index"))
    assert shards and len(index) == 1, f"{folder}: no finished bank"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in [*files, *shards, *index]}
