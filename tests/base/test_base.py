"""The frozen base: what it encodes, how it noises, which layers it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import pipelines
from hyperdreambooth.base.denoise import add_noise, denoise_loss, draw_of, loss_weights, sample_noise, target
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.files import InputError
from hyperdreambooth.shapes import Site, canonical, site_fingerprint


def test_sites_are_all_attention_projections(micro_base: Base) -> None:
    names = {s.name for s in micro_base.sites}
    assert len(names) == len(micro_base.sites) == 40
    assert "text_encoder.encoder.layers.1.self_attn.out_proj" in names
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0" in names
    assert list(micro_base.sites) == sorted(micro_base.sites)


def test_text_encoder_can_stay_out(micro_dir: Path) -> None:
    assert {s.component for s in load_base(micro_dir, "cpu", skip_sites="^text_encoder").sites} == {"unet"}


@pytest.mark.parametrize(
    "path",
    ["text_model.encoder.layers.0.q", "encoder.layers.0.q", "module._orig_mod.encoder.layers.0.base_layer.q"],
)
def test_canonical_names_ignore_wrappers(path: str) -> None:
    assert canonical("text_encoder", path) == "text_encoder.encoder.layers.0.q"


def test_site_fingerprint_follows_the_list() -> None:
    one, two = Site("unet.a", 4, 4), Site("unet.b", 4, 8)
    assert site_fingerprint([one, two]) == site_fingerprint([two, one])
    assert site_fingerprint([one]) != site_fingerprint([one, two])


def test_fingerprint_names_the_weights(micro_dir: Path, micro_base: Base) -> None:
    again = load_base(micro_dir, "cpu")
    assert again.fingerprint == micro_base.fingerprint
    with torch.no_grad():
        next(micro_base.pipe.unet.parameters()).add_(0.1)
    changed = Base.from_pipeline(micro_base.pipe, "x", trigger="sks", class_word="face")
    assert changed.fingerprint != again.fingerprint


def test_nothing_of_the_base_is_trainable(micro_base: Base) -> None:
    assert not any(p.requires_grad for m in micro_base.components.values() for p in m.parameters())


def test_noise_is_what_the_scheduler_adds(micro_base: Base) -> None:
    latents, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    expected = micro_base.pipe.scheduler.add_noise(latents, noise, t)
    torch.testing.assert_close(add_noise(latents, draw_of(micro_base, noise, t)), expected)


def test_velocity_is_what_the_scheduler_asks_for(micro_base: Base) -> None:
    micro_base.pipe.scheduler.register_to_config(prediction_type="v_prediction")
    latents, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    expected = micro_base.pipe.scheduler.get_velocity(latents, noise, t)
    torch.testing.assert_close(target(micro_base, latents, draw_of(micro_base, noise, t)), expected)


def test_loss_is_one_value_a_sample_and_masks(micro_base: Base) -> None:
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    cond = micro_base.encode_prompts(micro_base.tokenize(["a photo of a [V] face"] * 2))
    plain = denoise_loss(micro_base, latents, cond, noise, t)
    ones = denoise_loss(micro_base, latents, cond, noise, t, mask=torch.ones(2, 1, 8, 8))
    assert plain.shape == (2,)
    torch.testing.assert_close(plain, ones)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_are_those_of_the_clean_pictures_error(micro_base: Base, prediction: str) -> None:
    micro_base.pipe.scheduler.register_to_config(prediction_type=prediction)
    t = torch.tensor([1, 300, 999])
    alphas = micro_base.pipe.scheduler.alphas_cumprod[t]
    # the error of x_0 is that of ε times 1/SNR, and that of v times σ² = 1/(SNR + 1)
    snr, to_clean = alphas / (1 - alphas), {"epsilon": (1 - alphas) / alphas, "v_prediction": 1 - alphas}
    capped = to_clean[prediction] * snr.clamp(max=5)
    torch.testing.assert_close(loss_weights(micro_base, t, "min_snr"), capped)
    debiased = to_clean[prediction] * torch.minimum(snr.sqrt(), 10 * snr)
    torch.testing.assert_close(loss_weights(micro_base, t, "debiased"), debiased)
    assert torch.equal(loss_weights(micro_base, t, "uniform"), torch.ones(3))


def test_noise_is_a_function_of_its_key(micro_base: Base) -> None:
    a, b, c = (sample_noise(micro_base, (4, 8, 8), 0, who, 5) for who in ("ana", "ana", "bob"))
    assert torch.equal(a[0], b[0]) and a[1] == b[1]
    assert not torch.equal(a[0], c[0])


def test_the_bases_words_replace_the_placeholders(micro_base: Base) -> None:
    assert micro_base.prompt("a [V] {class_word}") == "a sks face"
    assert torch.equal(micro_base.tokenize(["a [V] {class_word}"]), micro_base.tokenize(["a sks face"]))


def test_plain_diffusers_loads_the_folder(micro_dir: Path) -> None:
    assert type(DiffusionPipeline.from_pretrained(micro_dir)).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize("name", pipelines.FAMILIES)
def test_offloaded_networks_draw_in_turn_and_the_same_pictures(name: str) -> None:
    """On the CPU nothing moves: what would move it is there while it draws, and gone afterwards."""
    drawn: list[bytes] = []
    for offload in (False, True):
        pipe, seen = pipelines.FAMILIES[name](), list[bool]()
        pipe.set_progress_bar_config(disable=True)
        base = Base.from_pipeline(pipe, "x", resolution=32, offload=offload)
        handle = pipe.vae.decoder.register_forward_hook(lambda *_, to=seen, of=base: to.append(hooked(of)))
        noise = [torch.Generator().manual_seed(k) for k in range(2)]
        images = base.draw(["a", "b"], None, noise, steps=1, guidance=2.0, side=32)
        handle.remove()
        drawn.append(b"".join(image.tobytes() for image in images))
        assert seen == [offload] and not hooked(base)
    assert drawn[0] == drawn[1]


def hooked(base: Base) -> bool:
    """Whether accelerate would move a network; of all it does, or of none."""
    parts = [part for part in base.pipe.components.values() if isinstance(part, nn.Module)]
    (found,) = {hasattr(part, "_hf_hook") for part in parts}
    return found


def test_no_pipeline_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found an empty folder") as caught:
        load_base(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_leaves_everything_as_it_was(micro_base: Base, checkpointing: bool) -> None:
    allowed = torch.backends.cuda.cudnn_sdp_enabled()

    def spared() -> bool:
        return any(
            getattr(module, "gradient_checkpointing", False) for module in micro_base.denoiser.modules()
        )

    with pytest.raises(KeyboardInterrupt), micro_base.training(checkpointing):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert spared() == checkpointing
        raise KeyboardInterrupt
    assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
    assert not spared()


@torch.no_grad()
def test_latents_are_scaled_as_diffusers_scales_them(micro_base: Base) -> None:
    """Bit by bit: what is rounded in another way adds up in a training."""
    pixels, vae = torch.rand(2, 3, 16, 16) * 2 - 1, micro_base.pipe.vae
    expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    assert torch.equal(micro_base.encode_images(pixels), expected)
