"""The paper's scorers, each optional and downloaded: DINO, CLIP and an encoder of real faces.

The face encoder is AuraFace (`glintr100.onnx`, Apache-2.0); the usual ones forbid commercial use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize

from hyperdreambooth.faces.detect import FILE as YUNET_FILE
from hyperdreambooth.faces.detect import LEAST_SCORE, Detector, check_opencv, fetch_yunet, yunet
from hyperdreambooth.faces.image import to_image, to_pixels
from hyperdreambooth.faces.landmarks import Landmarks, laid_onto
from hyperdreambooth.files import InputError

Embed: TypeAlias = Callable[[Sequence[Image.Image]], Tensor]
"""`m` pictures → unit embeddings `(m, e)` on the CPU."""

FACE_FILE = "glintr100.onnx"
# where encoders of ArcFace's kind expect the five points, in pixels of 112 (Deng et al., 2019)
ARCFACE: Landmarks = (
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041),
)  # fmt: skip
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


class Face:
    """An encoder of ArcFace's kind in ONNX form: RGB faces of 112 pixels in [-1, 1], aligned to `ARCFACE`.

    Args:
        source: folder or hub id that has `glintr100.onnx`; a folder may have YuNet's file beside it.
        device: ignored: the encoder runs on the CPU.
        detect: finds the faces; None for YuNet.
    """

    def __init__(self, source: str, device: torch.device, detect: Detector | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            advice = "pip install 'hyperdreambooth[eval]'"
            raise InputError(f"the face encoder needs onnxruntime: {advice}") from None
        beside = Path(source) / FACE_FILE
        file = beside if beside.is_file() else Path(hf_hub_download(source, FACE_FILE))
        try:
            self.session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no narrower class in common
            raise InputError(f"{file}: expected an ONNX model, got {error}; download it again") from None
        self.input = self.session.get_inputs()[0].name
        self.detect = detect or _yunet_beside(Path(source))

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns unit embeddings `(m, e)` of the largest face in each picture; zeros if there is none."""
        crops = [self._crop(image) for image in images]
        pixels = torch.stack([to_pixels(crop or Image.new("RGB", (112, 112)), 112) for crop in crops])
        made = [self.session.run(None, {self.input: part.numpy()})[0] for part in pixels.split(_BATCH)]
        has_face = torch.tensor([crop is not None for crop in crops])[:, None]
        return normalize(torch.from_numpy(np.concatenate(made)), dim=1) * has_face

    def _crop(self, image: Image.Image) -> Image.Image | None:
        face = max(self.detect(image), key=lambda face: face.area, default=None)
        return face and laid_onto(image, face.landmarks, ARCFACE, 112)[0]


def _yunet_beside(folder: Path) -> Detector:
    """Loads YuNet from the encoder's folder, else from the hub."""
    check_opencv()
    beside = folder / YUNET_FILE
    file = beside if beside.is_file() else fetch_yunet(f"put it beside {FACE_FILE}")
    return yunet(file, LEAST_SCORE)


Model = TypeVar("Model", Dino, Clip, Face)


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
