"""The interface of a family of bases: a module with these names, for one diffusers pipeline.

`docs/families.md` explains how to add one. Nothing else in the package depends on a family.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from hyperdreambooth.base.noising import Diffusion, Flow

Conditioning = dict[str, Tensor]
"""The encoded prompts of a denoiser; the batch is the first axis of every tensor."""


class Family(Protocol):
    """The names in a family's module."""

    @property
    def DENOISER(self) -> str:
        """The component that predicts noise or velocity: `unet` or `transformer`."""

    @property
    def TEXT_ENCODERS(self) -> tuple[str, ...]:
        """The text encoders that may wear an adapter; others stay frozen."""

    @property
    def NOISING(self) -> Diffusion | Flow:
        """The noise levels and what the denoiser predicts."""

    def tokenize(self, pipe: Any, prompts: list[str]) -> Tensor:
        """Returns token ids `(b, t)`, those of all tokenizers concatenated."""

    def encode_prompts(self, pipe: Any, tokens: Tensor) -> Conditioning:
        """Returns the conditioning of token ids `(b, t)`; an adapter that is worn gets gradients."""

    def predict(self, pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the denoiser's prediction, `(b, c, h, w)` like the noisy latents; timesteps `(b,)`."""

    def sampling(
        self, pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float
    ) -> dict[str, Any]:
        """Returns the pipeline's arguments for prompts, negative prompts and guidance."""

    def resolution(self, pipe: Any) -> int:
        """Returns the side in pixels that the base was trained at."""

    def multiple(self, pipe: Any) -> int:
        """Returns the number of pixels that the sides of images must be a multiple of."""
