"""LoRA files of one layer each, at the edges of the rules by which diffusers loads a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from spellings import KOHYA, PEFT, State, conv, pair


def _wide(module: str, columns: int, rows: int) -> State:
    return pair(module, columns, rows, KOHYA)


ODD: Mapping[str, Sequence[State]] = {
    "SD 1.5": (
        _wide("lora_unet_time_embedding_linear_1", 320, 1280),
        conv("lora_unet_conv_in", 4, 320),
        conv("lora_unet_conv_out", 320, 4),
        conv("lora_unet_down_blocks_0_downsamplers_0_conv", 320, 320),
        conv("lora_unet_up_blocks_0_upsamplers_0_conv", 1280, 1280),
        _wide("lora_unet_down_blocks_1_resnets_0_time_emb_proj", 1280, 640),
        conv("lora_unet_down_blocks_1_resnets_0_conv_shortcut", 320, 640, 1),
        conv("lora_unet_down_blocks_1_attentions_0_proj_in", 640, 640, 1),
        _wide("lora_te_text_projection", 768, 768),
        _wide("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 640, 640),
    ),
    "SDXL": (
        _wide("lora_unet_add_embedding_linear_1", 2816, 1280),
        _wide("lora_unet_label_emb_0_0", 2816, 1280),
        _wide("lora_unet_time_embed_0", 320, 1280),
        conv("lora_unet_input_blocks_4_0_in_layers_2", 320, 640),
        conv("lora_unet_input_blocks_4_0_out_layers_3", 640, 640),
        _wide("lora_unet_input_blocks_4_0_emb_layers_1", 1280, 640),
        conv("lora_unet_input_blocks_4_0_skip_connection", 320, 640, 1),
        conv("lora_unet_input_blocks_3_0_op", 320, 320),
        conv("lora_unet_input_blocks_0_0", 4, 320),
        conv("lora_unet_out_2", 320, 4),
        _wide("lora_te2_text_projection", 1280, 1280),
        pair("text_encoder_2.text_projection", 1280, 1280, PEFT),
    ),
    "SD3": (
        pair("transformer.context_embedder", 4096, 1536, PEFT),
        pair("transformer.norm_out.linear", 1536, 3072, PEFT),
        pair("transformer.time_text_embed.timestep_embedder.linear_1", 256, 1536, PEFT),
        pair("transformer.proj_out", 1536, 64, PEFT),
        _wide("lora_unet_final_layer_linear", 1536, 64),
        pair("base_model.model.transformer_blocks.0.norm1.linear", 1536, 6 * 1536, PEFT),
    ),
    "Flux": (
        pair("transformer.x_embedder", 64, 3072, PEFT),
        pair("transformer.single_transformer_blocks.0.norm.linear", 3072, 3 * 3072, PEFT),
        _wide("lora_unet_img_in", 64, 3072),
        _wide("lora_unet_single_blocks_0_modulation_lin", 3072, 9216),
        _wide("lora_transformer_transformer_blocks_0_attn_to_q", 3072, 3072),
        {
            **_wide("lora_transformer_transformer_blocks_0_attn_to_q", 3072, 3072),
            "lora_transformer_transformer_blocks_0_attn_to_q.alpha": torch.tensor(2.0),
        },
        pair("transformer_blocks.0.attn.to_q", 3072, 3072, PEFT),
        pair("transformer.transformer_blocks.0.attn.to_q", 3072, 3072, KOHYA),
    ),
}
"""Family → the files."""
