"""Checks the arrows of ARCHITECTURE.md, the cost of importing, and the size of the public surface."""

from __future__ import annotations

import ast
import re
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
heavy = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "PIL", "pydantic"}
heavy &= set(sys.modules)
sys.exit(", ".join(sorted(heavy)) or None)
"""


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)


def test_imports_follow_the_arrows() -> None:
    command = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    done = python("-c", command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_imports_without_torchvision_and_development_tools() -> None:
    done = python("-W", "error::ImportWarning", "-c", BLOCKED)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_and_the_command_line_loads_nothing_heavy() -> None:
    done = python("-c", LIGHT)
    assert done.returncode == 0, done.stderr


def test_few_names_are_public_and_all_are_there() -> None:
    """Functions and the types that they take: the surface closes over itself (test_api.py)."""
    names = [name for name in dir(hyperdreambooth) if not name.startswith("_")]
    assert len(names) <= 22
    assert all(getattr(hyperdreambooth, name).__name__ == name for name in names)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = hyperdreambooth.nonsense


def test_no_family_is_named_outside_its_place() -> None:
    """Only base/ knows how families differ, and only lora/formats/ knows the names of their layers.

    The avatars' base is a pipeline of one family, so the code that makes it may name that family.
    """
    family = re.compile(
        r"sdxl|sd[1-3]\b|flux|stable.?diffusion|alphas_cumprod|prediction_type", re.IGNORECASE
    )
    package = ROOT / "src" / "hyperdreambooth"
    allowed = ("base/", "lora/formats/", "avatars/")
    for file in sorted(package.rglob("*.py")):
        if not str(file.relative_to(package)).startswith(allowed):
            found = [word for word in words(file) if family.search(word)]
            assert not found, f"{file}: {found}"


def words(file: Path) -> list[str]:
    """Returns the names and strings of a file's code, without its docstrings."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    names += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return names + [text for text in texts if isinstance(text, str)]


def test_files_stay_readable() -> None:
    sizes = {file: len(file.read_text().splitlines()) for file in (ROOT / "src").rglob("*.py")}
    assert max(sizes.values()) <= 400, max(sizes, key=lambda file: sizes[file])


SOURCES = {file: file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py")}


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        (r"""["']/(tmp|var|home|usr|dev)\b""", "tempfile, or a path the user gives"),
        (r"\bos\.(fork|getuid|getpgid|killpg|mkfifo|sched_getaffinity)\b", "multiprocessing with spawn"),
        (r"\bos\.path\.|\bos\.sep\b|import posixpath", "pathlib"),
        (r"""str\([^()]*\) ?\+ ?["']/|\{(out|folder|cache|home)\}/""", "pathlib's /"),
        (r"""get_context\((?!["']spawn)|set_start_method|Pool\((?!workers, )""", "get_context('spawn')"),
        (
            r"^\s*(import|from) (triton|bitsandbytes|xformers|flash_attn|fcntl|pwd|resource|torchvision)\b",
            "nothing",
        ),
        (r"\.cuda\(\)|device=[\"']cuda", "the base's device"),
    ],
)
def test_nothing_that_only_one_system_has(pattern: str, instead: str) -> None:
    """The package runs on Linux, macOS and Windows, and on CUDA, MPS and CPU."""
    found = [
        f"{file.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}: {match[0].strip()}"
        for file, text in SOURCES.items()
        for match in re.finditer(pattern, text, re.MULTILINE)
    ]
    assert not found, f"use {instead}: {found}"


def test_optional_packages_are_imported_where_they_are_used() -> None:
    """A missing extra must not break the rest of the package."""
    pattern = r"^(?:import|from) (cv2|datasets|webdataset|skimage|onnxruntime|pillow_heif|gradio|ray)\b"
    assert not [file for file, text in SOURCES.items() if re.search(pattern, text, re.MULTILINE)]
