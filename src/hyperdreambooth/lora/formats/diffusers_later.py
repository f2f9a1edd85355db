"""What diffusers 0.42 loads of files of Z-Image, FLUX.2, Qwen-Image and Krea 2: each has its own reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hyperdreambooth.lora.formats.layers import Layer, LoraKeys, Reads

Loads = tuple[list[Layer], str]
"""The layers that diffusers loads, or why it refuses the file."""

_NO_TARGET = "it finds no layer such as"
_ORIGINAL: Sequence[str] = ("diffusion_model.", "base_model.model.")  # before the original model's names
_ZIMAGE = ("zimage split", "zimage", "sd3 edge")
_FLUX2 = ("joint", "flux2 joint", "joint edge", "flux2 joint edge", "context")
_FLUX2_OWN = ("flux", "flux edge", "flux2 edge", "joint", "flux2 joint")
_QWEN = ("joint", "qwen", "joint edge", "flux edge")
_KREA2 = ("joint", "krea2 joint", "flux edge", "sd3 edge")


def pairs(layers: Sequence[Layer], reads: Reads) -> list[Layer]:
    """Returns the layers with two matrices and a name that is read."""
    return [layer for layer in layers if layer.down and layer.naming in reads.get(layer.prefix, ())]


def unless(odd: str, loaded: list[Layer], refusal: str = "it cannot rename") -> Loads:
    """Returns the layers, or a refusal where something odd was found: a module or a key."""
    return ([], f"{refusal} {odd}") if odd else (loaded, "")


def unread(layers: Sequence[Layer], loaded: Sequence[Layer]) -> str:
    """Returns the first module that is not loaded; empty if all are."""
    taken = {layer.module for layer in loaded}
    return next((layer.module for layer in layers if layer.module not in taken), "")


def with_a_target(file: LoraKeys, loaded: list[Layer], reads: Reads) -> Loads:
    """Refuses a file that names a part of the pipeline, but no layer of that part."""
    found = {layer.prefix for layer in loaded}
    lost = (layer.module for layer in file.layers if layer.prefix in reads.keys() - found)
    return unless(next(lost, ""), loaded, _NO_TARGET)


def _prefixes(file: LoraKeys) -> set[str]:
    return {layer.prefix for layer in file.layers}


def _has_alphas(file: LoraKeys) -> bool:
    return any(layer.alpha is not None for layer in file.layers)


def _is_renamed(file: LoraKeys) -> bool:
    """Whether Z-Image's and Qwen-Image's readers take a file for one of another form than diffusers'."""
    foreign = _prefixes(file) & {"lora_unet_", "diffusion_model."}
    return bool(foreign) or _has_alphas(file) or any("default." in key for key in file.keys)


def _own(file: LoraKeys, namings: Sequence[str], kinds: Sequence[str] = ("lora", "dora")) -> Loads:
    """Reads diffusers' own form, every key of which has to name its kind."""
    if odd := next((key for key in file.keys if not any(kind in key for kind in (*kinds, "lora"))), ""):
        return [], f"it wants `lora` in every key, and finds {odd}"
    found = [layer for layer in file.layers if layer.prefix == "transformer." and layer.naming in namings]
    return with_a_target(file, [layer for layer in found if layer.kind in kinds], {"transformer.": namings})


def _if_any(file: LoraKeys, loaded: list[Layer]) -> Loads:
    """Refuses a file of which no layer is read."""
    return unless("" if loaded else file.layers[0].module, loaded, _NO_TARGET)


def _renamed(file: LoraKeys, reads: Reads) -> Loads:
    """Reads names that it changes first: those that it does not know, and other kinds, make it stop."""
    left = next((layer.module for layer in file.layers if not layer.down), "") or next(iter(file.others), "")
    if left:
        return [], f"it cannot rename {left}"
    return _if_any(file, pairs(file.layers, reads))


def _zimage(file: LoraKeys) -> Loads:
    lokr = any(layer.kind == "lokr" for layer in file.layers)
    converted = _is_renamed(file)
    if lokr and converted:
        if other := next((layer.module for layer in file.layers if layer.kind != "lokr"), ""):
            return [], f"it takes nothing else beside LoKr, and finds {other}"
        known = [layer for layer in file.layers if layer.naming in _ZIMAGE]
        return _if_any(file, [layer for layer in known if layer.prefix == "diffusion_model."])
    if not converted:
        return _own(file, _ZIMAGE, ("lora", "dora", "lokr"))
    # it splits a fused q, k, v of kohya's form only
    fused = ("zimage fused",) if all("lora_down" in layer.down for layer in file.layers) else ()
    reads = {"lora_unet_": (*_ZIMAGE, *fused), "diffusion_model.": _ZIMAGE, "": _ZIMAGE}
    return _renamed(file, reads)


def _flux2(file: LoraKeys) -> Loads:
    prefixes = _prefixes(file)
    if any("lora_down" in layer.down for layer in file.layers):  # it leaves out what it does not know
        return pairs(file.layers, {"lora_unet_": ("flux", "flux edge")}), ""
    original = bool(prefixes & set(_ORIGINAL))
    if any(layer.kind == "lokr" for layer in file.layers):
        if "transformer." in prefixes:
            return _own(file, _FLUX2, ("lora", "dora", "lokr"))
        reads: Reads = {"diffusion_model.": ("flux", "flux edge", "flux2 edge")} if original else {"": _FLUX2}
        reads = {"lycoris_": ("joint", "flux2 joint")} if "lycoris_" in prefixes else reads
        known = [layer for layer in file.layers if layer.naming in reads.get(layer.prefix, ())]
        found = [layer for layer in known if layer.kind == "lokr"]
        return unless(unread(file.layers, found), found)
    if not original:
        return _own(file, _FLUX2)
    if _has_alphas(file):
        return [], "it stops at `.alpha` tensors beside the original names"
    loaded = pairs(file.layers, dict.fromkeys(_ORIGINAL, _FLUX2_OWN))
    return unless(unread(file.layers, loaded), loaded)


def _qwen(file: LoraKeys) -> Loads:
    if not _is_renamed(file):
        return _own(file, _QWEN)
    return _renamed(file, dict.fromkeys(("lora_unet_", "diffusion_model.", ""), _QWEN))


def _krea2(file: LoraKeys) -> Loads:
    if not _prefixes(file) & set(_ORIGINAL):
        return _own(file, _KREA2)
    if _has_alphas(file):
        return [], "it stops at `.alpha` tensors beside the original names"
    known = pairs(file.layers, dict.fromkeys(_ORIGINAL, ("krea2",)))
    loaded = [layer for layer in known if "lora_A" in layer.down]
    return unless(unread(file.layers, loaded), loaded)


LATER: Mapping[str, Callable[[LoraKeys], Loads]] = {
    "Z-Image": _zimage, "FLUX.2": _flux2, "Qwen-Image": _qwen, "Krea 2": _krea2,
}  # fmt: skip
"""Family → what diffusers loads of a file of it."""
