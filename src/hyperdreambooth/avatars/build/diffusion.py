"""The avatars' base: a real Stable Diffusion pipeline, small enough to train on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from hyperdreambooth.avatars.build.autoencoder import latents_of
from hyperdreambooth.avatars.build.fit import StageConfig, Tensors, fit
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.avatars.build.untyped import diffusers, transformers
from hyperdreambooth.avatars.captions import caption, described, names, words
from hyperdreambooth.files import load_tensors, save_tensors
from hyperdreambooth.precision import autocast
from hyperdreambooth.runs import rng

TRIGGER = "sks"
CLASS_WORD = "face"
MAX_TOKENS = 40
WIDTH = 128
FOCUS = 4.0  # how much more the error counts in the middle of a picture, where faces are
ALIGN = 0.5  # weight of the alignment with the encoder's features
# Half of the captions call the person by a name or the trigger. The trigger stands for so many people that it
# means an ordinary face until an adapter is worn. Names keep the text encoder from overlooking what it is.
SUBJECTS = ("[V] face", "[V] face", "face", "person")


def new_tokenizer() -> Any:
    """Returns a CLIP tokenizer in which each word of a caption, each name and the trigger is a token.

    Other words are spelled in bytes and in endings of those words.
    """
    letters = [byte + ending for ending in ("", "</w>") for byte in sorted(ByteLevel.alphabet())]
    vocab = {letter: number for number, letter in enumerate(letters)}
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({*words(), *names(), TRIGGER}):
        # From the end, so that only one merge fits at a time: "ho" of "hood" would split "photo".
        right = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            merges[(letter, right)] = None
            right = letter + right
            vocab.setdefault(right, len(vocab))
    # Special tokens come last because transformers looks for the end of a text at the largest token number.
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return transformers.CLIPTokenizer(
        vocab=vocab, merges=list(merges), model_max_length=MAX_TOKENS, pad_token="<|endoftext|>"
    )


def new_text_encoder(tokenizer: Any) -> Any:
    """Returns a text encoder of three layers of width 128."""
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_attention_heads=4,
            num_hidden_layers=3,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",  # for the reason in `plain_attention`
        )
    )


def new_unet(latent_channels: int) -> Any:
    """Returns a UNet with attention at 8×8 and 4×4 only; at 16×16 it costs nearly half of a step."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=1,
        block_out_channels=(96, 128, 192),
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    plain_attention(unet)
    return unet


def plain_attention(unet: Any) -> None:
    """Replaces fused attention, whose backward pass is 1.4 times slower than plain products on a CPU."""
    unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())


def scheduler() -> Any:
    """Returns Stable Diffusion's noise schedule with DPM-Solver++ (arXiv 2211.01095) as the sampler.

    The base predicts v, as Stable Diffusion 2 does: where noise prevails, an error in ε would be many times
    as large in the picture. With "trailing" spacing, sampling starts at the last timestep, as it should
    (arXiv 2305.08891).
    """
    return diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def features_of(encoder: Any, pictures: Pictures, file: Path, device: str) -> Tensor:
    """Returns the encoder's 8×8 maps `(m, c, 8, 8)` float16, less their mean, from `file` if it exists."""
    if file.is_file():
        return load_tensors(file)[0]["features"]
    parts: list[Tensor] = []
    for rows in torch.arange(len(pictures)).split(64):
        with autocast("bf16", torch.device(device)):
            maps = encoder(pictures.batch(rows).to(device), output_hidden_states=True).hidden_states
        parts.append(maps[-2].half().cpu())
    features = torch.cat(parts)
    features -= features.mean(dim=(0, 2, 3), keepdim=True, dtype=torch.float32).half()
    save_tensors(file, {"features": features})
    return features


def train_base(
    pipe: Any, encoder: Any, pictures: Pictures, config: StageConfig, folder: Path, device: str
) -> None:
    """Trains UNet and text encoder together on rendered pictures and their captions, in place.

    The loss is the squared error of v = √ᾱ ε - √(1-ᾱ) x_0 (progressive distillation, arXiv 2202.00512,
    appendix D) at all noise levels alike. Besides, what the UNet knows in its middle is drawn towards what an
    encoder sees in the clean picture (representation alignment, arXiv 2410.06940): it learns sooner what a
    picture shows.

    Args:
        pipe: from `assemble`.
        encoder: a frozen ResNet; it judges no picture.
    """
    vae, tokenizer = pipe.vae, pipe.tokenizer
    latents = latents_of(vae, pictures, folder / "latents.safetensors", device)
    features = features_of(encoder, pictures, folder / "features.safetensors", device)
    middle, seen = pipe.unet.up_blocks[0], dict[str, Tensor]()
    width = pipe.unet.config.block_out_channels[-1]
    aligned = nn.Sequential(nn.Conv2d(width, 256, 1), nn.SiLU(), nn.Conv2d(256, features.shape[1], 1))
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "aligned": aligned}
    model = nn.ModuleDict(parts).float().to(device)
    alphas = scheduler().alphas_cumprod.to(device)
    weight = _middle(latents.shape[-1], FOCUS).to(device)

    def batch_of(step: int) -> Tensors:
        generator = rng("base", config.seed, step)
        rows = torch.randint(0, len(pictures), (config.batch,), generator=generator)
        timesteps = torch.randint(0, 1000, (config.batch,), generator=generator)
        noise = torch.randn(config.batch, *latents.shape[1:], generator=generator)
        texts = [training_caption(pictures, row, config.seed, step) for row in rows.tolist()]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {
            "latents": latents[rows], "features": features[rows], "timesteps": timesteps, "noise": noise,
            "tokens": tokens,
        }  # fmt: skip

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        timesteps, noise = batch["timesteps"], batch["noise"]
        square = alphas[timesteps].view(-1, 1, 1, 1)
        signal, sigma, clean = square.sqrt(), (1 - square).sqrt(), batch["latents"].float()
        noisy, target = signal * clean + sigma * noise, signal * noise - sigma * clean
        hidden = model["text_encoder"](batch["tokens"])[0]
        answer = model["unet"](noisy, timesteps, encoder_hidden_states=hidden, return_dict=False)[0].float()
        error = ((answer - target).square() * weight).mean()
        apart = (
            1 - cosine_similarity(model["aligned"](seen["middle"]).float(), batch["features"], dim=1).mean()
        )
        return {"loss": error + ALIGN * apart, "error": error, "apart": apart}

    def see(_: nn.Module, __: Any, answer: Tensor) -> None:
        seen["middle"] = answer

    hook = middle.register_forward_hook(see)
    fit("base", model, batch_of, loss_of, config, folder, device)
    hook.remove()


def _middle(side: int, focus: float) -> Tensor:
    """Returns weights `(side, side)`: `1 + focus` in the middle, 1 at the edges, scaled to a mean of 1."""
    place = (torch.arange(side) + 0.5) / side - 0.5
    bell = (-0.5 * (place / 0.17).square()).exp()
    weight = 1 + focus * bell[:, None] * bell
    return weight / weight.mean()


def training_caption(pictures: Pictures, row: int, seed: int, step: int) -> str:
    """Returns the caption, with some traits named and parts left out at random.

    The first people of the pictures have names, and the trigger stands for all others. Every tenth caption is
    empty, for classifier-free guidance.
    """
    generator = rng("caption", seed, step, row)
    if torch.rand((), generator=generator) < 0.1:
        return ""
    choice, variant = torch.randint(0, 1 << 30, (2,), generator=generator).tolist()
    scene, person = pictures.contexts[row], pictures.identities[row]
    subject = described(person, scene, SUBJECTS[choice % len(SUBJECTS)], variant)
    text = caption(scene, subject=subject, drop=0.15, seed=variant)
    known, number = names(), row // pictures.each
    return text.replace("[V]", known[number] if number < len(known) else TRIGGER)


def assemble(vae: Any, seed: int) -> Any:
    """Returns an ordinary untrained pipeline around a VAE."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        unet=new_unet(vae.config.latent_channels),
        text_encoder=new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
