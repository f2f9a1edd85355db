"""Generation: the base's own pipeline, whatever is worn, whoever shares the batch."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, PNDMScheduler
from PIL import Image

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.generate import generate_images, wearing
from hyperdreambooth.lora.relax import concatenate, scaled
from hyperdreambooth.runs import rng
from hyperdreambooth.shapes import Factors

PROMPTS = ["a [V] face", "a photo of a [V] face smiling", "a [V] face wearing a hat"]


def people(base: Base, n: int, seed: int = 0, rank: int = 2, size: float = 0.3) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return {
        s.name: (
            torch.randn(n, rank, s.in_features, generator=generator) * size,
            torch.randn(n, s.out_features, rank, generator=generator) * size,
        )
        for s in base.sites
    }


def adapter(base: Base, factors: Factors, trigger: str = "sks") -> Adapter:
    return Adapter(factors, trigger, base.fingerprint, base.source)


def worst(one: list[Image.Image], other: list[Image.Image]) -> int:
    """The largest difference of any colour value, of 255."""
    assert len(one) == len(other)
    return max(
        int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
        for a, b in zip(one, other, strict=True)
    )


def test_it_is_the_pipelines_own_answer(micro_base: Base) -> None:
    ours = generate_images(micro_base, PROMPTS[:1], seed=3, steps=3, guidance=2.0, negative="a hat")
    theirs = micro_base.pipe(
        "a sks face",
        negative_prompt="a hat",
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=rng(3, "generate", PROMPTS[0], 0),
    ).images
    assert worst(ours, theirs) == 0


def test_guidance_is_rescaled_where_sampling_starts_from_noise_alone(micro_base: Base) -> None:
    own = micro_base.pipe.scheduler.config
    micro_base.pipe.scheduler = DDIMScheduler.from_config(own, rescale_betas_zero_snr=True)
    ours = generate_images(micro_base, "a face", seed=3, steps=3, guidance=6.0)
    plain, rescaled = (
        micro_base.pipe(
            "a face", num_inference_steps=3, guidance_scale=6.0, guidance_rescale=rescale,
            generator=rng(3, "generate", "a face", 0),
        ).images
        for rescale in (0.0, 0.7)
    )  # fmt: skip
    assert worst(ours, rescaled) == 0 < worst(ours, plain)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_person_for_each_prompt_equals_one_by_one(micro_base: Base, guidance: float) -> None:
    factors = people(micro_base, 3)
    three = [
        adapter(micro_base, {name: (down[[k]], up[[k]]) for name, (down, up) in factors.items()})
        for k in range(3)
    ]
    three[1] = three[1].relax(3)  # of another rank
    options: dict[str, Any] = {"images": 2, "steps": 3, "guidance": guidance}
    together = generate_images(micro_base, PROMPTS, three, batch=4, **options)
    alone: list[Image.Image] = []
    for own, prompt in zip(three, PROMPTS, strict=True):
        alone += generate_images(micro_base, prompt, own, **options)
    assert worst(together, alone) <= 1
    assert worst(together, generate_images(micro_base, PROMPTS, images=2, steps=3, guidance=guidance)) > 5


def test_a_picture_does_not_depend_on_its_batch(micro_base: Base) -> None:
    worn = adapter(micro_base, people(micro_base, 1))
    whole = generate_images(micro_base, PROMPTS, worn, images=2, steps=2, batch=6)
    assert worst(whole, generate_images(micro_base, PROMPTS, worn, images=2, steps=2, batch=1)) <= 1
    assert worst(whole[4:], generate_images(micro_base, PROMPTS[2:], worn, images=2, steps=2)) <= 1
    assert worst(whole[:1], whole[1:2]) > 5
    shown: list[tuple[int, bytes]] = []
    generate_images(
        micro_base, PROMPTS, worn, images=2, steps=2, batch=4,
        drawn=lambda at, picture: shown.append((at, picture.tobytes())),
    )  # fmt: skip
    assert [at for at, _ in shown] == list(range(6))
    seeds = generate_images(micro_base, [PROMPTS[0], PROMPTS[0]], worn, seed=[0, 1], steps=2)
    assert worst(seeds[:1], whole[:1]) <= 1
    assert worst(seeds[:1], seeds[1:]) > 5


def test_a_person_and_a_style_add_up_with_their_weights(micro_base: Base) -> None:
    person, style = people(micro_base, 1, 1), people(micro_base, 1, 2, rank=3)
    both = generate_images(
        micro_base, PROMPTS, adapter(micro_base, person) + 0.5 * adapter(micro_base, style, ""), steps=2
    )
    summed = concatenate(person, scaled(style, 0.5))
    assert worst(both, generate_images(micro_base, PROMPTS, adapter(micro_base, summed), steps=2)) <= 1
    nothing = generate_images(micro_base, PROMPTS, 0.0 * adapter(micro_base, person), steps=2)
    assert worst(nothing, generate_images(micro_base, PROMPTS, steps=2)) == 0


def test_the_base_is_bare_afterwards_even_after_an_error(
    micro_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: p.clone() for name, p in micro_base.pipe.unet.state_dict().items()}
    worn = adapter(micro_base, people(micro_base, 1))
    generate_images(micro_base, PROMPTS, worn, steps=1)

    def fail(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(micro_base.pipe), "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        generate_images(micro_base, PROMPTS, worn, steps=1)
    after = micro_base.pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_warns_when_nobody_calls_the_person(micro_base: Base) -> None:
    person = adapter(micro_base, people(micro_base, 1))
    with pytest.warns(UserWarning, match="'a face asksed' does not name the person: write \\[V\\] or 'sks'"):
        generate_images(micro_base, ["a face asksed"], person, steps=1)
    with pytest.warns(UserWarning, match="'a hat' does not name the person") as warned:
        generate_images(micro_base, ["a [V] face", "a hat"], [person, person], steps=1)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_images(micro_base, ["a sks face", "a [V] face"], person, steps=1)
        generate_images(
            micro_base, ["a face"], adapter(micro_base, people(micro_base, 1), trigger=""), steps=1
        )
        generate_images(micro_base, ["a face"], steps=1)


def test_the_placeholder_is_the_worn_persons_trigger(micro_base: Base) -> None:
    other = adapter(micro_base, people(micro_base, 1), trigger="zwx")
    named = generate_images(micro_base, ["a [V] face"], other, steps=2)
    tokens = micro_base.tokenize(["a [V] face", "a zwx face"])
    assert not torch.equal(tokens[0], tokens[1])
    own = generate_images(micro_base, ["a [V] face"], adapter(micro_base, other.factors), steps=2)
    assert worst(named, own) > 0


def test_prompts_have_the_bases_word_for_a_person(micro_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def draw(base: Base, texts: list[str], *_: object, **__: object) -> list[Image.Image]:
        asked.extend(texts)
        return [Image.new("RGB", (8, 8))] * len(texts)

    monkeypatch.setattr(Base, "draw", draw)
    generate_images(micro_base, ["a [V] {class_word}"])
    assert asked == ["a sks face"]


def test_a_styles_trigger_is_not_the_persons(micro_base: Base) -> None:
    style, person = (
        adapter(micro_base, people(micro_base, 1, 2), "zwx"),
        adapter(micro_base, people(micro_base, 1)),
    )
    with pytest.warns(UserWarning, match="no prompt names an adapter that is worn: write 'zwx'"):
        mixed = generate_images(micro_base, ["a [V] face"], style + person, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (
            worst(mixed, generate_images(micro_base, ["a sks face"], style + person, steps=2)) > 5
        )  # another seed
        again = generate_images(micro_base, ["a [V] face"], person + style, steps=2)
    assert worst(mixed, again) <= 1


def test_one_prompt_is_one_picture_and_two_alike_are_two(micro_base: Base) -> None:
    one = generate_images(micro_base, "a [V] face", steps=2)
    assert len(one) == 1
    two = generate_images(micro_base, ["a [V] face"] * 2, steps=2)
    assert worst(two[:1], one) <= 1 and worst(two[:1], two[1:]) > 5
    assert worst(two, generate_images(micro_base, "a [V] face", images=2, steps=2)) <= 1


def test_two_people_with_one_prompt_start_from_the_same_noise(micro_base: Base) -> None:
    ana, ben = (adapter(micro_base, people(micro_base, 1, seed)) for seed in (1, 2))
    together = generate_images(micro_base, ["a [V] face"] * 4, [ana, ben, ana, ben], steps=2)
    for person, own in ((ana, together[::2]), (ben, together[1::2])):
        assert worst(own, generate_images(micro_base, "a [V] face", person, images=2, steps=2)) <= 1


def test_a_lora_of_another_checkpoint_is_worn_with_a_warning(micro_base: Base) -> None:
    person = replace(adapter(micro_base, people(micro_base, 1)), base_fingerprint="f" * 16)
    with pytest.warns(
        UserWarning, match=rf"made for base {'f' * 16} \(.*\), this base .* is {micro_base.fingerprint}"
    ):
        worn = generate_images(micro_base, "a [V] face", person, steps=2)
    own = replace(person, base_fingerprint=micro_base.fingerprint)
    assert worst(worn, generate_images(micro_base, "a [V] face", own, steps=2)) == 0
    with pytest.warns(UserWarning, match="made for base"), wearing(micro_base, person):
        pass


def test_what_cannot_be_drawn_is_refused(micro_base: Base) -> None:
    person = adapter(micro_base, people(micro_base, 1))
    with pytest.raises(
        InputError, match=r"expected one, or one for each of 3 prompts, got 2; .*add adapters"
    ):
        generate_images(micro_base, PROMPTS, [person, person], steps=1)
    with pytest.raises(InputError, match="seed: expected one, or one for each of 3 prompts, got 2"):
        generate_images(micro_base, PROMPTS, person, seed=[1, 2], steps=1)
    with pytest.raises(InputError, match="multiple of 8"):
        generate_images(micro_base, PROMPTS, size=33, steps=1)
    stray = {"unet.nowhere.to_q": next(iter(people(micro_base, 1).values()))}
    with pytest.raises(InputError, match=r"unet\.nowhere"):
        generate_images(micro_base, PROMPTS, adapter(micro_base, stray), steps=1)
    assert generate_images(micro_base, PROMPTS[:1], size=40, steps=1)[0].size == (40, 40)


@pytest.mark.parametrize(
    ("kind", "prk", "steps", "possible"),
    [
        (PNDMScheduler, True, 2, False),
        (PNDMScheduler, True, 3, False),
        (PNDMScheduler, True, 4, True),
        (PNDMScheduler, False, 2, True),
        (DDIMScheduler, False, 1001, False),
        (LCMScheduler, False, 51, False),
        (LCMScheduler, False, 1, True),
    ],
)
def test_a_number_of_steps_that_the_scheduler_cannot_make_is_one_line(
    kind: Any, prk: bool, steps: int, possible: bool, micro_base: Base
) -> None:
    own = micro_base.pipe.scheduler.config
    options = {"skip_prk_steps": not prk} if kind is PNDMScheduler else {}
    micro_base.pipe.scheduler = kind.from_config(own, **options)
    if possible:
        assert len(generate_images(micro_base, "a face", steps=steps, guidance=1)) == 1
    else:
        with pytest.raises(InputError, match=f"^steps: the base's {kind.__name__} cannot make {steps} steps"):
            generate_images(micro_base, "a face", steps=steps)


@pytest.mark.parametrize(
    ("negative", "guidance", "words"),
    [
        ("hat", 1.0, "negative: not used at guidance 1; raise"),
        ("hat", 0.5, "negative: not used at guidance 0.5; raise"),
        ("hat " * 20, 4.0, "negative: too long, read as far as '.*hat'; shorten it"),
        ("hat", 4.0, None),
        ("", 1.0, None),
        (None, 1.0, None),
    ],
)
def test_a_negative_prompt_that_is_not_read_warns(
    negative: str | None, guidance: float, words: str | None, micro_base: Base
) -> None:
    with pytest.warns(UserWarning, match=words) if words else warnings.catch_warnings():
        generate_images(micro_base, "a face", steps=1, guidance=guidance, negative=negative)


def test_a_person_named_after_what_is_read_warns(micro_base: Base) -> None:
    person = adapter(micro_base, people(micro_base, 1))
    with pytest.warns(UserWarning, match="names the person after the end of what is read: move 'sks'"):
        generate_images(micro_base, ["hat " * 20 + "sks"], person, steps=1)
