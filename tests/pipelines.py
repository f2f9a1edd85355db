"""Micro pipelines of every family that LoRA files are written for: the real classes, random weights, fast."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import micro
import qwens
from hyperdreambooth.shapes import Site, canonical

DENOISER = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LATER = ("to_qkv_mlp_proj", "attn.to_out", "to_gate")  # FLUX.2's single blocks, Krea 2
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")


def parts(pipe: Any) -> dict[str, nn.Module]:
    """Denoiser and CLIP text encoders: what a LoRA may change."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    found = {name: getattr(pipe, name, None) for name in names}
    frozen = (T5EncoderModel, *qwens.TEXT_ENCODERS)
    return {name: m for name, m in found.items() if m is not None and not isinstance(m, frozen)}


def attention_sites(components: dict[str, nn.Module]) -> tuple[Site, ...]:
    """Every attention projection, by canonical name."""
    return tuple(
        sorted(
            Site(canonical(part, path), layer.in_features, layer.out_features)
            for part, module in components.items()
            for path, layer in module.named_modules()
            if isinstance(layer, nn.Linear)
            and re.search(r"att(n|ention)", path)
            and "text_fusion" not in path
            and path.endswith(
                tuple(f".{end}" for end in (TEXT if part.startswith("text") else DENOISER + LATER))
            )
        )
    )


def _clip(tok: CLIPTokenizer, width: int, seed: int, projected: bool, layers: int = 2) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tok), hidden_size=width, intermediate_size=24, num_attention_heads=2,
        num_hidden_layers=layers, max_position_embeddings=16, projection_dim=width,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(seed: int = 7, width: int = 16) -> tuple[T5Tokenizer, T5EncoderModel]:
    """A tokenizer of single letters, and one layer."""
    symbols = string.ascii_letters + string.digits + string.punctuation
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in symbols)]
    tok = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=32)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tok), d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return tok, T5EncoderModel(config).eval()


def _vae() -> AutoencoderKL:
    """For the later families: no convolutions around the latents, and a shift; 32 pixels → 16×16×4."""
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        sample_size=32, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()  # fmt: skip


def sd21() -> Any:
    """SD 2.x differs from 1.x in linear projections around its transformers, and in what it predicts."""
    pipe = micro.pipeline()
    torch.manual_seed(3)
    config = {**pipe.unet.config, "use_linear_projection": True, "attention_head_dim": [2, 4]}
    pipe.unet = UNet2DConditionModel.from_config(config).eval()
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    return pipe


def sdxl() -> Any:
    """Two text encoders, transformers of several blocks, size and crop as conditions."""
    tok = micro.tokenizer()
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=6 * 8 + 24,
        cross_attention_dim=40,
    ).eval()  # fmt: skip
    scheduler = micro.pipeline().scheduler
    return StableDiffusionXLPipeline(
        vae=micro.vae(), text_encoder=_clip(tok, 16, 1, False), text_encoder_2=_clip(tok, 24, 4, True),
        tokenizer=tok, tokenizer_2=micro.tokenizer(), unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def sd3() -> Any:
    """A transformer of joint blocks; both CLIPs, and no T5."""
    tok = micro.tokenizer()
    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=40, caption_projection_dim=16,
        pooled_projection_dim=40, out_channels=4,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(),
        text_encoder=_clip(tok, 16, 1, True), tokenizer=tok, text_encoder_2=_clip(tok, 24, 4, True),
        tokenizer_2=micro.tokenizer(), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def sd3_with_t5() -> Any:
    """The whole one."""
    pipe, (tok, text) = sd3(), t5(width=40)
    pipe.register_modules(text_encoder_3=text, tokenizer_3=tok)
    return pipe


def flux() -> Any:
    """Double and single stream blocks; a CLIP and a T5."""
    tok = micro.tokenizer()
    tok2, text2 = t5()
    torch.manual_seed(3)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(), text_encoder=_clip(tok, 16, 1, False),
        tokenizer=tok, text_encoder_2=text2, tokenizer_2=tok2, transformer=transformer,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Any]] = {
    "SD 1.5": micro.pipeline, "SD 2.1": sd21, "SDXL": sdxl, "SD3": sd3, "Flux": flux,
    "Z-Image": qwens.zimage, "FLUX.2 klein": qwens.klein, "Qwen-Image": qwens.qwenimage,
    "Krea 2": qwens.krea2,
}  # fmt: skip
FAMILY_NAMES = {  # a micro SD 2.1 is one without its widths
    "SD 1.5": "sd1", "SD 2.1": "sd1", "SDXL": "sdxl", "SD3": "sd3", "Flux": "flux", "Z-Image": "zimage",
    "FLUX.2 klein": "flux2", "Qwen-Image": "qwenimage", "Krea 2": "krea2",
}  # fmt: skip


def weightless(pipe: Any) -> Any:
    """Modules of the meta device get weights again, all of them one zero, at no cost."""
    for component in parts(pipe).values():
        for module in component.modules():
            for kind in (module._parameters, module._buffers):
                for name, tensor in kind.items():
                    if tensor is not None and tensor.is_meta:
                        zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                        kind[name] = nn.Parameter(zeros, False) if kind is module._parameters else zeros
    return pipe


def full_sd15() -> Any:
    """The real SD 1.5 without its weights: every module at its real size."""
    pipe, tok = micro.pipeline(), micro.tokenizer()
    with torch.device("meta"):
        pipe.unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        pipe.text_encoder = _clip(tok, 768, 1, False, layers=12)
    return weightless(pipe)


def full_sdxl() -> Any:
    """The real SDXL without its weights."""
    pipe, tok = sdxl(), micro.tokenizer()
    with torch.device("meta"):
        pipe.unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        pipe.text_encoder = _clip(tok, 768, 1, False, layers=12)
        pipe.text_encoder_2 = _clip(tok, 1280, 1, True, layers=32)
    return weightless(pipe)


FULL: dict[str, Callable[[], Any]] = {"SD 1.5": full_sd15, "SDXL": full_sdxl}

# the denoisers of later families at their published sizes; klein's are from Black Forest Labs' own code
_KLEIN: dict[str, dict[str, int]] = {
    "4B": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    "9B": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
}
_LATER_FULL: dict[str, tuple[Callable[[], Any], Callable[[], nn.Module]]] = {
    "Z-Image": (qwens.zimage, ZImageTransformer2DModel),
    "FLUX.2 klein 4B": (qwens.klein, partial(Flux2Transformer2DModel, guidance_embeds=False, **_KLEIN["4B"])),
    "FLUX.2 klein 9B": (qwens.klein, partial(Flux2Transformer2DModel, guidance_embeds=False, **_KLEIN["9B"])),
    "Qwen-Image": (qwens.qwenimage, QwenImageTransformer2DModel),
    "Krea 2": (qwens.krea2, Krea2Transformer2DModel),
}
LATER_FULL = tuple(_LATER_FULL)


def full_later(name: str) -> Any:
    """A pipeline of a later family whose transformer has its published size, and no weights."""
    pipe, make = _LATER_FULL[name][0](), _LATER_FULL[name][1]
    with torch.device("meta"):
        pipe.transformer = make()
    return weightless(pipe)


def picture(pipe: Any) -> torch.Tensor:
    """Two steps from fixed noise, `(1, 32, 32, 3)` in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"max_sequence_length": 16} if hasattr(pipe, "transformer") else {}
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made = pipe(
            prompt="a photo of sks", num_inference_steps=2, height=32, width=32, generator=noise,
            output_type="np", **options,
        )  # fmt: skip
    return torch.from_numpy(made.images)
