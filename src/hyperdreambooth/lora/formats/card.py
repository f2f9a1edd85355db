"""The page beside a person's files: who they call, on which base, and how three tools load them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hyperdreambooth.lora.formats.headers import LoraInfo


def model_card(
    facts: LoraInfo,
    subject: str,
    files: Mapping[str, str],
    rank: int,
    gallery: Sequence[str],
    place: str,
    licence: str,
) -> str:
    """A model card in Markdown, its front matter as the Hugging Face hub reads it.

    Args:
        facts: of the adapter.
        subject: what prompts call the person: trigger and class word.
        files: form → file name: `diffusers`, `kohya`, `lidb`.
        rank: of the LoRA.
        gallery: names of pictures in the same folder.
        place: Python that sets `base` to where the base is.
        licence: of the base, which a LoRA of it inherits; an identifier of the hub.
    """
    front: dict[str, Any] = {
        "base_model": facts.base,
        "instance_prompt": subject,
        "library_name": "diffusers",
        "license": licence,
        "tags": ["text-to-image", "lora", "diffusers", "template:sd-lora"],
        "widget": [{"text": f"a {subject}", "output": {"url": name}} for name in gallery],
    }
    matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())  # JSON is YAML
    pictures = "\n".join(f"![{name}]({name})" for name in gallery)
    return _PAGE.format(
        matter=matter, pictures=pictures, subject=subject, rank=rank, licence=licence, place=place,
        **asdict(facts), **files, name=Path(files["kohya"]).stem,
    )  # fmt: skip


def licence_of(base: Path) -> str:
    """What a pipeline folder's own card names as its licence; `other` where none does."""
    card = base / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    named = [line.partition(":")[2].strip(" '\"") for line in lines[:100] if line.startswith("license:")]
    return named[0] if named and named[0] else "other"


_PAGE = """---
{matter}
---

# {title}

A LoRA of one person, rank {rank}, {steps} steps, {resolution} pixels, for **{base}** and no other base.

Write **`{subject}`** where the person is meant: `a photo of a {subject} on a beach`.
Without the word `{trigger}` the LoRA does little.

{pictures}

## diffusers

```python
from diffusers import DiffusionPipeline

{place}
pipe = DiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(".", weight_name="{diffusers}")
image = pipe("a photo of a {subject}").images[0]
```

## ComfyUI

Put `{kohya}` into `models/loras`, load it with *Load LoRA* behind a checkpoint of the base,
and write `{subject}` in the prompt.

## A1111 and Forge

Put `{kohya}` into `models/Lora` and write `<lora:{name}:1> a {subject}` in the prompt.

## hyperdreambooth

`{lidb}` is the hypernetwork's prediction before the finetune, about 4 bytes a number:
for `hdb generate --adapter` and `hdb finetune`.

## Licence

{licence}: that of the base. This is personal data of the person it shows: share it only with their consent.
"""
