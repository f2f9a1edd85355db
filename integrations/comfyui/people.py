"""Photos in, LoRAs out: what the nodes do, in the types of ComfyUI. Nothing of ComfyUI is imported here.

An IMAGE is `(b, h, w, 3)` in [0, 1]. A LORA_MODEL is a dict of tensors under the names of a LoRA file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hyperdreambooth import (
    Adapter,
    Base,
    DreamboothConfig,
    InputError,
    Personalizer,
    Predictor,
    dreambooth,
    generate_images,
)
from hyperdreambooth.evaluate.base_scorers import load_base_scorers
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.crop import crop_face, main_faces
from hyperdreambooth.faces.detect import FILE, Face, check_opencv, fetch_yunet, yunet
from hyperdreambooth.lora.relax import add_up, scaled

LoraModel = dict[str, Tensor]

LOOK = "a photo of a [V] {class_word}"
HALVES = (".lora_down.weight", ".lora_up.weight", ".alpha")
"""What a layer has in a LORA_MODEL of ours, which has kohya's names."""


def pictures(images: Tensor) -> list[Image.Image]:
    """Returns the pictures of an IMAGE; transparency is dropped."""
    return [Image.fromarray(rows) for rows in (images[..., :3] * 255).round().byte().cpu().numpy()]


def image(made: Sequence[Image.Image]) -> Tensor:
    """Returns pictures of one size as an IMAGE."""
    return torch.stack([torch.from_numpy(np.array(one)).float() / 255 for one in made])


def crops(photos: Sequence[Image.Image], side: int, find_face: bool, models: Path) -> list[Image.Image]:
    """Crops photos to the face, or to their centre square.

    Args:
        photos: of one person.
        side: of the crops, in pixels.
        find_face: whether the face is looked for, by YuNet, and turned upright.
        models: a folder that may hold YuNet's file; otherwise it is downloaded once.

    Raises:
        InputError: no face, several faces, or a face that is cut off, too small or blurred.
    """
    config = PrepareConfig(size=side, already_cropped=not find_face, sharpness=10 if find_face else 0)
    if not find_face:
        return [crop_face(photo, None, config).picture for photo in photos]
    check_opencv(", or switch find_face off")
    file = models / FILE
    detect = yunet(file if file.is_file() else fetch_yunet("switch find_face off"), config.score)
    return [crop_face(photo, _face(detect(photo), config).landmarks, config).picture for photo in photos]


def _face(found: Sequence[Face], config: PrepareConfig) -> Face:
    """Returns the only face of a photo, besides those of passers-by."""
    faces = main_faces(found, config)
    if len(faces) != 1:
        advice = "crop it to one person, or switch find_face off"
        raise InputError(f"photo: expected one face, found {len(faces)}; {advice}")
    return faces[0]


def person(
    base: Base,
    hypernet: Predictor | None,
    photos: Sequence[Image.Image],
    steps: int,
    rank: int,
    seed: int,
    callback: Callable[[int, float], None],
) -> Adapter:
    """Makes the LoRA of a person: by a hypernetwork and a finetune, or from scratch where there is none.

    Without steps it is the hypernetwork's prediction.
    """
    if hypernet is None:
        if steps == 0:
            raise InputError("steps: expected 1 or more without a hypernetwork, got 0; 400 are usual")
        config = DreamboothConfig(method="lora", steps=steps, rank=rank, seed=seed)
        made = dreambooth(base, list(photos), config=config, callback=callback)
        assert isinstance(made, Adapter)  # the method is `lora`
        return made
    me = Personalizer(base, hypernet)
    if steps == 0:
        return me.predict(list(photos))
    return me.personalize(list(photos), rank, steps, seed, callback=callback)


def likeness(base: Base, adapter: Adapter, photos: Sequence[Image.Image], seed: int) -> float:
    """Draws a picture of the person and scores it: 0 is a stranger, 1 another photo of the person.

    It is compared with the photos of the training, so a picture that copies them scores too high. NaN stands
    for no face in it, and for no face encoder on this machine.
    """
    scorers = load_base_scorers(base)
    if scorers is None:
        return math.nan
    drawn = generate_images(base, LOOK, adapter, seed=seed)
    value = scorers.judge.identity(drawn, list(photos))[0]
    return math.nan if value is None else value


def mix(people: Sequence[tuple[LoraModel, float]]) -> LoraModel:
    """Adds people up, each with a weight: ΔW of the mix is exactly the weighted sum, and the ranks add up.

    Raises:
        InputError: a LORA_MODEL with other names than ours, or people of two bases.
    """
    total = add_up([scaled(_factors(lora), weight) for lora, weight in people])
    made: LoraModel = {}
    for layer, (down, up) in total.items():
        made |= {f"{layer}{HALVES[0]}": down[0], f"{layer}{HALVES[1]}": up[0]}
        made[f"{layer}{HALVES[2]}"] = torch.tensor(float(down.shape[1]))
    return made


def _factors(lora: LoraModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns layer → down `(1, r, i)`, up `(1, o, r)`, with the scale of alpha multiplied into up."""
    layers = {name.removesuffix(HALVES[0]) for name in lora if name.endswith(HALVES[0])}
    wanted = {f"{layer}{half}" for layer in layers for half in HALVES}
    if not layers or wanted != lora.keys():
        odd = next(iter(sorted(wanted ^ lora.keys())), "nothing")
        raise InputError(f"lora: expected one of Photo → Person LoRA or Person Mix, got one with {odd}")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        down, up, alpha = (lora[f"{layer}{half}"].float() for half in HALVES)
        found[layer] = down[None], up[None] * (alpha / len(down))
    return found
