"""Frozen weights in 8 or 4 bits, by diffusers' own backends: torchao (int8) and bitsandbytes (nf4).

The linear layers of the denoiser and of the frozen text encoders are quantised. Everything else keeps its
number format, and so do adapters, activations and gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdreambooth.files import InputError
from hyperdreambooth.sites import full_weight, quantized

Quantize: TypeAlias = Literal["int8", "nf4"]
PACKAGES: Mapping[Quantize, str] = {"int8": "torchao", "nf4": "bitsandbytes"}
_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a weight. nf4 has a scale for each block of 64 weights, in 8 bits, and one for 256 of those."""
_UNQUANTIZED = ("lm_head",)  # transformers leaves the head of a language model as it is

# diffusers warns of every number format but bfloat16; our own linear layer computes in each of them
logging.getLogger("diffusers.quantizers.torchao.torchao_quantizer").addFilter(
    lambda record: "only bfloat16 is supported" not in record.getMessage()
)


def check_quantize(quantize: Quantize | None, device: torch.device, file: bool) -> None:
    """Refuses a quantisation that cannot be made, before anything large is read.

    Args:
        quantize: what the user asks for.
        device: where the base will be.
        file: whether the base is a single file.

    Raises:
        InputError: an unknown word, a package that is missing, a CPU for nf4, or a single file.
    """
    if quantize is None:
        return
    if quantize not in PACKAGES:
        raise InputError(f"quantize: expected int8 or nf4, got {quantize}")
    if file:
        raise InputError(
            "quantize: expected a pipeline folder or a hub id, got a single file; save it as one"
        )
    if quantize == "nf4" and device.type == "cpu":
        raise InputError("quantize: diffusers makes nf4 on a GPU only, and this is a CPU; use int8")
    if find_spec(PACKAGES[quantize]) is None:
        raise InputError(
            f"quantize: {quantize} needs {PACKAGES[quantize]}; pip install 'hyperdreambooth[quantize]'"
        )


def quantization(quantize: Quantize, parts: Mapping[str, str], dtype: torch.dtype) -> Any:
    """Returns diffusers' config.

    Args:
        quantize: the number of bits and the way.
        parts: component → its library, `diffusers` or `transformers`.
        dtype: the number format of the other weights, and of the activations.
    """
    import diffusers
    import transformers
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    homes: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}

    def config(library: str) -> Any:
        if quantize == "int8":
            from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore - it may be missing

            return homes[library].TorchAoConfig(Int8WeightOnlyConfig())
        return homes[library].BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip

    mapping = {part: config(library) for part, library in parts.items()}
    return PipelineQuantizationConfig(quant_mapping=mapping)


class _Product(torch.autograd.Function):
    """`x @ W.T + b` of a frozen int8 weight. torchao's own product would keep W in 16 bits for the backward
    pass, and then int8 would take more memory than no quantisation at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return (grad @ full_weight(ctx.layer).to(grad.dtype)).to(ctx.dtype), None


class Int8Linear(nn.Linear):
    """A frozen linear layer whose weight stays in 8 bits between the forward and the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns `(…, o)` of `(…, i)`."""
        return _Product.apply(input, self)  # pyright: ignore[reportReturnType] - untyped in torch


def spare_backward(denoiser: nn.Module) -> None:
    """Makes the layers that torchao has quantised keep nothing but their 8 bits for the backward pass."""
    for layer in denoiser.modules():
        if type(layer) is nn.Linear and quantized(layer.weight):
            layer.__class__ = Int8Linear  # the layer is the same, only its product is another


def nbytes(network: nn.Module, quantize: Quantize | None) -> int:
    """Returns the bytes that a network without weights will have once it is loaded and quantised."""
    small: set[int] = set()
    size = 0.0
    for name, layer in network.named_modules():
        if quantize and isinstance(layer, nn.Linear) and not name.endswith(_UNQUANTIZED):
            small.add(id(layer.weight))
            scales = 4 * layer.out_features if quantize == "int8" else 0
            size += layer.weight.numel() * _BYTES[quantize] + scales
    tensors = [*network.parameters(), *network.buffers()]
    return int(size) + sum(tensor.nbytes for tensor in tensors if id(tensor) not in small)
