"""A trained hypernetwork on disk: one folder that says everything about itself, and predicts.

`config.json` (written last, with a fingerprint of the weights: a folder is whole or refused),
`model.safetensors`, `encoder/` where the vision model is small (else its name), `README.md`. Never a pickle.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from hyperdreambooth.files import (
    InputError,
    load_tensors,
    read_json,
    save_tensors,
    whole_file,
    whole_folder,
    write_json,
)
from hyperdreambooth.hypernet.decoder import HyperNetwork, NetworkShape
from hyperdreambooth.hypernet.encoder import Encoder, load_encoder
from hyperdreambooth.lidb.basis import Basis, basis_fingerprint, seed_of, seeded_basis
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.weights import Layout, factors
from hyperdreambooth.shapes import Factors

FORMAT = 1
COPIED = 50 * 2**20  # an encoder below this size travels in the folder

_CARD = """---
library_name: hyperdreambooth
pipeline_tag: text-to-image
tags: [hyperdreambooth, hypernetwork, personalization, lora]
---
# A HyperDreamBooth hypernetwork

Reads a photo of a person and writes the LoRA of that person for one base model.

| | |
|---|---|
| base | `{base}` (fingerprint `{fingerprint}`) |
| trigger | `{trigger}`, so a prompt says "a photo of a {trigger} {class_word}" |
| predicts | {numbers:,} numbers a person, rank {rank}, at {sites} sites |
| aux bases | `{basis}` |
| image encoder | `{encoder}` |
| trained | {step:,} steps |
| finetune | {finetune} |

```python
from hyperdreambooth import Personalizer

me = Personalizer.from_pretrained(base="{base}", hypernet="PATH OR HUB ID OF THIS FOLDER")
me.personalize("photo.jpg").save("person.safetensors", format="kohya")
```

Only `config.json`, `model.safetensors` and `encoder/` are read; `run/` and `cache/` serve to go on training.
"""


@dataclass(frozen=True)
class HypernetInfo:
    """What a hypernetwork was made for.

    Attributes:
        base_fingerprint: of the base it was trained on.
        base_source: folder or hub id of that base; information only.
        trigger: the rare word of its captions.
        class_word: what a person is called in its captions.
        resolution: pixels a side that photos are cropped to.
        training: figures of the training; information only, except `step`.
        finetune: settings that suit the finetune of its predictions; its defaults wherever this is used.
        strength: ΔW is predicted times this, see `HypernetConfig.strength`.
    """

    base_fingerprint: str
    base_source: str
    trigger: str
    class_word: str
    resolution: int
    training: dict[str, Any] = field(default_factory=dict[str, Any])
    finetune: dict[str, Any] = field(default_factory=dict[str, Any])
    strength: float = 1.0


class Predictor:
    """Photo → numbers.

    Attributes:
        network: the decoder.
        encoder: the frozen vision model.
        facts: base, trigger, resolution.
        layout: where each site's numbers lie.
        basis: the aux bases of the numbers.
    """

    def __init__(self, network: HyperNetwork, encoder: Encoder, facts: HypernetInfo) -> None:
        self.network, self.encoder, self.info = network.eval().requires_grad_(False), encoder, facts
        self.layout: Layout = network.layout
        self.basis: Basis = network.named_basis().to("cpu")  # beside numbers, which are files' matter

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.network.mean.device

    @property
    def basis_source(self) -> str:
        """`seed:N`, or `hypernet:FINGERPRINT` where the bases were learned."""
        return self.basis.source

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of all that a prediction comes out of."""
        state, facts = self.network.state_dict(), self.info
        made_of = (self.layout, self.basis.source, self.encoder.fingerprint(), self.network.shape)
        digest = hashlib.sha256(f"{made_of} {facts.strength} {facts.resolution}".encode())
        for name in sorted(state):
            digest.update(name.encode() + state[name].detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:
        """Photos `(b, 3, h, w)` in [-1, 1] → numbers `(b, P)`, a person each."""
        numbers = self.network(self.encoder(pixels).to(self.device))
        parts = self.layout.split(numbers)
        return self.layout.join({name: (a, b * self.info.strength) for name, (a, b) in parts.items()})

    def average(self, pixels: Tensor) -> Tensor:
        """Several photos `(m, 3, h, w)` of one person → numbers `(1, P)`.

        Each photo is predicted from and the normalised numbers are averaged: what the photos share stays,
        what belongs to one of them (pose, light) shrinks.
        """
        return self.predict(pixels).mean(0, keepdim=True)

    @torch.no_grad()
    def factors(self, numbers: Tensor) -> Factors:
        """What the base wears for numbers `(n, P)`."""
        return factors(self.layout, self.network.basis(), numbers.to(self.device))

    def lidb(self, numbers: Tensor) -> Lidb:
        """Numbers `(P,)` or `(1, P)` as a person that can be saved."""
        facts = self.info
        return Lidb(
            numbers.reshape(-1).cpu(), self.layout, self.basis.source, basis_fingerprint(self.basis),
            facts.base_fingerprint, facts.trigger, facts.base_source,
        )  # fmt: skip

    def check_fits(self, base_fingerprint: str) -> None:
        """Refuses a base that it was not trained on.

        Raises:
            InputError: naming both fingerprints.
        """
        if base_fingerprint != self.info.base_fingerprint:
            raise InputError(
                f"hypernetwork: trained on base {self.info.base_fingerprint} ({self.info.base_source}), "
                f"this base is {base_fingerprint}; load that base, or a hypernetwork trained on this one"
            )

    def save(self, folder: Path, stored: str = "float32") -> None:
        """Writes the folder; `config.json` last, so what is there is whole or recognisably not.

        Args:
            folder: may hold an earlier save.
            stored: number format of the weights; learned bases stay as they are, for their fingerprint.
        """
        if self.encoder.nbytes() < COPIED:
            _save_encoder(self.encoder, folder)
        weights = {
            name: tensor if name.startswith("basis_") else tensor.to(getattr(torch, stored))
            for name, tensor in self.network.state_dict().items()
        }
        save_tensors(folder / "model.safetensors", weights)
        with whole_file(folder / "README.md") as card:
            card.write_text(self._card(), encoding="utf-8")
        write_json(folder / "config.json", self._config(_fingerprint(folder / "model.safetensors")))

    def _config(self, weights: str) -> dict[str, Any]:
        """Everything that is needed to load it again, and what is good to know."""
        copied = self.encoder.nbytes() < COPIED
        return {
            "format": FORMAT,
            "facts": asdict(self.info),
            "layout": self.layout.to_json(),
            "network": asdict(self.network.shape),
            "learn_basis": self.network.learn_basis,
            "basis": {"source": self.basis.source, "fingerprint": basis_fingerprint(self.basis)},
            "encoder": {
                "source": "encoder" if copied else self.encoder.source,
                "layers": list(self.encoder.layers),
                "preprocess": asdict(self.encoder.preprocess),
                "fingerprint": self.encoder.fingerprint(),
            },
            "weights": weights,
        }

    def _card(self) -> str:
        facts, layout = self.info, self.layout
        encoder = "encoder/" if self.encoder.nbytes() < COPIED else self.encoder.source
        finetune = ", ".join(f"`{name} {value}`" for name, value in facts.finetune.items())
        return _CARD.format(
            base=facts.base_source, fingerprint=facts.base_fingerprint, trigger=facts.trigger,
            class_word=facts.class_word, numbers=layout.size, rank=layout.rank, sites=len(layout.sites),
            basis=self.basis.source, encoder=encoder, step=int(facts.training.get("step", 0)),
            finetune=finetune or "with the defaults",
        )  # fmt: skip


def load_hypernet(source: str | Path, device: torch.device | str = "cpu") -> Predictor:
    """Loads a hypernetwork folder.

    Args:
        source: the folder, or a hub id.
        device: where it is to run.

    Raises:
        InputError: nothing there, half-written, damaged, of a newer format, or its encoder cannot be had.
    """
    folder = hypernet_folder(source)
    config, facts = _config(folder), load_info(folder)
    tensors, _ = load_tensors(folder / "model.safetensors")
    if _fingerprint(folder / "model.safetensors") != config.get("weights"):
        raise InputError(
            f"{folder}: model.safetensors and config.json do not belong together; run the training again"
        )
    try:
        network = _network(config, tensors).to(device)
        source, layers, wanted = (config["encoder"][name] for name in ("source", "layers", "fingerprint"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"{folder / 'config.json'}: does not describe model.safetensors ({first}); get it again"
        ) from None
    return Predictor(network, _encoder(folder, str(source), layers, wanted, device), facts)


def load_info(source: str | Path) -> HypernetInfo:
    """What a hypernetwork folder says of itself; no weights are read.

    Args:
        source: the folder, or a hub id.

    Raises:
        InputError: nothing there, damaged, or of a newer format.
    """
    folder = hypernet_folder(source)
    try:
        return HypernetInfo(**_config(folder)["facts"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'}: does not say what it was made for ({error}); get it again"
        ) from None


def _config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise InputError(
            f"{folder / 'config.json'}: not a hypernetwork of format {FORMAT} but {found}; see hdb train"
        )
    return config


def hypernet_folder(source: str | Path) -> Path:
    """The folder itself, or the hub's copy of it."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise InputError(f"hypernetwork {source}: no such folder, and not a hub id (owner/name)")
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"hypernetwork {source}: no such folder, and the hub did not give it ({first})"
        ) from error


def _network(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> HyperNetwork:
    """The decoder with its weights; seeded bases are drawn again and must be the ones it was trained over."""
    layout, source = Layout.from_json(config["layout"]), str(config["basis"]["source"])
    if config["learn_basis"]:
        names = [site.name for site in layout.sites]
        down = {name: tensors[f"basis_down_{k}"] for k, name in enumerate(names)}
        basis = Basis(source, down, {name: tensors[f"basis_up_{k}"] for k, name in enumerate(names)})
    else:
        basis = seeded_basis(layout.sites, layout.down_dim, layout.up_dim, int(seed_of(source) or 0))
    network = HyperNetwork(layout, NetworkShape(**config["network"]), basis, bool(config["learn_basis"]))
    network.load_state_dict(tensors)
    found, wanted = basis_fingerprint(basis), config["basis"]["fingerprint"]
    if found != wanted:
        raise ValueError(f"its bases {source} are {wanted}, here they come out as {found}")
    return network


def _encoder(
    folder: Path, source: str, layers: list[int], wanted: str, device: torch.device | str
) -> Encoder:
    """The vision model beside the weights, or the one they name; another one would see other features."""
    encoder = load_encoder(folder / "encoder" if source == "encoder" else source, layers, device)
    if (found := encoder.fingerprint()) != wanted:
        raise InputError(
            f"{folder}: trained with encoder {wanted}, {encoder.source} is {found}; get that version"
        )
    return encoder


def _save_encoder(encoder: Encoder, folder: Path) -> None:
    """Copies the vision model once; later saves of the same training find it there."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    there = config.get("encoder", {}).get("fingerprint") if (folder / "encoder").is_dir() else None
    if there != encoder.fingerprint():
        with whole_folder(folder / "encoder") as home:
            encoder.save(home)


def _fingerprint(file: Path) -> str:
    """Sixteen hex digits of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
