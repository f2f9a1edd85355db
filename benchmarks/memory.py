"""What fits where: the bases that people use now at their published sizes, without their weights.

    python benchmarks/memory.py                                # the table of docs/families.md
    python benchmarks/memory.py --gpu "Z-Image" --bits nf4     # on a GPU: random weights, a person, a picture

The first asks `hdb doctor`'s estimate. The second writes random weights in bfloat16 to a folder (20 GB for
Z-Image), loads them like any base, and trains a person: seconds, and the most memory beside what was told.
Results go to benchmarks/results/memory.json, entry by entry.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer, Qwen3Config, Qwen3VLConfig

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import Base, load_base
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

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
PAGE = ROOT / "docs" / "families.md"
MARK = re.compile(r"(<!-- memory -->\n)(?P<table>.*?)(<!-- /memory -->)", re.DOTALL)
BITS = ("bf16", "int8", "nf4")
STEPS = 25

_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN3_8B = {**_QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [24, 20, 20]}
_QWEN25_VL = {
    "text_config": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
        "rope_parameters": {**_ROPE, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    },
}  # fmt: skip
_QWEN3_VL = {
    "text_config": {**_QWEN3_4B, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
    "vision_config": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
    },
}  # fmt: skip
_KL_16 = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
    "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611,
    "shift_factor": 0.1159, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip


def _klein(double: int, single: int, heads: int, text: dict[str, Any]) -> dict[str, Any]:
    config = {
        "num_layers": double, "num_single_layers": single, "num_attention_heads": heads,
        "joint_attention_dim": 3 * text["hidden_size"], "in_channels": 128, "guidance_embeds": False,
    }  # fmt: skip
    return {
        "class": "Flux2KleinPipeline", "transformer": ("Flux2Transformer2DModel", config),
        "text_encoder": ("Qwen3ForCausalLM", Qwen3Config(**text)), "vae": ("AutoencoderKLFlux2", {}),
        "settings": {"is_distilled": False},
    }  # fmt: skip


BASES: dict[str, dict[str, Any]] = {
    "Z-Image": {
        "class": "ZImagePipeline", "transformer": ("ZImageTransformer2DModel", {}),
        "text_encoder": ("Qwen3ForCausalLM", Qwen3Config(**_QWEN3_4B)), "vae": ("AutoencoderKL", _KL_16),
    },
    "FLUX.2 klein 4B": _klein(5, 20, 24, _QWEN3_4B),
    "FLUX.2 klein 9B": _klein(8, 24, 32, _QWEN3_8B),
    "Qwen-Image": {
        "class": "QwenImagePipeline", "transformer": ("QwenImageTransformer2DModel", {}),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLConfig(**_QWEN25_VL)),
        "vae": ("AutoencoderKLQwenImage", {}),
    },
    "Krea 2": {
        "class": "Krea2Pipeline", "transformer": ("Krea2Transformer2DModel", {}),
        "text_encoder": ("Qwen3VLModel", Qwen3VLConfig(**_QWEN3_VL)), "vae": ("AutoencoderKLQwenImage", {}),
    },
}  # fmt: skip
"""Sizes as their repositories publish them; an empty config is diffusers' default, which is that size."""


def write_configs(name: str, folder: Path) -> Path:
    """Writes a pipeline folder with every config of a base and no weights, and a tokenizer of bytes."""
    told = BASES[name]
    index: dict[str, Any] = {"_class_name": told["class"], **told.get("settings", {})}
    for part in ("transformer", "vae"):
        kind, config = told[part]
        index[part] = ["diffusers", kind]
        write_json(folder / part / "config.json", {"_class_name": kind, **config})
    kind, config = told["text_encoder"]
    index["text_encoder"] = ["transformers", kind]
    config.save_pretrained(folder / "text_encoder")
    index["tokenizer"] = ["transformers", "Qwen2Tokenizer"]
    vocab = {symbol: k for k, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab |= {word: len(vocab) + k for k, word in enumerate(special)}
    made: Any = Qwen2Tokenizer(vocab=vocab, merges=[], pad_token=special[0], eos_token=special[2])
    made.chat_template = _CHAT
    made.save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    write_json(folder / "model_index.json", index)
    return folder


def _bits(word: str) -> Any:
    return None if word == "bf16" else word


def row(name: str, folder: Path) -> dict[str, Any]:
    """Returns sites, numbers, file sizes, and the memory that both tasks are said to take on a GPU."""
    make = partial(skeleton, write_configs(name, folder), "bfloat16", offload=True)
    base = make()
    layout = Layout(base.sites, 1, 100, 50)
    basis = seeded_basis(layout.sites[:1], 100, 50, 0)
    person = Lidb(
        start(layout, 0), layout, basis.source, basis_fingerprint(basis), base.fingerprint, "sks", name
    )
    save_lidb(folder / "person.lidb.safetensors", person)
    tasks: dict[str, Any] = {
        "personalize": FinetuneConfig(rank=16, batch=1, checkpointing=True),
        "train": HypernetConfig(batch=4, accumulation=4, checkpointing=True),
    }
    return {
        "parameters": {
            part: sum(p.numel() for p in network.parameters())
            for part, network in networks(base.pipe).items()
        },
        "sites": len(base.sites),
        "lidb_numbers": layout.size,
        "lidb_file_bytes": (folder / "person.lidb.safetensors").stat().st_size,
        "lora_16_file_bytes": sum(16 * 2 * (s.in_features + s.out_features) for s in base.sites),
        "resolution": base.resolution,
        "told_gib": {
            f"{task}, {word}": _gib(need(make(quantize=_bits(word)), task, config, offline=True))
            for task, config in tasks.items()
            for word in BITS
        },
    }  # fmt: skip


def _gib(needs: dict[str, int]) -> float:
    return round(sum(needs.values()) / 2**30, 1)


def table(results: dict[str, Any]) -> str:
    """Returns the table of the page."""
    heads = [
        "base", "denoiser + text encoder", "sites", "LiDB", "LoRA, rank 16", "finetune: bf16, int8, nf4",
        "train: bf16, int8, nf4",
    ]  # fmt: skip
    rows = [heads, ["---"] * len(heads), *(_cells(name, told) for name, told in results["bases"].items())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _cells(name: str, told: dict[str, Any]) -> list[str]:
    sizes = [f"{told['parameters'][part] / 1e9:.1f}" for part in ("transformer", "text_encoder")]
    needs = [
        ", ".join(f"{told['told_gib'][f'{task}, {word}']:.1f}" for word in BITS) + " GiB"
        for task in ("personalize", "train")
    ]
    lidb, lora = told["lidb_file_bytes"] / 2**10, told["lora_16_file_bytes"] / 2**20
    return [name, " + ".join(sizes) + " B", str(told["sites"]), f"{lidb:.0f} KiB", f"{lora:.0f} MiB", *needs]


def page(text: str, results: dict[str, Any]) -> str:
    """Returns the page with the table of these results between its markers."""
    return MARK.sub(lambda match: match[1] + table(results) + match[3], text)


@torch.no_grad()
def random_weights(folder: Path) -> None:
    """Fills the networks of a folder of configs with random numbers, one network at a time."""
    pipe = skeleton(folder, "bfloat16").pipe
    torch.manual_seed(0)
    for part, network in networks(pipe).items():
        network.to_empty(device="cuda")
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            one = ("norm" in name and name.endswith("weight")) or name.endswith("running_var")
            if tensor.ndim > 1:
                tensor.normal_(0, 0.02)
            elif tensor.is_floating_point():
                tensor.fill_(float(one))
        network.save_pretrained(folder / part)
        network.to("meta")


def person(name: str, bits: str, folder: Path) -> dict[str, Any]:
    """Returns the seconds and the memory of a person's steps and of a picture, at the base's own size."""
    config = FinetuneConfig(rank=16, steps=STEPS, batch=1, checkpointing=True)
    write_configs(name, folder)
    told = need(skeleton(folder, "bfloat16", offload=True, quantize=_bits(bits)), "personalize", config)
    random_weights(folder)
    base: Base = load_base(folder, "cuda", "bfloat16", offload=True, quantize=_bits(bits))
    Image.effect_noise((base.resolution,) * 2, 64).convert("RGB").save(folder / "photo.png")
    photos = [Photo(folder / "photo.png", "person", None)]
    adapter = Adapter(fresh(base.sites, 16), "sks", base.fingerprint, name)
    finetune_adapter(base, adapter, photos, config.model_copy(update={"steps": 2}))  # CUDA's own start
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(), "side": base.resolution, "bits": bits}
    gib: dict[str, float] = {"told": _gib(told)}
    for task in ("finetune", "picture"):
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        if task == "finetune":
            adapter = finetune_adapter(base, adapter, photos, config)
        else:
            generate_images(base, ["a photo of a [V] person"], adapter, steps=25)
        torch.cuda.synchronize()
        figures[f"{task}_seconds"] = round(time.perf_counter() - began, 2)
        gib[f"{task}, most allocated"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return {**figures, "steps": STEPS, "drawn_steps": 25, "gib": gib, "environment": environment()}


def main() -> None:
    """Writes the table, or one base's person beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=BASES)
    parser.add_argument("--bits", choices=BITS, default="bf16")
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        if asked.gpu:
            made = person(asked.gpu, asked.bits, Path(place))
            results.setdefault("gpu", {})[f"{asked.gpu}, {asked.bits}"] = made
        else:
            made = {name: row(name, Path(place) / name.replace(" ", "-")) for name in BASES}
            results |= {"bases": made, "environment": environment()}
    write_json(RESULTS, results)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
