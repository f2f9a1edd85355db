"""Stable Diffusion 1.x with random weights, as diffusers has it and as a checkpoint under the original names.

The names are written out here, apart from the code under test, which takes diffusers' own conversion.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import micro

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_EDGES = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
}  # fmt: skip


def pipeline(levels: int = 2, layers: int = 1) -> StableDiffusionPipeline:
    """Returns a small pipeline of the architecture of SD 1.x, whose lowest level has no attention."""
    tok = micro.tokenizer()
    tok.model_max_length = 77
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    )  # fmt: skip
    return _assembled(_unet(32, levels, layers, 64), _text(len(tok), 64, 2), vae, tok)


def smallest() -> StableDiffusionPipeline:
    """Returns the smallest pipeline that ComfyUI takes for SD 1.5, its weights rounded to float16.

    ComfyUI reads blocks and levels of the U-Net off the weights. The channels of its first level, the text
    encoder and the autoencoder have to be those of SD 1.5.
    """
    torch.manual_seed(0)
    pipe = _assembled(_unet(320, 2, 1, 768), _text(49408, 768, 12), _vae(), micro.tokenizer())
    for network in (pipe.unet, pipe.text_encoder, pipe.vae):
        network.half().float()
    return pipe


def full_size() -> tuple[Any, Any, Any]:
    """Returns U-Net, text encoder and autoencoder of SD 1.5 at their full size, without weights."""
    with init_empty_weights():
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
        return unet, _text(49408, 768, 12), _vae()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
    )  # fmt: skip


def _unet(width: int, levels: int, layers: int, words: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=layers, block_out_channels=[width * 2**k for k in range(levels)],
        down_block_types=["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
        cross_attention_dim=words, attention_head_dim=8,
    )  # fmt: skip


def _text(vocabulary: int, width: int, layers: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, projection_dim=width, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip
    return CLIPTextModel(config)


def _assembled(unet: Any, text_encoder: Any, vae: Any, tokenizer: Any) -> StableDiffusionPipeline:
    """Returns the pipeline of these networks, with SD 1.5's own scheduler."""
    pipe = StableDiffusionPipeline(
        unet=unet.eval(), text_encoder=text_encoder.eval(), vae=vae.eval(), tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_shape(unet: Any) -> dict[str, Any]:
    """Returns what ComfyUI finds out about a U-Net: its `unet_config`."""
    config, layers = unet.config, unet.config.layers_per_block
    depths = [int("Cross" in kind) for kind in config.down_block_types]
    widths = config.block_out_channels
    return {
        "in_channels": 4, "out_channels": 4, "model_channels": widths[0], "num_heads": 8,
        "channel_mult": [one // widths[0] for one in widths], "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in depths for _ in range(layers)],
        "context_dim": config.cross_attention_dim, "use_linear_in_transformer": False,
        "adm_in_channels": None,
    }  # fmt: skip


def original_unet(unet: Any) -> dict[str, Tensor]:
    """Returns a U-Net's tensors under the original names."""
    layers = unet.config.layers_per_block
    return {_unet_name(name, layers): tensor for name, tensor in unet.state_dict().items()}


def _unet_name(name: str, layers: int) -> str:
    for ours, theirs in _EDGES.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, number, rest = found.groups()
        at = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{at}.{_inner(kind, rest)}"
    found = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
    assert found, name
    way, block, kind, number, rest = found.groups()
    place = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{place + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":  # behind the attention, where there is one: not in the first block
        return f"output_blocks.{place + layers}.{1 if block == '0' else 2}.{rest}"
    home = (
        f"input_blocks.{place + int(number) + 1}" if way == "down" else f"output_blocks.{place + int(number)}"
    )
    return f"{home}.{int(kind == 'attentions')}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    layer, _, part = rest.rpartition(".")
    return f"{_RESNET[layer]}.{part}" if kind == "resnets" else rest


def original_vae(vae: Any) -> dict[str, Tensor]:
    """Returns an autoencoder's tensors under the original names, its attention as 1×1 convolutions."""
    blocks = len(vae.config.block_out_channels)
    made: dict[str, Tensor] = {}
    for name, tensor in vae.state_dict().items():
        part = name
        if found := re.match(r"(.+)up_blocks\.(\d)\.(.+)", part):
            part = f"{found[1]}up.{blocks - 1 - int(found[2])}.{found[3]}"
        part = re.sub(r"mid_block\.resnets\.(\d)", lambda at: f"mid.block_{int(at[1]) + 1}", part)
        part = part.replace("mid_block.attentions.0", "mid.attn_1").replace("down_blocks.", "down.")
        part = part.replace("resnets", "block").replace("conv_shortcut", "nin_shortcut")
        part = part.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        part = part.replace("conv_norm_out", "norm_out").replace("group_norm", "norm")
        part = re.sub(r"to_(?:out\.0|([qkv]))\.", lambda at: f"{at[1] or 'proj_out'}.", part)
        made[part] = tensor[..., None, None] if "attn_1" in part and tensor.ndim == 2 else tensor
    return made


def text_tensors(text_encoder: Any) -> dict[str, Tensor]:
    """Returns the tensors of CLIP's text model as ComfyUI names them."""
    return {name.removeprefix("text_model."): t for name, t in text_encoder.state_dict().items()}


def save_checkpoint(pipe: Any, file: Path) -> None:
    """Writes a whole pipeline as one checkpoint, in float16 as most are published."""
    text = "cond_stage_model.transformer.text_model."
    tensors = {
        **{f"model.diffusion_model.{name}": t for name, t in original_unet(pipe.unet).items()},
        **{f"first_stage_model.{name}": t for name, t in original_vae(pipe.vae).items()},
        **{f"{text}{name}": t for name, t in text_tensors(pipe.text_encoder).items()},
    }
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, file)
