"""Prompts and adapters → pictures, by the base's own pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeAlias

from PIL import Image

from hyperdreambooth.adapter import Adapter, weighted
from hyperdreambooth.base.conditioning import mentions
from hyperdreambooth.base.load import PLACEHOLDER, Base
from hyperdreambooth.files import InputError
from hyperdreambooth.lora.inject import Worn, wear
from hyperdreambooth.runs import rng
from hyperdreambooth.shapes import Factors
from hyperdreambooth.sites import wearable

Weighted: TypeAlias = Adapter | tuple[Adapter, float]


def generate(
    base: Base,
    prompts: Sequence[str],
    adapters: Sequence[Weighted] = (),
    *,
    per_prompt: Factors | None = None,
    seed: int | Sequence[int] = 0,
    steps: int = 25,
    guidance: float = 4.0,
    images: int = 1,
    negative: str | None = None,
    size: int | None = None,
    batch: int = 8,
    drawn: Callable[[int, Image.Image], None] | None = None,
) -> list[Image.Image]:
    """Draws pictures; the base is as before afterwards.

    A picture starts from noise that (seed, prompt, its number) name, so its neighbours do not change it.

    Args:
        base: the frozen base.
        prompts: `[V]` stands for the person, `{class_word}` for the base's word for one.
        adapters: worn together, each with a weight (1 where none is given): a person and a style, say.
        per_prompt: factors with `n = len(prompts)`: another person for each prompt.
        seed: of all pictures, or one a prompt.
        steps: denoising steps.
        guidance: classifier-free guidance; 1 or less for none.
        images: pictures a prompt.
        negative: what the pictures should not show.
        size: pixels; None for the base's own.
        batch: pictures drawn together.
        drawn: called with every picture and its place as soon as it is there.

    Returns:
        `len(prompts) * images` pictures, prompt by prompt.

    Raises:
        InputError: an adapter of another base, a weight that is no number, or a size the base cannot draw.
    """
    pairs = [(a, 1.0) if isinstance(a, Adapter) else a for a in adapters]
    texts = _texts(base, prompts, [adapter for adapter, _ in pairs])
    side = base.resolution if size is None else size
    base.check_side("size", side)
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    jobs = [(at, number) for at in range(len(prompts)) for number in range(images)]
    done: list[Image.Image] = []
    with ExitStack() as stack:
        for index, (adapter, weight) in enumerate(pairs):
            _check_fits(base, adapter)
            stack.enter_context(wear(base.components, weighted(adapter, weight), name=f"adapter_{index}"))
        first = _of(per_prompt, [0]) if per_prompt else None
        worn = stack.enter_context(wear(base.components, first, name="each")) if first else None
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            _change(worn, per_prompt, [at for at, _ in part])
            generators = [rng(seeds[at], "generate", prompts[at], number) for at, number in part]
            against = [base.prompt(negative)] * len(part) if negative else None
            here = [texts[at] for at, _ in part]
            done += base.draw(here, against, generators, steps=steps, guidance=guidance, side=side)
            for at in range(start, len(done)):
                if drawn is not None:
                    drawn(at, done[at])
    return done


def _of(factors: Factors, identities: list[int]) -> Factors:
    return {name: (down[identities], up[identities]) for name, (down, up) in factors.items()}


def _change(worn: Worn | None, factors: Factors | None, identities: list[int]) -> None:
    if worn is not None and factors is not None:
        worn.set(_of(factors, identities))


def _texts(base: Base, prompts: Sequence[str], adapters: Sequence[Adapter]) -> list[str]:
    """The prompts with `[V]` replaced by the trigger of the person worn, else by the base's own.

    Styles have triggers too: among several, the person's is the base's own wherever one of them has that.

    Warns of every prompt that does not call the person worn, and where none calls another adapter: it then
    does little, and nobody can see why.
    """
    triggers = [adapter.trigger for adapter in adapters if adapter.trigger]
    person = triggers[0] if triggers and base.trigger not in triggers else base.trigger
    texts = [base.prompt(prompt.replace(PLACEHOLDER, person)) for prompt in prompts]
    for trigger in dict.fromkeys(triggers):
        silent = [text for text in texts if not mentions(trigger, text)]
        if trigger == person:
            for text in silent:
                warnings.warn(f"{text!r} does not name the person: write [V] or {trigger!r}", stacklevel=3)
        elif len(silent) == len(texts):
            warnings.warn(f"no prompt names an adapter that is worn: write {trigger!r}", stacklevel=3)
    return texts


def _check_fits(base: Base, adapter: Adapter) -> None:
    """Refuses an adapter that was made for another base."""
    known = {site.name for site in wearable(base.components)}
    foreign = sorted(set(adapter.factors) - known)
    if adapter.base_fingerprint not in ("", base.fingerprint) or foreign:
        reason = (
            f"changes {foreign[0]}, which this base has not"
            if foreign
            else f"made for base {adapter.base_fingerprint}"
        )
        raise InputError(
            f"adapter: {reason}; this base {base.source} is {base.fingerprint}; load the base it was made for"
        )
