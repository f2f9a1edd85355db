"""Micro pipelines of the families whose text encoder is a Qwen: the real classes, random weights, fast."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLModel,
)

# the turns of a conversation, as the Qwens write them; thinking is refused by an empty thought
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TEXT_ENCODERS = (Qwen3ForCausalLM, Qwen2_5_VLForConditionalGeneration, Qwen3VLModel)
_WIDTH = 16
_TEXT: dict[str, Any] = {
    "hidden_size": _WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 2048,
}  # fmt: skip


def tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of single bytes, with the special words of the real one."""
    vocab = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab |= {word: len(vocab) + number for number, word in enumerate(special)}
    made = Qwen2Tokenizer(
        vocab=vocab, merges=[], pad_token=special[0], eos_token=special[2], unk_token=None,
        additional_special_tokens=special[1:],
    )  # fmt: skip
    made.chat_template = _CHAT
    return made


def _qwen3(layers: int) -> Qwen3ForCausalLM:
    """Z-Image's and FLUX.2 klein's text encoder."""
    torch.manual_seed(1)
    config = Qwen3Config(vocab_size=len(tokenizer()), num_hidden_layers=layers, **_TEXT)
    return Qwen3ForCausalLM(config).eval()


def _qwen_vae() -> AutoencoderKLQwenImage:
    """Qwen-Image's and Krea 2's autoencoder of films of one picture: 32 pixels → 4×4×4."""
    torch.manual_seed(2)
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.7, 1.1],
    ).eval()  # fmt: skip


def zimage() -> Any:
    """A single stream transformer over lists of pictures and of captions, whose time runs from noise."""
    torch.manual_seed(3)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=_WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[1024, 256, 256],
    ).eval()  # fmt: skip
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        sample_size=32, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()  # fmt: skip
    with torch.no_grad():  # as it is made, these hold whatever was in memory
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=_qwen3(2),
        tokenizer=tokenizer(), transformer=transformer,
    )  # fmt: skip


def klein(is_distilled: bool = False) -> Any:
    """FLUX.2 klein: double and single streams, captions of three layers, latents in patches of 2 x 2."""
    torch.manual_seed(3)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * _WIDTH, guidance_embeds=False, axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=16,
    ).eval()  # fmt: skip
    torch.manual_seed(2)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        sample_size=32,
    ).eval()  # fmt: skip
    # the transformer counts its time in bfloat16, which is too coarse for the fastest waves: a trained one is
    # deaf to them
    with torch.no_grad():
        transformer.time_guidance_embed.timestep_embedder.linear_1.weight.unflatten(1, (2, 8))[..., :3] = 0
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(
        scheduler=scheduler, vae=vae, text_encoder=_qwen3(28), tokenizer=tokenizer(), transformer=transformer,
        is_distilled=is_distilled,
    )  # fmt: skip


def _dynamic() -> FlowMatchEulerDiscreteScheduler:
    """A schedule that is shifted by the number of patches."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def qwenimage() -> Any:
    """Joint streams, captions of different lengths under a mask."""
    torch.manual_seed(3)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=_WIDTH, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    torch.manual_seed(1)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**_TEXT, "vocab_size": len(tokenizer()), "num_hidden_layers": 2, "rope_parameters": rope}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": _WIDTH,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return QwenImagePipeline(
        scheduler=_dynamic(), vae=_qwen_vae(), text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer(), transformer=transformer,
    )  # fmt: skip


def krea2(is_distilled: bool = False) -> Any:
    """A single stream, captions of several layers that a small transformer joins."""
    torch.manual_seed(3)
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=_WIDTH, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=24,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    with torch.no_grad():  # random layers hardly answer, and a person would not show
        transformer.final_layer.linear.weight.mul_(4)
    torch.manual_seed(1)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**_TEXT, "vocab_size": len(tokenizer()), "num_hidden_layers": 3, "rope_parameters": rope}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": _WIDTH,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=vision)
    return Krea2Pipeline(
        scheduler=_dynamic(), vae=_qwen_vae(), text_encoder=Qwen3VLModel(config).eval(),
        tokenizer=tokenizer(), transformer=transformer, text_encoder_select_layers=(1, 3),
        is_distilled=is_distilled,
    )  # fmt: skip
