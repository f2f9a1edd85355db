"""One photo of a person → a LoRA → pictures, stage by stage, on the embedded avatars: no GPU, no network.

python examples/one_file.py                         # an avatar that no training has seen
python examples/one_file.py --photo face.png --out me
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers import DiffusionPipeline

from hyperdreambooth import Adapter, Personalizer
from hyperdreambooth.apps.inference import held_out
from hyperdreambooth.base.load import EMBEDDED
from hyperdreambooth.grid import grid

PROMPTS = (
    "a photo of a [V] face, laughing",
    "a photo of a [V] face, wearing sunglasses",
    "a pencil sketch of a [V] face",
)


def main(photo: Path | None, out: Path, steps: int | None = None, draw_steps: int = 25) -> Adapter:
    """Personalizes, and writes the prediction, the LoRA and a grid of pictures into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    photo = photo or held_out(0, out)[0]
    me = Personalizer.from_pretrained(device="cpu")

    # The hypernetwork predicts the person's numbers from the photo; nothing is trained (paper, section 4.2).
    prediction = me.predict(photo)
    assert prediction.lidb is not None
    prediction.save(out / "prediction.safetensors", format="lidb")
    print(f"predicted {prediction.lidb.numbers.numel():,} numbers, rank {prediction.rank}")

    # Relaxing writes the same ΔW at a higher rank (paper, section 4.3): it is exact and leaves room to train.
    relaxed = prediction.relax(rank=4)
    print(f"relaxed to rank {relaxed.rank}: ΔW changed by {distance(prediction, relaxed):.1e}")

    # The fast finetune trains the relaxed prediction on the photo, as the hypernetwork's folder recommends.
    adapter = me.personalize(photo, rank=4, steps=steps, prediction=prediction)
    print(f"finetuned {adapter.metadata['steps']} steps: ΔW changed by {distance(prediction, adapter):.1e}")
    adapter.save(out / "pytorch_lora_weights.safetensors")

    # The same prompts from the same noise, by the bare base, the prediction and the finished LoRA.
    stages = {"base": None, "prediction": prediction, "finetuned": adapter}
    rows = {name: me.generate(PROMPTS, worn, steps=draw_steps) for name, worn in stages.items()}

    # Any diffusion tool loads the file. Plain diffusers needs the trigger in place of [V].
    pipe = DiffusionPipeline.from_pretrained(EMBEDDED)
    pipe.load_lora_weights(out)
    plain = pipe(
        me.base.prompt(PROMPTS[0]), num_inference_steps=draw_steps, guidance_scale=4.0, guidance_rescale=0.7
    ).images
    pictures = grid([*rows.values(), plain], cell=me.base.resolution, gap=0, margin=0)
    pictures.save(out / "pictures.png")
    print(f"{out / 'pictures.png'}: {', '.join(rows)}, and one picture by plain diffusers")
    return adapter


def distance(one: Adapter, other: Adapter) -> float:
    """Returns the relative distance of two adapters over all sites: ‖ΔW - ΔW'‖ / ‖ΔW‖."""
    pairs = [(one.factors[site], other.factors[site]) for site in one.factors]
    apart = sum((up @ down - v @ u).square().sum().item() for (down, up), (u, v) in pairs)
    return (apart / sum((up @ down).square().sum().item() for (down, up), _ in pairs)) ** 0.5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photo", type=Path, help="your own picture of an avatar")
    parser.add_argument("--out", type=Path, default=Path("out/one_file"))
    chosen = parser.parse_args()
    main(chosen.photo, chosen.out)
