"""One base and several threads, as a small server uses it: each gets what it would get alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

import micro
from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig
from hyperdreambooth.finetune.dreambooth import dreambooth
from hyperdreambooth.finetune.fast import finetune_adapter
from hyperdreambooth.generate import generate_images, wearing
from hyperdreambooth.hypernet.predictor import load_hypernet
from hyperdreambooth.personalize import Personalizer


@pytest.fixture
def me(micro_base: Base, tmp_path: Path) -> Personalizer:
    return Personalizer(micro_base, load_hypernet(micro.hypernet(tmp_path, micro_base)))


def picture(me: Personalizer, person: Adapter) -> np.ndarray[Any, Any]:
    return np.asarray(me.generate("a [V] face", person, steps=3, size=32)[0])


def trained(me: Personalizer, person: Adapter, photo: Path) -> np.ndarray[Any, Any]:
    made = finetune_adapter(me.base, person, photo, FinetuneConfig(steps=2, batch=1, rank=2))
    return torch.cat([factor.flatten() for pair in made.factors.values() for factor in pair]).numpy()


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_two_people_drawn_and_trained_at_once_are_as_alone(
    scheduler: Any, me: Personalizer, micro_photos: Path
) -> None:
    me.base.pipe.scheduler = scheduler.from_config(me.base.pipe.scheduler.config, skip_prk_steps=True)
    photos = [micro_photos / f"person-{k}" / "0.png" for k in range(2)]
    people = [me.predict(photo) for photo in photos]
    jobs: list[Callable[[], Any]] = [
        *(lambda person=person: picture(me, person) for person in people),
        *(lambda k=k: trained(me, people[k], photos[k]) for k in range(2)),
    ]
    alone, together = [job() for job in jobs], [None] * len(jobs)
    ready = threading.Barrier(len(jobs))

    def serve(k: int) -> None:
        ready.wait()
        together[k] = jobs[k]()

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def is_free(base: Base) -> bool:
    """Whether another thread could use the base now."""
    found: list[bool] = []

    def ask() -> None:
        found.append(base.lock.acquire(blocking=False))
        if found[0]:
            base.lock.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("what", ["generate", "wearing", "finetune", "dreambooth", "personalize"])
def test_whoever_wears_draws_or_trains_is_alone_with_the_base(
    what: str, me: Personalizer, micro_photos: Path
) -> None:
    base, photo = me.base, micro_photos / "person-0" / "0.png"
    same = base.with_words("sks", "person"), Base.from_pipeline(base.pipe, "again")
    seen: list[bool] = []

    def look(*_: object) -> None:
        seen.extend(is_free(one) for one in (base, *same))

    person = me.predict(photo)
    if what == "generate":
        generate_images(base, "a [V] face", person, steps=1, drawn=look)
    elif what == "wearing":
        with wearing(base, person):
            look()
    elif what == "finetune":
        finetune_adapter(base, person, photo, FinetuneConfig(steps=1, batch=1), callback=look)
    elif what == "dreambooth":
        config = DreamboothConfig(steps=1, batch=1, down_dim=4, up_dim=3)
        dreambooth(base, photo, config=config, callback=look)
    else:
        me.personalize(photo, steps=1, config=FinetuneConfig(batch=1), callback=look)
    assert seen == [False] * 3
    assert is_free(base)


def test_an_error_leaves_the_base_free(micro_base: Base) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        generate_images(micro_base, "a face", steps=1, drawn=fail)
    assert is_free(micro_base)
