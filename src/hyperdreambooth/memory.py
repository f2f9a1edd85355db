"""Estimates the memory of a task before it runs: a base without weights makes a step on the meta device.

    total = process + weights + encoder + trained · 16 + basis + saved + work

This is the sum while training. While generating some of its parts are smaller and *work* is larger; the
estimate is the larger of the two sums.

*weights*: the networks on the device, in their number format or quantised; with `offload` only those that are
there together, and while training no frozen text encoder that can be read from its files again. *encoder*:
the image encoder of the hypernetwork in float32, and for `personalize` the hypernetwork too; 0 if their
configs are not found. *trained*: value, gradient and two moments of Adam of each number in float32 (20 bytes
with the average that `train` keeps, 14 with its 8-bit optimizer). *saved*: what autograd saves for the
backward pass of one step, with fused attention as on devices. *work*: three times the largest activation of
the VAE (input, output and workspace of a convolution), or three times the largest saved tensor if that is
larger. *process*: Python with its libraries, or a CUDA context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel

from hyperdreambooth.base.autoencoder import raw_latents
from hyperdreambooth.base.denoise import denoise_loss, sample_noise
from hyperdreambooth.base.load import EMBEDDED, FAMILIES, Base, is_embedded
from hyperdreambooth.base.open import open_skeleton
from hyperdreambooth.base.quantize import PACKAGES, Quantize, nbytes
from hyperdreambooth.base.readers import networks
from hyperdreambooth.files import read_json
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.data import EVERY
from hyperdreambooth.hypernet.decoder import HyperNetwork, NetworkShape
from hyperdreambooth.hypernet.encoder import encoder_of, encoder_place
from hyperdreambooth.hypernet.predictor import hypernet_folder, load_info
from hyperdreambooth.lidb.basis import Basis
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.lora.inject import wear

Task = Literal["train", "personalize"]
Config: TypeAlias = FinetuneConfig | HypernetConfig
PROCESS = 700 * 2**20  # bytes, measured, of Python with its libraries; a CUDA context takes about as much
GENERATED = 8  # images generated together, the default of `generate`
TOKENS = (257, 1280)  # tokens and channels of a large image encoder, the input of the hypernetwork


def skeleton(
    source: str | Path | None = None,
    dtype: str = "float32",
    *,
    offline: bool = False,
    base_config: str | None = None,
    leave_out: Collection[str] = (),
    **options: Any,
) -> Base:
    """Makes a base without weights, on the meta device; the arguments are those of `load_base`."""
    place = str(EMBEDDED if is_embedded(source) else source)
    pipe = open_skeleton(place, tuple(FAMILIES), dtype, offline, base_config, leave_out)
    return Base.from_pipeline(pipe, place, **options)


def need(
    base: Base, task: Task, config: Config, offline: bool = False, hypernet: Path | None = None
) -> dict[str, int]:
    """Returns the bytes that a task needs on its device, part by part; their sum is the peak.

    Args:
        base: a skeleton.
        task: `train`, or `personalize`, whose finetune and pictures need most.
        config: of the task.
        offline: whether to look for the image encoder's config on this machine only.
        hypernet: the folder of the hypernetwork; None if it is unknown.
    """
    training = _training(base, task, config, _predictor(base, config, hypernet, offline))
    # while generating nothing is saved, and only the factors of a person are left
    generating = {
        **training,
        "weights": _weights(base, training=False),
        "trained": training["trained"] if task == "train" else training["trained"] // 4,
        "saved": 0,
        "work": 3 * _largest_map(base, 1 if base.pipe.vae.use_slicing else GENERATED),
    }
    return max(training, generating, key=lambda needs: sum(needs.values()))


def _training(base: Base, task: Task, config: Config, encoder: int) -> dict[str, int]:
    """Returns the bytes of a training step, or of encoding a photo before the first one."""
    trained, basis = _trained(base, config)
    saved, largest = _step(base, config)
    return {
        "process": PROCESS,
        "weights": _weights(base, training=True),
        "encoder": encoder,
        "trained": trained,
        "basis": basis,
        "saved": saved,
        "work": 3 * max(largest, _largest_map(base, 1)),
    }


def advise(
    build: Callable[..., Base],
    task: Task,
    config: Config,
    free: int,
    hypernet: Path | None = None,
    offline: bool = False,
    bits: Collection[Quantize] = tuple(PACKAGES),
) -> Iterator[tuple[str, dict[str, int]]]:
    """Estimates a task as it is set, then with one more setting that saves memory at a time, until it fits.

    Args:
        build: makes the skeleton, given `dtype`, `offload` or `quantize` (`functools.partial` of `skeleton`).
        task, config, hypernet, offline: see `need`.
        free: the bytes that are free.
        bits: the quantisations that the device can have.

    Yields:
        The added settings, as options of the command line, and what the task needs with them.
    """
    # a hypernetwork's step must see many people; accumulated one by one they make the same step
    one_by_one = {"accumulation": config.batch} if task == "train" else {"batch": 1}
    sparing = [{"dtype": "bfloat16"}, {"offload": True}, {"checkpointing": True}, one_by_one]
    settings: dict[str, Any] = {}
    options: dict[str, Any] = {}
    least: float = math.inf
    for change in ({}, *sparing, *({"quantize": each} for each in bits)):
        trains = change.keys() <= type(config).model_fields.keys()
        changed_options = options if trains else {**options, **change}
        changed = config.model_copy(update=change) if trains else config
        needs = need(build(**changed_options), task, changed, offline, hypernet)
        if (total := sum(needs.values())) >= least:
            continue
        options, config, least = changed_options, changed, total
        settings |= change
        yield " ".join(f"--set {key}={str(value).lower()}" for key, value in settings.items()), needs
        if total <= free:
            return


def _predictor(base: Base, config: Config, hypernet: Path | None, offline: bool) -> int:
    """Returns the bytes of the image encoder, and of a trained hypernetwork beside it.

    The hub is not asked for an encoder that nobody named.
    """
    if isinstance(config, HypernetConfig):
        return _encoder(config.encoder or encoder_of(base.source), offline or config.encoder is None)
    if hypernet is None:
        return 0
    folder = hypernet_folder(hypernet)
    load_info(folder)  # refuses a folder that holds no hypernetwork
    info = read_json(folder / "config.json")
    source = info["encoder"]["source"]
    network = _network(Layout.from_json(info["layout"]), NetworkShape(**info["network"]), info["learn_basis"])
    copied = str(folder / "encoder") if source == "encoder" else source
    return _nbytes(network) + _encoder(copied, offline)


@cache
def _encoder(source: str, offline: bool) -> int:
    """Returns the bytes of an image encoder in float32, from its config; 0 if that is not found."""
    try:
        with torch.device("meta"):
            place = encoder_place(source)
            model = AutoModel.from_config(AutoConfig.from_pretrained(place, local_files_only=offline))
    except (OSError, ValueError):
        return 0
    return sum(4 * p.numel() for p in model.parameters())


def _nbytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])


def _weights(base: Base, training: bool) -> int:
    """Returns the bytes of the networks that are on the device together, while training or generating."""
    packed = {base.family.DENOISER, *base.readers}
    sizes = {
        name: nbytes(part, base.quantize if name in packed else None)
        for name, part in networks(base.pipe).items()
    }
    if not base.offload:
        away = base.readers if training and not Path(base.source).is_file() else ()
        return sum(size for name, size in sizes.items() if name not in away)
    if training:
        kept = {base.family.DENOISER, *(site.component for site in base.sites)}
        return sum(sizes[name] for name in kept)
    text_encoders = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    return max(text_encoders, *sizes.values())


def _trained(base: Base, config: Config) -> tuple[int, int]:
    """Returns the bytes of all numbers that are trained, and those of the frozen aux bases."""
    if isinstance(config, FinetuneConfig):
        return 16 * sum(config.rank * (s.in_features + s.out_features) for s in base.sites), 0
    sites = tuple(s for s in base.sites if config.text_encoder or s.component == base.family.DENOISER)
    layout = Layout(sites, config.rank, config.down_dim, config.up_dim)
    shape = NetworkShape(*TOKENS, config.width, config.layers, config.heads, config.refinements)
    network = _network(layout, shape, config.learn_basis)
    numbers = sum(p.numel() for p in network.parameters())
    frozen = 2 * sum(b.nbytes for b in network.buffers())
    return numbers * (20 if config.optimizer == "adamw" else 14), frozen


def _network(layout: Layout, shape: NetworkShape, learn_basis: bool) -> HyperNetwork:
    """Makes a hypernetwork without weights."""
    down_dim, up_dim = layout.down_dim, layout.up_dim
    with torch.device("meta"):
        down = {s.name: torch.empty(min(down_dim, s.in_features), s.in_features) for s in layout.sites}
        up = {s.name: torch.empty(s.out_features, min(up_dim, s.out_features)) for s in layout.sites}
        return HyperNetwork(layout, shape, Basis("seed:0", down, up), learn_basis)


class _Fused(torch.autograd.Function):
    """Attention that saves what fused kernels save: the inputs, the output, and a number a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns an output of the right shape, `(…, t, c)`; nothing is computed."""
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class _FusedAttention(TorchFunctionMode):
    """Replaces attention, which on the meta device would save all its scores; on devices it is fused."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            inputs = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            return _Fused.apply(inputs["query"], inputs["key"], inputs["value"])
        return func(*args, **(kwargs or {}))


def _step(base: Base, config: Config) -> tuple[int, int]:
    """Returns the bytes that autograd saves in one step, and those of the largest tensor."""
    held = config.class_weight > 0  # which adds samples
    people, images = 1, config.batch + held
    if isinstance(config, HypernetConfig):
        people, images = config.batch // config.accumulation, config.photos
        people += held * math.ceil(people / EVERY)
    leaf = partial(torch.empty, device="meta", requires_grad=True)
    factors = {
        s.name: (leaf(people, config.rank, s.in_features), leaf(people, s.out_features, config.rank))
        for s in base.sites
    }
    weights = {_storage(p) for part in networks(base.pipe).values() for p in part.parameters()}
    saved: dict[int, Tensor] = {}  # kept alive, or their storages' addresses would be used again

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            saved[_storage(tensor)] = tensor
        return tensor

    batch = people * images
    noise, timestep = sample_noise(base, _latent_shape(base), "measured")
    tokens = base.family.tokenize(base.pipe, ["a person"] * batch)
    with (
        wear(base.components, factors, images=images),
        base.training(config.checkpointing),
        _FusedAttention(),
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        embeddings = base.family.encode_prompts(base.pipe, tokens)
        latents, times = noise.expand(batch, -1, -1, -1), timestep.expand(batch)
        loss = denoise_loss(base, latents, embeddings, latents, times)
        assert loss.requires_grad
    sizes = [tensor.untyped_storage().nbytes() for tensor in saved.values()]
    return sum(sizes), max(sizes)


def _storage(tensor: Tensor) -> int:
    """Names a storage as long as it exists; on the meta device all storages have the address 0."""
    storage: Any = tensor.untyped_storage()
    return storage._cdata


def _latent_shape(base: Base) -> tuple[int, ...]:
    """Returns the shape of a photo's latents, `(c, h, w)`."""
    return tuple(base.encode_images(torch.empty(1, 3, base.resolution, base.resolution)).shape[1:])


@torch.no_grad()
def _largest_map(base: Base, images: int) -> int:
    """Returns the bytes of the VAE's largest activation while it decodes that many images."""
    sizes: list[int] = []
    vae = base.pipe.vae
    latents = raw_latents(vae, torch.empty(images, *_latent_shape(base), device="meta")).to(vae.dtype)
    watch = register_module_forward_hook(lambda _, __, output: sizes.append(getattr(output, "nbytes", 0)))
    with watch, _FusedAttention():
        vae.decode(latents)
    return max(sizes)
