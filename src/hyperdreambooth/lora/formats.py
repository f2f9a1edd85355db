"""LoRA files: what diffusers, ComfyUI, A1111 and Forge load, and reading whatever they write.

The scale is folded into `up`, one rank holds for all sites and alpha equals it: readers that lose alpha, or
that mis-scale sites of different alphas, then still get the same ΔW. Text-encoder keys always carry
`text_model.`, which old and new transformers both read. Every write is read back before the file appears.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save as to_bytes
from torch import Tensor

from hyperdreambooth.runs import InputError, load_tensors, read_json, save_tensors, whole_file
from hyperdreambooth.shapes import Factors, Site, canonical

Form = Literal["diffusers", "kohya"]

ADAPTER_METADATA = "lora_adapter_metadata"  # the header field that diffusers hands to LoraConfig, unfiltered
UNFIT_NAMES = ("checkpoint", "optimizer", "scheduler")  # diffusers' file guesser passes over these
_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
_KOHYA_READ = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_text_model_", "lora_te_", "lora_te1_text_model_", "lora_te1_"),
}
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
    r"|(?P<up>lora_B|lora_up|lora\.up|lora_linear_layer\.up))(?:\.[^.]+)?\.weight"
)


# -- writing -------------------------------------------------------------------------------------------------


def write_lora(
    path: Path,
    factors: Factors,
    form: Form,
    *,
    trigger: str,
    base_name: str,
    resolution: int,
    title: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a standard LoRA file and makes sure that it can be read back.

    Args:
        path: a `.safetensors` file.
        factors: one identity: down `(1, r, i)`, up `(1, o, r)`; smaller ranks are zero-padded to the largest.
        form: `diffusers` for `pipe.load_lora_weights`, `kohya` for ComfyUI, A1111 and Forge.
        trigger: the word that means this person in prompts.
        base_name: the base it was trained on.
        resolution: side of the pictures it was trained on, in pixels.
        title: shown by interfaces.
        dtype: number format in the file.

    Raises:
        InputError: a file name that diffusers passes over, or numbers that `dtype` cannot hold.
        ValueError: several identities, or a component without a name in `form`.
        RuntimeError: the file read back is not the adapter that was written; no file is left.
    """
    if path.suffix != ".safetensors" or any(word in path.name.lower() for word in UNFIT_NAMES):
        taboo = ", ".join(UNFIT_NAMES)
        raise InputError(f"{path}: expected a name that ends in .safetensors, without {taboo} in it")
    flat = _flatten(factors, dtype)
    tensors = _diffusers_tensors(flat) if form == "diffusers" else _kohya_tensors(flat)
    facts = {"trigger": trigger, "base": base_name, "title": title, "name": path.stem}
    metadata = _model_spec(tensors, facts, resolution)
    if form == "diffusers":
        metadata[ADAPTER_METADATA] = _peft_metadata(flat)
    else:
        metadata |= _kohya_metadata(flat, facts, resolution)
    with whole_file(path) as temporary:
        save_tensors(temporary, tensors, metadata)
        _check(temporary, flat)


def _flatten(factors: Factors, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """One identity at one rank: site → down `(r, i)`, up `(o, r)`."""
    rank = max(down.shape[1] for down, _ in factors.values())
    flat: dict[str, tuple[Tensor, Tensor]] = {}
    for site, (down, up) in sorted(factors.items()):
        if len(down) != 1:
            raise ValueError(f"a LoRA file holds one identity, not {len(down)}")
        spare = rank - down.shape[1]
        rows = torch.nn.functional.pad(down.detach()[0], (0, 0, 0, spare)).to("cpu", dtype)
        columns = torch.nn.functional.pad(up.detach()[0], (0, spare)).to("cpu", dtype)
        if not (rows.isfinite().all() and columns.isfinite().all()):
            raise InputError(
                f"{site}: NaN or infinite numbers in {dtype}; training diverged, or needs float32"
            )
        flat[site] = rows, columns
    return flat


def _diffusers_tensors(flat: Factors) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site, (down, up) in flat.items():
        part, _, inner = site.partition(".")
        module = f"{part}.text_model.{inner}" if part.startswith("text_encoder") else site
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    return tensors


def _kohya_tensors(flat: Factors) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site, (down, up) in flat.items():
        part, _, inner = site.partition(".")
        if part not in _KOHYA:
            raise ValueError(f"the kohya form has no name for {part}; use the diffusers form")
        module = _KOHYA[part] + inner.replace(".", "_")
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(float(len(down)), dtype=down.dtype)
    return tensors


def _rank(flat: Factors) -> int:
    return len(next(iter(flat.values()))[0])


def _peft_metadata(flat: Factors) -> str:
    """Only fields that every PEFT knows: an unknown one is a TypeError in the reader."""
    told: dict[str, Any] = {}
    for part in sorted({site.partition(".")[0] for site in flat}):
        inside = [site.partition(".")[2] for site in flat if site.startswith(f"{part}.")]
        told |= {f"{part}.r": _rank(flat), f"{part}.lora_alpha": _rank(flat)}
        told[f"{part}.target_modules"] = inside
    return json.dumps(told, sort_keys=True)


def _model_spec(tensors: Mapping[str, Tensor], facts: Mapping[str, str], resolution: int) -> dict[str, str]:
    """ModelSpec 1.0.1; its hash covers everything behind the header."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": facts["title"],
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.trigger_phrase": facts["trigger"],
        "modelspec.usage_hint": f"write {facts['trigger']} where the person is meant; base: {facts['base']}",
        "modelspec.hash_sha256": f"0x{_hash(tensors)}",
    }


def _kohya_metadata(flat: Factors, facts: Mapping[str, str], resolution: int) -> dict[str, str]:
    """What A1111 and Forge show; strings only."""
    return {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": facts["base"],
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(_rank(flat)),
        "ss_network_alpha": str(float(_rank(flat))),
        "ss_network_args": "{}",
        "ss_output_name": facts["name"],
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_tag_frequency": json.dumps({"person": {facts["trigger"]: 1}}),
    }


def _hash(tensors: Mapping[str, Tensor]) -> str:
    blob = to_bytes({key: tensor.contiguous().clone() for key, tensor in tensors.items()})
    return hashlib.sha256(blob[8 + int.from_bytes(blob[:8], "little") :]).hexdigest()


def _check(path: Path, flat: Factors) -> None:
    """Reads the file as anybody would, and compares ΔW at every site."""
    back, _ = read_lora(path, [Site(site, down.shape[1], len(up)) for site, (down, up) in flat.items()])
    if back.keys() != flat.keys():
        raise RuntimeError(f"{path}: wrote {len(flat)} sites, read back {len(back)}")
    for site, (down, up) in flat.items():
        wanted, got = up.float() @ down.float(), back[site][1][0] @ back[site][0][0]
        error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not error < 1e-5:
            raise RuntimeError(f"{path}: {site} came back with a relative error of {error:.1e}")


# -- reading -------------------------------------------------------------------------------------------------


def read_lora(path: Path, sites: Sequence[Site]) -> tuple[Factors, dict[str, str]]:
    """Reads a LoRA in diffusers', PEFT's or kohya's form, alpha folded into `up`.

    Args:
        path: a safetensors file; for PEFT's `adapter_model`, `adapter_config.json` beside it gives alpha.
        sites: the base's sites; the file may adapt fewer, never others.

    Returns:
        Float32 factors with n = 1 and one rank (smaller ones are zero-padded), and the file's metadata.

    Raises:
        InputError: damage, keys that fit no site, halves without their other half, wrong shapes, NaN.
    """
    tensors, metadata = load_tensors(path)
    pairs, alphas = _sort(path, tensors, _lookup(sites))
    factors: Factors = {}
    config = _config(path, metadata)
    for site in (s for s in sites if s.name in pairs):
        down, up = _pair(path, site, pairs[site.name])
        alpha = alphas.get(site.name)
        scale = _scale(path, config, site.name, len(down)) if alpha is None else alpha / len(down)
        factors[site.name] = down, up * scale
    rank = max(len(down) for down, _ in factors.values())
    pad = torch.nn.functional.pad
    even = {
        name: (pad(down, (0, 0, 0, rank - len(down)))[None], pad(up, (0, rank - len(down)))[None])
        for name, (down, up) in factors.items()
    }
    return even, metadata


def _lookup(sites: Sequence[Site]) -> dict[str, str]:
    """Every spelling of a module in a file → site name; dotted ones are looked up in their canonical form."""
    found = {site.name: site.name for site in sites}
    for site in sites:
        part, _, inner = site.name.partition(".")
        found.setdefault(inner, site.name)  # PEFT's own files name no component
        for prefix in _KOHYA_READ.get(part, ()):
            found[prefix + inner.replace(".", "_")] = site.name
    return found


def _site_of(module: str, lookup: Mapping[str, str]) -> str | None:
    module = module.removeprefix("base_model.model.")
    part, _, inner = module.partition(".")
    return lookup.get(canonical(part, inner)) or lookup.get(canonical("", module).removeprefix("."))


def _sort(
    path: Path, tensors: Mapping[str, Tensor], lookup: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Site → its halves `down` and `up`, and site → alpha; all keys must belong."""
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        site = _site_of(match["module"] if match else key.removesuffix(".alpha"), lookup)
        if site is None or not (match or (key.endswith(".alpha") and tensor.numel() == 1)):
            unknown.append(key)
        elif match is None:
            alphas[site] = float(tensor)
        else:
            half = "down" if match["down"] else "up"
            if half in pairs.setdefault(site, {}):
                raise InputError(f"{path}: two {half} matrices for {site}; expected one adapter a file")
            pairs[site][half] = tensor
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        listed = ", ".join(sorted(unknown)[:5])
        raise InputError(f"{path}: keys that fit no site of this base: {listed}{more}")
    if not pairs:
        raise InputError(f"{path}: expected a LoRA (lora_A and lora_B, or lora_down and lora_up), found none")
    return pairs, alphas


def _pair(path: Path, site: Site, halves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Down `(r, i)` and up `(o, r)` in float32."""
    if len(halves) != 2:
        raise InputError(f"{path}: {site.name} has only its {next(iter(halves))} matrix; get the file again")
    down, up = halves["down"].float(), halves["up"].float()
    rank = down.shape[0] if down.ndim == 2 else 0
    if rank == 0 or down.shape != (rank, site.in_features) or up.shape != (site.out_features, rank):
        fits = f"down (r, {site.in_features}) and up ({site.out_features}, r)"
        got = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise InputError(f"{path}: {site.name}: expected {fits}, got {got}; it was made for another base")
    return down, up


def _config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration of the file: diffusers keeps it in the header, PEFT in a file beside it."""
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():
        return read_json(beside)
    try:
        config = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except ValueError as error:
        raise InputError(f"{path}: header field {ADAPTER_METADATA} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: header field {ADAPTER_METADATA}: expected an object, got {config!r}")
    return config


def _scale(path: Path, config: Mapping[str, Any], site: str, rank: int) -> float:
    """What PEFT multiplies a site's ΔW by; without a configuration, 1."""
    part, _, inner = site.partition(".")
    ours = {key.removeprefix(f"{part}."): value for key, value in config.items()}
    patterns: dict[str, Any] = ours.get("alpha_pattern") or {}
    try:
        alpha = float(patterns.get(get_pattern_key(list(patterns), inner), ours.get("lora_alpha", rank)))
    except (TypeError, ValueError, AttributeError, re.error):
        raise InputError(
            f"{path}: lora_alpha or alpha_pattern of {part} are not numbers; mend the header"
        ) from None
    return alpha / (rank**0.5 if ours.get("use_rslora") else rank)
