"""A trained hypernetwork: photo → LiDB numbers, and the folder that stores it.

`config.json` is written last, with a fingerprint of the weights, so that a half-written folder is refused.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hyperdreambooth.base.load import EMBEDDED
from hyperdreambooth.files import (
    InputError,
    first_line,
    load_tensors,
    read_json,
    save_tensors,
    whole_file,
    whole_folder,
    write_json,
)
from hyperdreambooth.hub import fetch_folder, is_hub_id, push_folder
from hyperdreambooth.hypernet.decoder import HyperNetwork, NetworkShape
from hyperdreambooth.hypernet.encoder import Encoder, load_encoder
from hyperdreambooth.hypernet.familiar import Familiar, load_familiar
from hyperdreambooth.lidb.basis import Basis, basis_fingerprint, seed_of, seeded_basis
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.weights import Layout, factors
from hyperdreambooth.shapes import Factors

EMBEDDED_HYPERNET = EMBEDDED.parent / "hypernet"
"""The folder of the hypernetwork for the embedded avatars."""
FORMAT = 1
COPIED = 50 * 2**20  # bytes; a smaller encoder is copied into the folder

_CARD = """---
library_name: hyperdreambooth
pipeline_tag: text-to-image
tags: [hyperdreambooth, hypernetwork, personalization, lora]
---
# A HyperDreamBooth hypernetwork

Reads a photo of a person and writes the LoRA of that person for one base model.

| | |
|---|---|
| base | `{info.base_source}` (fingerprint `{info.base_fingerprint}`) |
| trigger | `{info.trigger}`, so a prompt says "a photo of a {info.trigger} {info.class_word}" |
| predicts | {layout.size:,} numbers a person, rank {layout.rank}, at {sites} sites |
| aux bases | `{basis}` |
| image encoder | `{encoder}` |
| trained | {trained} |
| finetune | {finetune} |

```python
from hyperdreambooth import Personalizer

me = Personalizer.from_pretrained(base="{info.base_source}", hypernet="PATH OR HUB ID OF THIS FOLDER")
me.personalize("photo.jpg").save("person.safetensors", format="kohya")
```

Only `config.json`, `model.safetensors`, `familiar.safetensors` and `encoder/` are read. `run/` and `cache/`
are for further training.
"""


@dataclass(frozen=True)
class HypernetInfo:
    """What a hypernetwork was trained for."""

    base_fingerprint: str
    base_source: str  # the folder or hub id of its base, for information only
    trigger: str  # the rare word of its captions
    class_word: str  # the word for a person in its captions
    resolution: int  # the side in pixels to which photos are cropped
    training: dict[str, Any] = field(default_factory=dict[str, Any])  # figures, and its config
    finetune: dict[str, Any] = field(default_factory=dict[str, Any])  # the defaults of a finetune
    strength: float = 1.0  # the factor of predicted ΔW, see `HypernetConfig.strength`


class Predictor:
    """A trained hypernetwork with its encoder: photos of a person → the numbers of a LiDB.

    `load_hypernet` and `train_hypernet` return one, and `Personalizer` uses it. `layout` has the places of
    each site's numbers, and `basis` their aux bases, on the CPU. `familiar` describes the photos of the
    training, where there were enough of them.
    """

    def __init__(
        self, network: HyperNetwork, encoder: Encoder, info: HypernetInfo, familiar: Familiar | None = None
    ) -> None:
        self.network, self.encoder, self.info = network.eval().requires_grad_(False), encoder, info
        self.familiar = familiar
        self.layout: Layout = network.layout
        self.basis: Basis = network.named_basis().to("cpu")  # where files want it

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.network.mean.device

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of everything that a prediction depends on."""
        state, info = self.network.state_dict(), self.info
        made_of = (self.layout, self.basis.source, self.encoder.fingerprint, self.network.shape)
        # published results name fingerprints of the time when the class was called so
        text = f"{made_of} {info.strength} {info.resolution}".replace("NetworkShape(", "Shape(")
        digest = hashlib.sha256(text.encode())
        for name in sorted(state):
            digest.update(name.encode() + state[name].detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:
        """Predicts the numbers `(b, P)` of photos `(b, 3, h, w)` in [-1, 1], one person each."""
        numbers = self.network(self.encoder(pixels).to(self.device))
        parts = self.layout.split(numbers)
        return self.layout.join({name: (a, b * self.info.strength) for name, (a, b) in parts.items()})

    def distance(self, pixels: Tensor) -> float | None:
        """Returns how far photos `(m, 3, h, w)` are from those of the training: the mean; 1 is the limit.

        None stands for a hypernetwork that does not know.
        """
        if self.familiar is None:
            return None
        return float(self.familiar.distance(self.encoder.texture(pixels)).mean())

    def average(self, pixels: Tensor) -> Tensor:
        """Predicts the numbers `(1, P)` of one person from several photos `(m, 3, h, w)`.

        In the average, what only one photo shows (pose, light) shrinks.
        """
        return self.predict(pixels).mean(0, keepdim=True)

    @torch.no_grad()
    def factors(self, numbers: Tensor) -> Factors:
        """Returns the LoRA factors of numbers `(n, P)`."""
        return factors(self.layout, self.network.basis(), numbers.to(self.device))

    def lidb(self, numbers: Tensor) -> Lidb:
        """Returns numbers `(P,)` or `(1, P)` as a LiDB that can be saved."""
        info = self.info
        return Lidb(
            numbers.reshape(-1).cpu(), self.layout, self.basis.source, basis_fingerprint(self.basis),
            info.base_fingerprint, info.trigger, info.base_source, info.resolution,
        )  # fmt: skip

    def check_fits(self, base_fingerprint: str) -> None:
        """Refuses a base that the hypernetwork was not trained on."""
        if base_fingerprint != self.info.base_fingerprint:
            raise InputError(
                f"hypernetwork: expected base {self.info.base_fingerprint} ({self.info.base_source}), got "
                f"{base_fingerprint}; load that base, or a hypernetwork trained on this one"
            )

    def save(self, folder: str | Path, stored: Literal["float32", "float16"] = "float32") -> None:
        """Writes the folder and its weights; learned bases stay float32, as their fingerprint needs."""
        folder, dtype = Path(folder), getattr(torch, stored)
        if self._copied:
            self._save_encoder(folder)
        state = self.network.state_dict()
        weights = {name: t if name.startswith("basis_") else t.to(dtype) for name, t in state.items()}
        save_tensors(folder / "model.safetensors", weights)
        if self.familiar is not None:
            self.familiar.save(folder)
        with whole_file(folder / "README.md") as card:
            card.write_text(self._card(), encoding="utf-8")
        write_json(folder / "config.json", self._config(_fingerprint(folder / "model.safetensors")))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a hypernetwork",
    ) -> str:
        """Uploads the hypernetwork, so that `load_hypernet(repo_id)` loads it, and returns the commit's URL.

        The repository `owner/name` is created if there is none, private or as its owner's default is. Without
        token and branch they are those of the user who is logged in and `main`.

        Raises:
            InputError: the name is bad, the permission is missing, or the hub cannot be reached.
        """
        with tempfile.TemporaryDirectory() as name:
            self.save(name)
            return push_folder(
                Path(name), repo_id, private=private, token=token, revision=revision, message=commit_message
            )

    @property
    def _copied(self) -> bool:
        """Whether the folder has a copy of the encoder."""
        return sum(tensor.nbytes for tensor in self.encoder.model.state_dict().values()) < COPIED

    def _save_encoder(self, folder: Path) -> None:
        """Copies the vision model, unless an earlier save has."""
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        saved = config.get("encoder", {}).get("fingerprint") if (folder / "encoder").is_dir() else None
        if saved != self.encoder.fingerprint:
            with whole_folder(folder / "encoder") as home:
                self.encoder.save(home)

    def _config(self, weights: str) -> dict[str, Any]:
        """Returns the content of `config.json`: all that loading needs besides the weights."""
        return {
            "format": FORMAT,
            "facts": asdict(self.info),
            "layout": self.layout.to_json(),
            "network": asdict(self.network.shape),
            "learn_basis": self.network.learn_basis,
            "basis": {"source": self.basis.source, "fingerprint": basis_fingerprint(self.basis)},
            "encoder": {
                "source": "encoder" if self._copied else self.encoder.source,
                "layers": list(self.encoder.layers),
                "preprocess": asdict(self.encoder.preprocess),
                "fingerprint": self.encoder.fingerprint,
            },
            "weights": weights,
        }

    def _card(self) -> str:
        info, layout = self.info, self.layout
        finetune = ", ".join(f"`{name} {value}`" for name, value in info.finetune.items())
        return _CARD.format(
            info=info, layout=layout, sites=len(layout.sites),
            basis=self.basis.source, encoder="encoder/" if self._copied else self.encoder.source,
            trained=_trained(info.training), finetune=finetune or "with the defaults",
        )  # fmt: skip


def _trained(training: Mapping[str, Any]) -> str:
    """Says how long the network was trained, and whether it began with another one's weights."""
    steps = f"{int(training.get('step', 0)):,} steps"
    begun = (training.get("config") or {}).get("start_from")
    return f"{steps}, after those of another network" if begun else steps


def load_hypernet(
    source: str | Path,
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Predictor:
    """Loads a hypernetwork.

    Args:
        source: a folder, or a hub id (`owner/name`).
        device: the device it runs on.
        revision, token: a branch, tag or commit on the hub, and an access token for private repositories.

    Raises:
        InputError: there is no such hypernetwork, it is damaged, half-written or of a newer format, or its
            encoder cannot be loaded.
    """
    folder = hypernet_folder(source, revision, token)
    config, info = _read_config(folder), load_info(folder)
    tensors, _ = load_tensors(folder / "model.safetensors")
    if _fingerprint(folder / "model.safetensors") != config.get("weights"):
        raise InputError(
            f"{folder}: model.safetensors and config.json do not belong together; run the training again"
        )
    try:
        network = _network(config, tensors).to(device)
        origin, layers, wanted = (config["encoder"][name] for name in ("source", "layers", "fingerprint"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise InputError(
            f"{folder / 'config.json'}: does not describe model.safetensors ({reason}); get it again"
        ) from None
    encoder = load_encoder(folder / "encoder" if origin == "encoder" else origin, layers, device)
    if encoder.fingerprint != wanted:
        raise InputError(
            f"{folder}: expected encoder {wanted}, got {encoder.source} with {encoder.fingerprint}; get the "
            "version of the training"
        )
    return Predictor(network, encoder, info, load_familiar(folder))


def load_info(source: str | Path) -> HypernetInfo:
    """Reads what a hypernetwork, a folder or hub id, was trained for, without its weights."""
    folder = hypernet_folder(source)
    try:
        return HypernetInfo(**_read_config(folder)["facts"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'}: does not say what it was trained for ({error}); get it again"
        ) from None


def hypernet_folder(source: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Returns a hypernetwork's folder, after downloading it if `source` is a hub id."""
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_id(source):
        raise InputError(f"hypernetwork {source}: no such folder, and not a hub id (owner/name)")
    try:
        files = ("*.json", "*.safetensors", "*.md")
        return fetch_folder(str(source), files, revision=revision, token=token)
    except InputError as error:
        raise InputError(f"hypernetwork {source}: no such folder; {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{folder / 'config.json'}: expected a hypernetwork of format {FORMAT}, got {found}; get it again"
        )
    return config


def _network(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> HyperNetwork:
    """Builds the decoder with its weights. Seeded bases are drawn again and must be those of the training."""
    layout, source = Layout.from_json(config["layout"]), str(config["basis"]["source"])
    if config["learn_basis"]:
        names = [(k, site.name) for k, site in enumerate(layout.sites)]
        down, up = ({name: tensors[f"basis_{side}_{k}"] for k, name in names} for side in ("down", "up"))
        basis = Basis(source, down, up)
    else:
        basis = seeded_basis(layout.sites, layout.down_dim, layout.up_dim, int(seed_of(source) or 0))
    network = HyperNetwork(layout, NetworkShape(**config["network"]), basis, bool(config["learn_basis"]))
    network.load_state_dict(tensors)
    found, wanted = basis_fingerprint(basis), config["basis"]["fingerprint"]
    if found != wanted:
        raise ValueError(f"expected bases {source} with fingerprint {wanted}, got {found}")
    return network


def _fingerprint(file: Path) -> str:
    """Returns sixteen hex digits of a file's content."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
