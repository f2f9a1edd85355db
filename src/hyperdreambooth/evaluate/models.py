"""The paper's scorers of whole pictures, each optional and downloaded: DINO and CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize

from hyperdreambooth.faces.image import to_image, to_pixels

_BATCH = 16


class _Transformer:
    """A model of transformers that embeds the centre squares of pictures."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.model: Any = AutoModel.from_pretrained(source).eval().to(device)
        self.processor: Any = AutoImageProcessor.from_pretrained(source)

    def features(self, pixels: Tensor) -> Tensor:
        """Returns embeddings `(b, e)`, of any length, of the pixels that the processor gives."""
        raise NotImplementedError

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns unit embeddings `(m, e)` of pictures."""
        squares = [to_image(to_pixels(image, min(image.size))) for image in images]
        batches = [squares[at : at + _BATCH] for at in range(0, len(squares), _BATCH)]
        pixels = [self.processor(batch, return_tensors="pt").pixel_values for batch in batches]
        made = [self.features(part.to(self.model.device)) for part in pixels]
        return normalize(torch.cat(made).float().cpu(), dim=1)


class Dino(_Transformer):
    """DINO's class token (the paper: DINO; here: DINOv2); `source` is a `Dinov2Model`'s folder or hub id."""

    def features(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


class Clip(_Transformer):
    """CLIP's embeddings of pictures and of texts; `source` is a `CLIPModel`'s folder or hub id."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import AutoTokenizer

        super().__init__(source, device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source)

    def features(self, pixels: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns unit embeddings `(m, e)` of texts."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        read = self.model.text_model(**tokens.to(self.model.device)).pooler_output
        return normalize(self.model.text_projection(read).float().cpu(), dim=1)


Model = TypeVar("Model", Dino, Clip)


def load_model(
    kind: type[Model], scores: str, source: str | None, device: torch.device, missing: list[str]
) -> Model | None:
    """Loads a model that was asked for, or adds a line to `missing` that says why its `scores` are null."""
    if source is None:
        return None
    try:
        return kind(source, device)
    except (OSError, ValueError, RuntimeError, SafetensorError, HfHubHTTPError) as error:
        lines = (line.strip() for line in str(error).splitlines())
        reason = next(filter(None, lines), type(error).__name__)
        missing.append(f"{scores}: null, {source} cannot be loaded ({reason})")
        return None
