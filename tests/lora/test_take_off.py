"""Taking off: the bare base afterwards, whatever else was worn, done by diffusers, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from worn import PROMPTS, close, fuse_by_hand, person, pictures, predict, random_factors, scaled

from hyperdreambooth.base.load import Base
from hyperdreambooth.lora.formats.headers import LoraInfo
from hyperdreambooth.lora.formats.write import write_lora
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.shapes import Factors


def state(base: Base) -> dict[str, Any]:
    return {
        part: (
            [(path, type(m), id(m)) for path, m in module.named_modules()],
            {key: value.clone() for key, value in module.state_dict().items()},
            sorted(set(module.__dict__) - {"lora_scale", "_safe_fusing"}),  # fuse_lora's own notes
            [(path, p.requires_grad, id(p)) for path, p in module.named_parameters()],
        )
        for part, module in base.components.items()
    }


def same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for part in a:
        assert a[part][0] == b[part][0] and a[part][2:] == b[part][2:]
        assert list(a[part][1]) == list(b[part][1])
        assert all(torch.equal(value, b[part][1][key]) for key, value in a[part][1].items())


@pytest.mark.parametrize("n", [1, 2])
def test_taking_off_restores_everything(micro_base: Base, n: int) -> None:
    micro_base.components["unet"].requires_grad_(True)
    before, image = state(micro_base), pictures(micro_base.pipe, PROMPTS[:2])
    random_state = torch.get_rng_state()
    with wear(micro_base.components, random_factors(micro_base, n, 2)) as worn:
        assert not torch.equal(pictures(micro_base.pipe, PROMPTS[:2]), image)
    worn.take_off()
    same_state(state(micro_base), before)
    assert torch.equal(pictures(micro_base.pipe, PROMPTS[:2]), image)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("first_off", ["person", "style"])
def test_two_adapters_together(micro_base: Base, first_off: str) -> None:
    people, style = random_factors(micro_base, 2, 1), random_factors(micro_base, 1, 3, seed=5)
    style = {site: pair for site, pair in style.items() if site.startswith("unet.")}
    both = {s: _sum(person(people, 1)[s], style.get(s)) for s in people}
    before = state(micro_base)
    dense = {
        "person": predict(fuse_by_hand(micro_base, person(people, 1)), [PROMPTS[1]], 1),
        "style": predict(fuse_by_hand(micro_base, style), [PROMPTS[1]], 1),
        "both": predict(fuse_by_hand(micro_base, both), [PROMPTS[1]], 1),
    }
    worn = {"person": wear(micro_base.components, person(people, 1))}
    worn["style"] = wear(micro_base.components, style, name="style")
    close(predict(micro_base, [PROMPTS[1]], 1), dense["both"])
    worn.pop(first_off).take_off()
    (left,) = worn
    close(predict(micro_base, [PROMPTS[1]], 1), dense[left])
    assert set(micro_base.pipe.get_list_adapters()["unet"]) == {left}
    worn[left].take_off()
    same_state(state(micro_base), before)


def _sum(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    return a if b is None else (torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 2))


def test_people_with_a_style(micro_base: Base) -> None:
    people, style = random_factors(micro_base, 2, 1), random_factors(micro_base, 1, 3, seed=5)
    with torch.no_grad(), wear(micro_base.components, style, name="style"):
        with wear(micro_base.components, people):
            together = pictures(micro_base.pipe, PROMPTS[:2])
        for k in range(2):
            with wear(micro_base.components, person(people, k)):
                close(together[k : k + 1], pictures(micro_base.pipe, [PROMPTS[k]], seeds=[k]), 1e-4)


def test_diffusers_own_controls(micro_base: Base) -> None:
    factors, pipe = random_factors(micro_base, 1, 2), micro_base.pipe
    before, bare = state(micro_base), pictures(pipe, PROMPTS[:1])
    half = pictures(fuse_by_hand(micro_base, scaled(factors, 0.5)).pipe, PROMPTS[:1])
    full = pictures(fuse_by_hand(micro_base, factors).pipe, PROMPTS[:1])
    with wear(micro_base.components, factors):
        pipe.set_adapters("person", 0.5)
        close(pictures(pipe, PROMPTS[:1]), half, 1e-4)
        pipe.set_adapters("person", 1.0)
        pipe.disable_lora()
        assert torch.equal(pictures(pipe, PROMPTS[:1]), bare)
        pipe.enable_lora()
        close(pictures(pipe, PROMPTS[:1]), full, 1e-4)
        pipe.fuse_lora(safe_fusing=True)
        close(pictures(pipe, PROMPTS[:1]), full, 1e-4)
        pipe.unfuse_lora()
        close(pictures(pipe, PROMPTS[:1]), full, 1e-4)
        pipe.fuse_lora()
    same_state(state(micro_base), before)


def test_taking_one_of_two_fused_adapters_off(micro_base: Base) -> None:
    one, two = random_factors(micro_base, 1, 2), random_factors(micro_base, 1, 1, seed=5)
    before, alone = state(micro_base), predict(fuse_by_hand(micro_base, two), [PROMPTS[0]], 1)
    first = wear(micro_base.components, one)
    with wear(micro_base.components, two, name="style"):
        micro_base.pipe.fuse_lora()
        first.take_off()
        close(predict(micro_base, [PROMPTS[0]], 1), alone)
    same_state(state(micro_base), before)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT's, for any second adapter
@pytest.mark.parametrize("ours_first", [False, True])
def test_an_adapter_that_diffusers_loaded_stays(micro_base: Base, tmp_path: Path, ours_first: bool) -> None:
    theirs, ours = random_factors(micro_base, 1, 3, seed=5), random_factors(micro_base, 1, 2)
    theirs = {site: pair for site, pair in theirs.items() if site.startswith("unet.mid_block")}
    pipe, file = micro_base.pipe, tmp_path / "style.safetensors"
    info = LoraInfo("sks", micro_base.source, 32, "a style", family="sd1")
    write_lora(file, theirs, "diffusers", info)
    alone = predict(fuse_by_hand(micro_base, theirs), [PROMPTS[0]], 1)
    both = {site: _sum(ours[site], theirs.get(site)) for site in ours}
    together = predict(fuse_by_hand(micro_base, both), [PROMPTS[0]], 1)
    if ours_first:
        worn = wear(micro_base.components, ours)
        pipe.load_lora_weights(file, adapter_name="style")
        pipe.set_adapters(["person", "style"])
    else:
        pipe.load_lora_weights(file, adapter_name="style")
        worn = wear(micro_base.components, ours)
    close(predict(micro_base, [PROMPTS[0]], 1), together)
    worn.take_off()
    close(predict(micro_base, [PROMPTS[0]], 1), alone)
    assert pipe.get_list_adapters() == {"unet": ["style"]}
    pipe.unload_lora_weights()
    assert not any(isinstance(module, LoraLayer) for module in micro_base.components["unet"].modules())


def test_unfusing_follows_the_base_to_another_number_format(micro_base: Base) -> None:
    wear(micro_base.components, random_factors(micro_base, 1, 2))
    micro_base.pipe.fuse_lora()
    micro_base.pipe.to(torch.bfloat16)
    micro_base.pipe.unfuse_lora()
    assert {p.dtype for p in micro_base.components["unet"].parameters()} == {torch.bfloat16}


def test_what_the_user_deleted_is_not_missed(micro_base: Base) -> None:
    before = state(micro_base)
    with wear(micro_base.components, random_factors(micro_base, 1, 2)):
        micro_base.pipe.delete_adapters("person")
    with wear(micro_base.components, random_factors(micro_base, 1, 2)):
        micro_base.pipe.unload_lora_weights()
    assert [m[0] for m in state(micro_base)["unet"][0]] == [m[0] for m in before["unet"][0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {}, "factors at one or more sites"),
        (lambda f: f | {"unet.nowhere.to_q": next(iter(f.values()))}, "no linear layer unet.nowhere.to_q"),
        (lambda f: f | {"vae.to_q": next(iter(f.values()))}, "no linear layer vae.to_q"),
    ],
)
def test_what_cannot_be_worn_leaves_no_trace(
    micro_base: Base, change: Callable[[Factors], Factors], message: str
) -> None:
    before = state(micro_base)
    with pytest.raises(ValueError, match=message):
        wear(micro_base.components, change(random_factors(micro_base, 1, 2)))
    same_state(state(micro_base), before)


def test_names_and_shapes_that_do_not_fit(micro_base: Base) -> None:
    factors, before = random_factors(micro_base, 1, 2), state(micro_base)
    with (
        wear(micro_base.components, factors),
        pytest.raises(ValueError, match="already worn by text_encoder, unet"),
    ):
        wear(micro_base.components, factors)
    same_state(state(micro_base), before)
    site = next(iter(factors))
    with pytest.raises(RuntimeError):
        wear(micro_base.components, factors | {site: (torch.zeros(1, 2, 7), factors[site][1])})
    same_state(state(micro_base), before)
