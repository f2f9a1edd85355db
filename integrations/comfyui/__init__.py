"""HyperDreamBooth in ComfyUI: a photo of a person becomes a LoRA in the workflow itself."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
