"""The model card beside a person's files: the words for the person, the base, and how tools load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hyperdreambooth.files import decode_text
from hyperdreambooth.lora.formats.headers import LoraInfo


def model_card(
    info: LoraInfo,
    subject: str,
    files: Mapping[str, str],
    rank: int,
    picture: str | None,
    setup: str,
    licence: str,
    family: str = "",
    on_hub: bool = True,
) -> str:
    """Writes a model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        info: the metadata of the adapter.
        subject: what prompts call the person: the trigger and the class word.
        files: form → file name, for `diffusers`, `kohya` and, if the prediction is there, `lidb`.
        rank: of the LoRA.
        picture: the file name of a picture in the same folder.
        setup: a line of Python that sets `base` to the folder or hub id of the base.
        licence: the base's licence, as the hub abbreviates it; a LoRA inherits it.
        family: of the base, as `LoraFamily` names it, for what its user interfaces want; empty for a base
            that none of them can load, such as the avatars.
        on_hub: whether the base is a repository of the hub, which the card may name as the base model.
    """
    front: dict[str, Any] = {
        **({"base_model": info.base} if on_hub else {}),
        "instance_prompt": subject,
        "library_name": "diffusers",
        "license": licence,
        "tags": ["text-to-image", "lora", "diffusers", "template:sd-lora"],
    }
    if picture is not None:
        front["widget"] = [{"text": f"a {subject}", "output": {"url": picture}}]
    size = f", {info.resolution} pixels" if info.resolution else ""
    return _PAGE.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),  # JSON is YAML
        subject=subject, rank=rank, size=size, setup=setup, licence=licence,
        gallery=f"\n![{picture}]({picture})\n" if picture else "",
        prediction=_PREDICTION.format(**files) if "lidb" in files else "",
        interfaces="".join(
            text.format(subject=subject, name=Path(files["kohya"]).stem, **files)
            for text in _INTERFACES.get(family, ())
        ),
        agreed=_AGREED.get(info.consent, ""), **asdict(info), **files,
    )  # fmt: skip


def licence_of(base: Path) -> str:
    """Reads the licence from the model card in a pipeline's folder; `other` if there is none."""
    card = base / "README.md"
    lines = decode_text(card.read_bytes(), "replace").splitlines() if card.is_file() else []
    found = [line.partition(":")[2].strip(" '\"") for line in lines[:100] if line.startswith("license:")]
    return found[0] if found and found[0] else "other"


_PAGE = """---
{front}
---

# {title}

A LoRA of one person for **{base}**: rank {rank}, {steps} steps{size}.

Write **`{subject}`** in prompts for the person: `a photo of a {subject} on a beach`.
Prompts without the word `{trigger}` can show this person, too: training also changes what the other
words of its captions mean, less so with a `class_weight`.
{gallery}
## diffusers

```python
from diffusers import DiffusionPipeline

{setup}
pipe = DiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(".", weight_name="{diffusers}")
image = pipe(prompt="a photo of a {subject}").images[0]
```
{interfaces}{prediction}
## Licence

{licence}, the licence of the base. These files are personal data of the person they show:
share them only with that person's consent.
{agreed}"""

_AGREED = {
    "self": "\nWhoever made these files says that the photos show themselves.\n",
    "consented": "\nWhoever made these files says that the person agreed.\n",
    "synthetic": "\nWhoever made these files says that the photos show nobody: a machine made them.\n",
}
"""What the header says of consent → what the card says."""

_COMFY = """
## ComfyUI

Put `{kohya}` into `models/loras`, load it with *Load LoRA* after a checkpoint of the base,
and write `{subject}` in the prompt.
"""
_WEBUI = """
Put `{kohya}` into `models/Lora` and write `<lora:{name}:1> a {subject}` in the prompt.
"""
_BOTH = (_COMFY, f"\n## A1111 and Forge\n{_WEBUI}")
_FORGE = (_COMFY, f"\n## Forge\n{_WEBUI}")
_INTERFACES = {
    **dict.fromkeys(("sd1", "sd2", "sdxl"), _BOTH),
    **dict.fromkeys(("sd3", "flux"), _FORGE),
    **dict.fromkeys(("zimage", "flux2", "qwenimage", "krea2"), (_COMFY,)),
}
"""Family → how its user interfaces load the LoRA. A1111 reads no Flux, and no SD 3 file with alpha."""

_PREDICTION = """
## hyperdreambooth

`{lidb}` is the hypernetwork's prediction before the finetune, with 4 bytes a number.
`hdb generate --adapter` and `hdb finetune` read it.
"""
