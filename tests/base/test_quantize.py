"""Quantised bases: the same sites, fingerprints and files as full weights, and exact gradients.

torchao and bitsandbytes import slowly and are no development tools: without them, most of it is skipped.
`make quantised` installs them into a folder of their own and runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import pipelines
import qwens
from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.denoise import denoise_loss, sample_noise
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.base.quantize import nbytes
from hyperdreambooth.faces.dataset import read_faces, read_person
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig
from hyperdreambooth.finetune.dreambooth import dreambooth
from hyperdreambooth.finetune.fast import finetune_adapter
from hyperdreambooth.generate import generate_images
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import fresh
from hyperdreambooth.shapes import Factors
from hyperdreambooth.sites import full_weight, quantized

FAMILIES: dict[str, Callable[[], Any]] = {
    "SD 1.5": pipelines.FAMILIES["SD 1.5"], "Flux": pipelines.flux, "Z-Image": qwens.zimage,
    "FLUX.2 klein": qwens.klein, "Qwen-Image": qwens.qwenimage, "Krea 2": qwens.krea2,
}  # fmt: skip
int8 = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
nf4 = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    FAMILIES[request.param]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def in_four_bits(folder: Path) -> Base:
    """The base with bitsandbytes' own layers in its denoiser, made on the CPU, where diffusers makes none."""
    import bitsandbytes

    base = load_base(folder, "cpu", resolution=32)
    for path, layer in list(base.denoiser.named_modules()):
        if isinstance(layer, nn.Linear) and layer.weight.numel() >= 64:  # a block
            small = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, torch.float32, True, "nf4"
            )
            small.weight = bitsandbytes.nn.Params4bit(layer.weight.data, False, quant_type="nf4")
            small.bias = layer.bias
            base.denoiser.set_submodule(path, small.to("cpu"))
    made = Base.from_pipeline(base.pipe, str(folder), resolution=32, quantize="nf4", stored=folder)
    made.denoiser.train()  # else bitsandbytes packs weights anew for some CPUs, and fails for narrow layers
    return made


def in_eight_bits(folder: Path) -> Base:
    return load_base(folder, "cpu", resolution=32, quantize="int8")


WAYS = [pytest.param(in_eight_bits, marks=int8), pytest.param(in_four_bits, marks=nf4)]


def whole_again(folder: Path, small: Base) -> Base:
    """The same base in full weights, rounded as the quantised ones are."""
    base = load_base(folder, "cpu", resolution=32)
    rounded = dict(small.denoiser.named_modules())
    for path, layer in base.denoiser.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.copy_(full_weight(rounded[path]))
    return base


def leaves(base: Base) -> Factors:
    generator = torch.Generator().manual_seed(0)
    return {
        site.name: (
            torch.randn(1, 2, site.in_features, generator=generator).mul(0.3).requires_grad_(),
            torch.randn(1, site.out_features, 2, generator=generator).mul(0.3).requires_grad_(),
        )
        for site in base.sites
        if site.component == base.family.DENOISER
    }


def gradients(base: Base, told: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """The loss of one batch, its gradient, and the bytes that autograd saves."""
    factors = leaves(base)
    latents = base.encode_images(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))
    noise, timestep = sample_noise(base, tuple(latents.shape[1:]), "here")
    own = {p.untyped_storage().data_ptr() for p in base.denoiser.parameters() if not quantized(p)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            saved[place] = tensor.untyped_storage().nbytes()
        return tensor

    with wear(base.components, factors), saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = denoise_loss(base, latents, dict(told), noise[None], timestep[None]).sum()
        every = [each for pair in factors.values() for each in pair]
        # the last block of joint streams has no use for its text
        found = torch.autograd.grad(loss, every, materialize_grads=True)
    return loss.detach(), torch.cat([each.flatten() for each in found]), sum(saved.values())


@pytest.mark.parametrize("make", WAYS)
def test_gradients_are_those_of_the_weights_that_it_stands_for(
    folder: Path, make: Callable[[Path], Base], record_property: Callable[[str, object], None]
) -> None:
    small = make(folder)
    whole = whole_again(folder, small)
    told = {key: value.detach() for key, value in whole.encode_prompts(whole.tokenize(["a face"])).items()}
    ours, theirs = gradients(small, told), gradients(whole, told)
    error = float((ours[1] - theirs[1]).norm() / theirs[1].norm())
    record_property("relative error of the gradient", error)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=0)
    assert error < 1e-4
    weights = sum(layer.weight.nbytes for layer in whole.denoiser.modules() if isinstance(layer, nn.Linear))
    assert ours[2] < theirs[2] + weights / 4  # no full weight is kept for the backward pass


@pytest.mark.parametrize("make", WAYS)
def test_it_is_the_same_base(folder: Path, make: Callable[[Path], Base]) -> None:
    small, full = make(folder), load_base(folder, "cpu", resolution=32)
    assert (small.fingerprint, small.sites, small.parts) == (full.fingerprint, full.sites, full.parts)
    assert small.dtype == torch.float32
    assert small.run_inputs == {**full.run_inputs, "quantize": small.quantize}
    before = list(packed(small.denoiser))
    with wear(small.components, leaves(small)):
        pass
    assert all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(before, packed(small.denoiser), strict=True)
    )
    assert [type(m) for m in small.denoiser.modules()] == [type(m) for m in make(folder).denoiser.modules()]


def packed(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter as it is stored, copied."""
    for name, p in network.named_parameters():
        stored: Any = p.qdata if hasattr(p, "qdata") else p.data
        yield name, stored.clone()


@int8
def test_the_whole_of_a_person_on_eight_bits(folder: Path, micro_photos: Path, tmp_path: Path) -> None:
    base = load_base(folder, "cpu", "bfloat16", resolution=32, class_word="face", quantize="int8")
    photos = read_faces(micro_photos)["person-1"][:1]
    losses: list[float] = []
    config = DreamboothConfig(method="lora", rank=4, steps=12, lr=2e-2, batch=4)
    person = dreambooth(base, photos, tmp_path / "run", config, callback=lambda _, loss: losses.append(loss))
    assert isinstance(person, Adapter)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(factor.dtype == torch.float32 for pair in person.factors.values() for factor in pair)
    tuned = finetune_adapter(base, person, read_person([photos[0].path]), FinetuneConfig(rank=4, steps=2))
    tuned.save(tmp_path / "pytorch_lora_weights.safetensors", "diffusers")
    assert len(generate_images(base, ["a [V] face"], tuned, steps=1)) == 1
    plain: Any = DiffusionPipeline.from_pretrained(folder)  # of full weights
    plain.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    same = load_base(folder, "cpu", resolution=32)
    with wear(same.components, Adapter(fresh(same.sites, 4), "sks", same.fingerprint, "x").factors):
        pass
    assert tuned.base_fingerprint == same.fingerprint


@int8
def test_text_encoders_are_quantised_too(tmp_path: Path) -> None:
    qwens.zimage().save_pretrained(tmp_path)
    base = load_base(tmp_path, "cpu", "bfloat16", resolution=32, quantize="int8")
    base.wake()
    linears = {name: m for name, m in base.pipe.text_encoder.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, layer in linears.items() if not quantized(layer.weight)} == {"lm_head"}
    told = base.encode_prompts(base.tokenize(["a face"]))["hidden"].float()
    full = load_base(tmp_path, "cpu", resolution=32)
    theirs = full.encode_prompts(full.tokenize(["a face"]))["hidden"]
    assert torch.cosine_similarity(told.flatten(), theirs.flatten(), dim=0) > 0.99


@int8
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_told_are_the_bytes_taken(tmp_path: Path, dtype: str) -> None:
    qwens.qwenimage().save_pretrained(tmp_path)
    small, full = (load_base(tmp_path, "cpu", dtype, quantize=q) for q in ("int8", None))
    stored = 0
    for p in [*small.denoiser.parameters(), *small.denoiser.buffers()]:
        stored += p.qdata.nbytes + p.scale.nbytes if hasattr(p, "qdata") else p.nbytes
    assert nbytes(full.denoiser, "int8") == stored < nbytes(full.denoiser, None)


@nf4
def test_the_bytes_told_of_four_bits_are_the_bytes_taken() -> None:
    import bitsandbytes

    layer = nn.Linear(1024, 512, bias=False)
    weight = bitsandbytes.nn.Params4bit(layer.weight.data, False, quant_type="nf4").to("cpu")
    state = weight.quant_state
    taken = weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert nbytes(nn.Sequential(layer), "nf4") == pytest.approx(taken, rel=1e-3)


@int8
def test_a_quantised_base_is_neither_fused_nor_merged_nor_trained(
    tmp_path: Path, micro_dir: Path, micro_photos: Path
) -> None:
    base = load_base(micro_dir, "cpu", quantize="int8")
    with (
        wear({"unet": base.denoiser}, {k: (d.detach(), u.detach()) for k, (d, u) in leaves(base).items()}),
        pytest.raises(ValueError, match="a quantised base cannot be fused"),
    ):
        base.denoiser.fuse_lora()
    with pytest.raises(InputError, match="quantize: full DreamBooth trains the base's own weights"):
        dreambooth(base, micro_photos / "person-0", tmp_path / "run", DreamboothConfig(method="full"))


def test_what_cannot_be_quantised_is_one_line(tmp_path: Path, micro_dir: Path) -> None:
    (tmp_path / "whole.safetensors").touch()
    for place, word, told in (
        (tmp_path / "whole.safetensors", "int8", "a pipeline folder or a hub id, got a single file"),
        (micro_dir, "nf4", "on a GPU only"), (micro_dir, "fp8", "expected int8 or nf4, got fp8"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^quantize: .*{told}"):
            load_base(place, "cpu", quantize=word)  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_a_missing_package_is_named(micro_dir: Path) -> None:
    with pytest.raises(InputError, match=r"int8 needs torchao; pip install 'hyperdreambooth\[quantize\]'"):
        load_base(micro_dir, "cpu", quantize="int8")
