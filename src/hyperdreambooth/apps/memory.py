"""The memory a task will take, told before it takes it: the base's skeleton makes a step without numbers.

    total = process + weights + encoder + trained · 16 + basis + saved + work

while training, and less of it while pictures are drawn; the larger of the two is told.

*weights*: the networks on the device, in their number format; all of them, unless `offload` lets them come in
turn. *encoder*: the hypernetwork's eye, in float32, and to personalize the hypernetwork beside it; 0 where
their configs are not at hand. *trained*: float32 value, gradient and Adam's two moments (20 bytes with the
average that `train` keeps, 14 where its optimiser has eight bits). *saved*: what autograd keeps for the
backward pass of one step, added up while the skeleton makes it, with attention fused as it is on devices.
*work*: three times the largest map of the autoencoder (input, output and workspace of one convolution) or, if
that is more, three times the largest saved tensor. *process*: Python with its libraries, or a CUDA context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel

from hyperdreambooth.apps.options import Place
from hyperdreambooth.base.denoise import denoise_loss, sample_noise
from hyperdreambooth.base.load import EMBEDDED, FAMILIES, Base, is_embedded
from hyperdreambooth.base.open import open_skeleton
from hyperdreambooth.files import read_json
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.decoder import HyperNetwork, NetworkShape
from hyperdreambooth.hypernet.predictor import hypernet_folder, load_info
from hyperdreambooth.lidb.basis import Basis
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.lora.inject import wear

Task = Literal["train", "personalize"]
PROCESS = (
    700 * 2**20
)  # bytes, measured: Python, torch, diffusers and transformers imported; a CUDA context is like it
DRAWN = 8  # pictures together, the default of `generate`
SEEN = (257, 1280)  # tokens and channels of a large image encoder: the hypernetwork's way in


def skeleton(place: Place) -> Base:
    """The base without weights, on the meta device."""
    source = str(EMBEDDED if is_embedded(place.base) else place.base)
    pipe = open_skeleton(
        source, tuple(FAMILIES), place.dtype, place.offline, place.base_config, place.leave_out
    )
    return Base.from_pipeline(
        pipe, source, resolution=place.resolution, add_sites=place.add_sites, skip_sites=place.skip_sites,
        offload=place.offload,
    )  # fmt: skip


def need(
    base: Base,
    task: Task,
    config: FinetuneConfig | HypernetConfig,
    offline: bool = False,
    hypernet: Path | None = None,
) -> dict[str, int]:
    """Bytes that a task takes on its device, by what for; their sum is the peak.

    Args:
        base: a skeleton.
        task: `train` (stage 3) or `personalize`, whose finetune and pictures need most.
        config: of the task.
        offline: do not ask the hub for the image encoder's config.
        hypernet: the folder that predicts; None where that is not known.
    """
    training = _training(base, task, config, _eye(config, hypernet, offline))
    return max(training, _drawing(base, task, training), key=lambda needs: sum(needs.values()))


def _training(base: Base, task: Task, config: FinetuneConfig | HypernetConfig, eye: int) -> dict[str, int]:
    """Bytes while a step is made, or a photo encoded before the first one."""
    trained, bytes_each, fixed = _trained(base, config)
    saved, largest = _step(base, task, config)
    return {
        "process": PROCESS,
        "weights": _weights(base),
        "encoder": eye,
        "trained": trained * bytes_each,
        "basis": fixed,
        "saved": saved,
        "work": 3 * max(largest, _largest_map(base, 1)),
    }


def _drawing(base: Base, task: Task, training: Mapping[str, int]) -> dict[str, int]:
    """Bytes while pictures are drawn: nothing is saved, and of a person nothing is left but the factors."""
    trained = training["trained"] if task == "train" else training["trained"] // 4
    drawn = 1 if base.pipe.vae.use_slicing else DRAWN
    changed = {"weights": _drawn_weights(base), "trained": trained, "saved": 0}
    return {**training, **changed, "work": 3 * _largest_map(base, drawn)}


def advise(
    place: Place,
    task: Task,
    config: FinetuneConfig | HypernetConfig,
    room: int,
    hypernet: Path | None = None,
) -> Iterator[tuple[str, dict[str, int]]]:
    """The task's needs as it is set, then with one more setting after the other, of those that save memory.

    Args:
        place: the base and how it is loaded.
        task: what is to be done.
        config: of the task.
        room: bytes there are; ends as soon as the task fits.
        hypernet: see `need`.

    Yields:
        The settings, as `--set` takes them, and `need`.
    """
    changes: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("", {}, {}),
        ("dtype=bfloat16", {"dtype": "bfloat16"}, {}),
        ("offload=true", {"offload": True}, {}),
        ("checkpointing=true", {}, {"checkpointing": True}),
        # a hypernetwork's step must see many people; one after the other they are the same step
        (f"accumulation={config.batch}", {}, {"accumulation": config.batch})
        if task == "train"
        else ("batch=1", {}, {"batch": 1}),
    ]
    settings: list[str] = []
    least: float = math.inf
    for words, placing, training in changes:
        changed = place.model_copy(update=placing), config.model_copy(update=training)
        needs = need(skeleton(changed[0]), task, changed[1], place.offline, hypernet)
        if (total := sum(needs.values())) >= least:
            continue
        (place, config), least = changed, total
        settings += [words] if words else []
        yield " ".join(f"--set {word}" for word in settings), needs
        if total <= room:
            return


def _eye(config: FinetuneConfig | HypernetConfig, hypernet: Path | None, offline: bool) -> int:
    """Bytes of what looks at photos: the image encoder, and a finished hypernetwork beside it."""
    if isinstance(config, HypernetConfig):
        return _encoder(config.encoder, offline)
    if hypernet is None:
        return 0
    folder = hypernet_folder(hypernet)
    load_info(folder)  # refuses what is no hypernetwork
    told = read_json(folder / "config.json")
    source = told["encoder"]["source"]
    network = _network(Layout.from_json(told["layout"]), NetworkShape(**told["network"]), told["learn_basis"])
    copied = str(folder / "encoder") if source == "encoder" else source
    return _nbytes(network) + _encoder(copied, offline)


def _encoder(source: str, offline: bool) -> int:
    """Bytes of an image encoder, by its config."""
    try:
        with torch.device("meta"):
            told = AutoConfig.from_pretrained(source, local_files_only=offline)
            model = AutoModel.from_config(told)
    except (OSError, ValueError):
        return 0
    return sum(4 * p.numel() for p in model.parameters())


def _nbytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])


def _networks(base: Base) -> dict[str, nn.Module]:
    return {name: part for name, part in base.pipe.components.items() if isinstance(part, nn.Module)}


def _weights(base: Base) -> int:
    """Bytes of the networks that are on the device while training."""
    worn = {site.component for site in base.sites}
    return sum(
        _nbytes(part)
        for name, part in _networks(base).items()
        if not base.offload or part is base.denoiser or name in worn
    )


def _drawn_weights(base: Base) -> int:
    """Bytes of the networks that are on the device together while drawing."""
    sizes = {name: _nbytes(part) for name, part in _networks(base).items()}
    if not base.offload:
        return sum(sizes.values())
    readers = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    return max(readers, *sizes.values())


def _trained(base: Base, config: FinetuneConfig | HypernetConfig) -> tuple[int, int, int]:
    """How many numbers are trained, bytes for each, and bytes of frozen bases and the like."""
    if isinstance(config, FinetuneConfig):
        return sum(config.rank * (s.in_features + s.out_features) for s in base.sites), 16, 0
    sites = tuple(s for s in base.sites if config.text_encoder or s.component == base.family.DENOISER)
    layout = Layout(sites, config.rank, config.down_dim, config.up_dim)
    shape = NetworkShape(*SEEN, config.width, config.layers, config.heads, config.refinements)
    network = _network(layout, shape, config.learn_basis)
    numbers = sum(p.numel() for p in network.parameters())
    frozen = 2 * sum(b.nbytes for b in network.buffers())
    return numbers, 20 if config.optimizer == "adamw" else 14, frozen


def _network(layout: Layout, shape: NetworkShape, learn_basis: bool) -> HyperNetwork:
    """A hypernetwork without weights."""
    down_dim, up_dim = layout.down_dim, layout.up_dim
    with torch.device("meta"):
        down = {s.name: torch.empty(min(down_dim, s.in_features), s.in_features) for s in layout.sites}
        up = {s.name: torch.empty(s.out_features, min(up_dim, s.out_features)) for s in layout.sites}
        return HyperNetwork(layout, shape, Basis("seed:0", down, up), learn_basis)


class _Fused(torch.autograd.Function):
    """Attention that keeps what fused kernels keep: inputs, output, and a number a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`(…, t, c)` → `(…, t, c)` without numbers."""
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class _FusedAttention(TorchFunctionMode):
    """On the meta device attention would be counted with all its scores; devices never write them down."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            return _Fused.apply(given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Kept:
    """Tensors that autograd keeps, each storage once, without the base's own weights."""

    own: set[int]
    seen: dict[int, Tensor]

    def pack(self, tensor: Tensor) -> Tensor:
        """Called for every tensor that is kept."""
        place = _storage(tensor)
        if place not in self.own:
            self.seen.setdefault(place, tensor)  # alive, or its address would come again
        return tensor

    def sizes(self) -> list[int]:
        """Bytes of each storage."""
        return [tensor.untyped_storage().nbytes() for tensor in self.seen.values()] or [0]


def _step(base: Base, task: Task, config: FinetuneConfig | HypernetConfig) -> tuple[int, int]:
    """Bytes that autograd keeps of one step, and of its largest tensor; nothing is computed."""
    people, images = (config.batch, getattr(config, "photos", 1)) if task == "train" else (1, config.batch)
    if isinstance(config, HypernetConfig):
        people //= config.accumulation
    worn = {
        s.name: (_leaf(people, config.rank, s.in_features), _leaf(people, s.out_features, config.rank))
        for s in base.sites
    }
    kept = _Kept({_storage(p) for part in _networks(base).values() for p in part.parameters()}, {})
    batch, side = people * images, base.resolution // base.pipe.vae_scale_factor
    noise, timestep = sample_noise(base, (base.pipe.vae.config.latent_channels, side, side), "measured")
    tokens = base.family.tokenize(base.pipe, ["a person"] * batch)
    with (
        wear(base.components, worn, images=images),
        base.training(config.checkpointing),
        _FusedAttention(),
        saved_tensors_hooks(kept.pack, lambda tensor: tensor),
    ):
        told = base.family.encode_prompts(base.pipe, tokens)
        noisy, times = noise.expand(batch, -1, -1, -1), timestep.expand(batch)
        loss = denoise_loss(base, noisy, told, noisy, times)
        assert loss.requires_grad
    return sum(kept.sizes()), max(kept.sizes())


def _storage(tensor: Tensor) -> int:
    """Names a storage as long as it lives; on the meta device all have the address 0."""
    storage: Any = tensor.untyped_storage()
    return storage._cdata


def _leaf(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta", requires_grad=True)


@torch.no_grad()
def _largest_map(base: Base, pictures: int) -> int:
    """Bytes of the largest map while the autoencoder decodes some pictures in the base's number format."""
    largest: list[int] = [0]
    vae, side = base.pipe.vae, base.resolution // base.pipe.vae_scale_factor
    hooks = [
        module.register_forward_hook(lambda _, __, made: largest.append(getattr(made, "nbytes", 0)))
        for module in vae.modules()
    ]
    with _FusedAttention():
        vae.decode(
            torch.empty(pictures, vae.config.latent_channels, side, side, device="meta", dtype=vae.dtype)
        )
    for hook in hooks:
        hook.remove()
    return max(largest)
