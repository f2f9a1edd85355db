"""Real bases at their published sizes, without their weights: what a person costs, and one step of training.

    python benchmarks/full_size.py                  # the table: no weights at all
    python benchmarks/full_size.py --step "SD 1.5"  # random weights, one step of the finetune, its memory
    python benchmarks/full_size.py --gpu "SDXL"     # on a GPU: a person's 40 steps and a picture, their time

Results go to benchmarks/results/full_size.json, entry by entry.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5Tokenizer

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.base.readers import networks
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.files import write_json
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.finetune.fast import finetune_adapter
from hyperdreambooth.generate import generate_images
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import Lidb, save_lidb
from hyperdreambooth.lidb.weights import Layout, start
from hyperdreambooth.lora.relax import fresh
from hyperdreambooth.memory import need, skeleton
from hyperdreambooth.runs import environment

RESULTS = Path(__file__).parent / "results" / "full_size.json"
STEPS = {"SD 1.5": (512, "float32"), "SDXL": (256, "bfloat16")}
"""Base → side and number format of its step on a CPU."""

CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
CLIP_H = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
UNET_1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
UNET_2 = {
    "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}  # fmt: skip
UNET_XL = {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
MMDIT = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
FLUX = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "guidance_embeds": True,
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
VAE_16 = {
    **VAE, "latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False,
    "scaling_factor": 1.5305, "shift_factor": 0.0609,
}  # fmt: skip

BASES: dict[str, dict[str, Any]] = {
    "SD 1.5": {
        "_class_name": "StableDiffusionPipeline", "unet": (UNet2DConditionModel, UNET_1),
        "text_encoder": ("CLIPTextModel", CLIP_L), "vae": (AutoencoderKL, VAE),
    },
    "SD 2.1": {
        "_class_name": "StableDiffusionPipeline", "unet": (UNet2DConditionModel, UNET_2),
        "text_encoder": ("CLIPTextModel", CLIP_H), "vae": (AutoencoderKL, VAE),
    },
    "SDXL": {
        "_class_name": "StableDiffusionXLPipeline", "unet": (UNet2DConditionModel, UNET_XL),
        "text_encoder": ("CLIPTextModel", CLIP_L), "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        "vae": (AutoencoderKL, {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}),
    },
    "SD 3.5 medium": {
        "_class_name": "StableDiffusion3Pipeline", "transformer": (SD3Transformer2DModel, MMDIT),
        "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        "text_encoder_3": ("T5EncoderModel", T5_XXL), "vae": (AutoencoderKL, VAE_16),
    },
    "Flux dev": {
        "_class_name": "FluxPipeline", "transformer": (FluxTransformer2DModel, FLUX),
        "text_encoder": ("CLIPTextModel", CLIP_L), "text_encoder_2": ("T5EncoderModel", T5_XXL),
        "vae": (AutoencoderKL, VAE_16),
    },
}  # fmt: skip
"""As their own repositories have them."""


def tokenizers(folder: Path) -> tuple[Path, Path]:
    """A CLIP tokenizer of bytes and a T5 one of letters: the networks' sizes do not depend on them."""
    bytes_ = [byte + end for end in ("", "</w>") for byte in sorted(ByteLevel.alphabet())]
    words = [*bytes_, "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: k for k, word in enumerate(words)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder / "clip")
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdefgs")]
    T5Tokenizer(vocab=letters, extra_ids=0, model_max_length=512).save_pretrained(folder / "t5")
    return folder / "clip", folder / "t5"


def write_configs(name: str, folder: Path) -> Path:
    """A pipeline folder with every config of a base and no weights."""
    told = dict(BASES[name])
    index: dict[str, Any] = {"_class_name": told.pop("_class_name"), "_diffusers_version": "0.42.1"}
    if index["_class_name"] == "StableDiffusionPipeline":
        index |= {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    for part, (kind, config) in told.items():
        here = folder / part
        if isinstance(kind, str):
            index[part] = ["transformers", kind]
            made: Any = T5Config(**config) if kind.startswith("T5") else CLIPTextConfig(**config)
            made.save_pretrained(here)
            clip, t5 = tokenizers(folder / "made")
            place = part.replace("text_encoder", "tokenizer")
            index[place] = ["transformers", "T5Tokenizer" if kind.startswith("T5") else "CLIPTokenizer"]
            (t5 if kind.startswith("T5") else clip).rename(folder / place)
        else:
            index[part] = ["diffusers", kind.__name__]
            write_json(here / "config.json", {"_class_name": kind.__name__, **config})
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if "unet" in told:
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
            prediction_type="v_prediction" if name == "SD 2.1" else "epsilon",
        )  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    write_json(folder / "model_index.json", index)
    return folder


def row(name: str, folder: Path) -> dict[str, Any]:
    """Sites, numbers, file size, and the memory two tasks are said to take on a GPU in bfloat16."""
    base = skeleton(write_configs(name, folder), "bfloat16")
    layout = Layout(base.sites, 1, 100, 50)
    small = Layout(base.sites[:1], 1, 100, 50)
    basis = seeded_basis(small.sites, 100, 50, 0)
    person = Lidb(
        start(layout, 0), layout, basis.source, basis_fingerprint(basis), base.fingerprint, "sks", name
    )
    save_lidb(folder / "person.lidb.safetensors", person)
    tasks: dict[str, Any] = {
        "personalize": FinetuneConfig(batch=1),
        "personalize, checkpointing": FinetuneConfig(batch=1, checkpointing=True),
        "train": HypernetConfig(batch=4, checkpointing=True),
    }
    return {
        "parameters": {
            part: sum(p.numel() for p in each.parameters()) for part, each in networks(base.pipe).items()
        },
        "sites": {part: sum(s.component == part for s in base.sites) for part in base.components},
        "lidb_numbers": layout.size,
        "lidb_file_bytes": (folder / "person.lidb.safetensors").stat().st_size,
        "lora_rank_4_numbers": sum(4 * (s.in_features + s.out_features) for s in base.sites),
        "resolution": base.resolution,
        "told_gib": {
            task: round(sum(need(base, task.split(",")[0], config, offline=True).values()) / 2**30, 2)
            for task, config in tasks.items()
        },
    }  # fmt: skip


def random_base(folder: Path, side: int, dtype: str, device: str = "cpu") -> Base:
    """The skeleton filled with random numbers."""
    pipe = skeleton(folder, dtype).pipe
    torch.manual_seed(0)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to_empty(device=device)
            for name, tensor in part.named_parameters():
                if tensor.ndim == 1:
                    tensor.data.fill_(float("norm" in name and name.endswith("weight")))
                else:
                    tensor.data.normal_(0, 0.02)
            for name, tensor in part.named_buffers():
                if name.endswith("position_ids"):
                    tensor.copy_(torch.arange(tensor.shape[-1]).expand_as(tensor))
                else:
                    tensor.zero_()
    return Base.from_pipeline(pipe, str(folder), resolution=side)


def step(name: str, folder: Path) -> dict[str, Any]:
    """One step of the finetune and the most memory that the process ever had."""
    side, dtype = STEPS[name]
    write_configs(name, folder)
    config = FinetuneConfig(rank=4, steps=1, batch=1)
    told = need(skeleton(folder, dtype, resolution=side), "personalize", config)
    base = random_base(folder, side, dtype)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Image.effect_noise((side, side), 64).convert("RGB").save(folder / "photo.png")
    adapter = Adapter(fresh(base.sites, 4), "sks", base.fingerprint, name)
    began = time.perf_counter()
    finished = finetune_adapter(base, adapter, [Photo(folder / "photo.png", "person", None)], config)
    return {
        "side": side, "dtype": dtype, "batch": 1, "rank": 4, "loss": float(finished.metadata["loss"]),
        "seconds": round(time.perf_counter() - began, 1), "threads": torch.get_num_threads(),
        "gib": {
            "after loading": round(loaded / 2**30, 2),
            "peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "told before": round(sum(told.values()) / 2**30, 2),
        },
        "told": {part: round(bytes_ / 2**30, 3) for part, bytes_ in told.items()},
    }  # fmt: skip


def person(name: str, folder: Path) -> dict[str, Any]:
    """A person's forty steps on a GPU at the base's own size, a picture, and the most memory of each."""
    write_configs(name, folder)
    bare, config = (
        skeleton(folder, "bfloat16"),
        FinetuneConfig(rank=4, steps=40, batch=1),
    )
    told = need(bare, "personalize", config)
    base = random_base(folder, bare.resolution, "bfloat16", "cuda")
    Image.effect_noise((base.resolution, base.resolution), 64).convert("RGB").save(folder / "photo.png")
    photos = [Photo(folder / "photo.png", "person", None)]
    adapter = Adapter(fresh(base.sites, 4), "sks", base.fingerprint, name)
    finetune_adapter(base, adapter, photos, FinetuneConfig(rank=4, steps=2, batch=1))  # CUDA's own start
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "side": base.resolution,
        "dtype": "bfloat16",
    }
    gib = {"told before": round(sum(told.values()) / 2**30, 2)}
    made = adapter
    for task in ("finetune", "picture"):
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        if task == "finetune":
            made = finetune_adapter(base, adapter, photos, config)
        else:
            generate_images(base, ["a photo of a [V] person"], made, steps=25)
        torch.cuda.synchronize()
        figures[f"{task}_seconds"] = round(time.perf_counter() - began, 2)
        gib[f"{task}, peak"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return {**figures, "steps": 40, "batch": 1, "rank": 4, "drawn_steps": 25, "gib": gib}


def main() -> None:
    """Writes the table, or one base's step or person beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--step", choices=STEPS)
    chosen.add_argument("--gpu", choices=BASES)
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        if asked.step:
            told = results.setdefault("steps", {})[asked.step] = step(asked.step, Path(place))
        elif asked.gpu:
            told = {**person(asked.gpu, Path(place)), "environment": environment()}
            results.setdefault("gpu", {})[asked.gpu] = told
        else:
            told = {name: row(name, Path(place) / name.replace(" ", "-")) for name in BASES}
            results["bases"] = told
    if not asked.gpu:  # it ran on another machine
        results["environment"] = environment()
    write_json(RESULTS, results)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
