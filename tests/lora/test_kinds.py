"""Other people's kinds of change, against PEFT's own layers and against plain arithmetic on the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import pipelines
from hyperdreambooth.files import InputError
from hyperdreambooth.lora.formats.merged import merged_into
from hyperdreambooth.lora.formats.read import read_lora
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import add_up, scaled
from hyperdreambooth.shapes import Factors
from hyperdreambooth.sites import wearable, weight_of

QUERY, CONV = "mid_block.attentions.0.to_q", "mid_block.resnets.0.conv1"
State = dict[str, Tensor]
r = torch.randn


class Net(nn.Module):
    """Two linear layers and a convolution, by names of a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        attention = nn.ModuleDict({"to_q": nn.Linear(12, 8), "to_k": nn.Linear(6, 8)})
        resnet = nn.ModuleDict({"conv1": nn.Conv2d(4, 6, 3, padding=1)})
        self.mid_block = nn.ModuleDict(
            {"attentions": nn.ModuleList([attention]), "resnets": nn.ModuleList([resnet])}
        )
        self.config = {"model_type": "custom"}

    def weights(self) -> State:
        return {
            name.removesuffix(".weight"): tensor.clone()
            for name, tensor in self.state_dict().items()
            if name.endswith(".weight")
        }


def read(path: Path, net: Net) -> Factors:
    parts = {"unet": net}
    return read_lora(path, wearable(parts), weight_of(parts))[0]


def deltas(factors: Factors) -> State:
    return {name.removeprefix("unet."): (up[0] @ down[0]) for name, (down, up) in factors.items()}


TARGETS = ["to_q", "to_k", "conv1"]
CONFIGS: dict[str, Any] = {
    "plain": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS),
    "rank-stabilised": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_rslora=True),
    "the end of a name": LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS, alpha_pattern={"to_q": 9}),
    "an escaped name": LoraConfig(
        r=3, lora_alpha=3, target_modules=TARGETS, alpha_pattern={r"attentions\.0\.to_q": 9}
    ),
    "alternatives": LoraConfig(
        r=3, lora_alpha=3, target_modules=TARGETS, alpha_pattern={r".*\.to_(q|v)": 9, "conv1": 1}
    ),
    "digits": LoraConfig(r=3, target_modules=TARGETS, alpha_pattern={r"mid_block\..*\.\d+\.to_k": 32}),
    "no whole part of a name": LoraConfig(r=3, target_modules=TARGETS, alpha_pattern={"o_q": 99, "to": 77}),
    "the first pattern": LoraConfig(r=3, target_modules=TARGETS, alpha_pattern={"to_.": 2, "to_q": 50}),
    "from the start": LoraConfig(
        r=3, target_modules=TARGETS, alpha_pattern={f"^{QUERY}": 7, "^to_k": 70}, rank_pattern={"conv1": 2}
    ),
    "ranks": LoraConfig(
        r=3, lora_alpha=4, target_modules=TARGETS, rank_pattern={r"to_[qk]": 2}, use_rslora=True
    ),
    "DoRA": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True),
    "LoHa": LoHaConfig(r=2, alpha=3, target_modules=TARGETS, module_dropout=0),
    "LoHa of high rank": LoHaConfig(r=6, alpha=3, target_modules=TARGETS),
    "LoHa with a core": LoHaConfig(r=2, alpha=3, target_modules=TARGETS, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=1, alpha=3, target_modules=TARGETS, decompose_factor=2),
    "LoKr of two low ranks": LoKrConfig(r=1, alpha=2, target_modules=TARGETS, decompose_both=True),
    "LoKr of whole matrices": LoKrConfig(r=8, alpha=3, target_modules=TARGETS),
    "LoKr with a core": LoKrConfig(
        r=1, alpha=3, target_modules=TARGETS, use_effective_conv2d=True, decompose_factor=2
    ),
}


def saved(config: Any, folder: Path) -> State:
    """Has PEFT write a random adapter of a configuration; returns ΔW as PEFT merges it."""
    model: Any = get_peft_model(Net(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("lora_", "hada_", "lokr_")):
                parameter.copy_(r(parameter.shape).abs() if "magnitude" in name else r(parameter.shape) / 2)
    model.save_pretrained(folder)
    after, before = model.merge_and_unload().weights(), Net().weights()
    return {name: (after[name] - before[name]).flatten(1) for name in before}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_pefts_means_what_peft_makes_of_it(name: str, tmp_path: Path) -> None:
    wanted = saved(CONFIGS[name], tmp_path)
    got = deltas(read(tmp_path / "adapter_model.safetensors", Net()))
    assert got.keys() == wanted.keys()
    for site, delta in wanted.items():
        torch.testing.assert_close(got[site], delta, rtol=1e-4, atol=1e-5)


def test_a_renamed_file_of_pefts_keeps_its_configuration(tmp_path: Path) -> None:
    wanted = saved(CONFIGS["alternatives"], tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "ana.safetensors")
    got = deltas(read(tmp_path / "ana.safetensors", Net()))
    for site, delta in wanted.items():
        torch.testing.assert_close(got[site], delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": ["conv_in"]}, "modules_to_save .* means whole layers"),
        ({"bias": "lora_only"}, "bias = lora_only means changed biases"),
        ({"lora_bias": True}, "lora_bias = True means biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' means a base with changed weights"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "changed weights"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "embeddings of words"),
        ({"peft_type": "OFT"}, "peft_type = OFT means another kind"),
        ({"r": 4}, "has rank 4, the matrices have 3"),
        ({"rank_pattern": {"to_k": 7}}, "has rank 7"),
        ({"alpha_pattern": {"(a+)+$": 1}}, r"alpha_pattern has the pattern '\(a\+\)\+\$'"),
        ({"alpha_pattern": {"(to_q": 1}}, "has the pattern"),
        ({"alpha_pattern": {"(a|a)" * 20: 1}}, "has the pattern"),
    ],
)
def test_fields_that_mean_something_else_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(CONFIGS["plain"], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / "adapter_model.safetensors", Net())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "harmless",
    [
        {"init_lora_weights": "gaussian"}, {"init_lora_weights": "eva"}, {"fan_in_fan_out": True},
        {"layers_to_transform": [0]}, {"lora_dropout": 0.3}, {"inference_mode": False}, {"unheard_of": None},
    ],
)  # fmt: skip
def test_fields_that_change_no_result_are_read_over(harmless: dict[str, Any], tmp_path: Path) -> None:
    wanted = saved(CONFIGS["plain"], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | harmless))
    got = deltas(read(tmp_path / "adapter_model.safetensors", Net()))
    assert all(torch.allclose(got[site], delta, atol=1e-5) for site, delta in wanted.items())


def pair(o: int, i: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    return r(rank, i), r(o, rank)


def lora(net: Net) -> tuple[State, Tensor]:
    down, up = pair(8, 12)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(3)}, up @ down * 1.5


def locon(net: Net) -> tuple[State, Tensor]:
    down, up = r(2, 4, 3, 3), r(6, 2, 1, 1)
    delta = torch.einsum("or,rixy->oixy", up[..., 0, 0], down) / 2
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor([1.0])}, delta


def locon_with_a_core(net: Net) -> tuple[State, Tensor]:
    down, mid, up = r(2, 4, 1, 1), r(2, 2, 3, 3), r(6, 2, 1, 1)
    delta = torch.einsum("om,mnxy,ni->oixy", up[..., 0, 0], mid, down[..., 0, 0])
    state = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    return {**state, "alpha": torch.tensor(2.0)}, delta


def loha(net: Net) -> tuple[State, Tensor]:
    (b1, a1), (b2, a2) = pair(8, 12), pair(8, 12)
    state = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return {**state, "alpha": torch.tensor(1, dtype=torch.int64)}, (a1 @ b1) * (a2 @ b2) / 2


def lokr(net: Net) -> tuple[State, Tensor]:
    w1, w2 = r(2, 3), r(4, 4)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9e9)}, torch.kron(w1, w2)  # alpha: unused


def lokr_convolution(net: Net) -> tuple[State, Tensor]:
    w1, a, b = r(3, 2), r(2, 1), r(1, 2 * 3 * 3)
    delta = torch.kron(w1[:, :, None, None], (a @ b).view(2, 2, 3, 3)) * 4
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(4.0)}, delta


def whole(net: Net) -> tuple[State, Tensor]:
    delta = r(6, 4, 3, 3)
    return {"diff": delta}, delta


def dora_of_inputs(net: Net) -> tuple[State, Tensor]:
    state, delta = lora(net)
    weight, magnitude = net.get_submodule(QUERY).weight.detach(), r(1, 12).abs()
    changed = weight + delta
    return {**state, "dora_scale": magnitude}, changed * magnitude / changed.norm(dim=0) - weight


def dora_of_outputs(net: Net) -> tuple[State, Tensor]:
    state, delta = loha(net)
    weight, magnitude = net.get_submodule(QUERY).weight.detach(), r(8, 1).abs()
    changed = weight + delta
    return {**state, "dora_scale": magnitude}, changed * magnitude / changed.norm(
        dim=1, keepdim=True
    ) - weight


def dora_convolution(net: Net) -> tuple[State, Tensor]:
    state, delta = locon(net)
    weight, magnitude = net.get_submodule(CONV).weight.detach(), r(1, 4, 1, 1).abs()
    changed = weight + delta
    norms = torch.stack([changed[:, k].norm() for k in range(4)]).view(1, 4, 1, 1)
    return {**state, "dora_scale": magnitude}, changed * magnitude / norms - weight


KINDS: list[tuple[str, Callable[[Net], tuple[State, Tensor]]]] = [
    (QUERY, lora), (QUERY, loha), (QUERY, lokr), (QUERY, dora_of_inputs), (QUERY, dora_of_outputs),
    (CONV, locon), (CONV, locon_with_a_core), (CONV, lokr_convolution), (CONV, whole),
    (CONV, dora_convolution),
]  # fmt: skip


@pytest.mark.parametrize("start", ["lora_unet_", "lycoris_", "unet."])
@pytest.mark.parametrize(("site", "make"), KINDS)
def test_kinds_by_kohyas_names(
    site: str, make: Callable[[Net], tuple[State, Tensor]], start: str, tmp_path: Path
) -> None:
    net = Net()
    state, wanted = make(net)
    name = start + (site if start.endswith(".") else site.replace(".", "_"))
    save_file({f"{name}.{part}": t for part, t in state.items()}, tmp_path / "their.safetensors")
    got = deltas(read(tmp_path / "their.safetensors", net))
    torch.testing.assert_close(got[site], wanted.flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "alpha", [torch.int64, torch.int8, torch.float64, torch.bfloat16, torch.bool, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_of_every_number_format(alpha: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    down, up = pair(8, 12)
    state = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.ones(shape).to(alpha)}
    save_file({f"unet.{QUERY}.{part}": t for part, t in state.items()}, tmp_path / "a.safetensors")
    torch.testing.assert_close(deltas(read(tmp_path / "a.safetensors", Net()))[QUERY], up @ down / 2)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({f"{QUERY}.oft_blocks": r(2, 4, 4)}, "holds OFT"),
        ({f"{QUERY}.a1.weight": r(2, 4)}, "holds GLoRA"),
        ({f"{QUERY}.on_input": r(4)}, "holds IA³"),
        ({"mid_block.norm.w_norm": r(4)}, "normalisation"),
        ({f"{QUERY}.diff_b": r(8)}, "changes of biases"),
        ({f"{QUERY}.lora_down.weight": torch.ones(2, 12, dtype=torch.int8)}, "number format 'I8'"),
        ({f"{QUERY}.hada_w1_a": r(8, 2)}, "hada_w1_b.* missing"),
        ({f"{QUERY}.lokr_w1": r(2, 2)}, "lokr_w2 is missing"),
        ({f"{QUERY}.lokr_w1": r(2, 2), f"{QUERY}.lokr_w2": r(5, 5)}, "expected a LoKr of 8 outputs"),
        ({f"{QUERY}.diff": r(8, 13)}, "expected a whole matrix of 8 outputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(extra: State, message: str, tmp_path: Path) -> None:
    save_file({f"unet.{key}": t for key, t in extra.items()}, tmp_path / "their.safetensors")
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / "their.safetensors", Net())
    assert "\n" not in str(error.value)


def test_the_embedding_of_a_word_is_left_out_with_a_warning(tmp_path: Path) -> None:
    down, up = pair(8, 12)
    state = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    save_file(state | {"bundle_emb.ana.clip_l": r(2, 16)}, tmp_path / "their.safetensors")
    with pytest.warns(UserWarning, match="the embedding of 'ana' is not worn"):
        assert list(read(tmp_path / "their.safetensors", Net())) == [f"unet.{QUERY}"]


def test_a_style_with_convolutions_is_worn_together_with_a_person(tmp_path: Path) -> None:
    """Every kind at once on a whole pipeline: the same picture as from weights with ΔW in them."""
    pipe = pipelines.FAMILIES["SD 1.5"]()
    parts = pipelines.parts(pipe)
    layers = {site.name: site for site in wearable(parts)}
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
    conv, query, key = "unet.mid_block.resnets.0.conv1", f"{block}.attn1.to_q", f"{block}.attn1.to_k"
    o, i = layers[conv].out_features, layers[conv].in_features // 9
    wide, o2 = layers[query].in_features, layers[query].out_features
    state = {
        f"{conv}.lora_down.weight": r(2, i, 3, 3) / 9, f"{conv}.lora_up.weight": r(o, 2, 1, 1) / 9,
        f"{query}.lora_down.weight": r(2, wide) / 9, f"{query}.lora_up.weight": r(o2, 2) / 9,
        f"{query}.dora_scale": torch.ones(1, wide),
        f"{key}.lokr_w1": r(2, 2) / 9, f"{key}.lokr_w2": r(layers[key].out_features // 2, wide // 2) / 9,
    }  # fmt: skip
    save_file(state, tmp_path / "style.safetensors")
    style = read_lora(tmp_path / "style.safetensors", wearable(parts), weight_of(parts))[0]
    person = {query: (r(1, 3, wide) / 9, r(1, o2, 3) / 9)}
    both = add_up([person, scaled(style, 0.5)])
    assert both.keys() == {conv, query, key}
    before = {part: {k: t.clone() for k, t in module.state_dict().items()} for part, module in parts.items()}
    bare = pipelines.picture(pipe)
    with wear(parts, both):
        live = pipelines.picture(pipe)
    for part, module in parts.items():
        after = module.state_dict()
        assert after.keys() == before[part].keys()
        assert all(torch.equal(after[k], t) for k, t in before[part].items())
    with merged_into(parts, both):
        torch.testing.assert_close(pipelines.picture(pipe), live, rtol=0, atol=1e-5)
    assert (live - bare).abs().max() > 1e-3
