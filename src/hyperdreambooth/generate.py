"""Prompts and adapters → pictures, by the base's own pipeline."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from PIL import Image

from hyperdreambooth.adapter import Adapter, check_wearable
from hyperdreambooth.base.alone import alone
from hyperdreambooth.base.conditioning import mentions, read_part
from hyperdreambooth.base.load import PLACEHOLDER, Base
from hyperdreambooth.captured import GRAPHS, Captured
from hyperdreambooth.files import InputError
from hyperdreambooth.lora.inject import Worn, wear
from hyperdreambooth.lora.relax import padded
from hyperdreambooth.runs import rng
from hyperdreambooth.shapes import Factors
from hyperdreambooth.sites import linear_sites

Drawn: TypeAlias = Callable[[int, Image.Image], None]
"""Is called with the place of a picture in the result, and the picture, as soon as it is drawn."""


@alone
def generate_images(
    base: Base,
    prompts: str | Sequence[str],
    adapter: Adapter | Sequence[Adapter] | None = None,
    *,
    seed: int | Sequence[int] = 0,
    steps: int = 25,
    guidance: float = 4.0,
    images: int = 1,
    negative: str | None = None,
    size: int | None = None,
    batch: int = 8,
    drawn: Drawn | None = None,
) -> list[Image.Image]:
    """Draws pictures; the base is as before afterwards.

    The starting noise of a picture depends on the seed, the prompt and how often this prompt was drawn before
    with this adapter. So a picture does not depend on its neighbours, a prompt given twice makes two
    pictures, and two people with one prompt start from the same noise.

    Args:
        base: the frozen base.
        prompts: one or several; `[V]` stands for the person, `{class_word}` for the base's word for people.
        adapter: the person; a sequence gives every prompt a person of its own, in one batch; None for the
            bare base. Several adapters for one picture are a sum: `0.8 * ana + 0.6 * style`.
        seed: of all pictures, or one for each prompt.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 or less for none.
        images: pictures of each prompt.
        negative: what the pictures should not show.
        size: side in pixels; None for the base's own.
        batch: pictures drawn together.
        drawn: called with every picture and its place in the result.

    Returns:
        `len(prompts) * images` pictures, prompt by prompt.

    Raises:
        InputError: an adapter that the base cannot wear, another number of adapters or seeds than of prompts,
            a size that the base cannot draw, or a number of steps that its scheduler cannot make.
    """
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    people = _one_each(adapter, len(asked))
    seeds = [seed] * len(asked) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(asked):
        raise InputError(f"seed: expected one, or one for each of {len(asked)} prompts, got {len(seeds)}")
    for name, value in (("steps", steps), ("images", images), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name}: expected 1 or more, got {value}")
    side = base.resolution if size is None else size
    base.check_side("size", side)
    base.check_steps("steps", steps)
    check_wearable(base, *_distinct(people))
    texts = _texts(base, asked, people)
    _check_negative(base, negative, guidance)
    jobs = _jobs(list(zip(seeds, asked, map(id, people), strict=True)), images)
    done: list[Image.Image] = []
    with wearing_each(base, people) as put:
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            put([at for at, _ in part])
            with recorded(base):
                done += base.draw(
                    [texts[at] for at, _ in part],
                    [base.prompt(negative)] * len(part) if negative else None,
                    [rng(seeds[at], "generate", asked[at], number) for at, number in part],
                    steps=steps,
                    guidance=guidance,
                    side=side,
                )
            if drawn is not None:
                for at in range(start, len(done)):
                    drawn(at, done[at])
    return done


@contextmanager
def recorded(base: Base) -> Generator[None]:
    """Lets a GPU record the denoiser's call, which is the same in all steps of the pictures of the block.

    What the base wears must not change in the block.
    """
    denoiser: Any = base.denoiser
    hooked = "forward" in vars(denoiser)  # by whoever moves it, or reads along
    if base.device.type not in GRAPHS or base.offload or hooked:
        yield
        return
    denoiser.forward = Captured(denoiser.forward, base.device)
    try:
        yield
    finally:
        del denoiser.forward


def _one_each(adapter: Any, count: int) -> list[Adapter | None]:
    """The adapter of every prompt, from whatever a caller without types passed."""
    if adapter is None or isinstance(adapter, Adapter):
        return [adapter] * count
    many: list[Any] = list(adapter) if isinstance(adapter, list | tuple) else [adapter]
    if strange := [one for one in many if not isinstance(one, Adapter)]:
        what = type(strange[0]).__name__
        raise InputError(f"adapter: expected an Adapter, got {what}; load a file with load_adapter first")
    if len(many) != count:
        raise InputError(
            f"adapter: expected one, or one for each of {count} prompts, got {len(many)}; repeat a prompt to "
            "draw several people with it, or add adapters to wear them at once: 0.8 * ana + 0.6 * style"
        )
    return many


def _distinct(people: Sequence[Adapter | None]) -> list[Adapter]:
    return list({id(person): person for person in people if person is not None}.values())


def _jobs(asked: Sequence[tuple[int, str, int]], images: int) -> list[tuple[int, int]]:
    """Every picture as (its place in `asked`, how many of the same seed, prompt and person precede it)."""
    before, jobs = Counter[tuple[int, str, int]](), list[tuple[int, int]]()
    for at, one in enumerate(asked):
        jobs += [(at, before[one] + number) for number in range(images)]
        before[one] += images
    return jobs


@contextmanager
def wearing_each(base: Base, people: Sequence[Adapter | None]) -> Generator[Callable[[list[int]], None]]:
    """The base wears the adapters of some places of a batch, as the callable that it gives is asked to."""
    distinct = _distinct(people)
    if not distinct:
        yield lambda places: None
        return
    everybody = padded([one.factors for one in distinct]) if len(distinct) > 1 else distinct[0].factors
    if len(distinct) > 1 and everybody.keys() - {site.name for site in linear_sites(base.wearers)}:
        raise InputError("adapter: one that changes convolutions cannot share a batch; draw it alone")
    row = {id(person): k for k, person in enumerate(distinct)}
    rows = [row[id(person)] for person in people]

    def chosen(places: list[int]) -> Factors:
        own = [rows[at] for at in places]
        own = own[:1] if len(set(own)) == 1 else own  # one person for the whole batch needs no copies
        return {site: (down[own], up[own]) for site, (down, up) in everybody.items()}

    with wear(base.wearers, chosen([0])) as worn:
        yield lambda places: worn.set(chosen(places))


@contextmanager
def wearing(base: Base, adapter: Adapter) -> Generator[Worn]:
    """The base wears an adapter in the block and is as before afterwards, bit for bit.

    Other threads that draw or train with this base wait until the block ends.

    Raises:
        InputError: an adapter that the base cannot wear.
    """
    check_wearable(base, adapter)
    with base.lock, wear(base.wearers, adapter.factors) as worn:
        yield worn


def _check_negative(base: Base, negative: str | None, guidance: float) -> None:
    """Warns of a negative prompt that is not used, or not all of it."""
    if not negative:
        return
    if guidance <= 1:
        warnings.warn(f"negative: not used at guidance {guidance:g}; raise guidance above 1", stacklevel=4)
    elif (read := read_part(base, negative)) != base.prompt(negative).rstrip():
        warnings.warn(f"negative: too long, read as far as {read[-30:]!r}; shorten it", stacklevel=4)


def _texts(base: Base, prompts: Sequence[str], people: Sequence[Adapter | None]) -> list[str]:
    """The prompts with `[V]` replaced by the trigger of the person worn.

    Of an adapter with several triggers, the person's is the base's own trigger where it is one of them, else
    the first.

    Warns of every prompt that does not name its person, and of triggers of other terms (a style's) that no
    prompt names: such an adapter does little, and nobody sees why.
    """
    texts: list[str] = []
    unused: dict[str, None] = {}
    for prompt, worn in zip(prompts, people, strict=True):
        triggers = worn.triggers if worn else ()
        person = triggers[0] if triggers and base.trigger not in triggers else base.trigger
        text = base.prompt(prompt.replace(PLACEHOLDER, person))
        if person in triggers and not mentions(person, text):
            warnings.warn(f"{text!r} does not name the person: write [V] or {person!r}", stacklevel=4)
        elif person in triggers and not mentions(person, read_part(base, text)):
            warnings.warn(
                f"{text!r} names the person after the end of what is read: move {person!r} towards the start",
                stacklevel=4,
            )
        unused |= dict.fromkeys(word for word in triggers if word != person)
        texts.append(text)
    for word in unused:
        if not any(mentions(word, text) for text in texts):
            warnings.warn(f"no prompt names an adapter that is worn: write {word!r}", stacklevel=4)
    return texts
