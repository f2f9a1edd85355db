"""What a family of bases is: one file with these names, over the pipeline that diffusers has for it.

`docs/families.md` says how to add one. Nothing else in the package knows any family.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from hyperdreambooth.base.noising import Diffusion, Flow

Conditioning = dict[str, Tensor]
"""What a denoiser is told of its prompts; every tensor leads with the batch axis."""


class Family(Protocol):
    """The names of a family's file."""

    @property
    def DENOISER(self) -> str:
        """The pipeline's component that is asked: `unet`, `transformer`."""
        ...

    @property
    def TEXT_ENCODERS(self) -> tuple[str, ...]:
        """The components that read prompts and may wear an adapter; others stay frozen."""
        ...

    @property
    def NOISING(self) -> Diffusion | Flow:
        """How latents become noisy, and what the denoiser is asked."""
        ...

    def tokenize(self, pipe: Any, prompts: list[str]) -> Tensor:
        """Token numbers `(b, t)`, of all tokenizers in a row."""
        ...

    def encode_prompts(self, pipe: Any, tokens: Tensor) -> Conditioning:
        """Conditioning of token numbers `(b, t)`; gradients flow through what is worn."""
        ...

    def predict(self, pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, `(b, c, h, w)` like the noisy latents; timesteps `(b,)`."""
        ...

    def sampling(
        self, pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float
    ) -> dict[str, Any]:
        """What the pipeline's call takes for prompts, negative prompts and guidance."""
        ...

    def resolution(self, pipe: Any) -> int:
        """Pixels a side that the base was made for."""
        ...

    def multiple(self, pipe: Any) -> int:
        """Sides of pictures must be a multiple of this many pixels."""
        ...
