"""Every family does everything: the same chain on micro pipelines, against the pipelines' own answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import eyes
import pipelines
import qwens
from hyperdreambooth.adapter import Adapter, read_adapter
from hyperdreambooth.apps import cli
from hyperdreambooth.apps.person_folder import FILES
from hyperdreambooth.base.denoise import denoise_loss, sample_noise
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.faces.dataset import read_faces, read_person
from hyperdreambooth.faces.image import open_photo, to_pixels
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig
from hyperdreambooth.finetune.dreambooth import dreambooth
from hyperdreambooth.finetune.fast import finetune_adapter, finetune_adapters
from hyperdreambooth.generate import generate_images
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.train import train_hypernet
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import fresh
from hyperdreambooth.personalize import Personalizer
from hyperdreambooth.preopt.bank_training import PreoptConfig, preoptimize
from hyperdreambooth.runs import rng
from hyperdreambooth.shapes import Factors
from hyperdreambooth.training.trainable import each

PROMPT = "a photo of a [V] face"


def flux_guided() -> Any:
    """The distilled one, which takes guidance as an input."""
    pipe = pipelines.flux()
    torch.manual_seed(3)
    config = {**pipe.transformer.config, "guidance_embeds": True}
    pipe.transformer = FluxTransformer2DModel.from_config(config).eval()
    return pipe


def sampled_in_few_steps() -> Any:
    """A distilled one is drawn without guidance."""
    return qwens.klein(is_distilled=True)


VARIANTS: dict[str, Callable[[], Any]] = {
    **pipelines.FAMILIES, "Flux, guided": flux_guided, "SD3 with T5": pipelines.sd3_with_t5,
    "FLUX.2 klein, distilled": sampled_in_few_steps,
}  # fmt: skip


@pytest.fixture(scope="module", params=pipelines.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved micro pipeline."""
    place = tmp_path_factory.mktemp("family") / "base"
    pipelines.FAMILIES[request.param]().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(folder, "cpu", resolution=32, class_word="face")


def people(base: Base, n: int) -> Factors:
    generator = torch.Generator().manual_seed(0)
    return {
        s.name: (
            torch.randn(n, 2, s.in_features, generator=generator) * 0.3,
            torch.randn(n, s.out_features, 2, generator=generator) * 0.3,
        )
        for s in base.sites
    }


def worst(one: list[Image.Image], other: list[Image.Image]) -> int:
    """The largest difference of any colour value, of 255."""
    pairs = zip(one, other, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


@pytest.mark.parametrize("make", [pipelines.sdxl, pipelines.sd3])
def test_one_of_two_text_encoders_may_rest_elsewhere(make: Callable[[], Any]) -> None:
    pipe = make()
    base = Base.from_pipeline(pipe, "micro")
    tokens = base.tokenize(["a person"])
    before = base.family.encode_prompts(pipe, tokens)
    pipe.text_encoder.to("meta")  # stands for the other device
    assert {k: v.shape for k, v in base.family.encode_prompts(pipe, tokens).items()} == {
        k: v.shape for k, v in before.items()
    }


def unpacked(pipe: Any, latents: Tensor) -> Tensor:
    """Latents as rows and columns again, where a pipeline keeps them as a sequence of patches."""
    if latents.ndim == 4:
        return latents
    match type(pipe).__name__:
        case "FluxPipeline":
            return pipe._unpack_latents(latents, 16, 16, 1)
        case "Flux2KleinPipeline":
            return latents.mT.unflatten(2, (8, 8))
        case "QwenImagePipeline":
            return pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor).squeeze(2)
        case _:
            return pipe._unpack_latents(latents, 32, 32).squeeze(2)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_the_denoiser_is_told_is_what_the_pipeline_tells_it(name: str) -> None:
    pipe: Any = VARIANTS[name]()
    pipe.set_progress_bar_config(disable=True)
    base = Base.from_pipeline(pipe, name, resolution=32)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    take = pipe.scheduler.step

    def record(answer: Tensor, t: Tensor, noisy: Tensor, **options: Any) -> Any:
        steps.append((answer, t, noisy))
        return take(answer, t, noisy, **options)

    pipe.scheduler.step = record
    told = base.family.sampling(pipe, ["a sks face", "a hat"], None, 1.0)
    pipe(**told, num_inference_steps=2, height=32, width=32, generator=torch.Generator().manual_seed(0))
    theirs, t, noisy = steps[1]
    theirs, noisy = unpacked(pipe, theirs), unpacked(pipe, noisy)
    with torch.no_grad():
        conditioning = base.encode_prompts(base.tokenize(["a [V] face", "a hat"]))
        ours = base.predict(noisy, t.expand(2), conditioning)
    assert all(len(tensor) == 2 for tensor in conditioning.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# what trainers of the later families adapt, by the ends of names (ai-toolkit, SimpleTuner, musubi-tuner)
QKVO = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*QKVO, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ADAPTED = {
    "ZImagePipeline": QKVO,
    "Flux2KleinPipeline": (*JOINT, "to_qkv_mlp_proj", "attn.to_out"),
    "QwenImagePipeline": JOINT,
    "Krea2Pipeline": (*QKVO, "to_gate"),
}


def test_sites_are_the_attention_projections(base: Base) -> None:
    if (ends := ADAPTED.get(type(base.pipe).__name__)) is None:
        assert base.sites == pipelines.attention_sites(pipelines.parts(base.pipe))
        return
    layers = (name for name, layer in base.denoiser.named_modules() if isinstance(layer, torch.nn.Linear))
    wanted = {f"transformer.{name}" for name in layers if name.endswith(ends) and "text_fusion" not in name}
    assert {site.name for site in base.sites} == wanted


def test_latents_come_back_as_pictures_of_the_pipelines_own_decoding(base: Base) -> None:
    pixels, vae = torch.rand(1, 3, 32, 32) * 2 - 1, base.pipe.vae
    film = pixels.unsqueeze(2) if "temperal_downsample" in vae.config else pixels
    with torch.no_grad():
        shown = vae.decode(vae.encode(film).latent_dist.mode()).sample.clamp(-1, 1)
    torch.testing.assert_close(base.decode_latents(base.encode_images(pixels)), shown.reshape(1, 3, 32, 32))


def test_the_last_latents_are_the_picture(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    last: list[Tensor] = []
    take = base.pipe.scheduler.step

    def record(*arguments: Any, **options: Any) -> Any:
        last.append(take(*arguments, **options)[0])
        return (last[-1],)

    monkeypatch.setattr(base.pipe.scheduler, "step", record)
    generators = [torch.Generator().manual_seed(0)]
    picture = base.draw(["a hat"], None, generators, steps=2, guidance=1.0, side=32)[0]
    latents = unpacked(base.pipe, last[-1])
    ours = (base.decode_latents(latents)[0].permute(1, 2, 0) / 2 + 0.5) * 255
    assert np.abs(ours.numpy() - np.asarray(picture)).max() < 0.51


def test_the_whole_chain(base: Base, folder: Path, micro_photos: Path, tmp_path: Path) -> None:
    eye = eyes.vit(tmp_path / "eye")
    held: dict[str, Any] = {"class_weight": 1.0}
    bank_config = PreoptConfig(down_dim=6, up_dim=4, steps=3, lr=1e-2, identities_per_batch=6, **held)
    preoptimize(base, micro_photos, tmp_path / "bank", bank_config)
    config = HypernetConfig(
        encoder=str(eye), width=16, heads=2, layers=1, refinements=1, steps=2, batch=2, validation=0, **held
    )
    predictor = train_hypernet(base, micro_photos, tmp_path / "hyper", config, tmp_path / "bank")
    me = Personalizer(base, predictor)
    photo = micro_photos / "person-0" / "0.png"
    prediction = me.predict(photo)
    prediction.save(tmp_path / "person.lidb.safetensors", "lidb")
    again = read_adapter(tmp_path / "person.lidb.safetensors", base.sites, base.fingerprint)
    relaxed = again.relax(2)
    tuned = finetune_adapter(
        base, relaxed, read_person([photo]), FinetuneConfig(rank=2, steps=3, lr=1e-2, batch=2, **held)
    )
    whole = me.personalize(photo, rank=2, steps=3, config=FinetuneConfig(lr=1e-2, batch=2, **held))
    for site, (down, up) in whole.factors.items():
        torch.testing.assert_close(up @ down, tuned.factors[site][1] @ tuned.factors[site][0])
    check_export(base, folder, whole, tmp_path)


def check_export(base: Base, folder: Path, adapter: Adapter, place: Path) -> None:
    """The written LoRA in plain diffusers gives the live model's picture."""
    strong = Adapter.made_on(base, {s: (d, u * 20) for s, (d, u) in adapter.factors.items()})
    strong.save(place / "pytorch_lora_weights.safetensors", "diffusers")
    live = generate_images(base, [PROMPT], strong, steps=2, guidance=2.0)
    plain: Any = DiffusionPipeline.from_pretrained(folder, **absent(base))
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(place, weight_name="pytorch_lora_weights.safetensors")
    told = base.family.sampling(base.pipe, ["a photo of a sks face"], None, 2.0)
    options = {"num_inference_steps": 2, "height": 32, "width": 32}
    theirs = plain(**told, **options, generator=rng(0, "generate", PROMPT, 0)).images
    assert worst(live, theirs) <= 1
    assert worst(live, generate_images(base, [PROMPT], steps=2, guidance=2.0)) > 1


def absent(base: Base) -> dict[str, None]:
    """Plain diffusers wants to be told of parts that a pipeline was saved without."""
    return {"text_encoder_3": None, "tokenizer_3": None} if hasattr(base.pipe, "text_encoder_3") else {}


def test_the_loss_of_one_person_falls(base: Base, micro_photos: Path, tmp_path: Path) -> None:
    photos = read_faces(micro_photos)["person-1"][:1]
    config = DreamboothConfig(method="lora", rank=4, steps=30, lr=2e-2, batch=4, schedule="cosine")
    adapter = dreambooth(base, photos, tmp_path / "run", config)
    latents = base.encode_images(to_pixels(open_photo(photos[0].path), 32)[None])
    drawn = [sample_noise(base, tuple(latents.shape[1:]), "held out", k) for k in range(16)]
    noise, times = torch.stack([n for n, _ in drawn]), torch.stack([t for _, t in drawn])

    def loss() -> float:
        with torch.no_grad():
            told = base.encode_prompts(base.tokenize([photos[0].caption or PROMPT] * 16))
            return denoise_loss(base, latents.expand(16, -1, -1, -1), told, noise, times).mean().item()

    bare = loss()
    with wear(base.components, adapter.factors):
        assert loss() < 0.95 * bare


@pytest.mark.parametrize("negative", [None, "a hat"])
def test_a_batch_of_different_people_is_one_by_one(base: Base, negative: str | None) -> None:
    two, prompts = each(people(base, 2)), [PROMPT, "a [V] face wearing a hat"]
    worn = [Adapter(factors, "sks", base.fingerprint, base.source) for factors in two]
    options: dict[str, Any] = {"steps": 2, "guidance": 3.0, "negative": negative}
    together = generate_images(base, prompts, worn, images=2, batch=4, **options)
    alone = [
        picture
        for person, prompt in zip(worn, prompts, strict=True)
        for picture in generate_images(base, prompt, person, images=2, **options)
    ]
    assert worst(together, alone) <= 1
    assert worst(together, generate_images(base, prompts, images=2, **options)) > 5


def test_sparing_memory_changes_nothing(base: Base, folder: Path, micro_photos: Path) -> None:
    """Checkpointing gives the same people; a bfloat16 base nearly the same, in float32 adapters."""
    shots = list(read_faces(micro_photos).values())[:2]
    lora = Adapter(fresh(base.sites, 2), "sks", base.fingerprint, base.source)
    config = FinetuneConfig(rank=2, steps=2, batch=1, lr=1e-2)

    def trained(here: Base, **fields: Any) -> Iterator[tuple[Tensor, float]]:
        for one in finetune_adapters(here, [lora, lora], shots, config.model_copy(update=fields)):
            yield (
                torch.cat([(up @ down).flatten() for down, up in one.factors.values()]),
                float(one.metadata["loss"]),
            )

    def alike(one: Tensor, other: Tensor) -> bool:
        return bool(torch.cosine_similarity(one, other, dim=0) > 0.8)

    half = load_base(folder, "cpu", "bfloat16", resolution=32, class_word="face")
    autocast, spared_ones = trained(base, precision="bf16"), trained(base, checkpointing=True)
    for plain, spared, cast, rough in zip(trained(base), spared_ones, autocast, trained(half), strict=True):
        torch.testing.assert_close(spared[0], plain[0], rtol=1e-3, atol=1e-6)
        assert rough[0].dtype == torch.float32
        assert rough[1] == pytest.approx(plain[1], rel=0.05)
        assert alike(rough[0], plain[0]) and alike(cast[0], plain[0])


def test_float16_weights_train_only_where_gradients_are_scaled(
    micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    half = load_base(micro_dir, "cpu", "float16")
    with pytest.raises(InputError, match="dtype: float16 trains one person"):
        preoptimize(half, micro_photos, tmp_path / "bank", PreoptConfig())
    with pytest.raises(InputError, match="use dtype=bfloat16"):
        train_hypernet(half, micro_photos, tmp_path / "hyper", HypernetConfig())


@pytest.mark.filterwarnings("ignore:.*after the end of what is read")  # 16 tokens
def test_the_commands_take_any_base(tmp_path: Path, micro_photos: Path) -> None:
    pipelines.FAMILIES["SD3"]().save_pretrained(tmp_path / "base")
    config, photo, out = tmp_path / "config.toml", micro_photos / "person-0" / "0.png", tmp_path / "out"
    config.write_text(f"base = '{tmp_path / 'base'}'\nresolution = 32\ndevice = 'cpu'\n")
    person = str(out / FILES["kohya"])
    for words in (
        ["dreambooth", str(photo), "--out", str(out), "--steps", "2", "--set", "skip_sites=^text"],
        ["generate", "--prompt", PROMPT, "--adapter", person, "--out", str(tmp_path / "pictures")],
    ):
        result = CliRunner().invoke(cli.app, [*words, "--config", str(config)])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "pictures" / "000-0.png").is_file() and (out / FILES["diffusers"]).is_file()
