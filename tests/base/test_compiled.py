"""A denoiser whose blocks are compiled computes the same, and compiles nothing again as factors change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_changing_factors_compiles_nothing_again(micro_dir: Path) -> None:
    """In a process of its own: the compiler cannot look through the type checks of the tests."""
    script = Path(__file__).with_name("compiled.py")
    subprocess.run([sys.executable, str(script), str(micro_dir)], check=True)
