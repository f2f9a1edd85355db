"""Photographs and a detector that lie beside the project; tests that need them are skipped without them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

# beside the project, or beside the folder that holds its worktrees
_PLACES = [above / "shared" for above in Path(__file__).resolve().parents[2:4]]
SHARED = next((place for place in _PLACES if (place / "photos").is_dir()), _PLACES[0])
YUNET = SHARED / "models" / "face_detection_yunet_2023mar.onnx"

needs_photos = pytest.mark.skipif(not (SHARED / "photos").is_dir(), reason="no portraits in ../shared/photos")
needs_yunet = pytest.mark.skipif(not YUNET.is_file(), reason="no YuNet in ../shared/models")


def portraits(count: int, side: int = 256) -> list[Image.Image]:
    """Returns portraits of several people at `side` pixels, spread over the set: women, then men."""
    files = sorted((SHARED / "photos").glob("*.jpg"))
    chosen = files[:: len(files) // count][:count]
    return [Image.open(file).convert("RGB").resize((side, side)) for file in chosen]
