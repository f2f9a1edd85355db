"""The arrows of ARCHITECTURE.md, what importing costs, and the size of the public surface."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hyperdreambooth

ROOT = Path(__file__).parent.parent

BLOCKED = """
import importlib, pkgutil, sys

for absent in ("torchvision", "beartype"):
    sys.modules[absent] = None  # importing it now fails as if it were not installed
import hyperdreambooth
for module in pkgutil.walk_packages(hyperdreambooth.__path__, "hyperdreambooth."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in dir(hyperdreambooth):
    getattr(hyperdreambooth, name)
"""

LIGHT = """
import sys
import hyperdreambooth
from hyperdreambooth.apps import cli
heavy = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "PIL"} & set(sys.modules)
sys.exit(", ".join(sorted(heavy)) or None)
"""


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)


def test_imports_follow_the_arrows() -> None:
    command = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    done = python("-c", command)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_module_imports_without_torchvision_and_development_tools() -> None:
    done = python("-W", "error::ImportWarning", "-c", BLOCKED)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_and_the_command_line_loads_nothing_heavy() -> None:
    done = python("-c", LIGHT)
    assert done.returncode == 0, done.stderr


def test_at_most_fifteen_public_names_and_all_are_there() -> None:
    names = [name for name in dir(hyperdreambooth) if not name.startswith("_")]
    assert len(names) <= 15
    assert all(getattr(hyperdreambooth, name).__name__ == name for name in names)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = hyperdreambooth.nonsense


def test_files_stay_readable() -> None:
    sizes = {file: len(file.read_text().splitlines()) for file in (ROOT / "src").rglob("*.py")}
    assert max(sizes.values()) <= 400, max(sizes, key=lambda file: sizes[file])
