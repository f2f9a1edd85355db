"""Run by ComfyUI's own Python: what the nodes make of a checkpoint, measured beside ComfyUI itself.

    python in_comfyui.py COMFYUI CHECKPOINT MODELS NAME SIDE

It prints one JSON object. Everything happens in inference mode, as in ComfyUI's server.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

comfyui, checkpoint, models, name, side = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from hyperdreambooth import load_adapter  # noqa: E402

folder_paths.models_dir = models
NODE = Path(__file__).parents[2] / "integrations" / "comfyui" / "__init__.py"
spec = importlib.util.spec_from_file_location("hdb_node", NODE, submodule_search_locations=[str(NODE.parent)])
assert spec is not None and spec.loader is not None
package = importlib.util.module_from_spec(spec)
sys.modules["hdb_node"] = package
spec.loader.exec_module(package)
nodes: Any = sys.modules["hdb_node.nodes"]


def result(node: Any, **given: Any) -> tuple[Any, ...]:
    return node.execute(**given).result


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def sharing(base: Any, model: Any, clip: Any, vae: Any) -> dict[str, list[int]]:
    """Returns network → bytes of our parameters that are ComfyUI's, and bytes that are our own."""
    theirs = {
        place(tensor)
        for network in (model.model.diffusion_model, clip.cond_stage_model, vae.first_stage_model)
        for tensor in network.state_dict().values()
    }
    found: dict[str, list[int]] = {}
    for part in ("unet", "text_encoder", "vae"):
        tensors = list(getattr(base.pipe, part).parameters())
        shared = sum(one.nbytes for one in tensors if place(one) in theirs)
        found[part] = [shared, sum(one.nbytes for one in tensors) - shared]
    return found


def same_output(base: Any, model: Any) -> float:
    """Returns how far our U-Net's answer is from ComfyUI's, relative to its size."""
    torch.manual_seed(0)
    noisy, when, text = torch.randn(1, 4, 8, 8), torch.tensor([321.0]), torch.randn(1, 77, 768)
    ours = base.pipe.unet(noisy, when, encoder_hidden_states=text).sample
    theirs = model.model.diffusion_model(noisy, when, context=text)
    return float((ours - theirs).norm() / theirs.norm())


def patched(patcher: Any) -> dict[str, torch.Tensor]:
    """Returns every weight that ComfyUI's patches change, as it computes it."""
    made: dict[str, torch.Tensor] = {}
    for key, patches in patcher.patches.items():
        weight = comfy.utils.get_attr(patcher.model, key).float()
        made[key] = comfy.lora.calculate_weight(patches, weight.clone(), key) - weight
    return made


def errors(base: Any, lora: dict[str, torch.Tensor], model: Any, clip: Any) -> dict[str, Any]:
    """Compares each weight that ComfyUI changes with our ΔW at the site of the same weight.

    A weight of the U-Net is known by its memory, which our site shares, and not by its name.
    """
    worn_model, worn_clip = result(nodes.WearPerson, model=model, clip=clip, lora=lora, strength=1.0)
    found = {**patched(worn_model), **patched(worn_clip.patcher)}
    places = {place(comfy.utils.get_attr(model.model, key)): key for key in worn_model.patches}
    worst, adapter = 0.0, read(base, lora)
    for site, (down, up) in adapter.factors.items():
        part, _, path = site.partition(".")
        key = f"clip_l.transformer.text_model.{path.removeprefix('text_model.')}.weight"
        if part == "unet":
            key = places[place(base.pipe.unet.get_submodule(path).weight)]
        change = (up @ down)[0]
        worst = max(worst, float((found.pop(key) - change).norm() / change.norm()))
    return {"sites": len(adapter.factors), "others": sorted(found), "worst": worst}


def read(base: Any, lora: dict[str, torch.Tensor]) -> Any:
    """Reads a LORA_MODEL by our own reader, from a file as ComfyUI's Save LoRA writes it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "person.safetensors"
        save_file(lora, file)
        return load_adapter(file, base)


def interrupted(given: dict[str, Any]) -> list[int]:
    """Interrupts a training of 1,000 steps at its third, as the button does, and returns the steps seen."""
    seen: list[int] = []

    def hook(value: int, total: int, preview: Any, node_id: Any = None) -> None:
        seen.append(value)
        if value == 3:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        result(nodes.PersonLora, **given, steps=1000)
    except comfy.model_management.InterruptProcessingException:
        return seen
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    raise AssertionError("was not interrupted")


with torch.inference_mode():
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(checkpoint)
    (hypernet,) = result(nodes.HypernetLoader, name=name)
    photo = torch.rand(1, 96, 80, 3, generator=torch.Generator().manual_seed(0))
    given = {"model": model, "clip": clip, "vae": vae, "photo": photo, "hypernet": hypernet}
    given |= {"rank": 2, "resolution": int(side), "find_face": False, "seed": 0}
    prediction = result(nodes.PersonLora, **given, steps=0)
    report: dict[str, Any] = {"trigger": prediction[1], "crop": list(prediction[2].shape)}
    report["interrupted"] = interrupted(given)
    tuned = result(nodes.PersonLora, **given, steps=2)
    with torch.inference_mode(False), torch.no_grad():
        base = nodes.loaded_base(model, clip, vae, int(side))
        report["fingerprint"], report["base_sites"] = base.fingerprint, len(base.sites)
        report["sharing"] = sharing(base, model, clip, vae)
        report["unet"] = same_output(base, model)
        report["prediction"] = errors(base, prediction[0], model, clip)
        report["finetuned"] = errors(base, tuned[0], model, clip)
print(json.dumps(report))
