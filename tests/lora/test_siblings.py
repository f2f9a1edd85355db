"""A LoRA that was trained on a base is worn on its turbo or distilled sibling, with a warning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qwens
from hyperdreambooth.adapter import Adapter, load_adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.generate import generate_images, wearing
from hyperdreambooth.lora.formats.write import Form

OPTIONS = {"steps": 2, "guidance": 1.0, "seed": 0}


@pytest.mark.parametrize("form", ["kohya", "diffusers", "original"])
def test_a_warning_names_both_and_nothing_is_refused(form: Form, tmp_path: Path) -> None:
    base = Base.from_pipeline(qwens.klein(), "klein-base-4B", resolution=32)
    other = qwens.klein(is_distilled=True)
    with torch.no_grad():
        other.transformer.proj_out.weight.add_(0.1)
    distilled = Base.from_pipeline(other, "klein-4B", resolution=32)
    sizes = {site.name: (site.in_features, site.out_features) for site in base.sites}
    factors = {name: (torch.randn(1, 2, i), torch.randn(1, o, 2)) for name, (i, o) in sizes.items()}
    made = Adapter.made_on(base, factors)
    made.save(tmp_path / "ana.safetensors", form)
    adapter = load_adapter(tmp_path / "ana.safetensors", distilled)
    assert adapter.base_source == "klein-base-4B" and adapter.family == "flux2"
    names = rf"{base.fingerprint} \(klein-base-4B\), this base klein-4B is {distilled.fingerprint}"
    with pytest.warns(UserWarning, match=names):
        worn = generate_images(distilled, ["a [V] person"], adapter, **OPTIONS)
    with pytest.warns(UserWarning, match=names), wearing(distilled, made):
        direct = generate_images(distilled, ["a [V] person"], **OPTIONS)
    assert worn[0].tobytes() == direct[0].tobytes()
    assert worn[0].tobytes() != generate_images(distilled, ["a [V] person"], **OPTIONS)[0].tobytes()
