"""A frozen base, behind the few functions the rest of the package needs."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from hyperdreambooth.base import autoencoder, flux, flux2, krea2, qwenimage, sd, sd3, sdxl, zimage
from hyperdreambooth.base.alone import lock_of
from hyperdreambooth.base.device import pick_device
from hyperdreambooth.base.family import Conditioning, Family
from hyperdreambooth.base.fingerprint import weights_fingerprint
from hyperdreambooth.base.open import facts_of, folder_of, open_pipeline
from hyperdreambooth.base.quantize import Quantize, check_quantize
from hyperdreambooth.base.readers import awake, fetch, in_turn, let_go, networks, readers_of, reading
from hyperdreambooth.base.recognise import check_channels, only_variant
from hyperdreambooth.files import InputError
from hyperdreambooth.precision import resolved_dtype
from hyperdreambooth.shapes import Site, site_fingerprint
from hyperdreambooth.sites import find_sites

EMBEDDED = Path(__file__).resolve().parent.parent / "avatars" / "assets" / "base"
EMBEDDED_NAME = "hyperdreambooth/avatars"
"""What files and cards call the embedded base: where it happens to be installed means nothing to others."""
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": sd,
    "StableDiffusionXLPipeline": sdxl,
    "StableDiffusion3Pipeline": sd3,
    "FluxPipeline": flux,
    "Flux2KleinPipeline": flux2,
    "ZImagePipeline": zimage,
    "QwenImagePipeline": qwenimage,
    "Krea2Pipeline": krea2,
}
PLACEHOLDER = "[V]"
_DTYPES = ("float32", "bfloat16", "float16")
_LARGE = 512  # pixels a side from which the autoencoder takes one picture at a time: its maps are gigabytes


@dataclass(frozen=True, eq=False, repr=False)
class Base:
    """A frozen text-to-image pipeline, made by `load_base` or, of a pipeline in memory, by `from_pipeline`.

    Attributes:
        pipe: the diffusers pipeline; no parameter requires a gradient.
        source: the folder or hub id it was loaded from, or `EMBEDDED_NAME`.
        family: what differs between Stable Diffusion, SDXL, SD 3 and Flux.
        components: the networks that an adapter may change: the denoiser and the text encoders.
        sites: the linear layers that an adapter changes, sorted by name.
        fingerprint: sixteen hex digits that name the weights.
        trigger, class_word: the rare word, `[V]` in prompts, and what captions call a person (`face`).
        resolution: pixels a side at which photos are encoded and pictures are drawn.
        offload: whether `rest` moves what a training loop does not need to the CPU.
        quantize: `int8` or `nf4` if the denoiser and the frozen text encoders are quantised, else None.
        lock: held by whoever wears, draws or trains. All bases that share a denoiser share it.
    """

    pipe: Any
    source: str
    family: Family
    components: dict[str, nn.Module]
    sites: tuple[Site, ...]
    fingerprint: str
    trigger: str
    class_word: str
    resolution: int
    offload: bool
    quantize: Quantize | None
    lock: RLock

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        source: str,
        *,
        trigger: str = "sks",
        class_word: str = "person",
        resolution: int | None = None,
        add_sites: str | None = None,
        skip_sites: str | None = None,
        offload: bool = False,
        quantize: Quantize | None = None,
        stored: Path | None = None,
        variant: str | None = None,
    ) -> Base:
        """Freezes a diffusers pipeline of one of `FAMILIES`, which files and cards call `source`.

        `stored` is the folder of the files, which the fingerprint is computed from where `pipe` holds their
        numbers rounded to bfloat16 or quantised. The other arguments are those of `load_base`.

        Raises:
            InputError: a scheduler that the family cannot train with, a bad pattern, or a bad resolution.
        """
        family = FAMILIES[type(pipe).__name__]
        family.NOISING.check(pipe.scheduler)
        check_channels(source, getattr(pipe, family.DENOISER).config, pipe.vae.config)
        parts = (family.DENOISER, *family.TEXT_ENCODERS)
        components: dict[str, nn.Module] = {name: getattr(pipe, name) for name in parts}
        for module in networks(pipe).values():
            module.requires_grad_(False).eval()
        sites = find_sites(components, family.SITES, add_sites, skip_sites)
        fingerprint = weights_fingerprint(components, stored, variant)
        side = resolution or family.resolution(pipe)
        lock = lock_of(components[family.DENOISER])
        base = cls(
            pipe, source, family, components, sites, fingerprint, trigger, class_word, side, offload,
            quantize, lock,
        )  # fmt: skip
        base.check_side("resolution", side)
        if side >= _LARGE:
            pipe.vae.enable_slicing()
        return base

    def with_words(self, trigger: str, class_word: str) -> Base:
        """The same base, sharing the pipeline, with other words for the person and for people."""
        return replace(self, trigger=trigger, class_word=class_word)

    @property
    def wearers(self) -> dict[str, nn.Module]:
        """The components, and a T5 text encoder, which LoRAs of other tools may change as well."""
        fetch(self.pipe)
        parts = {name: getattr(self.pipe, name, None) for name in ("text_encoder_2", "text_encoder_3")}
        return {name: part for name, part in parts.items() if part is not None} | self.components

    @property
    def denoiser(self) -> Any:
        """The component that is asked for noise or velocity."""
        return self.components[self.family.DENOISER]

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's number format; the one that it computes in where it is quantised."""
        named = self.denoiser.named_parameters()
        return next(p.dtype for name, p in named if p.is_floating_point() and "lora_" not in name)

    @property
    def parts(self) -> list[str]:
        """The names of the pipeline's components, also of text encoders that are not in memory now."""
        readers = readers_of(self.pipe)
        here = {name for name, part in self.pipe.components.items() if part is not None}
        return sorted(here.union(readers.names if readers is not None else ()))

    @property
    def scorers(self) -> Path:
        """The folder of the base's own scorers, if it has any."""
        return (EMBEDDED if self.source == EMBEDDED_NAME else Path(self.source)) / "scorers"

    @property
    def run_inputs(self) -> dict[str, str]:
        """What a training has to find again when it goes on: weights, words, size and sites."""
        words = {"trigger": self.trigger, "class_word": self.class_word}
        sizes = {"resolution": str(self.resolution), "sites": site_fingerprint(self.sites)}
        packed = {"quantize": self.quantize} if self.quantize else {}
        return {"base": self.fingerprint, **words, **sizes, **packed}

    @property
    def readers(self) -> tuple[str, ...]:
        """The names of the text encoders that no adapter of ours changes."""
        texts = (name for name in self.parts if name.startswith("text_encoder"))
        return tuple(name for name in texts if name not in self.family.TEXT_ENCODERS)

    def check_side(self, field: str, side: int) -> None:
        """Refuses a side of pictures that this base cannot draw."""
        multiple = self.family.multiple(self.pipe)
        if side <= 0 or side % multiple:
            own = self.family.resolution(self.pipe)
            raise InputError(
                f"{field}: expected a positive multiple of {multiple}, got {side}; this base draws {own}"
            )

    def check_steps(self, field: str, steps: int) -> None:
        """Refuses a number of denoising steps that the pipeline's scheduler cannot make."""
        self.family.NOISING.check_steps(self.pipe.scheduler, field, steps)

    def prompt(self, text: str) -> str:
        """Fills this base's words in: its trigger for `[V]`, its class word for `{class_word}`."""
        return text.replace(PLACEHOLDER, self.trigger).replace("{class_word}", self.class_word)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels `(b, 3, h, w)` in [-1, 1] → scaled float32 latents `(b, c, h/8, w/8)`."""
        self.pipe.vae.to(self.device)
        return autoencoder.encode_images(self.pipe.vae, pixels).to(self.device)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents → pixels `(b, 3, h, w)` in [-1, 1]."""
        self.pipe.vae.to(self.device)
        return autoencoder.decode_latents(self.pipe.vae, latents).to(self.device)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers `(b, t)` of prompts whose `[V]` is replaced by the trigger."""
        return self.family.tokenize(self.pipe, [self.prompt(p) for p in prompts]).to(self.device)

    def encode_frozen(self, tokens: Tensor) -> Tensor | None:
        """States `(b, t, c)` of the text encoder that never wears an adapter; None where there is none."""
        encode = getattr(self.family, "encode_frozen", None)
        return None if encode is None else encode(self.pipe, tokens)

    def encode_prompts(self, tokens: Tensor, frozen: Tensor | None = None) -> Conditioning:
        """Conditioning of token numbers `(b, t)`; every tensor leads with the batch axis.

        Args:
            tokens: of the prompts.
            frozen: what `encode_frozen` gave for them, if that is known already.
        """
        encode: Any = self.family.encode_prompts
        made = encode(self.pipe, tokens) if frozen is None else encode(self.pipe, tokens, frozen)
        return {name: tensor.to(self.device) for name, tensor in made.items()}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output for noisy latents `(b, c, h, w)` at timesteps `(b,)`."""
        return self.family.predict(self.pipe, noisy, timesteps, conditioning)

    def draw(
        self,
        prompts: list[str],
        negative: list[str] | None,
        generators: list[torch.Generator],
        *,
        steps: int,
        guidance: float,
        side: int,
    ) -> list[Any]:
        """Pictures by the pipeline itself, a generator each; prompts are taken as they are."""
        readers, slept = readers_of(self.pipe), not awake(self.pipe)
        self.wake()
        options = self.family.sampling(self.pipe, prompts, negative, guidance)
        options |= {"num_inference_steps": steps, "generator": generators, "height": side, "width": side}
        try:
            return in_turn(self.pipe, options, self.device) if self.offload else self.pipe(**options).images
        finally:
            if readers is not None and readers.training and slept:
                let_go(self.pipe)

    def wake(self) -> None:
        """Brings back the text encoders that a training has let go, or that were never read yet."""
        if (readers := readers_of(self.pipe)) is not None:
            readers.device = torch.device("cpu") if self.offload else self.device
            fetch(self.pipe)

    def reading(self) -> AbstractContextManager[None]:
        """Has the frozen text encoders on the device in the block, and no longer in memory after it.

        With `offload`, the denoiser makes room for them.
        """
        return reading(self.pipe, self.denoiser, self.offload)

    def rest(self, worn: Collection[str] = ()) -> None:
        """With `offload`, keeps only the denoiser and what wears an adapter on the device."""
        if self.offload:
            for name, module in networks(self.pipe).items():
                module.to(self.device if name in worn or module is self.denoiser else "cpu")

    def move(self, device: torch.device) -> None:
        """Puts the denoiser on a device, and with it what `offload` does not keep on the CPU."""
        self.denoiser.to(device)
        if not self.offload:
            for module in networks(self.pipe).values():
                module.to(device)

    @contextmanager
    def training(self, checkpointing: bool, compile_blocks: bool = False) -> Generator[None]:
        """The base as a training through it needs it, for the length of the block.

        Without cuDNN's attention: on Hopper GPUs its backward fails or gives NaN at some lengths (torch 2.11;
        github.com/pytorch/pytorch/issues/196678, and Flux at 1024 pixels, docs/LOG.md).
        """
        readers = readers_of(self.pipe)
        if readers is not None:
            readers.training = True
        allowed = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        if checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        if compile_blocks:
            self.denoiser.compile_repeated_blocks()
        try:
            yield
        finally:
            if readers is not None:
                readers.training = False
            torch.backends.cuda.enable_cudnn_sdp(allowed)
            if checkpointing:
                self.denoiser.disable_gradient_checkpointing()
            for module in self.denoiser.modules() if compile_blocks else ():
                module._compiled_call_impl = None


def is_embedded(source: str | Path | None) -> bool:
    """Whether a base's name means the embedded avatars."""
    return source is None or source == EMBEDDED_NAME or Path(source).resolve() == EMBEDDED


def load_base(
    source: str | Path | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    variant: str | None = None,
    offline: bool = False,
    base_config: str | None = None,
    leave_out: Collection[str] = (),
    trigger: str | None = None,
    class_word: str | None = None,
    resolution: int | None = None,
    add_sites: str | None = None,
    skip_sites: str | None = None,
    offload: bool = False,
    quantize: Quantize | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Base:
    """Loads and freezes a pipeline.

    Args:
        source: pipeline folder, hub id, or a `.safetensors` file of a whole checkpoint; None (or
            `EMBEDDED_NAME`) for the embedded avatars.
        device: `auto`, `cpu`, `cuda`, `mps`.
        dtype: number format of the frozen weights; `auto` is bfloat16 on GPUs that compute faster in it, and
            float32 elsewhere.
        variant: of the files to load, such as `fp16`; None for the only one that a folder has.
        offline: look at files on this machine only.
        base_config: folder or hub id of a pipeline like a single file's; None to tell from its weights.
        leave_out: components that the pipeline can do without, such as a third text encoder.
        trigger, class_word: the rare word (`sks`) and what a person is called; None for the base's own.
        resolution: pixels a side to work at; None for the base's own.
        add_sites: pattern of linear layers to adapt besides the attention's, such as `ff\\.net`.
        skip_sites: pattern of sites to leave out, such as `^text_encoder`.
        offload: keep the VAE and text encoders without an adapter on the CPU while training.
        quantize: `int8` or `nf4` for the weights of the denoiser and of the frozen text encoders.
        revision, token: branch, tag or commit on the hub, and an access token for private repositories.

    Raises:
        InputError: no pipeline of a known family there, or no such device or number format.
    """
    where = pick_device(device)  # a mistake there would show after the loading
    dtype = resolved_dtype(str(dtype).removeprefix("torch."), where)
    if dtype not in _DTYPES:
        raise InputError(f"dtype: expected auto or one of {', '.join(_DTYPES)}, got {dtype}")
    place = str(EMBEDDED if is_embedded(source) else source)
    check_quantize(quantize, where, Path(place).is_file())
    variant = variant or only_variant(place)
    with torch.cuda.device(where) if where.type == "cuda" else nullcontext():  # nf4 is made where it will be
        pipe = open_pipeline(
            place, FAMILIES, dtype, variant, offline, base_config, leave_out, revision, token, quantize
        )
    asked = {"trigger": trigger, "class_word": class_word, "resolution": resolution}
    words: dict[str, Any] = facts_of(Path(place)) | {name: value for name, value in asked.items() if value}
    name = EMBEDDED_NAME if is_embedded(place) else place
    stored = folder_of(place, revision) if dtype == "bfloat16" or quantize else None
    sites: dict[str, Any] = {"add_sites": add_sites, "skip_sites": skip_sites}
    files: dict[str, Any] = {"stored": stored, "variant": variant}
    base = Base.from_pipeline(pipe, name, **words, **sites, **files, offload=offload, quantize=quantize)
    base.move(where)
    if base.device.type == "cpu":
        plain_attention(base)
    return base


def plain_attention(base: Base) -> None:
    """Fused attention is slow backwards on small maps on CPUs: 0.47 → 0.34 s a step at 256 tokens."""
    side = getattr(base.denoiser.config, "sample_size", None)
    if base.family.DENOISER == "unet" and isinstance(side, int) and side**2 <= 1024:
        base.denoiser.set_attn_processor(AttnProcessor())
