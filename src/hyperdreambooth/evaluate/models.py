"""The paper's judges, which have to be fetched: DINO, CLIP, and an encoder of real faces. Each is optional.

The face encoder is AuraFace (`glintr100.onnx`, Apache-2.0); the usual ones forbid commercial use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

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

T = TypeVar("T")
FACE_FILE = "glintr100.onnx"
# where encoders of ArcFace's kind were taught to expect the five points, in pixels of 112 (Deng et al., 2019)
ARCFACE: Landmarks = (
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041),
)  # fmt: skip
_TOGETHER = 16


def _parts(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[at : at + _TOGETHER] for at in range(0, len(items), _TOGETHER)]


def _square(image: Image.Image) -> Image.Image:
    """The centre square, as every stage sees a photo."""
    return to_image(to_pixels(image, min(image.size)))


def _pretrained(kind: Any, source: str, device: torch.device) -> tuple[Any, Any]:
    """A transformers model and what prepares pictures for it."""
    from transformers import AutoImageProcessor

    return kind.from_pretrained(source).eval().to(device), AutoImageProcessor.from_pretrained(source)


class Dino:
    """DINO's class token (paper: DINO; here DINOv2).

    Args:
        source: folder or hub id of a `Dinov2Model`.
        device: where it runs.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import AutoModel

        self.model, self.processor = _pretrained(AutoModel, source, device)
        self.device = device

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings `(m, e)`."""
        made = [
            self.model(**self.processor([_square(i) for i in part], return_tensors="pt").to(self.device))
            for part in _parts(images)
        ]
        return normalize(torch.cat([one.last_hidden_state[:, 0].float().cpu() for one in made]), dim=1)


class Clip:
    """CLIP's embeddings of pictures and of texts.

    Args:
        source: folder or hub id of a `CLIPModel`.
        device: where it runs.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.model, self.processor = _pretrained(CLIPModel, source, device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        self.device = device

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings `(m, e)`."""
        made: list[Tensor] = []
        for part in _parts(images):
            pixels = self.processor([_square(i) for i in part], return_tensors="pt").pixel_values
            seen = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
            made.append(self.model.visual_projection(seen).float().cpu())
        return normalize(torch.cat(made), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings `(m, e)` of texts."""
        words = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        read = self.model.text_model(**words.to(self.device)).pooler_output
        return normalize(self.model.text_projection(read).float().cpu(), dim=1)


class Face:
    """An ArcFace-like encoder in ONNX form: faces of 112 pixels, [-1, 1], RGB, laid onto `ARCFACE`.

    Args:
        source: folder or hub id that has `glintr100.onnx`; a folder may have YuNet's file beside it.
        device: ignored: it runs where onnxruntime was built for.
        detect: finds the faces; None for YuNet.
    """

    def __init__(self, source: str, device: torch.device, detect: Detector | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise InputError(
                "the face encoder needs onnxruntime: pip install 'hyperdreambooth[eval]'"
            ) from None
        here = Path(source) / FACE_FILE
        file = here if here.is_file() else Path(hf_hub_download(source, FACE_FILE))
        try:
            self.session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no narrower class in common
            raise InputError(f"{file} is no whole ONNX model: {error}; get it again") from None
        self.input = self.session.get_inputs()[0].name
        self.detect = detect or _yunet_beside(Path(source))

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings `(m, e)` of the largest face in each picture; zeros where there is none."""
        crops = [self._crop(image) for image in images]
        pixels = [to_pixels(crop or Image.new("RGB", (112, 112)), 112) for crop in crops]
        made = [
            self.session.run(None, {self.input: torch.stack(list(part)).numpy()})[0]
            for part in _parts(pixels)
        ]
        there = torch.tensor([crop is not None for crop in crops])[:, None]
        return normalize(torch.cat([torch.from_numpy(one) for one in made]), dim=1) * there

    def _crop(self, image: Image.Image) -> Image.Image | None:
        faces = self.detect(image)
        if not faces:
            return None
        return laid_onto(image, max(faces, key=lambda face: face.area).landmarks, ARCFACE, 112)[0]


def _yunet_beside(folder: Path) -> Detector:
    """YuNet from the encoder's folder, else from the hub.

    Raises:
        InputError: neither has it, or OpenCV is missing.
    """
    check_opencv()
    beside = folder / YUNET_FILE
    file = beside if beside.is_file() else fetch_yunet(f"put it beside {FACE_FILE}")
    return yunet(file, LEAST_SCORE)


Model = TypeVar("Model", Dino, Clip, Face)


def fetch(
    kind: type[Model], score: str, source: str | None, device: torch.device, missing: list[str]
) -> Model | None:
    """The judge, or None with one line in `missing` that says why its scores will be null.

    Args:
        kind: `Dino`, `Clip` or `Face`.
        score: what it judges.
        source: folder or hub id; None where it was not asked for.
        device: where it runs.
        missing: takes the line.
    """
    if source is None:
        return None
    try:
        return kind(source, device)
    except (OSError, ValueError, RuntimeError, SafetensorError, HfHubHTTPError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        missing.append(f"{score}: null, {source} cannot be had ({reason})")
        return None
