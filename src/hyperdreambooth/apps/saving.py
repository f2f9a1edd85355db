"""Writes adapters and what else was trained: in one form, in every form, or as a whole pipeline."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from typer import echo

from hyperdreambooth.adapter import FILES, ORIGINAL_FILE, Adapter, Format
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError, room_for
from hyperdreambooth.finetune.dreambooth import TrainedPerson
from hyperdreambooth.finetune.word import Word
from hyperdreambooth.lora.formats.merged import save_merged

WORD = "learned_embeds.safetensors"  # as diffusers names the file of a textual inversion


def save_forms(
    adapter: Adapter, out: Path, form: Format | Literal["all"] = "all", dtype: str = "float32"
) -> dict[str, str]:
    """Writes one form of an adapter, or every form it has, into a folder; returns form → file name."""
    small = adapter.lidb is not None and dtype != "bfloat16"  # in which a LiDB's few numbers lose too much
    every: list[Format] = [one for one in FILES if one != "lidb" or small]
    forms: list[Format] = every if form == "all" else [form]
    files: dict[Format, str] = {one: FILES.get(one, ORIGINAL_FILE) for one in forms}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".forms-", dir=out) as part:
        for one, name in files.items():
            with room_for(out / name):  # not the hidden name
                adapter.save(Path(part) / name, one, getattr(torch, dtype))
        for name in files.values():  # all of them or none
            os.replace(Path(part) / name, out / name)
    return {str(one): name for one, name in files.items()}


def save_pipeline(adapter: Adapter, out: Path, base: Base, dtype: str = "float32") -> dict[str, str]:
    """Writes the base with the adapter folded in, as a folder that is a base itself; form → folder name."""
    if base.quantize:
        raise InputError(
            f"quantize: a merged pipeline has full weights, got {base.quantize}; load the base without it"
        )
    base.wake()
    for part in base.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, getattr(torch, dtype))  # diffusers' own `to` warns about float16
    words = {"trigger": adapter.trigger or base.trigger, "class_word": base.class_word}
    save_merged(out / "merged", base.pipe, base.wearers, adapter.factors, words)
    return {"merged": "merged"}


def save_trained(person: TrainedPerson, out: Path, base: Base) -> dict[str, str]:
    """Writes an adapter's forms, a whole pipeline, or a word's embedding; returns form → file or folder."""
    if isinstance(person, Adapter):
        forms: list[Format] = [one for one in FILES if one != "lidb" or person.lidb is not None]
        for form in forms:
            person.save(out / FILES[form], form)
        return {str(form): FILES[form] for form in forms}
    if isinstance(person, Word):
        person.save(out / WORD)
        return {"textual-inversion": WORD}
    person.save(out / "pipeline", base)
    return {"pipeline": "pipeline"}


def print_files(out: Path, files: Mapping[str, str]) -> None:
    """Prints where each file is."""
    for name, file in files.items():
        echo(f"{name:12} {out / file}")
