"""Weight pre-optimisation (paper, section 4.2): one LiDB for every person of a face set, many in one step.

Groups of people go through the loop of `training/loop.py`, all from one shared start, and finished groups are
appended to a bank. A group keeps checkpoints, so a kill loses at most `save_every` steps of one group. Groups
may be trained anywhere and in any order: they enter the bank in their own order.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from hyperdreambooth.preopt.groups import Group, HandOut, Results, Trained
from hyperdreambooth.runs import Run, environment
from hyperdreambooth.storage import Store
from hyperdreambooth.training.class_images import class_shots
from hyperdreambooth.training.loop import Outcome, train
from hyperdreambooth.training.shots import Shots, digest, inputs_of, shots_of
from hyperdreambooth.training.step import in_half
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


def preoptimize(base: Base, photos: str | Path, out: str | Path, config: PreoptConfig | None = None) -> Bank:
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
    return fill_bank(base, photos, out, config or PreoptConfig(), None)


@alone
def fill_bank(
    base: Base, photos: str | Path, out: str | Path, config: PreoptConfig, hand_out: HandOut | None
) -> Bank:
    """Does the work of `preoptimize`; `hand_out` has groups trained elsewhere, None trains them here."""
    store = Store(out)
    people, stage = read_faces(Path(photos)), prepare(base, config)
    bank = Bank.create(store, stage.manifest(), stage.start)
    run, groups = run_of(stage, store), groups_of(stage, people, bank)
    kept = Results(store.here / "groups")
    missing = [group for group in groups if group not in kept]
    done = len(people) - sum(len(group.names) for group in groups)
    with run.events.running("preoptimize", len(people), done):
        for place, trained in (hand_out or GroupTrainer(stage, store).each)(missing):
            kept.save(missing[place], trained)
            _collect(bank, run, kept, groups)
        _collect(bank, run, kept, groups)
    discard(kept.folder)
    bank.compact()
    return bank


def run_of(stage: Stage, out: Store) -> Run:
    """Opens the run folder of a bank; refuses one of another config or base."""
    return Run(out.here, stage.config, inputs={**stage.base.run_inputs, "sites": stage.layout.fingerprint})


def groups_of(stage: Stage, people: Mapping[str, Sequence[Photo]], there: Container[str]) -> list[Group]:
    """Returns the people who are not there yet in groups, which are the same wherever they are trained."""
    missing, size = [name for name in sorted(people) if name not in there], stage.config.identities_per_batch
    parts = [missing[at : at + size] for at in range(0, len(missing), size)]
    return [_group(stage, {name: tuple(people[name]) for name in part}) for part in parts]


def _group(stage: Stage, people: Mapping[str, tuple[Photo, ...]]) -> Group:
    """Names a group by its photos, so that what is left over of other people is never taken for its own."""
    names, photos = tuple(people), tuple(people.values())
    return Group(names, photos, digest(([*names], inputs_of(stage.base, photos, stage.config))))


def _collect(bank: Bank, run: Run, kept: Results, groups: list[Group]) -> None:
    """Moves results into the bank, in the order of the groups: so all banks of these people are the same."""
    while groups and groups[0] in kept:
        trained = kept.read(group := groups.pop(0))
        bank.append(group.names, trained.numbers, trained.figures)
        means = {name: column.mean().item() for name, column in trained.figures.items()}
        run.log(len(bank), identities=len(group.names), **means, seconds=trained.seconds)
        run.events.add("unit", done=len(bank), people=len(group.names))
        kept.discard(group)


class GroupTrainer:
    """Trains groups, one after another, on one base. What a group becomes depends on nothing else."""

    def __init__(self, stage: Stage, out: Store, checkpoints: bool = True) -> None:
        """Keeps latents in `out/cache` and, if asked to, the checkpoints of an unfinished group."""
        self.stage, self._out, self._checkpoints = stage, out, checkpoints

    @cached_property
    def _prior(self) -> list[Shots]:
        return class_shots(self.stage.base, self.stage.config)

    def each(self, groups: Sequence[Group]) -> Iterator[tuple[int, Trained]]:
        """Trains the groups in turn; yields the place of each and what it became."""
        for k, group in enumerate(groups):
            yield k, self(group, f"preoptimize {k + 1}/{len(groups)}")

    def __call__(self, group: Group, title: str = "preoptimize") -> Trained:
        """Trains one group."""
        stage, cache, began = self.stage, self._out / "cache", time.monotonic()
        base, config = stage.base, stage.config
        with base.lock:
            shots, judged = shots_of(base, group.photos, config, self._prior, cache)
            run = Run(self._out.here / "groups" / group.key, config) if self._checkpoints else None
            numbers, outcome = train_group(stage, shots, judged, run, title=title, cache=cache)
        tenth = max(1, len(outcome.history) // 10)
        figures = {
            "first_loss": outcome.history[:tenth].mean(0), "last_loss": outcome.history[-tenth:].mean(0)
        }  # fmt: skip
        return Trained(numbers, figures, round(time.monotonic() - began, 3))
