"""One type over what a base can wear: a LiDB (numbers over aux bases) or a standard LoRA."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hyperdreambooth.base.load import EMBEDDED_NAME, Base
from hyperdreambooth.files import InputError
from hyperdreambooth.hub import fetch_file, is_hub_id, push_folder
from hyperdreambooth.lidb.basis import Basis
from hyperdreambooth.lidb.file import Lidb, basis_for, check_fits, lidb_header, load_lidb, save_lidb
from hyperdreambooth.lidb.weights import factors as lidb_factors
from hyperdreambooth.lora.formats.card import licence_of, model_card
from hyperdreambooth.lora.formats.headers import (
    BASE_FINGERPRINT,
    BASE_NAME,
    CONSENT,
    LoraInfo,
    resolution_of,
)
from hyperdreambooth.lora.formats.names import family_of_base
from hyperdreambooth.lora.formats.read import WeightOf, read_lora
from hyperdreambooth.lora.formats.write import check_form, state_dict, write_lora
from hyperdreambooth.lora.relax import add_up, check_rank, relax, scaled, truncate
from hyperdreambooth.shapes import Factors, Site
from hyperdreambooth.sites import wearable, weight_of

Format = Literal["diffusers", "kohya", "original", "lidb"]

FILES: dict[Format, str] = {
    "lidb": "person.lidb.safetensors",
    "kohya": "person.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
}
"""The file of each format in a folder or repository that holds one person."""
ORIGINAL_FILE = "person.original.safetensors"
"""The file of the format that is only written when somebody asks for it."""


@dataclass(frozen=True, eq=False, repr=False)  # thousands of numbers can be neither compared nor shown
class Adapter:
    """One person, or a mix of people, as a change of a base's weights.

    Adapters can be scaled and added: `0.5 * ana + 0.5 * ben` has exactly the weighted sum of their ΔW. Two
        LiDBs over the same aux bases add up to a LiDB, everything else to a LoRA; ranks add up.

    Attributes:
        factors: site → (down `(1, r, i)`, up `(1, o, r)`), with `ΔW = up @ down`.
        trigger: the rare word that stands for this person in prompts; empty where a foreign file names none.
        base_fingerprint: of the base that it was made for; empty where a foreign file names none.
        base_source: folder or hub id of that base; information only.
        resolution: side in pixels of the pictures that it was trained on; None where a foreign file does not
            say.
        lidb: the numbers, as long as the factors are still exactly what they stand for.
        metadata: header of the file that it came from, and what its training recorded.
        other_triggers: of a sum, the triggers of the further terms: a style's, say.
        family: of the base (`sd1`, `sdxl`, …); empty where nobody knows.
    """

    factors: Factors
    trigger: str
    base_fingerprint: str
    base_source: str
    resolution: int | None = None
    lidb: Lidb | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    other_triggers: tuple[str, ...] = ()
    family: str = ""

    def __repr__(self) -> str:
        """One line: kind, rank, trigger, pixels and base."""
        side = f"{self.resolution} px, " if self.resolution else ""
        return f"Adapter({self.kind}, rank {self.rank}, {self.trigger!r}, {side}base {self.base_source!r})"

    @property
    def rank(self) -> int:
        """The largest rank of any site."""
        return max(down.shape[1] for down, _ in self.factors.values())

    @property
    def kind(self) -> Literal["lidb", "lora"]:
        """`lidb` as long as it lies in the space of the aux bases, `lora` afterwards."""
        return "lora" if self.lidb is None else "lidb"

    @property
    def triggers(self) -> tuple[str, ...]:
        """Every trigger that is known, the person's first."""
        return tuple(dict.fromkeys(word for word in (self.trigger, *self.other_triggers) if word))

    @staticmethod
    def made_on(
        base: Base, factors: Factors, lidb: Lidb | None = None, metadata: dict[str, str] | None = None
    ) -> Adapter:
        """The adapter that was made on a base, whose words and family it has."""
        origin = (base.trigger, base.fingerprint, base.source, base.resolution)
        return Adapter(factors, *origin, lidb, metadata or {}, family=family_name(base))

    @staticmethod
    def from_lidb(lidb: Lidb, basis: Basis, family: str = "") -> Adapter:
        """The adapter that a person's numbers stand for, over the bases that they were made over."""
        factors = lidb_factors(lidb.layout, basis, lidb.numbers[None])
        origin = (lidb.trigger, lidb.base_fingerprint, lidb.base_source, lidb.resolution)
        return Adapter(factors, *origin, lidb, family=family)

    def __mul__(self, weight: float) -> Adapter:
        """The adapter with ΔW times a weight; a LiDB stays a LiDB.

        Raises:
            InputError: a weight that is not finite, or makes numbers infinite.
        """
        made = scaled(self.factors, float(weight))
        if not all(up.isfinite().all() for _, up in made.values()):
            raise InputError(f"weight {weight:g}: expected a finite number that keeps the adapter's finite")
        return replace(self, factors=made, lidb=None if self.lidb is None else self.lidb.scaled(weight))

    __rmul__ = __mul__

    def __truediv__(self, weight: float) -> Adapter:
        """The adapter with ΔW divided by a number."""
        return self * (1 / weight)

    def __sub__(self, other: Adapter) -> Adapter:
        """The adapter whose ΔW is the difference of both, exactly."""
        return self + -1 * other

    def __radd__(self, nothing: int) -> Adapter:
        """`sum` begins with 0."""
        return self if nothing == 0 else NotImplemented

    def __add__(self, other: Adapter) -> Adapter:
        """The adapter whose ΔW is the sum of both, exactly: their ranks add up, at the sites of either.

        Trigger, base and resolution are the first ones known.

        Raises:
            InputError: a LiDB and an adapter of another base, or two layers of one name and different sizes.
                It warns of two LoRAs of different bases.
        """
        if not isinstance(other, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        both = (self, other)
        if len(bases := {one.base_fingerprint for one in both} - {""}) > 1:
            if "lidb" in (self.kind, other.kind):
                raise InputError(f"adapters of two bases, {' and '.join(bases)}, cannot be added")
            warnings.warn(f"adapters of two bases, {' and '.join(bases)}, are added", stacklevel=2)
        lidb = None if self.lidb is None or other.lidb is None else self.lidb.plus(other.lidb)
        return Adapter(
            add_up([self.factors, other.factors]),
            self.trigger or other.trigger,
            self.base_fingerprint or other.base_fingerprint,
            self.base_source or other.base_source,
            self.resolution or other.resolution,
            lidb,
            other_triggers=tuple(word for one in both for word in one.triggers)[1:],
            family=self.family or other.family,
        )

    def relax(self, rank: int, seed: int = 0) -> Adapter:
        """The same ΔW as a LoRA of a higher rank, ready to be trained in every slot (paper, section 4.3).

        Args:
            rank: of the LoRA, at least the adapter's own.
            seed: of the directions that fill the new slots.

        Raises:
            InputError: the adapter does not fit into the rank, or no layer has so many.
        """
        check_rank(rank, self.factors)
        try:
            relaxed = relax(self.factors, rank, seed)
        except ValueError as error:
            raise InputError(f"rank {rank}: {error}; pass at least {self.rank}") from None
        return replace(self, factors=relaxed, lidb=None, metadata=dict(self.metadata))

    def truncate(self, rank: int) -> tuple[Adapter, float]:
        """The LoRA of a rank whose ΔW is nearest, and the relative error of ΔW over all sites.

        Raises:
            InputError: a rank below 1, or above what a file can hold.
        """
        check_rank(rank, self.factors)
        factors, error = truncate(self.factors, rank)
        return replace(self, factors=factors, lidb=None, metadata={}), error

    def state_dict(
        self, dtype: torch.dtype = torch.float32, form: Literal["diffusers", "kohya"] = "diffusers"
    ) -> dict[str, Tensor]:
        """The LoRA's tensors under the names that `pipe.load_lora_weights` takes, or under kohya's.

        Raises:
            InputError: numbers that are NaN, infinite, or too large for `dtype`, or a layer that the form has
                no name for.
        """
        return state_dict(self.factors, form, dtype, self.family)

    def lora_info(self, title: str) -> LoraInfo:
        """What headers and cards say of it; of a base in a folder, the folder's name alone."""
        steps = self.metadata.get("steps", "")  # a foreign file may have anything there
        place = Path(self.base_source)
        name = place.name if place.is_absolute() else self.base_source
        count = int(steps) if steps.isdecimal() else 0
        origin = (self.base_fingerprint, self.family, self.metadata.get(CONSENT, ""))
        return LoraInfo(self.trigger, name, self.resolution, title, count, *origin)

    def save(
        self, path: Path | str, format: Format = "diffusers", dtype: torch.dtype = torch.float32
    ) -> None:
        """Writes the adapter as one safetensors file, which is read back before it appears.

        Args:
            path: the file.
            format: `diffusers` (`pipe.load_lora_weights`), `kohya` (ComfyUI, A1111, Forge), `original` (the
                original model's names, for other trainers and hosts), or `lidb`.
            dtype: number format in the file.

        Raises:
            InputError: an unknown format, `lidb` for an adapter that is none any more, or numbers that are
                NaN, infinite, or too large for `dtype`.
        """
        path = Path(path)
        if format == "lidb":
            if self.lidb is None:
                raise InputError(
                    f"{path}: a relaxed or finetuned adapter is not a LiDB; use diffusers or kohya"
                )
            consent = self.metadata.get(CONSENT)
            save_lidb(path, self.lidb, dtype, {CONSENT: consent} if consent else {})
        elif format in ("diffusers", "kohya", "original"):
            check_rank(self.rank, self.factors)
            write_lora(path, self.factors, format, self.lora_info(path.name.split(".")[0]), dtype)
        else:
            raise InputError(f"format {format!r} is unknown; use diffusers, kohya, original or lidb")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a person's adapter",
    ) -> str:
        """Uploads the adapter in every format that it has, with a model card.

        A LoRA of a real person is personal data: pass `private=True` unless the person agreed.

        Args:
            repo_id: `owner/name`; the repository is made where there is none.
            private: whether a new repository is private; None for the owner's default.
            token: of the hub; None for the one that is logged in.
            revision: the branch; None for `main`.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            InputError: a bad name, no permission, or the hub cannot be reached.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            formats: list[Format] = [one for one in FILES if one != "lidb" or self.lidb is not None]
            for one in formats:
                self.save(folder / FILES[one], one)
            (folder / "README.md").write_text(self.card(None, forms=formats), encoding="utf-8")
            return push_folder(
                folder, repo_id, private=private, token=token, revision=revision, message=commit_message
            )

    def card(self, picture: str | None, class_word: str = "", forms: Sequence[Format] = tuple(FILES)) -> str:
        """The model card, in Markdown, of a folder with the files of some formats and perhaps a picture."""
        info = self.lora_info("A person")
        family, on_hub = self.family, is_hub_id(self.base_source)
        licence = licence_of(Path(self.base_source))
        if self.base_source == EMBEDDED_NAME:  # found by its import, and by no other tool
            place, licence = "from hyperdreambooth.base.load import EMBEDDED as base", "apache-2.0"
            family = ""
        elif on_hub:
            place = f'base = "{info.base}"'
        else:
            place = f'base = "path/to/{Path(info.base).name}"  # where the base lies on your machine'
        subject = f"{self.trigger} {class_word}".strip()
        files = {str(form): FILES[form] for form in forms}
        return model_card(info, subject, files, self.rank, picture, place, licence, family, on_hub)


def load_adapter(
    source: Path | str,
    base: Base,
    basis_of: Callable[[str], Basis] | None = None,
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Adapter:
    """Reads an adapter of any format, from a file or from the hub.

    Args:
        source: a LiDB, or a LoRA in diffusers', kohya's or another known spelling; or a hub id.
        base: the base that is to wear it.
        basis_of: gives the learned bases of a source `hypernet:FINGERPRINT`; bases from a seed are made here.
        weight_name: the file in a repository; None for `pytorch_lora_weights.safetensors`.
        revision: branch, tag or commit of a repository.
        token: of the hub.

    Returns:
        The adapter; its `lidb` is set where the file is a LiDB.

    Raises:
        InputError: damaged, not an adapter, made for other layers, or a LiDB of another base or basis.
    """
    if is_hub_id(source):
        source = fetch_file(str(source), weight_name or FILES["diffusers"], revision=revision, token=token)
    layers, weights = wearable(base.wearers), weight_of(base.wearers)
    return read_adapter(source, base.sites, base.fingerprint, basis_of, layers, weights)


def read_adapter(
    path: Path | str,
    base_sites: Sequence[Site],
    base_fingerprint: str,
    basis_of: Callable[[str], Basis] | None = None,
    layers: Sequence[Site] = (),
    weights: WeightOf | None = None,
) -> Adapter:
    """`load_adapter` of a file, for a base that is known by its sites, fingerprint and `wearable` layers.

    `weights` gives the base's weights, which only a DoRA needs.
    """
    path = Path(path)
    header, layers = lidb_header(path), layers or base_sites
    family = family_of_base(layers).name
    if header is None:
        factors, metadata = read_lora(path, layers, weights)
        trigger = metadata.get("modelspec.trigger_phrase", "")
        source = metadata.get(BASE_NAME) or metadata.get("ss_sd_model_name", "")
        fingerprint = metadata.get(BASE_FINGERPRINT, "")
        side = resolution_of(metadata)
        return Adapter(factors, trigger, fingerprint, source, side, None, metadata, family=family)
    lidb = load_lidb(path, base_sites)
    basis = basis_for(path, lidb, basis_of)
    check_fits(lidb, base_fingerprint, base_sites, basis, path)
    return replace(Adapter.from_lidb(lidb, basis, family), metadata=header)


def check_wearable(base: Base, *adapters: Adapter) -> None:
    """Refuses adapters that a base cannot wear; warns of a LoRA that was made for another checkpoint.

    A LoRA may be worn on another checkpoint of the same family, as people do: trained on a base, worn on its
    turbo or distilled sibling. A LiDB means something only over the base that it was trained on.

    Raises:
        InputError: layers that the base does not have, or a LiDB of another base.
    """
    known = {site.name for site in wearable(base.components)}
    if any(adapter.factors.keys() - known for adapter in adapters):  # a T5 is read for this alone
        known = {site.name for site in wearable(base.wearers)}
    for adapter in adapters:
        if foreign := sorted(adapter.factors.keys() - known):
            raise InputError(
                f"adapter: changes layer {foreign[0]} ({len(foreign)} such), which base {base.source} does "
                "not have; load the base it was made for"
            )
        if adapter.base_fingerprint in ("", base.fingerprint):
            continue
        theirs = f"{adapter.base_fingerprint} ({adapter.base_source or 'of no known name'})"
        made_for = f"made for base {theirs}, this base {base.source} is {base.fingerprint}"
        if adapter.kind == "lidb":
            raise InputError(f"adapter: {made_for}; load the base it was made for")
        warnings.warn(f"adapter: {made_for}; the person may look different", stacklevel=3)


def check_forms(base: Base, sites: Sequence[Site], forms: Sequence[str] = tuple(FILES)) -> None:
    """Refuses sites that a form has no name for (an `InputError` with the layer), before they are trained."""
    for form in forms:
        check_form(sites, form, family_name(base))


def family_name(base: Base) -> str:
    """The family of a base, as files of LoRAs name it."""
    return family_of_base(wearable(base.components)).name
