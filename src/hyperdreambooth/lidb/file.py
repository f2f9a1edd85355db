"""One person on disk: a flat tensor for each component and a small header, about 4 bytes a number.

The aux bases come from the seed or the hypernetwork's folder, and the site list from the base. Fingerprints
in the header prove that both are those that the numbers were made for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hyperdreambooth.files import InputError, load_tensors, save_tensors
from hyperdreambooth.lidb.basis import Basis, basis_fingerprint, seed_of, seeded_basis
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.lora.formats.container import Entry, read_header
from hyperdreambooth.shapes import Site, site_fingerprint

FORMAT = "1"
ROUNDING = 2e-3  # relative error of a site's numbers that float16 may cause: ten times what it usually is
_FIELDS = (
    "base_fingerprint", "base_source", "sites_fingerprint", "basis", "basis_fingerprint",
    "rank", "down_dim", "up_dim", "trigger",
)  # fmt: skip


@dataclass
class Lidb:
    """One person's numbers and what they were made for."""

    numbers: Tensor  # `(P,)` float32
    layout: Layout
    basis_source: str  # `seed:N` or `hypernet:FINGERPRINT`
    basis_fingerprint: str
    base_fingerprint: str
    trigger: str  # the rare word that stands for this person
    base_source: str  # folder or hub id of the base; information only
    resolution: int | None = None  # side in pixels of the training's pictures; older files do not say

    def scaled(self, weight: float) -> Lidb:
        """The numbers of the same ΔW times a weight, which `B_train` carries."""
        parts = self.layout.split(self.numbers[None])
        numbers = self.layout.join({name: (a, b * weight) for name, (a, b) in parts.items()})[0]
        return replace(self, numbers=numbers)

    def plus(self, other: Lidb) -> Lidb | None:
        """The numbers of the sum of both ΔW, whose rank is the sum of their ranks; None over other bases."""
        layout = replace(self.layout, rank=self.layout.rank + other.layout.rank)
        same_space = layout == replace(other.layout, rank=layout.rank)
        if not same_space or self.basis_fingerprint != other.basis_fingerprint:
            return None
        mine, more = self.layout.split(self.numbers[None]), other.layout.split(other.numbers[None])
        parts = {
            name: (torch.cat([a, more[name][0]], 1), torch.cat([b, more[name][1]], 2))
            for name, (a, b) in mine.items()
        }
        trigger, resolution = self.trigger or other.trigger, self.resolution or other.resolution
        numbers = layout.join(parts)[0]
        return replace(self, numbers=numbers, layout=layout, trigger=trigger, resolution=resolution)


def save_lidb(
    path: Path, lidb: Lidb, dtype: torch.dtype = torch.float32, further: Mapping[str, str] = {}
) -> None:
    """Writes `NAME.lidb.safetensors` whole, in float32 or in float16, which halves the file.

    `further` are fields of the header that reading needs not.
    """
    if dtype not in (torch.float32, torch.float16):
        raise InputError(f"{path}: a LiDB is float32 or float16, not {dtype}; its numbers are few")
    if tuple(lidb.numbers.shape) != (lidb.layout.size,):
        raise ValueError(f"numbers of shape ({lidb.layout.size},) expected, got {tuple(lidb.numbers.shape)}")
    numbers, name = lidb.numbers.detach().to(dtype), str(dtype).removeprefix("torch.")
    if not numbers.isfinite().all():
        raise InputError(
            f"{path}: nothing was written, the numbers are NaN, infinite or too large for {name}"
        )
    if lost := _lost(lidb, numbers):
        limit = f"lose {lost[1]:.1%} in {name}, expected at most {ROUNDING:.1%}; use float32"
        raise InputError(f"{path}: nothing was written, the numbers of {lost[0]} {limit}")
    parts = {part: numbers[span] for part, span in lidb.layout.components.items()}
    save_tensors(path, parts, {**further, **_header(lidb)})


def _lost(lidb: Lidb, rounded: Tensor) -> tuple[str, float] | None:
    """Returns a site whose numbers lose too much by rounding, and how much; None if none does."""
    layout = lidb.layout
    whole, kept = layout.split(lidb.numbers[None].detach()), layout.split(rounded[None].float())
    for site, halves in whole.items():
        for half, other in zip(halves, kept[site], strict=True):
            error = float((half - other).norm() / half.norm().clamp_min(1e-30))
            if error > ROUNDING:
                return site, error
    return None


def lidb_header(path: Path) -> dict[str, str] | None:
    """The header of a LiDB file without its numbers, or None for any other file, readable or not."""
    try:
        _, metadata = read_header(path)
    except InputError:
        return None
    return metadata if "lidb_format" in metadata else None


def load_lidb(path: Path, sites: Sequence[Site]) -> Lidb:
    """Reads a LiDB file; whether base and basis fit is for `check_fits` to say.

    `sites` are all of the base that is to wear it; a file made without the text encoder uses the others.
    """
    entries, header = read_header(path)
    _check_header(path, header)
    own = _worn_sites(sites, entries)
    if not own or site_fingerprint(own) != header["sites_fingerprint"]:
        raise InputError(
            f"{path}: made for site list {header['sites_fingerprint']} of base {header['base_source']}, "
            f"this base has site list {site_fingerprint(own or sites)}; use the base it was made for, with "
            "the add_sites and skip_sites of its training"
        )
    layout = Layout(own, *(int(header[field]) for field in ("rank", "down_dim", "up_dim")))
    _check_shapes(path, entries, layout)
    tensors, _ = load_tensors(path)
    numbers = torch.cat([tensors[part].float() for part in layout.components])
    return Lidb(
        numbers, layout, header["basis"], header["basis_fingerprint"],
        header["base_fingerprint"], header["trigger"], header["base_source"],
        int(header["resolution"]) if header.get("resolution", "").isdecimal() else None,
    )  # fmt: skip


def check_fits(
    lidb: Lidb, base_fingerprint: str, sites: Sequence[Site], basis: Basis, name: str | Path = "LiDB"
) -> None:
    """Refuses a LiDB, called `name`, of another base, site list or basis: it would paint somebody else."""
    if lidb.base_fingerprint != base_fingerprint:
        raise InputError(
            f"{name}: made for base {lidb.base_fingerprint} ({lidb.base_source}), "
            f"this base is {base_fingerprint}; use the base it was made for"
        )
    made_for, here = lidb.layout.fingerprint, site_fingerprint(_worn_sites(sites, lidb.layout.components))
    if made_for != here:
        raise InputError(f"{name}: made for site list {made_for}, this base has {here}; use its own base")
    if lidb.basis_fingerprint != (found := basis_fingerprint(basis)):
        raise InputError(
            f"{name}: made over basis {lidb.basis_fingerprint} ({lidb.basis_source}), this basis is {found} "
            f"({basis.source}); use the hypernetwork or seed it was made with"
        )


def basis_for(path: Path, lidb: Lidb, basis_of: Callable[[str], Basis] | None) -> Basis:
    """Bases from the seed, at the file's own dims; learned ones from the hypernetwork that has them."""
    seed, layout = seed_of(lidb.basis_source), lidb.layout
    if seed is not None:
        return seeded_basis(layout.sites, layout.down_dim, layout.up_dim, seed)
    if basis_of is None:
        raise InputError(
            f"{path}: its basis is {lidb.basis_source}; name that hypernetwork's folder "
            "(--hypernet; in Python, load it with that hypernetwork's Personalizer)"
        )
    return basis_of(lidb.basis_source)


def _header(lidb: Lidb) -> dict[str, str]:
    """Everything the numbers need to be understood again, as the strings safetensors allows."""
    layout = lidb.layout
    values = (
        lidb.base_fingerprint, lidb.base_source, layout.fingerprint,
        lidb.basis_source, lidb.basis_fingerprint,
        str(layout.rank), str(layout.down_dim), str(layout.up_dim), lidb.trigger,
    )  # fmt: skip
    header = {"lidb_format": FORMAT, **dict(zip(_FIELDS, values, strict=True))}
    return header if lidb.resolution is None else {**header, "resolution": str(lidb.resolution)}


def _check_header(path: Path, header: dict[str, str]) -> None:
    """Refuses other files, newer formats and headers with holes."""
    if "lidb_format" not in header:
        raise InputError(
            f"{path}: expected a LiDB file, the header has no lidb_format; load it as an adapter"
        )
    if header["lidb_format"] != FORMAT:
        raise InputError(
            f"{path}: LiDB format {header['lidb_format']}, this version reads format {FORMAT}; "
            "update hyperdreambooth"
        )
    if missing := [field for field in _FIELDS if field not in header]:
        raise InputError(f"{path}: the LiDB header lacks {', '.join(missing)}; get the file again")
    for field in ("rank", "down_dim", "up_dim"):
        if not re.fullmatch(r"[1-9][0-9]{0,5}", header[field]):
            raise InputError(
                f"{path}: {field} in the header is {header[field][:20]!r}, expected a whole number above 0"
            )


def _worn_sites(sites: Sequence[Site], components: Container[str]) -> tuple[Site, ...]:
    """The base's sites in the components the LiDB has numbers for (it may leave the text encoder alone)."""
    return tuple(sorted(site for site in sites if site.component in components))


def _check_shapes(path: Path, entries: Mapping[str, Entry], layout: Layout) -> None:
    """Every component's numbers are there, in float32 or float16, before any is read."""
    for part, entry in entries.items():
        span = layout.components.get(part, slice(0, 0))
        if entry.shape != (span.stop - span.start,) or entry.dtype not in ("F32", "F16"):
            raise InputError(
                f"{path}: tensor {part} has shape {entry.shape} and type {entry.dtype}, expected "
                f"({span.stop - span.start},) in F32 or F16; get the file again"
            )
