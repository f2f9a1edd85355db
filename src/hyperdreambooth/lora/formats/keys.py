"""The keys of a LoRA file, sorted into the layers that it changes and the parts that each change is made of.

LoRA, LoHa and LoKr, their convolutions, whole matrices (`diff`) and the magnitudes of DoRA are read. Other
kinds change what is no weight of a layer, or add no matrix to it: they are refused by their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hyperdreambooth.files import InputError
from hyperdreambooth.lora.formats.container import FLOATS, Entry, read_header
from hyperdreambooth.lora.formats.names import plain

Kind = Literal["LoRA", "LoHa", "LoKr", "whole matrix"]

MAX_KERNEL = 3  # of the convolutions of every base

_HALVES = {
    "lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up",
    "lora_linear_layer.down": "lora_linear_layer.up",
}  # fmt: skip
"""How tools call the matrix that is multiplied first → what they call the other one."""
_KEY = re.compile(
    r"(?P<module>.+?)(?:\.(?:"
    rf"(?P<down>(?:{'|'.join(map(re.escape, _HALVES))})(?:\.[^.]+)?\.weight)"
    rf"|(?P<up>(?:{'|'.join(map(re.escape, _HALVES.values()))})(?:\.[^.]+)?\.weight)"
    r"|(?P<mid>lora_mid\.weight)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.[^.]+){0,2})"
    r"|(?P<own>alpha|dora_scale|diff|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12]|w[12]_[ab]|t2))"
    # what other tools load, and we do not
    r"|(?:hada|lokr)_[wt][12](?:_[ab])?|lora_[AB]\.bias|diff_b|[wb]_norm)"
    r"|_lora\.(?:down|up)\.weight)"  # diffusers before PEFT
)
_OLD = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")  # diffusers before PEFT
_EMBEDDING = re.compile(r"bundle_emb\.([^.]+)\.")  # OneTrainer's vectors of new words, beside a LoRA
_REFUSED = {
    r"(^|[._])b?oft_|\.oft_R": "OFT (rotations of weights)",
    r"\.[abc][12]\.weight$": "GLoRA",
    r"\.on_input$": "IA³",
    r"\.(w_norm|b_norm)$": "changes of normalisation layers",
    r"\.(diff_b|bias)$": "changes of biases",
    r"\.set_weight$": "weights that replace those of the base",
    r"\.wd_for_diff$": "DoRA over the change alone",
    r"lora_embedding_|emb_params|string_to_param|^clip_[lg]$": "the embedding of a word",
    r"modules_to_save": "layers that were trained whole (PEFT's modules_to_save)",
}
"""How keys of other kinds look, and what the user is to read of them."""
# the matrices of each kind: of every set, at least one
_REQUIRED: tuple[tuple[Kind, tuple[set[str], ...]], ...] = (
    ("LoRA", ({"down"}, {"up"})),
    ("LoHa", ({"hada_w1_a"}, {"hada_w1_b"}, {"hada_w2_a"}, {"hada_w2_b"})),
    ("LoKr", ({"lokr_w1", "lokr_w1_a"}, {"lokr_w2", "lokr_w2_a"})),
    ("whole matrix", ({"diff"},)),
)


_ALWAYS = {"alpha", "dora_scale", "magnitude"}
_MORE: dict[Kind, set[str]] = {
    "LoRA": {"mid"}, "LoHa": {"hada_t1", "hada_t2"}, "LoKr": {"lokr_w1_b", "lokr_w2_b", "lokr_t2"},
    "whole matrix": set(),
}  # fmt: skip
"""The parts that a kind may have besides those that it must have."""
_TOGETHER = (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))  # both or none
_EITHER = (("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a"))  # not both


@dataclass
class Layer:
    """One changed layer of a file: its name as the file spells it, and the keys of the change's parts."""

    module: str
    parts: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def kind(self) -> Kind:
        """What the parts make together; LoRA if they make nothing whole."""
        for kind, needed in _REQUIRED:
            if any(one & self.parts.keys() for one in needed):
                return kind
        return "LoRA"

    @property
    def dora(self) -> bool:
        """Whether magnitudes belong to it, so that ΔW depends on the weight of the base."""
        return "dora_scale" in self.parts or "magnitude" in self.parts


@dataclass
class LoraFile:
    """A LoRA file whose tensors have not been read yet: layers by name, without wrappers → their keys."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    modules: dict[str, Layer] = field(default_factory=dict[str, Layer])
    left_out: dict[str, None] = field(default_factory=dict[str, None])

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """The shape of every part of a layer."""
        return {part: self.entries[key].shape for part, key in layer.parts.items()}


def open_lora(path: Path) -> LoraFile:
    """Reads the header of a LoRA file and sorts its keys into layers.

    Raises:
        InputError: keys that no LoRA has, a kind that cannot be read, or half of a layer.
    """
    file = LoraFile(path, *read_header(path))
    unknown = [key for key, entry in file.entries.items() if not _sort(file, key, entry)]
    if unknown:
        raise InputError(f"{path}: {_what(unknown)}: {some(unknown)}")
    if not any(layer.parts.keys() - {"alpha"} for layer in file.modules.values()):
        raise InputError(f"{path}: expected a LoRA (lora_A and lora_B, or lora_down and lora_up), found none")
    for name, layer in file.modules.items():
        _check_parts(file, name, layer)
    return file


def split_key(key: str) -> tuple[str, str, str] | None:
    """Splits a key into its module, the tail behind it, and the part that the tail means.

    The part is `down`, `up`, `mid`, `magnitude` or LyCORIS's own word, whoever spelled it; empty where other
    tools load it and we do not. Keys that belong to no layer give None.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    part = next((name for name in ("down", "up", "mid", "magnitude") if match[name]), match["own"] or "")
    return match["module"], key[match.end("module") :].removeprefix("."), part


def up_of(tail: str) -> str:
    """Returns the tail of the matrix that belongs to a down matrix; empty for any other tail."""
    half = next((half for half in _HALVES if tail.removeprefix("_").startswith(half)), "")
    return tail.replace(half, _HALVES[half], 1) if half and tail.endswith(".weight") else ""


def some(keys: Sequence[str]) -> str:
    """The first five names of many, as messages show them."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(key[:120] for key in sorted(keys)[:5]) + more


def _what(unknown: Sequence[str]) -> str:
    """Names the kind of the first keys whose kind is known, and what to do."""
    for pattern, kind in _REFUSED.items():
        if any(re.search(pattern, key) for key in unknown):
            return f"holds {kind}, which cannot be worn; merge it into the base with the tool that made it"
    return "not keys of a LoRA in a supported form; hdb inspect says which tools read the file"


def _sort(file: LoraFile, key: str, entry: Entry) -> bool:
    """Records a key under its layer; returns False if no LoRA has such a key."""
    if embedding := _EMBEDDING.match(key):
        file.left_out[f"the embedding of {embedding[1][:60]!r}"] = None
        return True
    renamed = _OLD.sub(r".to_\1.lora.\2.weight", key).replace(".to_out.lora.", ".to_out.0.lora.")
    module, _, part = split_key(renamed) or ("", "", "")
    if not part:
        return False
    if part == "alpha" and entry.shape not in ((), (1,), (1, 1)):
        return False
    if part != "alpha" and entry.dtype not in FLOATS:
        wanted = f"expected one of {', '.join(FLOATS)}; convert the file"
        raise InputError(f"{file.path}: tensor {key[:80]!r} has number format {entry.dtype!r}, {wanted}")
    layer = file.modules.setdefault(plain(module), Layer(module))
    if part in layer.parts:
        what = f"two {part} matrices for {module[:200]}"
        raise InputError(f"{file.path}: {what}; expected one adapter per file")
    layer.parts[part] = key
    return True


def _check_parts(file: LoraFile, name: str, layer: Layer) -> None:
    """Refuses a layer with some of its matrices only, and a LoRA whose two matrices do not fit together."""
    needed = dict(_REQUIRED)[layer.kind]
    if missing := [min(one) for one in needed if not one & layer.parts.keys()]:
        has = " and ".join(sorted(layer.parts.keys() - {"alpha"}) or ["alpha"])
        lacks = f"{name[:200]} has only its {has} matrix, {', '.join(missing)} is missing"
        raise InputError(f"{file.path}: {lacks}; get the file again")
    parts, known = layer.parts.keys(), set[str]().union(*needed) | _MORE[layer.kind] | _ALWAYS
    torn = any(len({one, other} & parts) == 1 for one, other in _TOGETHER)
    twice = any({one, other} <= parts for one, other in _EITHER)
    if (odd := sorted(parts - known)) or torn or twice:
        what = f"has {', '.join(odd)} besides a {layer.kind}" if odd else f"is no whole {layer.kind}"
        raise InputError(f"{file.path}: {name[:200]} {what}: {', '.join(sorted(parts))}; get the file again")
    for part, shape in file.shapes(layer).items():
        if len(shape) == 4 and (shape[2] != shape[3] or shape[2] > MAX_KERNEL) and part not in _ALWAYS:
            kernel = f"expected a kernel of at most {MAX_KERNEL}×{MAX_KERNEL}, got {shape[2]}×{shape[3]}"
            raise InputError(f"{file.path}: {name[:200]}: {kernel}; it was made for another base")
    if layer.kind == "LoRA":
        _check_halves(file, name, file.shapes(layer))


def _check_halves(file: LoraFile, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    down, up = shapes["down"], shapes["up"]
    flat = len(down) in (2, 4) and len(up) in (2, 4) and set(up[2:]) <= {1}
    if not flat or not 0 < down[0] == up[1]:
        wanted = "expected down (r, i) and up (o, r)"
        raise InputError(f"{file.path}: {name[:200]}: {wanted}, got {down} and {up}; get the file again")
