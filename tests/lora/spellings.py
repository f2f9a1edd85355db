"""LoRA files as tools spell them, each of a few layers at their real widths, made without those tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperdreambooth.lora.formats.container import Entry, read_header
from hyperdreambooth.lora.formats.headers import LoraInfo
from hyperdreambooth.lora.formats.names import family_of_base, kohya_rows
from hyperdreambooth.lora.formats.original import Rows
from hyperdreambooth.lora.formats.write import Form, write_lora
from hyperdreambooth.shapes import Site

RANK = 4
State = dict[str, Tensor]
Made = tuple[State, dict[str, str]]
"""The tensors of a file and its metadata."""


def _unet(tokens: int, mid: int, up: int) -> tuple[Site, ...]:
    """Three transformers of a U-Net: down, in the middle and up."""
    found: list[Site] = []
    for block, c in (("down_blocks.1", 640), ("mid_block", mid), ("up_blocks.1", up)):
        number = 2 if block.startswith("up") else 0
        stem = f"unet.{block}.attentions.{number}.transformer_blocks.0"
        for attention, k in (("attn1", c), ("attn2", tokens)):
            widths = {"to_q": c, "to_k": k, "to_v": k, "to_out.0": c}
            found += [Site(f"{stem}.{attention}.{end}", width, c) for end, width in widths.items()]
        found += [Site(f"{stem}.ff.net.0.proj", c, 8 * c), Site(f"{stem}.ff.net.2", 4 * c, c)]
    return tuple(found)


def _clip(part: str, width: int) -> tuple[Site, ...]:
    stem = f"{part}.encoder.layers.0"
    attention = [Site(f"{stem}.self_attn.{end}_proj", width, width) for end in ("q", "k", "v", "out")]
    return (*attention, Site(f"{stem}.mlp.fc1", width, 4 * width))


def _joint(c: int, single: bool) -> tuple[Site, ...]:
    stem, ends = "transformer.transformer_blocks.0", ("q", "k", "v")
    found = [Site(f"{stem}.attn.to_{end}", c, c) for end in (*ends, "out.0", "add_out")]
    found += [Site(f"{stem}.attn.add_{end}_proj", c, c) for end in ends]
    for name in ("ff", "ff_context"):
        found += [Site(f"{stem}.{name}.net.0.proj", c, 4 * c), Site(f"{stem}.{name}.net.2", 4 * c, c)]
    if single:
        stem = "transformer.single_transformer_blocks.0"
        found += [Site(f"{stem}.attn.to_{end}", c, c) for end in ends]
        found += [Site(f"{stem}.proj_mlp", c, 4 * c), Site(f"{stem}.proj_out", 5 * c, c)]
    return tuple(found)


SITES: Mapping[str, tuple[Site, ...]] = {
    "SD 1.5": (*_unet(768, 1280, 1280), *_clip("text_encoder", 768)),
    "SD 2.1": (*_unet(1024, 1280, 1280), *_clip("text_encoder", 1024)),
    "SDXL": (*_unet(2048, 1280, 640), *_clip("text_encoder", 768), *_clip("text_encoder_2", 1280)),
    "SD3": (*_joint(1536, single=False), *_clip("text_encoder", 768), *_clip("text_encoder_2", 1280)),
    "Flux": (*_joint(3072, single=True), *_clip("text_encoder", 768)),
}


def pair(module: str, columns: int, rows: int, halves: tuple[str, str], rank: int = RANK) -> State:
    return {
        f"{module}.{halves[0]}": torch.ones(rank, columns),
        f"{module}.{halves[1]}": torch.ones(rows, rank),
    }


def conv(module: str, columns: int, rows: int, side: int = 3) -> State:
    return {
        f"{module}.lora_down.weight": torch.ones(RANK, columns, side, side),
        f"{module}.lora_up.weight": torch.ones(rows, RANK, 1, 1),
    }


def lokr(module: str, columns: int, rows: int) -> State:
    """LoKr with one matrix of low rank."""
    return {
        f"{module}.lokr_w1": torch.ones(4, 4),
        f"{module}.lokr_w2_a": torch.ones(rows // 4, RANK),
        f"{module}.lokr_w2_b": torch.ones(RANK, columns // 4),
        f"{module}.alpha": torch.tensor(float(RANK)),
    }


KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")


def _denoiser(family: str) -> list[Site]:
    return [site for site in SITES[family] if not site.component.startswith("text")]


def _inner(site: Site) -> str:
    inner = site.name.partition(".")[2]
    return f"text_model.{inner}" if site.component.startswith("text") else inner


def _rows_of(family: str) -> dict[str, Rows]:
    """Site → its place in kohya's form."""
    sites = sorted(SITES[family])
    return kohya_rows(sites, family_of_base(sites))


def kohya(family: str, alpha: float | None = 1.0, blocks: str = "own") -> Made:
    """kohya's own trainers; `blocks = "diffusers"` keeps diffusers' names of the denoiser."""
    state: State = {}
    one = "lora_te_" if family in ("SD 1.5", "SD 2.1") else "lora_te1_"
    prefixes = {"text_encoder": one, "text_encoder_2": "lora_te2_"}
    rows = _rows_of(family)
    for site in SITES[family]:
        own, name = rows[site.name], _inner(site).replace(".", "_")
        if site.component in prefixes or blocks == "diffusers":
            own = Rows(f"{prefixes.get(site.component, 'lora_unet_')}{name}", 0, site.out_features)
        state |= pair(own.module, site.in_features, own.total, KOHYA)
        state |= {f"{own.module}.alpha": torch.tensor(alpha)} if alpha is not None else {}
    return state, {"ss_network_module": "networks.lora"}


def dotted(family: str, prefix: str = "", halves: tuple[str, str] = PEFT, text: bool = True) -> Made:
    """diffusers' names with dots; `prefix` replaces the component of the denoiser."""
    state: State = {}
    for site in SITES[family] if text else _denoiser(family):
        head = site.component if text or not prefix else ""
        own = f"{prefix}{_inner(site)}" if prefix and not site.component.startswith("text") else (
            f"{head}.{_inner(site)}"
        )  # fmt: skip
        state |= pair(own, site.in_features, site.out_features, halves)
    return state, {}


def with_header(family: str, alpha: int) -> Made:
    """diffusers' and SimpleTuner's trainers, which keep alpha in PEFT's configuration in the header."""
    state, _ = dotted(family)
    parts = {site.component for site in SITES[family]}
    fields = {f"{part}.{key}": value for part in parts for key, value in (("r", RANK), ("lora_alpha", alpha))}
    targets = {
        f"{part}.target_modules": sorted({_end(site) for site in SITES[family] if site.component == part})
        for part in parts
    }
    return state, {"lora_adapter_metadata": json.dumps(fields | targets, sort_keys=True)}


def _end(site: Site) -> str:
    """The end of a name, as people write `target_modules`."""
    return re.split(
        r"\.(?:attn\d?|self_attn|transformer_blocks\.0|single_transformer_blocks\.0|mlp)\.", site.name
    )[-1]


def before_peft(family: str) -> Made:
    """diffusers until 0.21: attention processors."""
    state: State = {}
    for site in _denoiser(family):
        if "to_" not in site.name:
            continue
        stem, _, end = site.name.rpartition(".to_")
        end = end.removesuffix(".0")
        for half, shape in (("down", (RANK, site.in_features)), ("up", (site.out_features, RANK))):
            state[f"{stem}.processor.to_{end}_lora.{half}.weight"] = torch.ones(shape)
    return state, {}


def flat(family: str, prefix: str, alpha: float | None = 1.0, text: str = "") -> Made:
    """diffusers' names without dots, as OneTrainer writes them for transformers."""
    state: State = {}
    for site in SITES[family]:
        if site.component.startswith("text") and not text:
            continue
        head = {"text_encoder": text, "text_encoder_2": "lora_te2_"}.get(site.component, prefix)
        own = head + _inner(site).replace(".", "_")
        state |= pair(own, site.in_features, site.out_features, KOHYA)
        state |= {f"{own}.alpha": torch.tensor(alpha)} if alpha is not None else {}
    return state, {}


def original(family: str, prefix: str, halves: tuple[str, str], clip: bool = False) -> Made:
    """The original model's names with dots, as ai-toolkit and OneTrainer's ComfyUI form have them."""
    state: State = {}
    rows = _rows_of(family)
    names = _ORIGINAL[family]
    for site in _denoiser(family):
        own = rows[site.name]
        state |= pair(f"{prefix}{names[own.module]}", site.in_features, own.total, halves)
    for site in SITES[family] if clip else ():
        if site.component == "text_encoder":
            state |= pair(
                f"text_encoders.clip_l.transformer.{_inner(site)}",
                site.in_features,
                site.out_features,
                halves,
            )
    return state, {}


def _dots(family: str) -> dict[str, str]:
    """kohya's flat names of the denoiser → the original model's."""
    made: dict[str, str] = {}
    for site in _denoiser(family):
        module = _rows_of(family)[site.name].module
        name = module.removeprefix("lora_unet_")
        for old, new in _DOTS:
            name = name.replace(old, new)
        made[module] = name
    return made


_DOTS = (
    ("input_blocks_4_1_", "input_blocks.4.1."), ("middle_block_1_", "middle_block.1."),
    ("output_blocks_5_1_", "output_blocks.5.1."), ("transformer_blocks_0_", "transformer_blocks.0."),
    ("attn1_", "attn1."), ("attn2_", "attn2."), ("to_out_0", "to_out.0"), ("ff_net_0_proj", "ff.net.0.proj"),
    ("ff_net_2", "ff.net.2"), ("joint_blocks_0_", "joint_blocks.0."), ("x_block_", "x_block."),
    ("context_block_", "context_block."), ("attn_qkv", "attn.qkv"), ("attn_proj", "attn.proj"),
    ("mlp_fc", "mlp.fc"), ("double_blocks_0_", "double_blocks.0."), ("single_blocks_0_", "single_blocks.0."),
    ("mlp_0", "mlp.0"), ("mlp_2", "mlp.2"),
)  # fmt: skip
_ORIGINAL = {family: _dots(family) for family in ("SDXL", "SD3", "Flux")}


def locon(family: str) -> Made:
    """kohya with `conv_dim`: convolutions of 3×3 as well."""
    state, metadata = kohya(family)
    for name, columns in (("conv1", 320), ("conv2", 640)):
        module = f"lora_unet_down_blocks_1_resnets_0_{name}"
        state |= conv(module, columns, 640) | {f"{module}.alpha": torch.tensor(1.0)}
    return state, metadata


def dora(family: str) -> Made:
    """LyCORIS's DoRA in kohya's names."""
    state, metadata = kohya(family)
    ups = {key.removesuffix(".lora_up.weight"): len(up) for key, up in state.items() if ".lora_up" in key}
    return state | {f"{module}.dora_scale": torch.ones(rows, 1) for module, rows in ups.items()}, metadata


def loha(family: str) -> Made:
    """LyCORIS's LoHa in kohya's names."""
    state: State = {}
    for module, (columns, rows) in _modules(kohya(family)[0]).items():
        for number in "12":
            state[f"{module}.hada_w{number}_a"] = torch.ones(rows, RANK)
            state[f"{module}.hada_w{number}_b"] = torch.ones(RANK, columns)
        state[f"{module}.alpha"] = torch.tensor(1.0)
    return state, {}


def lycoris(family: str) -> Made:
    """SimpleTuner's LoKr: diffusers' names behind `lycoris_`."""
    state: State = {}
    for module, size in _modules(flat(family, "lycoris_", None)[0]).items():
        state |= lokr(module, *size)
    return state, {}


def _modules(state: State) -> dict[str, tuple[int, int]]:
    """Module → columns and rows of the layer, of a file in kohya's halves."""
    names = [key.removesuffix(".lora_down.weight") for key in state if key.endswith(".lora_down.weight")]
    return {
        name: (state[f"{name}.lora_down.weight"].shape[1], len(state[f"{name}.lora_up.weight"]))
        for name in names
    }


def with_embedding(made: Made) -> Made:
    """OneTrainer's file with a bundled embedding."""
    return made[0] | {"bundle_emb.sks.clip_l": torch.ones(2, 768)}, made[1]


def with_t5(made: Made) -> Made:
    """kohya's file that also trains T5."""
    module = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    return made[0] | pair(module, 4096, 4096, KOHYA) | {f"{module}.alpha": torch.tensor(1.0)}, made[1]


def with_modulation(made: Made) -> Made:
    """kohya's default for SD 3, which trains adaLN as well."""
    module = "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1"
    return made[0] | pair(module, 1536, 6 * 1536, KOHYA) | {f"{module}.alpha": torch.tensor(1.0)}, made[1]


def written(sites: Sequence[Site], family: str, form: Form, folder: Path) -> Made:
    """Our own writer's file."""
    factors = {
        site.name: (torch.ones(1, RANK, site.in_features), torch.ones(1, site.out_features, RANK))
        for site in sites
    }
    path = folder / "ana.safetensors"
    write_lora(path, factors, form, LoraInfo("sks", family, 512, "Ana"))
    with safe_open(path, "pt") as file:
        return load_file(path), dict(file.metadata())


def _plain(make: Callable[..., Made], *args: object, **options: object) -> Callable[[Path], Made]:
    return lambda folder: make(*args, **options)


def _ours(family: str, form: Form) -> Callable[[Path], Made]:
    return lambda folder: written(SITES[family], family, form, folder)


_OLD = ("lora.down.weight", "lora.up.weight")
FILES: Mapping[tuple[str, str], Callable[[Path], Made]] = {
    ("SD 1.5", "ours, kohya's form"): _ours("SD 1.5", "kohya"),
    ("SD 1.5", "ours, diffusers' form"): _ours("SD 1.5", "diffusers"),
    ("SD 1.5", "kohya, alpha 1 of rank 4"): _plain(kohya, "SD 1.5"),
    ("SD 1.5", "kohya, old, without alpha"): _plain(kohya, "SD 1.5", alpha=None),
    ("SD 1.5", "kohya, with 3×3 convolutions"): _plain(locon, "SD 1.5"),
    ("SD 1.5", "LyCORIS, DoRA"): _plain(dora, "SD 1.5"),
    ("SD 1.5", "LyCORIS, LoHa"): _plain(loha, "SD 1.5"),
    ("SD 1.5", "OneTrainer, with an embedding"): lambda folder: with_embedding(kohya("SD 1.5")),
    ("SD 1.5", "SimpleTuner, alpha 8 in the header"): _plain(with_header, "SD 1.5", 8),
    ("SD 1.5", "SimpleTuner, LyCORIS, LoKr"): _plain(lycoris, "SD 1.5"),
    ("SD 1.5", "diffusers before PEFT"): _plain(before_peft, "SD 1.5"),
    ("SD 1.5", "diffusers 0.22, `lora.down`"): _plain(dotted, "SD 1.5", halves=_OLD, text=False),
    ("SD 1.5", "PEFT, the denoiser alone"): _plain(dotted, "SD 1.5", "base_model.model.", text=False),
    ("SD 2.1", "ours, kohya's form"): _ours("SD 2.1", "kohya"),
    ("SD 2.1", "ours, diffusers' form"): _ours("SD 2.1", "diffusers"),
    ("SD 2.1", "kohya, alpha 1 of rank 4"): _plain(kohya, "SD 2.1"),
    ("SDXL", "ours, kohya's form"): _ours("SDXL", "kohya"),
    ("SDXL", "ours, diffusers' form"): _ours("SDXL", "diffusers"),
    ("SDXL", "kohya, alpha 1 of rank 4"): _plain(kohya, "SDXL"),
    ("SDXL", "ai-toolkit and OneTrainer"): _plain(kohya, "SDXL", blocks="diffusers"),
    ("SDXL", "OneTrainer, ComfyUI's names"): _plain(original, "SDXL", "diffusion_model.", KOHYA, clip=True),
    ("SDXL", "SimpleTuner, alpha 8 in the header"): _plain(with_header, "SDXL", 8),
    ("SDXL", "PEFT, the denoiser alone"): _plain(dotted, "SDXL", "base_model.model.", text=False),
    ("SD3", "ours, kohya's form"): _ours("SD3", "kohya"),
    ("SD3", "ours, diffusers' form"): _ours("SD3", "diffusers"),
    ("SD3", "kohya, adaLN as well"): lambda folder: with_modulation(kohya("SD3")),
    ("SD3", "kohya's names without alpha"): _plain(kohya, "SD3", alpha=None),
    ("SD3", "OneTrainer"): _plain(flat, "SD3", "lora_transformer_", text="lora_te1_"),
    ("SD3", "SimpleTuner, alpha 8 in the header"): _plain(with_header, "SD3", 8),
    ("SD3", "SimpleTuner, LyCORIS, LoKr"): _plain(lycoris, "SD3"),
    ("SD3", "PEFT, the denoiser alone"): _plain(dotted, "SD3", "base_model.model.", text=False),
    ("Flux", "ours, kohya's form"): _ours("Flux", "kohya"),
    ("Flux", "ours, diffusers' form"): _ours("Flux", "diffusers"),
    ("Flux", "kohya and musubi-tuner, alpha 1 of rank 4"): _plain(kohya, "Flux"),
    ("Flux", "kohya, T5 as well"): lambda folder: with_t5(kohya("Flux")),
    ("Flux", "ai-toolkit"): _plain(dotted, "Flux", "transformer.", text=False),
    ("Flux", "OneTrainer"): _plain(flat, "Flux", "lora_transformer_", text="lora_te1_"),
    ("Flux", "OneTrainer, ComfyUI's names"): _plain(original, "Flux", "diffusion_model.", KOHYA, clip=True),
    ("Flux", "original names with `lora_A`"): _plain(original, "Flux", "diffusion_model.", PEFT),
    ("Flux", "SimpleTuner, alpha 8 in the header"): _plain(with_header, "Flux", 8),
    ("Flux", "SimpleTuner, LyCORIS, LoKr"): _plain(lycoris, "Flux"),
    ("Flux", "PEFT, the denoiser alone"): _plain(dotted, "Flux", "base_model.model.", text=False),
}
"""(family, who writes it so) → the file."""


def write(path: Path, made: Made) -> Path:
    """Writes a file."""
    save_file({key: tensor.contiguous() for key, tensor in made[0].items()}, path, made[1] or None)
    return path


def entries(path: Path) -> dict[str, Entry]:
    """The header of a file, without its metadata."""
    return read_header(path)[0]
