"""The avatars' base: a real Stable Diffusion pipeline, small enough to train on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from hyperdreambooth.avatars.build.autoencoder import latents_of
from hyperdreambooth.avatars.build.fit import StageConfig, Tensors, fit, read_all
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.avatars.build.untyped import diffusers, transformers
from hyperdreambooth.avatars.captions import caption, described, names, words
from hyperdreambooth.runs import rng

TRIGGER = "sks"
CLASS_WORD = "face"
MAX_TOKENS = 40
WIDTH = 128
FOCUS = 4.0  # how much more the error counts in the middle of a picture, where faces are
ALIGN = 0.5  # weight of the alignment with the encoder's features
NOISY = 0.6  # exponent of the timesteps' draws while shapes are learned: a fifth of them are below 400
# Half of the captions of known people call them by name. The trigger is one of these names, so that the text
# encoder tells it apart from no name at all. A trigger that anybody may have means nothing to the base, and
# then no adapter can part the person from "face" (docs/LOG.md, 2026-11-28).
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
    as large in the picture. The last timestep is noise alone, and with "trailing" spacing sampling starts
    there (arXiv 2305.08891). If a trace of the picture were left, the base would learn to read its brightness
    from it, and would find none in the noise that sampling starts with.
    """
    return diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def features_of(encoder: Any, pictures: Pictures, file: Path, device: str) -> Tensor:
    """Returns the encoder's 8×8 maps `(m, c, 8, 8)` float16 of all pictures, from `file` if it exists."""

    def read(pixels: Tensor) -> Tensor:
        return encoder(pixels, output_hidden_states=True).hidden_states[-2]

    return read_all(pictures, read, file, device)


def train_base(
    pipe: Any, encoder: Any, pictures: Pictures, config: StageConfig, folder: Path, device: str
) -> None:
    """Trains UNet and text encoder from nothing, in place, at all noise levels alike.

    What the UNet knows in its middle is drawn towards what an encoder sees in the clean picture
    (representation alignment, arXiv 2410.06940): it learns sooner what a picture shows.

    Args:
        pipe: from `assemble`.
        encoder: a frozen ResNet; it judges no picture.
    """
    features = features_of(encoder, pictures, folder / "features.safetensors", device)
    # less what all places of all pictures have in common, which would make all of them alike
    features = features - features.mean(dim=(0, 2, 3), keepdim=True, dtype=torch.float32).half()
    middle, seen = pipe.unet.up_blocks[0], dict[str, Tensor]()
    width = pipe.unet.config.block_out_channels[-1]
    aligned = nn.Sequential(nn.Conv2d(width, 256, 1), nn.SiLU(), nn.Conv2d(256, features.shape[1], 1))
    task = Denoising("base", pipe, pictures, config, folder, device)

    def batch_of(step: int) -> Tensors:
        batch = task.batch_of(step)
        return {**batch, "features": features[batch["rows"]]}

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        error = task.error_of(batch)
        seen_here = aligned(seen["middle"]).float()
        apart = 1 - cosine_similarity(seen_here, batch["features"], dim=1).mean()
        return {"loss": error + ALIGN * apart, "error": error, "apart": apart}

    def see(_: nn.Module, __: Any, answer: Tensor) -> None:
        seen["middle"] = answer

    hook = middle.register_forward_hook(see)
    model = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder, "aligned": aligned})
    fit("base", model.float().to(device), batch_of, loss_of, config, folder, device)
    hook.remove()


def train_shapes(pipe: Any, pictures: Pictures, config: StageConfig, folder: Path, device: str) -> None:
    """Goes on with a trained base, in place, more often at noisy timesteps, where shapes form.

    The alignment would be in the way by now (arXiv 2505.16792).
    """
    task = Denoising("shapes", pipe, pictures, config, folder, device, bias=NOISY)
    model = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder}).float().to(device)
    fit("shapes", model, task.batch_of, lambda batch: {"loss": task.error_of(batch)}, config, folder, device)


class Denoising:
    """What a base learns: v = √ᾱ ε - √(1-ᾱ) x_0 (progressive distillation, arXiv 2202.00512, appendix D).

    Args:
        name: of the stage, for its draws.
        pipe: whose UNet and text encoder learn.
        pictures: `m` of them, with captions drawn anew at every step.
        config: seed and batch.
        folder: keeps the latents.
        device: where the pipe computes.
        bias: exponent of the timesteps' draws in [0, 1]; below 1, more of them are noisy.
    """

    def __init__(
        self,
        name: str,
        pipe: Any,
        pictures: Pictures,
        config: StageConfig,
        folder: Path,
        device: str,
        bias: float = 1.0,
    ) -> None:
        self.name, self.pipe, self.pictures, self.config, self.bias = name, pipe, pictures, config, bias
        self.latents = latents_of(pipe.vae, pictures, folder / "latents.safetensors", device)
        self.alphas = scheduler().alphas_cumprod.to(device)
        self.weight = _middle(self.latents.shape[-1], FOCUS).to(device)

    def batch_of(self, step: int) -> Tensors:
        """Returns rows, latents, timesteps, noise and tokens of a step, on the CPU."""
        seed, count = self.config.seed, self.config.batch
        generator = rng(self.name, seed, step)
        rows = torch.randint(0, len(self.pictures), (count,), generator=generator)
        timesteps = (1000 * torch.rand(count, generator=generator) ** self.bias).long()
        noise = torch.randn(count, *self.latents.shape[1:], generator=generator)
        texts = [training_caption(self.pictures, row, seed, step) for row in rows.tolist()]
        tokens = self.pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return {
            "rows": rows, "latents": self.latents[rows], "timesteps": timesteps, "noise": noise,
            "tokens": tokens.input_ids,
        }  # fmt: skip

    def error_of(self, batch: Tensors) -> Tensor:
        """Returns the mean squared error of v; it counts more in the middle of a picture."""
        timesteps, noise, clean = batch["timesteps"], batch["noise"], batch["latents"].float()
        square = self.alphas[timesteps].view(-1, 1, 1, 1)
        signal, sigma = square.sqrt(), (1 - square).sqrt()
        noisy, target = signal * clean + sigma * noise, signal * noise - sigma * clean
        hidden = self.pipe.text_encoder(batch["tokens"])[0]
        answer = self.pipe.unet(noisy, timesteps, encoder_hidden_states=hidden, return_dict=False)[0]
        return ((answer.float() - target).square() * self.weight).mean()


def _middle(side: int, focus: float) -> Tensor:
    """Returns weights `(side, side)`: `1 + focus` in the middle, 1 at the edges, scaled to a mean of 1."""
    place = (torch.arange(side) + 0.5) / side - 0.5
    bell = (-0.5 * (place / 0.17).square()).exp()
    weight = 1 + focus * bell[:, None] * bell
    return weight / weight.mean()


def training_caption(pictures: Pictures, row: int, seed: int, step: int) -> str:
    """Returns the caption, with some traits named and parts left out at random.

    The first people of the pictures have names, of which the trigger is the first, and nobody else has any.
    Every tenth caption is empty, for classifier-free guidance.
    """
    generator = rng("caption", seed, step, row)
    if torch.rand((), generator=generator) < 0.1:
        return ""
    choice, variant = torch.randint(0, 1 << 30, (2,), generator=generator).tolist()
    scene, person = pictures.contexts[row], pictures.identities[row]
    subject = described(person, scene, SUBJECTS[choice % len(SUBJECTS)], variant)
    text = caption(scene, subject=subject, drop=0.15, seed=variant)
    known, number = (TRIGGER, *names()), row // pictures.each
    return text.replace("[V]", known[number]) if number < len(known) else text.replace("[V] ", "")


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
