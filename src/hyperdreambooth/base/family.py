"""The interface of a family of bases, a module for one diffusers pipeline; see `docs/families.md`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from hyperdreambooth.base.noising import Diffusion, Flow

Conditioning = dict[str, Tensor]
"""The encoded prompts of a denoiser; the batch is the first axis of every tensor."""


class Family(Protocol):
    """The names in a family's module."""

    # the component that predicts noise or velocity: `unet` or `transformer`
    @property
    def DENOISER(self) -> str: ...

    # the text encoders that may wear an adapter; others stay frozen
    @property
    def TEXT_ENCODERS(self) -> tuple[str, ...]: ...

    # the pattern of the names of the layers that an adapter changes
    @property
    def SITES(self) -> str: ...

    # the noise levels and what the denoiser predicts
    @property
    def NOISING(self) -> Diffusion | Flow: ...

    # the side of the square of latents that the denoiser takes as one token
    @property
    def PATCH(self) -> int: ...

    # token ids `(b, t)`, those of all tokenizers concatenated
    def tokenize(self, pipe: Any, prompts: list[str]) -> Tensor: ...

    # the conditioning of token ids `(b, t)`; an adapter that is worn gets gradients. A family with a further
    # text encoder that never wears one has `encode_frozen(pipe, tokens)` and takes its answer as `frozen`
    def encode_prompts(self, pipe: Any, tokens: Tensor) -> Conditioning: ...

    # the denoiser's prediction, `(b, c, h, w)` like the noisy latents; timesteps `(b,)`
    def predict(self, pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor: ...

    # the pipeline's arguments for prompts, negative prompts and guidance
    def sampling(
        self, pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float
    ) -> dict[str, Any]: ...

    # the side in pixels that the base was trained at
    def resolution(self, pipe: Any) -> int: ...

    # the number of pixels that the sides of images must be a multiple of
    def multiple(self, pipe: Any) -> int: ...
