"""The node's own files, imported as they are: `integrations/comfyui` is no part of the package."""

from __future__ import annotations

import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

NODE = Path(__file__).parents[2] / "integrations" / "comfyui"


def part(name: str) -> Any:
    """Imports a file of the node that knows nothing of ComfyUI; its `__init__` needs a running one."""
    package = sys.modules.setdefault("comfyui_node", types.ModuleType("comfyui_node"))
    package.__path__ = [str(NODE)]
    return import_module(f"comfyui_node.{name}")
