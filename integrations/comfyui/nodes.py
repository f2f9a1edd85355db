"""The nodes: schemas, and the glue between ComfyUI's objects and `checkpoint.py` and `people.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

from hyperdreambooth import Base, InputError, Predictor, load_hypernet

from . import people
from .checkpoint import ELSEWHERE, base_of

CATEGORY = "HyperDreamBooth"
FOLDER = Path(folder_paths.models_dir) / "hyperdreambooth"
"""Hypernetworks, a folder each, and YuNet's file if it is not to be downloaded."""
ROOM = 3.5 * 2**30  # bytes that a training step of four samples needs beside the weights, at 512 pixels
Hypernet = io.Custom("HDB_HYPERNET")


def hypernets() -> list[str]:
    """Returns the names of the hypernetworks in ComfyUI's models folder."""
    return sorted(file.parent.name for file in FOLDER.glob("*/config.json"))


class HypernetLoader(io.ComfyNode):
    """Loads a hypernetwork once for all photos."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HdbHypernetLoader",
            display_name="Hypernetwork Loader",
            category=CATEGORY,
            description="Loads a hypernetwork: a folder that `hdb train` wrote.",
            inputs=[
                io.Combo.Input("name", options=hypernets(), tooltip="A folder in models/hyperdreambooth.")
            ],
            outputs=[Hypernet.Output("hypernet", display_name="hypernet")],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        with torch.inference_mode(False):
            return io.NodeOutput(load_hypernet(FOLDER / name, comfy.model_management.get_torch_device()))


class PersonLora(io.ComfyNode):
    """A photo of a person becomes a LoRA. ComfyUI skips the node as long as its inputs stay the same."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HdbPersonLora",
            display_name="Photo → Person LoRA",
            category=CATEGORY,
            description="Trains the LoRA of a person on the checkpoint that is loaded.",
            inputs=[
                io.Model.Input("model", tooltip="As the checkpoint loader gives it, without any LoRA."),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                io.Image.Input("photo", tooltip="One photo of the person, or a batch of several."),
                Hypernet.Input("hypernet", optional=True, tooltip="Without it, the training starts anew."),
                io.Int.Input(
                    "steps", default=40, min=0, max=10_000,
                    tooltip="25 to 40 with a hypernetwork, 0 for its prediction alone; 400 without.",
                ),
                io.Int.Input("rank", default=4, min=1, max=128),
                io.Int.Input(
                    "resolution", default=512, min=32, max=2048, step=8,
                    tooltip="Pixels a side at which the photo is trained.",
                ),
                io.Boolean.Input(
                    "find_face", default=True,
                    tooltip="Finds the face, turns it upright and crops it. Off: takes the centre square.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=False),
            ],
            outputs=[
                io.LoraModel.Output("lora", display_name="lora"),
                io.String.Output("trigger", display_name="trigger", tooltip="The person's word in prompts."),
                io.Image.Output("crop", display_name="crop", tooltip="What was trained on."),
                io.Float.Output(
                    "likeness", display_name="likeness",
                    tooltip="0 is a stranger, 1 the person; NaN without a face encoder.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, clip: Any, vae: Any, photo: torch.Tensor, steps: int, rank: int, resolution: int,
        find_face: bool, seed: int, hypernet: Predictor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        bar = comfy.utils.ProgressBar(max(steps, 1))

        def stepped(step: int, loss: float) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(step)

        with torch.inference_mode(False):  # what is made in that mode can take no part in a training
            base = loaded_base(model, clip, vae, resolution)
            if hypernet is not None:
                base = base.with_words(hypernet.info.trigger, hypernet.info.class_word)
            photos = people.crops(people.pictures(photo), base.resolution, find_face, FOLDER)
            adapter = people.person(base, hypernet, photos, steps, rank, seed, stepped)
            likeness = people.likeness(base, adapter, photos, seed)
            lora = adapter.state_dict(form="kohya")
            return io.NodeOutput(lora, adapter.trigger, people.image(photos), likeness)


class PersonMix(io.ComfyNode):
    """Somebody between people."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            one
            for k in range(1, 5)
            for one in (
                io.LoraModel.Input(f"person_{k}", optional=k > 2),
                io.Float.Input(f"weight_{k}", default=0.5, min=-10, max=10, step=0.05, optional=k > 2),
            )
        ]
        return io.Schema(
            node_id="HdbPersonMix",
            display_name="Person Mix",
            category=CATEGORY,
            description="Adds up to four people, each with a weight. Two at 0.5 give somebody in between.",
            inputs=inputs,
            outputs=[io.LoraModel.Output("lora", display_name="lora")],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        numbers = [k for k in range(1, 5) if f"person_{k}" in given]
        return io.NodeOutput(people.mix([(given[f"person_{k}"], given[f"weight_{k}"]) for k in numbers]))


class WearPerson(io.ComfyNode):
    """ComfyUI's own Load LoRA Model leaves the text encoder out, where a part of the person is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HdbWearPerson",
            display_name="Wear Person",
            category=CATEGORY,
            description="Puts a person on the model and on CLIP, as Load LoRA does with a file.",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.LoraModel.Input("lora"),
                io.Float.Input("strength", default=1.0, min=-10, max=10, step=0.05),
            ],
            outputs=[
                io.Model.Output("worn_model", display_name="model"),
                io.Clip.Output("worn_clip", display_name="clip"),
            ],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, lora: people.LoraModel, strength: float) -> io.NodeOutput:
        return io.NodeOutput(*comfy.sd.load_lora_for_models(model, clip, lora, strength, strength))


def loaded_base(model: Any, clip: Any, vae: Any, resolution: int) -> Base:
    """Has ComfyUI load the checkpoint whole, with room for a training step, and makes a base over it."""
    name = f"{type(model.model).__name__} in ComfyUI"
    text = getattr(clip.cond_stage_model, "clip_l", None)
    if text is None or not hasattr(model.model, "diffusion_model"):
        raise InputError(f"{name}: expected Stable Diffusion 1.x, got another architecture; {ELSEWHERE}")
    if model.patches or clip.patcher.patches:
        raise InputError("model: expected a checkpoint without LoRAs, got one with; put them after this node")
    manager = comfy.model_management
    room = ROOM * (resolution / 512) ** 2
    manager.load_models_gpu([model, clip.patcher, vae.patcher], room, force_full_load=True)
    kind = model.model.model_type.name
    return base_of(
        model.model.diffusion_model.state_dict(),
        model.model.model_config.unet_config,
        text.transformer.text_model.state_dict(),
        clip.tokenizer.clip_l.tokenizer,
        vae.first_stage_model.state_dict(),
        name,
        resolution=resolution,
        prediction="v_prediction" if kind == "V_PREDICTION" else "epsilon",
    )


class HyperDreamBooth(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [HypernetLoader, PersonLora, PersonMix, WearPerson]


async def comfy_entrypoint() -> HyperDreamBooth:
    return HyperDreamBooth()
