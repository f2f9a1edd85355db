"""The checkpoint that ComfyUI has loaded, as a base of ours over the same memory.

ComfyUI's networks have the names of the original Stable Diffusion, and ours those of diffusers; the numbers
are the same. So networks of diffusers are built without weights, and their parameters become views of
ComfyUI's tensors. This file knows torch and diffusers, and nothing of ComfyUI.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from hyperdreambooth import Base, InputError
from hyperdreambooth.base.load import plain_attention

Tensors = Mapping[str, Tensor]
Prediction = Literal["epsilon", "v_prediction"]

HEAD = 64  # channels of an attention head of CLIP
TOKENS = 77  # of a prompt
TRAINABLE = (torch.float32, torch.float16, torch.bfloat16)
ELSEWHERE = "make the LoRA with `hdb personalize`, and load its file with ComfyUI's Load LoRA"


def base_of(
    unet: Tensors,
    shape: Mapping[str, Any],
    text: Tensors,
    tokenizer: Any,
    vae: Tensors,
    source: str,
    *,
    resolution: int | None = None,
    prediction: Prediction = "epsilon",
) -> Base:
    """Builds a base over the weights of a loaded Stable Diffusion 1.x.

    The U-Net is never copied. The text encoder is copied if its number format differs from the U-Net's. An
    autoencoder in half precision is copied while it encodes photos, because that is done in float32.

    Args:
        unet: the U-Net's tensors by their original names (`input_blocks.0.0.weight`).
        shape: ComfyUI's `unet_config`: channels, blocks and attentions.
        text: the tensors of CLIP's text model (`encoder.layers.0.self_attn.q_proj.weight`).
        tokenizer: a `CLIPTokenizer`, which is left as it is.
        vae: the autoencoder's tensors by their original names (`encoder.conv_in.weight`).
        source: what messages call the checkpoint.
        resolution: pixels a side; None for 512.
        prediction: what the U-Net predicts, the noise or the velocity.

    Returns:
        The base, on the device of the tensors.

    Raises:
        InputError: another architecture, or weights in a number format that no training passes through.
    """
    _check(unet, shape, source)
    config = _unet_config(shape)
    with init_empty_weights():
        network, clip = UNet2DConditionModel(**config), CLIPTextModel(_text_config(text))
        autoencoder = AutoencoderKL(**_vae_config(vae))
    _attach(network, convert_ldm_unet_checkpoint(_under("model.diffusion_model.", unet), network.config))
    _attach(autoencoder, convert_ldm_vae_checkpoint(_under("vae.", vae), autoencoder.config))
    _attach(clip, _under(_prefix(clip), text))
    nn.Module.to(clip, network.dtype)  # a copy where the formats differ: they meet in one matrix product
    absent: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor"))
    scheduler: Any = _scheduler(prediction)
    pipe = StableDiffusionPipeline(
        autoencoder, clip, _limited(tokenizer), network, scheduler, **absent, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    base = Base.from_pipeline(pipe, source, resolution=resolution)
    if base.device.type == "cpu":
        plain_attention(base)
    return base


def _check(unet: Tensors, shape: Mapping[str, Any], source: str) -> None:
    """Refuses what is no U-Net of Stable Diffusion 1.x, and weights that are stored in 8 bits or fewer."""
    known = "input_blocks.0.0.weight" in unet and shape.get("context_dim") is not None
    # SD 2.x has linear layers around its transformers, SDXL a condition besides, edit models more channels
    same = shape.get("use_linear_in_transformer"), shape.get("adm_in_channels"), shape.get("in_channels")
    if not known or same != (False, None, 4):
        raise InputError(f"{source}: expected Stable Diffusion 1.x, got another architecture; {ELSEWHERE}")
    if odd := {tensor.dtype for tensor in unet.values()}.difference(TRAINABLE):
        found = str(odd.pop()).removeprefix("torch.")
        raise InputError(f"{source}: expected weights of 16 or 32 bits, got {found}; load them so")


def _unet_config(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Translates ComfyUI's `unet_config`, which counts the transformers behind every ResNet block."""
    layers = shape["num_res_blocks"][0]
    crossed = [depth > 0 for depth in shape["transformer_depth"][::layers]]
    return {
        "sample_size": 64,
        "in_channels": shape["in_channels"],
        "out_channels": shape["out_channels"],
        "layers_per_block": layers,
        "block_out_channels": tuple(shape["model_channels"] * times for times in shape["channel_mult"]),
        "down_block_types": tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in crossed),
        "up_block_types": tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in crossed[::-1]),
        "cross_attention_dim": shape["context_dim"],
        "attention_head_dim": shape["num_heads"],  # diffusers' name for the number of heads
    }


def _text_config(text: Tensors) -> CLIPTextConfig:
    """Reads the sizes of a CLIP text model off its tensors."""
    vocabulary, width = text["embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, projection_dim=width, num_attention_heads=width // HEAD,
        intermediate_size=len(text["encoder.layers.0.mlp.fc1.weight"]), max_position_embeddings=TOKENS,
        num_hidden_layers=_count(text, "encoder.layers.{}.layer_norm1.weight"),
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip


def _vae_config(vae: Tensors) -> dict[str, Any]:
    """Reads the sizes of an autoencoder off its tensors."""
    blocks = _count(vae, "encoder.down.{}.block.0.conv1.weight")
    return {
        "block_out_channels": tuple(
            len(vae[f"encoder.down.{k}.block.0.conv1.weight"]) for k in range(blocks)
        ),
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "layers_per_block": _count(vae, "encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": len(vae["post_quant_conv.weight"]),
    }


def _count(tensors: Tensors, name: str) -> int:
    return next(k for k in range(len(tensors)) if name.format(k) not in tensors)


def _under(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    return {prefix + name: _view(tensor) for name, tensor in tensors.items()}


def _view(tensor: Tensor) -> Tensor:
    """Returns the same memory as a tensor that autograd may save.

    ComfyUI loads and runs in PyTorch's inference mode, and what is made there can take no part in a training.
    """
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _prefix(clip: CLIPTextModel) -> str:
    """Returns what transformers puts before the names of the text model: nothing since version 5.6."""
    return "text_model." if hasattr(clip, "text_model") else ""


def _attach(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Makes the tensors the network's parameters. What it has no place for, an old buffer say, is left."""
    wanted: Sequence[str] = list(network.state_dict())
    if missing := [name for name in wanted if name not in tensors]:
        what = f"{type(network).__name__} lacks {missing[0]} ({len(missing)} missing)"
        raise InputError(f"checkpoint: {what}; load a whole Stable Diffusion 1.x, or {ELSEWHERE}")
    network.load_state_dict({name: tensors[name] for name in wanted}, assign=True)


def _limited(tokenizer: Any) -> Any:
    """Returns a copy of ComfyUI's tokenizer, which cuts long prompts itself, that pads and cuts at 77."""
    limited = copy.deepcopy(tokenizer)
    limited.model_max_length = TOKENS
    return limited


def _scheduler(prediction: Prediction) -> DDIMScheduler:
    """Returns the noise levels that Stable Diffusion was trained with."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
