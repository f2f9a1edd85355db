"""One type over what a base can wear: a LiDB (numbers over aux bases) or a standard LoRA."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from hyperdreambooth.files import InputError
from hyperdreambooth.lidb.basis import Basis, seed_of, seeded_basis
from hyperdreambooth.lidb.file import Lidb, check_fits, lidb_header, load_lidb, save_lidb
from hyperdreambooth.lidb.weights import factors as lidb_factors
from hyperdreambooth.lora.formats.headers import BASE_FINGERPRINT, LoraInfo
from hyperdreambooth.lora.formats.read import read_lora
from hyperdreambooth.lora.formats.write import write_lora
from hyperdreambooth.lora.relax import add_up, inner_product, relax, scaled, truncate
from hyperdreambooth.shapes import Factors, Site

Format = Literal["diffusers", "kohya", "lidb"]


@dataclass
class Adapter:
    """What a base can wear, for one person.

    Attributes:
        factors: site → (down `(1, r, i)`, up `(1, o, r)`).
        trigger: the rare word that calls this person; empty where a foreign file does not name it.
        base_fingerprint: of the base it was made for; empty where a foreign file does not name it.
        base_source: folder or hub id of that base; information only.
        lidb: the numbers, as long as the factors are still exactly what they say.
        metadata: header of the file it came from.
    """

    factors: Factors = field(repr=False)  # thousands of lines
    trigger: str
    base_fingerprint: str
    base_source: str
    lidb: Lidb | None = field(default=None, repr=False)
    metadata: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def rank(self) -> int:
        """The largest rank of any site."""
        return max(down.shape[1] for down, _ in self.factors.values())

    @property
    def kind(self) -> str:
        """`lidb` as long as it lies in the space of the aux bases, `lora` afterwards."""
        return "lora" if self.lidb is None else "lidb"

    @staticmethod
    def from_lidb(lidb: Lidb, basis: Basis) -> Adapter:
        """The adapter a person's numbers stand for.

        Args:
            lidb: the person.
            basis: the bases the numbers were made over (`check_fits` tells).
        """
        made = lidb_factors(lidb.layout, basis, lidb.numbers[None])
        return Adapter(made, lidb.trigger, lidb.base_fingerprint, lidb.base_source, lidb)

    def relax(self, rank: int, seed: int = 0) -> Adapter:
        """The same ΔW as a LoRA of a higher rank, every slot alive (paper, section 4.3).

        Raises:
            InputError: the adapter does not fit into the rank, or no layer has so many.
        """
        check_rank(rank, self.factors)
        try:
            relaxed = relax(self.factors, rank, seed)
        except ValueError as error:
            raise InputError(f"rank {rank}: {error}; pass at least {self.rank}") from None
        return replace(self, factors=relaxed, lidb=None, metadata=dict(self.metadata))

    def lora_info(self, title: str, resolution: int) -> LoraInfo:
        """What headers and cards tell of it; of a base on somebody's disk, the folder's name alone."""
        steps = self.metadata.get("steps", "")  # a stranger's file may have anything there
        place = Path(self.base_source)
        name = place.name if place.is_absolute() else self.base_source
        taken = int(steps) if steps.isdecimal() else 0
        return LoraInfo(self.trigger, name, resolution, title, taken, self.base_fingerprint)

    def save(
        self,
        path: Path | str,
        format: Format = "diffusers",
        resolution: int = 512,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Writes the adapter as one whole safetensors file.

        Args:
            path: the file.
            format: `diffusers` (`pipe.load_lora_weights`), `kohya` (ComfyUI, A1111, Forge), or `lidb`.
            resolution: pixels a side it was trained at; goes into a LoRA's header.
            dtype: number format in the file.

        Raises:
            InputError: an unknown format, or `lidb` for what has left that space.
        """
        path = Path(path)
        if format == "lidb":
            if self.lidb is None:
                raise InputError(f"{path}: a relaxed or finetuned adapter is no LiDB; use diffusers or kohya")
            save_lidb(path, self.lidb, dtype)
        elif format in ("diffusers", "kohya"):
            facts = self.lora_info(path.name.split(".")[0], resolution)
            write_lora(path, self.factors, format, facts, dtype)
        else:
            raise InputError(f"format {format!r} is unknown; use diffusers, kohya or lidb")


def load_adapter(
    path: Path | str,
    base_sites: Sequence[Site],
    base_fingerprint: str,
    basis_of: Callable[[str], Basis] | None = None,
    layers: Sequence[Site] = (),
) -> Adapter:
    """Reads any adapter file: the header of a LiDB tells it from a LoRA in diffusers or kohya form.

    Args:
        path: the file.
        base_sites: all sites of the base that is to wear it.
        base_fingerprint: of that base.
        basis_of: gives the learned bases of a source `hypernet:FINGERPRINT`; bases from a seed are made here.
        layers: every layer of the base that a LoRA may change (`wearable`); none for its sites only.

    Returns:
        The adapter; its `lidb` is set when the file is a LiDB.

    Raises:
        InputError: damaged, not an adapter, or made for another base, site list or basis.
    """
    path = Path(path)
    header = lidb_header(path)
    if header is None:
        made, metadata = read_lora(path, layers or base_sites)
        source, fingerprint = metadata.get("ss_sd_model_name", ""), metadata.get(BASE_FINGERPRINT, "")
        if fingerprint not in ("", base_fingerprint):
            raise InputError(
                f"{path}: made for base {fingerprint}, this base is {base_fingerprint}; "
                "use the base it was made for"
            )
        return Adapter(made, _trigger(metadata), fingerprint, source, None, metadata)
    lidb = load_lidb(path, base_sites)
    basis = _basis(path, lidb, basis_of)
    check_fits(lidb, base_fingerprint, base_sites, basis, path)
    adapter = Adapter.from_lidb(lidb, basis)
    adapter.metadata = header
    return adapter


def merge(adapters: Sequence[tuple[Adapter, float]], rank: int | None = None) -> tuple[Adapter, float]:
    """Several adapters of one base as one LoRA: a person and a style, say.

    Args:
        adapters: each with its weight.
        rank: of the result; None for the sum of all ranks, which is exact.

    Returns:
        The LoRA, and the relative error of its ΔW over all sites (0 without `rank`); trigger and base are the
        first ones named.

    Raises:
        InputError: a rank below 1 or above what a file can hold, or a weight that makes numbers infinite.
    """
    worn = add_up([weighted(adapter, weight) for adapter, weight in adapters])
    summed = max(down.shape[1] for down, _ in worn.values())
    check_rank(summed if rank is None else rank, worn)
    factors, error = (worn, 0.0) if rank is None else truncate(worn, rank)
    trigger, fingerprint, source = (
        next((getattr(adapter, field) for adapter, _ in adapters if getattr(adapter, field)), "")
        for field in ("trigger", "base_fingerprint", "base_source")
    )
    return Adapter(factors, trigger, fingerprint, source), error


def weighted(adapter: Adapter, weight: float) -> Factors:
    """The adapter's factors times a weight.

    Raises:
        InputError: NaN or infinity, as the weight or as what comes of it.
    """
    factors = scaled(adapter.factors, weight)
    if not all(up.isfinite().all() for _, up in factors.values()):
        raise InputError(f"weight {weight:g}: expected a finite number, small enough for the adapter's own")
    return factors


def check_rank(rank: int, factors: Factors) -> None:
    """Refuses a rank that a LoRA file of these sites cannot have: readers take it for damage.

    Raises:
        InputError: one line with the limit.
    """
    limit, site = min((down.shape[2] + up.shape[1], name) for name, (down, up) in factors.items())
    if not 1 <= rank <= limit:
        raise InputError(f"rank {rank}: expected 1 to {limit}, the inputs and outputs of {site} together")


def summary(adapter: Adapter) -> dict[str, Any]:
    """What `hdb inspect` shows: kind, rank, trigger, base, and how large ΔW is in each component."""
    squares: defaultdict[str, float] = defaultdict(float)
    for name, pair in adapter.factors.items():
        squares[name.split(".")[0]] += max(inner_product(pair, pair), 0.0)
    lidb = adapter.lidb
    held = [lidb.numbers] if lidb else [factor for pair in adapter.factors.values() for factor in pair]
    told: dict[str, Any] = {
        "kind": adapter.kind, "rank": adapter.rank, "trigger": adapter.trigger,
        "numbers": sum(tensor.numel() for tensor in held),
        "base_fingerprint": adapter.base_fingerprint, "base_source": adapter.base_source,
        "sites": dict(Counter(name.split(".")[0] for name in adapter.factors)),
        "delta_norm": {part: square**0.5 for part, square in squares.items()},
    }  # fmt: skip
    if lidb:
        told |= {"basis": lidb.basis_source, "down_dim": lidb.layout.down_dim, "up_dim": lidb.layout.up_dim}
    return told


def _basis(path: Path, lidb: Lidb, basis_of: Callable[[str], Basis] | None) -> Basis:
    """Bases from the seed, at the file's own dims; learned ones from whoever has the hypernetwork."""
    seed, layout = seed_of(lidb.basis_source), lidb.layout
    if seed is not None:
        return seeded_basis(layout.sites, layout.down_dim, layout.up_dim, seed)
    if basis_of is None:
        raise InputError(
            f"{path}: its basis is {lidb.basis_source}; name that hypernetwork's folder "
            "(--hypernet; in Python `basis_of`)"
        )
    return basis_of(lidb.basis_source)


def _trigger(metadata: dict[str, str]) -> str:
    """The trigger as our own writer and other tools note it."""
    return metadata.get("modelspec.trigger_phrase", "")
