"""Weight pre-optimisation (paper, section 4.2): one LiDB for every person of a face set, many in one step.

Groups of people go through the loop of `training/loop.py`, all from one shared start, and finished groups are
appended to a bank. A group keeps checkpoints, so a kill loses at most `save_every` steps of one group.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hyperdreambooth.base.alone import alone
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo, read_faces
from hyperdreambooth.files import InputError, discard
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.basis import Basis, basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.weights import Layout, start
from hyperdreambooth.preopt.config import PreoptConfig
from hyperdreambooth.runs import Run, environment
from hyperdreambooth.storage import Store
from hyperdreambooth.training.class_images import class_shots
from hyperdreambooth.training.loop import Outcome, in_half, train
from hyperdreambooth.training.shots import Shots, digest, inputs_of, shots_of
from hyperdreambooth.training.trainable import numbers_of


@dataclass(frozen=True)
class Stage:
    """What all groups share.

    Attributes:
        base: the frozen base.
        config: the settings.
        layout: where each site's numbers lie.
        basis: the aux bases, on the base's device.
        start: the point that everybody starts from, `(P,)`.
    """

    base: Base
    config: PreoptConfig
    layout: Layout
    basis: Basis
    start: Tensor

    def manifest(self) -> dict[str, Any]:
        """Returns how the bank is made; a bank with another manifest is refused."""
        return {
            "config": self.config.model_dump(mode="json"),
            "base_fingerprint": self.base.fingerprint,
            "base_source": str(self.base.source),
            "site_fingerprint": self.layout.fingerprint,
            "basis_source": self.basis.source,
            "basis_fingerprint": basis_fingerprint(self.basis),
            "trigger": self.base.trigger,
            "resolution": self.base.resolution,
            "layout": self.layout.to_json(),
            "environment": environment(),
        }


def prepare(base: Base, config: PreoptConfig) -> Stage:
    """Chooses the sites and draws the bases and the start from the config's seeds.

    Raises:
        InputError: float16, by the weights or by autocast.
    """
    if in_half(base, config):
        raise InputError(
            "dtype: float16 trains one person at a time, but a bank trains many; use bfloat16 or float32"
        )
    sites = tuple(s for s in base.sites if config.text_encoder or s.component == base.family.DENOISER)
    layout = Layout(sites, config.rank, config.down_dim, config.up_dim)
    basis = seeded_basis(sites, config.down_dim, config.up_dim, config.basis_seed, base.device)
    return Stage(base, config, layout, basis, start(layout, config.seed))


def train_group(
    stage: Stage,
    people: Sequence[Sequence[Shots]],
    judged: Sequence[Sequence[Shots]] = (),
    run: Run | None = None,
    **options: Any,
) -> tuple[Tensor, Outcome]:
    """Trains some people side by side from the shared start; the base is as before afterwards.

    Args:
        stage: what all groups share.
        people: the shots of `n` people.
        judged: the shots that `steps="auto"` judges by.
        run: the run folder of the group; None to keep none.
        options: other arguments of `training.loop.train`.

    Returns:
        The numbers `(n, P)` on the CPU, and how the training ended.
    """
    base = stage.base
    trainable = numbers_of(stage.layout, stage.basis, stage.start, len(people), base.device)
    outcome = train(base, trainable, people, stage.config, run, judged=judged, **options)
    return trainable.leaves["numbers"].detach().cpu(), outcome


@alone
def preoptimize(
    base: Base, photos: str | Path, out: str | Path | Store, config: PreoptConfig | None = None
) -> Bank:
    """Makes or continues a bank; the same call resumes.

    Args:
        base: the frozen base.
        photos: a folder with a subfolder for each person. People may be added to a finished bank.
        out: the folder of the bank with the cached latents, on a disk or in an object store (`s3://…`). The
            log and the checkpoints lie in it too, or for an object store in `HDB_CACHE`.
        config: the settings; a bank made with others is refused.

    Returns:
        The bank with every person of `photos`.

    Raises:
        InputError: unusable photos, a bank of another config or base, or a person whose training diverged.
    """
    config, store = config or PreoptConfig(), Store(out)
    work, cache = store.here, store / "cache"
    people, stage = read_faces(Path(photos)), prepare(base, config)
    bank = Bank.create(store, stage.manifest(), stage.start)
    run = Run(work, config, inputs={**base.run_inputs, "sites": stage.layout.fingerprint})
    # groups end in order and whole, so what is missing after a kill falls into the groups of the first call
    missing = [name for name in sorted(people) if name not in bank]
    size = config.identities_per_batch
    groups = [missing[at : at + size] for at in range(0, len(missing), size)]
    prior = class_shots(base, config) if groups else []
    done = len(people) - len(missing)
    with run.events.running("preoptimize", len(people), done):
        for k, group in enumerate(groups, start=1):
            began = time.monotonic()
            members: list[tuple[Photo, ...]] = [people[name] for name in group]
            shots, judged = shots_of(base, members, config, prior, cache)
            # named by its photos: a leftover of other people is never taken for this group's checkpoint
            folder = work / "groups" / digest((group, inputs_of(base, members, config)))
            title = f"preoptimize {k}/{len(groups)}"
            numbers, outcome = train_group(
                stage, shots, judged, Run(folder, config), title=title, cache=cache
            )
            tenth = max(1, len(outcome.history) // 10)
            figures = {
                "first_loss": outcome.history[:tenth].mean(0), "last_loss": outcome.history[-tenth:].mean(0)
            }  # fmt: skip
            bank.append(group, numbers, figures)
            means = {name: column.mean().item() for name, column in figures.items()}
            run.log(len(bank), identities=len(group), **means, seconds=round(time.monotonic() - began, 3))
            done += len(group)
            run.events.add("unit", done=done, people=len(group))
            discard(folder)
    discard(work / "groups")
    bank.compact()
    return bank
