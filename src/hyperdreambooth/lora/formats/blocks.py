"""The layers of transformers: what diffusers calls them, and what the original models call them.

The original names are those of Stability AI's, Black Forest Labs', Tongyi's and Krea's own code, which the
converters of checkpoints in diffusers read (`loaders/single_file_utils.py`). Qwen-Image's are diffusers' own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

_FLUX_SHARED = {
    "transformer_blocks.*.attn.to_[qkv]": "double_blocks.*.img_attn.qkv",
    "transformer_blocks.*.attn.add_[qkv]_proj": "double_blocks.*.txt_attn.qkv",
    "transformer_blocks.*.attn.to_out.0": "double_blocks.*.img_attn.proj",
    "transformer_blocks.*.attn.to_add_out": "double_blocks.*.txt_attn.proj",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_FLUX = _FLUX_SHARED | {
    "transformer_blocks.*.ff.net.0.proj": "double_blocks.*.img_mlp.0",
    "transformer_blocks.*.ff.net.2": "double_blocks.*.img_mlp.2",
    "transformer_blocks.*.ff_context.net.0.proj": "double_blocks.*.txt_mlp.0",
    "transformer_blocks.*.ff_context.net.2": "double_blocks.*.txt_mlp.2",
    "transformer_blocks.*.norm1.linear": "double_blocks.*.img_mod.lin",
    "transformer_blocks.*.norm1_context.linear": "double_blocks.*.txt_mod.lin",
    "single_transformer_blocks.*.attn.to_[qkv]": "single_blocks.*.linear1",
    "single_transformer_blocks.*.proj_mlp": "single_blocks.*.linear1",
    "single_transformer_blocks.*.proj_out": "single_blocks.*.linear2",
    "single_transformer_blocks.*.norm.linear": "single_blocks.*.modulation.lin",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}
_FLUX2 = _FLUX_SHARED | {
    "transformer_blocks.*.ff.linear_in": "double_blocks.*.img_mlp.0",
    "transformer_blocks.*.ff.linear_out": "double_blocks.*.img_mlp.2",
    "transformer_blocks.*.ff_context.linear_in": "double_blocks.*.txt_mlp.0",
    "transformer_blocks.*.ff_context.linear_out": "double_blocks.*.txt_mlp.2",
    "single_transformer_blocks.*.attn.to_qkv_mlp_proj": "single_blocks.*.linear1",
    "single_transformer_blocks.*.attn.to_out": "single_blocks.*.linear2",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}
_SD3 = {
    "transformer_blocks.*.attn.to_[qkv]": "joint_blocks.*.x_block.attn.qkv",
    "transformer_blocks.*.attn2.to_[qkv]": "joint_blocks.*.x_block.attn2.qkv",
    "transformer_blocks.*.attn.add_[qkv]_proj": "joint_blocks.*.context_block.attn.qkv",
    "transformer_blocks.*.attn.to_out.0": "joint_blocks.*.x_block.attn.proj",
    "transformer_blocks.*.attn2.to_out.0": "joint_blocks.*.x_block.attn2.proj",
    "transformer_blocks.*.attn.to_add_out": "joint_blocks.*.context_block.attn.proj",
    "transformer_blocks.*.ff.net.0.proj": "joint_blocks.*.x_block.mlp.fc1",
    "transformer_blocks.*.ff.net.2": "joint_blocks.*.x_block.mlp.fc2",
    "transformer_blocks.*.ff_context.net.0.proj": "joint_blocks.*.context_block.mlp.fc1",
    "transformer_blocks.*.ff_context.net.2": "joint_blocks.*.context_block.mlp.fc2",
    "transformer_blocks.*.norm1.linear": "joint_blocks.*.x_block.adaLN_modulation.1",
    "transformer_blocks.*.norm1_context.linear": "joint_blocks.*.context_block.adaLN_modulation.1",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_ZIMAGE = {
    f"{blocks}.*.{name}": f"{blocks}.*.{module}"
    for blocks in ("layers", "noise_refiner", "context_refiner")
    for name, module in {
        "attention.to_[qkv]": "attention.qkv",
        "attention.to_out.0": "attention.out",
        **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")},
        "adaLN_modulation.0": "adaLN_modulation.0",
    }.items()
} | {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    **{name: name for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")},
}
_QWENIMAGE = {
    name: name
    for name in (
        *(f"transformer_blocks.*.attn.{end}" for end in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
        *(f"transformer_blocks.*.attn.add_{letter}_proj" for letter in "qkv"),
        *(
            f"transformer_blocks.*.{stream}_{end}"
            for stream in ("img", "txt")
            for end in ("mlp.net.0.proj", "mlp.net.2", "mod.1")
        ),
        "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
        "img_in", "txt_in", "norm_out.linear", "proj_out",
    )
}  # fmt: skip
_KREA2 = {
    f"{ours}.*.{name}": f"{theirs}.*.{module}"
    for ours, theirs in {
        "transformer_blocks": "blocks",
        "text_fusion.layerwise_blocks": "txtfusion.layerwise_blocks",
        "text_fusion.refiner_blocks": "txtfusion.refiner_blocks",
    }.items()
    for name, module in {
        "attn.to_q": "attn.wq", "attn.to_k": "attn.wk", "attn.to_v": "attn.wv", "attn.to_out.0": "attn.wo",
        "attn.to_gate": "attn.gate", "ff.gate": "mlp.gate", "ff.up": "mlp.up", "ff.down": "mlp.down",
    }.items()
} | {
    "img_in": "first", "final_layer.linear": "last.linear", "time_mod_proj": "tproj.1",
    "time_embed.linear_1": "tmlp.0", "time_embed.linear_2": "tmlp.2",
    "txt_in.linear_1": "txtmlp.1", "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
}  # fmt: skip

FAMILY_LAYERS: Mapping[str, Mapping[str, str]] = {
    "sd3": _SD3, "flux": _FLUX, "zimage": _ZIMAGE, "flux2": _FLUX2, "qwenimage": _QWENIMAGE, "krea2": _KREA2,
}  # fmt: skip
"""Family → the layer in diffusers → the original one; `*` is a block's number, `[qkv]` one of the letters."""


def _by_layer() -> dict[str, list[tuple[str, str, int]]]:
    places: defaultdict[str, list[tuple[str, str, int]]] = defaultdict(list)
    for family, layers in FAMILY_LAYERS.items():
        for name, module in layers.items():
            if "[qkv]" in name:
                for part, letter in enumerate("qkv"):
                    places[name.replace("[qkv]", letter)].append((family, module, part))
            else:
                places[name].append((family, module, 3 if name.endswith(".proj_mlp") else -1))
    return dict(places)


PLACES: Mapping[str, list[tuple[str, str, int]]] = _by_layer()
"""Layer in diffusers, with `*` for the block → (family, original layer, its part of that; -1: the whole)."""
