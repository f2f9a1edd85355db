"""A base over the tensors of a loaded checkpoint, against the pipeline that the checkpoint was made from."""

from __future__ import annotations

import copy
from typing import Any

import node
import numpy as np
import originals
import pytest
import torch

from hyperdreambooth import Base, DreamboothConfig, InputError, dreambooth, generate_images
from hyperdreambooth.base.load import plain_attention

checkpoint = node.part("checkpoint")


def opened(pipe: Any, **changed: Any) -> Base:
    """The base of the node over a pipeline's tensors, as ComfyUI would hand them over."""
    given: dict[str, Any] = {
        "unet": originals.original_unet(pipe.unet),
        "shape": originals.unet_shape(pipe.unet),
        "text": originals.text_tensors(pipe.text_encoder),
        "tokenizer": pipe.tokenizer,
        "vae": originals.original_vae(pipe.vae),
        "source": "SD in ComfyUI",
        "resolution": 16,
    }
    return checkpoint.base_of(**{**given, **changed})


@pytest.fixture(scope="module")
def pipe() -> Any:
    return originals.pipeline()


def storages(*modules: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for m in modules for tensor in m.parameters()}


@pytest.mark.parametrize(("levels", "layers"), [(2, 1), (3, 2)])
def test_base_is_that_of_the_pipeline(levels: int, layers: int) -> None:
    pipe = originals.pipeline(levels=levels, layers=layers)
    base, whole = opened(pipe), Base.from_pipeline(pipe, "a folder", resolution=16)
    plain_attention(whole)  # as every base on a CPU has it
    assert base.fingerprint == whole.fingerprint
    assert base.sites == whole.sites
    options: dict[str, Any] = {"seed": 3, "steps": 2}
    ours, theirs = (generate_images(one, "a [V] face", **options)[0] for one in (base, whole))
    apart = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    assert np.abs(apart).max() <= 1  # the last digit depends on where memory happens to lie


def test_not_a_byte_of_the_weights_is_copied(pipe: Any) -> None:
    base = opened(pipe)
    ours = storages(base.pipe.unet, base.pipe.text_encoder, base.pipe.vae)
    assert ours == storages(pipe.unet, pipe.text_encoder, pipe.vae)


def test_sd15_of_full_size_is_shared_whole(pipe: Any) -> None:
    """Memory that nobody writes to stands for the weights: it costs nothing."""
    unet, text, vae = originals.full_size()
    given = {
        "unet": originals.original_unet(unet),
        "text": originals.text_tensors(text),
        "vae": originals.original_vae(vae),
    }
    given = {
        part: {name: torch.empty(tensor.shape, dtype=torch.float16) for name, tensor in tensors.items()}
        for part, tensors in given.items()
    }
    base = opened(pipe, **given, shape=originals.unet_shape(unet), resolution=512)
    assert len(base.sites) == 176  # docs/concepts.md
    theirs = {tensor.data_ptr() for tensors in given.values() for tensor in tensors.values()}
    networks = (base.pipe.unet, base.pipe.text_encoder, base.pipe.vae)
    ours = [tensor for network in networks for tensor in network.parameters()]
    assert {tensor.data_ptr() for tensor in ours} == theirs
    counts = [sum(tensor.numel() for tensor in network.parameters()) for network in networks]
    assert counts == [859_520_964, 123_060_480, 83_653_863]  # of the published SD 1.5


def test_text_encoder_of_another_format_alone_is_copied(pipe: Any) -> None:
    text = {name: tensor.half() for name, tensor in originals.text_tensors(pipe.text_encoder).items()}
    base = opened(pipe, text=text)
    assert base.pipe.text_encoder.dtype == torch.float32
    assert storages(base.pipe.unet, base.pipe.vae) == storages(pipe.unet, pipe.vae)


def test_trains_through_weights_that_were_loaded_in_inference_mode(pipe: Any) -> None:
    """ComfyUI runs nodes in that mode, and autograd refuses to save what was made in it."""
    from PIL import Image

    with torch.inference_mode():
        unet = {name: tensor.clone() for name, tensor in originals.original_unet(pipe.unet).items()}
        with torch.inference_mode(False):
            base = opened(pipe, unet=unet)
            config = DreamboothConfig(method="lora", steps=1)
            made: Any = dreambooth(base, Image.new("RGB", (32, 32), "red"), config=config)
    assert all(tensor.is_inference() for tensor in unet.values())
    assert any(up.any() for _, up in made.factors.values())


def test_tokenizer_of_comfyui_is_left_as_it_is(pipe: Any) -> None:
    whole = copy.deepcopy(pipe.tokenizer)
    whole.model_max_length = 8192  # as ComfyUI has it
    assert opened(pipe, tokenizer=whole).tokenize(["a face"]).shape == (1, 77)
    assert whole.model_max_length == 8192


@pytest.mark.parametrize(
    "changed",
    [
        {"use_linear_in_transformer": True},
        {"adm_in_channels": 2816},
        {"in_channels": 9},
        {"context_dim": None},
    ],
)
def test_other_architectures_are_told_what_to_do(pipe: Any, changed: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^SD in ComfyUI: expected Stable Diffusion 1\.x.*hdb personalize"):
        opened(pipe, shape={**originals.unet_shape(pipe.unet), **changed})


def test_weights_in_eight_bits_are_refused(pipe: Any) -> None:
    unet = {name: t.to(torch.float8_e4m3fn) for name, t in originals.original_unet(pipe.unet).items()}
    with pytest.raises(InputError, match="got float8_e4m3fn; load them so"):
        opened(pipe, unet=unet)


def test_part_of_a_checkpoint_is_refused(pipe: Any) -> None:
    vae = originals.original_vae(pipe.vae)
    del vae["decoder.conv_in.weight"]
    with pytest.raises(InputError, match=r"AutoencoderKL lacks decoder\.conv_in\.weight \(1 missing\)"):
        opened(pipe, vae=vae)
