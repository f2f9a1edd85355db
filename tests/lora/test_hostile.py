"""Thousands of damaged and hostile files: one line each, no crash, no memory beyond their size."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from damages import DAMAGES, join
from typer.testing import CliRunner

from hyperdreambooth.adapter import Adapter, read_adapter
from hyperdreambooth.apps.cli import app
from hyperdreambooth.files import InputError
from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.shapes import Site

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
SITES = (
    Site("text_encoder.encoder.layers.0.self_attn.q_proj", 12, 12),
    Site(f"{BLOCK}.attn1.to_q", 16, 16),
    Site(f"{BLOCK}.attn2.to_k", 12, 16),
)
BASE = "0123456789abcdef"
SPARE = 16 * 2**20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One whole file of every form."""
    folder = tmp_path_factory.mktemp("whole")
    layout, basis = Layout(SITES, 2, 8, 5), seeded_basis(SITES, 8, 5, 0)
    row = torch.randn(layout.size, generator=torch.Generator().manual_seed(1))
    lidb = Lidb(row, layout, "seed:0", basis_fingerprint(basis), BASE, "sks", "some/base")
    made: dict[str, bytes] = {}
    for form in ("diffusers", "kohya", "lidb"):
        Adapter.from_lidb(lidb, basis, "sd1").save(folder / f"{form}.safetensors", form)
        read_adapter(folder / f"{form}.safetensors", SITES, BASE)
        made[form] = (folder / f"{form}.safetensors").read_bytes()
    return made


def peak(job: Callable[[], object]) -> int:
    """Bytes of memory that a job adds at its height."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    job()
    return status("VmHWM") - before


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def refused(path: Path) -> str:
    """The one line that a file gets."""
    with pytest.raises(InputError) as error:
        read_adapter(path, SITES, BASE)
    text = str(error.value)
    assert "\n" not in text and path.name in text and len(text) < 3000
    return text


def files(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    chance = random.Random(0)
    for form, blob in whole.items():
        for damage, times in DAMAGES.items():
            for _ in range(times):
                yield f"{form} {damage.__name__}", damage(blob, chance)


def test_two_thousand_hostile_files(whole: dict[str, bytes], tmp_path: Path) -> None:
    path, count = tmp_path / "their.safetensors", 0
    for what, blob in files(whole):
        path.write_bytes(blob)
        try:
            refused(path)
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(f"{what} (file {count}): {type(error).__name__} {error}") from error
        count += 1
    assert count >= 2000


def test_flipped_bytes_never_crash(whole: dict[str, bytes], tmp_path: Path) -> None:
    """Some of these are still right: a title with another letter, a number with another digit."""
    path, chance, survived = tmp_path / "their.safetensors", random.Random(2), 0
    for k in range(900):
        blob = bytearray(list(whole.values())[k % 3])
        for _ in range(chance.randint(1, 4)):
            blob[chance.randrange(min(len(blob), 4000))] ^= 1 << chance.randrange(8)
        path.write_bytes(blob)
        try:
            read_adapter(path, SITES, BASE)
            survived += 1
        except InputError as error:
            assert "\n" not in str(error)
    assert survived < 800


def test_they_cost_no_memory(whole: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "their.safetensors"
    some = [blob for k, (_, blob) in enumerate(files(whole)) if k % 50 == 0]

    def read() -> None:
        for blob in some:
            path.write_bytes(blob)
            refused(path)

    read()
    assert peak(read) < SPARE


def heavy() -> Iterator[tuple[str, bytes]]:
    """Files that are cheap to write and dear to believe."""
    big = 24 * 2**20
    yield "a header of nothing but lists", join("[" + "[]," * (big // 3) + "[]]", b"")
    yield (
        "a header of many tensors",
        join(
            "{"
            + ",".join(f'"{k}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for k in range(100_000))
            + "}",
            b"",
        ),
    )
    yield "many metadata", join({"__metadata__": {str(k): "" for k in range(200_000)}}, b"")
    yield "wide characters", join('{"__metadata__": {"a": "' + "a" * 2_000_000 + '🙂"}}', b"")
    yield (
        "one tensor of no use",
        join({"x": {"dtype": "F32", "shape": [big // 4], "data_offsets": [0, big]}}, bytes(big)),
    )
    name, rank = f"{BLOCK}.attn1.to_q", big // 2 // 16
    half = big // 2
    pair = {
        f"{name}.lora_A.weight": {"dtype": "F8_E4M3", "shape": [rank, 16], "data_offsets": [0, half]},
        f"{name}.lora_B.weight": {"dtype": "F8_E4M3", "shape": [16, rank], "data_offsets": [half, big]},
    }
    yield "a rank of a million in eight bits", join(pair, bytes(big))
    text = "[" + "[]," * 600_000 + "[]]"
    small = {
        f"{name}.lora_A.weight": {"dtype": "F32", "shape": [1, 16], "data_offsets": [0, 64]},
        f"{name}.lora_B.weight": {"dtype": "F32", "shape": [16, 1], "data_offsets": [64, 128]},
    }
    yield (
        "a config that is dear to parse",
        join({**small, "__metadata__": {"lora_adapter_metadata": text}}, bytes(128)),
    )
    alphas = json.dumps({"unet.alpha_pattern": {"(a+)+$": 1}, "unet.lora_alpha": "1e400"})
    yield (
        "a pattern that never ends",
        join({**small, "__metadata__": {"lora_adapter_metadata": alphas}}, bytes(128)),
    )


def test_the_dear_ones_are_cheap(tmp_path: Path) -> None:
    path = tmp_path / "their.safetensors"
    for what, blob in heavy():
        path.write_bytes(blob)
        assert peak(lambda: refused(path)) < 2 * len(blob) + SPARE, what


def test_links_and_other_places(whole: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "their.safetensors"
    path.symlink_to(tmp_path / "gone")
    assert "no such file" in refused(path)
    path.unlink()
    path.symlink_to(path)
    assert "no such file" in refused(path)
    (tmp_path / "folder.safetensors").mkdir()
    assert "found a folder" in refused(tmp_path / "folder.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors")
    sparse = tmp_path / "sparse.safetensors"
    with sparse.open("wb") as file:
        file.write(struct.pack("<Q", 2**32))
        file.truncate(2**32 + 100)
    assert peak(lambda: refused(sparse)) < SPARE


def test_the_command_says_it_in_one_line_too(
    whole: dict[str, bytes], micro_dir: Path, tmp_path: Path
) -> None:
    path, chance = tmp_path / "their.safetensors", random.Random(1)
    words = ["generate", "--prompt", "a hat", "--out", str(tmp_path / "out"), "--base", str(micro_dir)]
    for damage in DAMAGES:
        path.write_bytes(damage(whole["kohya"], chance))
        result = CliRunner().invoke(app, [*words, "--device", "cpu", "--adapter", str(path)])
        lines = result.stderr.splitlines()
        assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: "), damage.__name__
