"""The node's own files, imported as they are: `integrations/comfyui` is no part of the package."""

from __future__ import annotations

import sys
import types
from pathlib import Path

NODE = Path(__file__).parents[2] / "integrations" / "comfyui"

# a package without its `__init__`, which needs ComfyUI
package = types.ModuleType("comfyui_node")
package.__path__ = [str(NODE)]
sys.modules["comfyui_node"] = package
