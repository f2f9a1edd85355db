"""The 103 KiB person: size, round trip, and everything that is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import save_file
from torch import Tensor

from hyperdreambooth.files import InputError, load_tensors
from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import Lidb, check_fits, lidb_header, load_lidb, save_lidb
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.shapes import Site, canonical, site_fingerprint


def test_the_sd15_site_list_is_the_real_one() -> None:
    """Against the real UNet's module tree, built without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    real = {
        Site(canonical("unet", name), module.in_features, module.out_features)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and (".attn1." in name or ".attn2." in name)
    }
    assert real == {site for site in small.sd15_sites() if site.component == "unet"} and len(real) == 128


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.float16, 2)])
def test_a_person_on_sd15_takes_103_kib(tmp_path: Path, dtype: torch.dtype, bytes_each: int) -> None:
    layout = Layout(small.sd15_sites(), 1, 100, 50)
    assert len(layout.sites) == 176 and layout.size == 26_400
    path = tmp_path / "ana.lidb.safetensors"
    lidb = Lidb(
        torch.randn(layout.size), layout, "seed:0", "f" * 16, small.BASE, "sks", "stable-diffusion-v1-5/x"
    )
    save_lidb(path, lidb, dtype)
    assert 26_400 * bytes_each < path.stat().st_size < 26_400 * bytes_each + 1024
    assert set(load_tensors(path)[0]) == {"unet", "text_encoder"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rank", [1, 3])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, rank: int) -> None:
    lidb = small.person(small.layout(rank))
    save_lidb(tmp_path / "x.lidb.safetensors", lidb, dtype)
    back = load_lidb(tmp_path / "x.lidb.safetensors", small.SITES)
    assert torch.equal(back.numbers, lidb.numbers.to(dtype).float())
    for field in dataclasses.fields(Lidb):
        if field.name != "numbers":
            assert getattr(back, field.name) == getattr(lidb, field.name)


def test_a_person_without_text_encoder_fits_the_whole_base(tmp_path: Path) -> None:
    unet = tuple(site for site in small.SITES if site.component == "unet")
    lidb = small.person(Layout(unet, 1, 8, 5))
    save_lidb(tmp_path / "x.lidb.safetensors", lidb)
    back = load_lidb(tmp_path / "x.lidb.safetensors", small.SITES)
    assert back.layout == lidb.layout and torch.equal(back.numbers, lidb.numbers)
    check_fits(back, small.BASE, small.SITES, seeded_basis(unet, 8, 5, 0))


def test_a_fitting_person_is_accepted() -> None:
    check_fits(small.person(), small.BASE, small.SITES, seeded_basis(small.SITES, 8, 5, 0))


def test_another_base_is_refused_with_both_fingerprints() -> None:
    with pytest.raises(
        InputError, match=rf"ana: made for base {small.BASE} .some/base., this base is {'f' * 16}"
    ):
        check_fits(small.person(), "f" * 16, small.SITES, seeded_basis(small.SITES, 8, 5, 0), "ana")


def test_another_basis_is_refused_with_both_fingerprints() -> None:
    other = seeded_basis(small.SITES, 8, 5, 1)
    mine = small.person().basis_fingerprint
    with pytest.raises(InputError, match=rf"{mine} \(seed:0\).*{basis_fingerprint(other)} \(seed:1\)"):
        check_fits(small.person(), small.BASE, small.SITES, other)


def test_another_site_list_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    wider = (*small.SITES[:-1], dataclasses.replace(small.SITES[-1], in_features=99))
    both = rf"{site_fingerprint(small.SITES)}.*{site_fingerprint(wider)}"
    with pytest.raises(InputError, match=both):
        check_fits(small.person(), small.BASE, wider, seeded_basis(small.SITES, 8, 5, 0))
    save_lidb(tmp_path / "x.lidb.safetensors", small.person())
    with pytest.raises(InputError, match=both):
        load_lidb(tmp_path / "x.lidb.safetensors", wider)
    with pytest.raises(InputError, match=site_fingerprint(small.SITES)):
        load_lidb(tmp_path / "x.lidb.safetensors", [Site("transformer.q", 4, 4)])


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **header: str | None) -> Path:
    """A LiDB file with some tensors replaced and some header fields replaced or (None) dropped."""
    save_lidb(path, small.person())
    there, facts = load_tensors(path)
    merged = {**facts, **header}
    save_file({**there, **(tensors or {})}, path, {k: v for k, v in merged.items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"lidb_format": None}, "expected a LiDB file"),
        ({"lidb_format": "2"}, "LiDB format 2, this version reads format 1"),
        ({"trigger": None, "basis": None}, "lacks basis, trigger"),
        ({"rank": "0"}, "rank in the header is '0'"),
        ({"up_dim": "five"}, "up_dim in the header is 'five'"),
        ({"down_dim": "9" * 5000}, "down_dim in the header"),
        ({"down_dim": "7"}, "tensor text_encoder has shape"),
    ],
)
def test_a_bad_header_is_refused(tmp_path: Path, header: dict[str, str | None], told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_lidb(rewrite(tmp_path / "x.lidb.safetensors", None, **header), small.SITES)


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.zeros(3), "tensor unet has shape"),
        (torch.zeros(1, 1), "tensor unet has shape"),
        (torch.full((45,), float("nan")), "NaN"),
        (torch.full((45,), float("inf")), "infinite"),
        (torch.zeros(48, dtype=torch.int64), "number format .I64."),
    ],
)
def test_bad_numbers_are_refused(tmp_path: Path, tensor: Tensor, told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        load_lidb(rewrite(tmp_path / "x.lidb.safetensors", {"unet": tensor}), small.SITES)
    assert "x.lidb.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_foreign_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tensor vae has shape"):
        load_lidb(rewrite(tmp_path / "x.lidb.safetensors", {"vae": torch.zeros(2)}), small.SITES)


def test_a_truncated_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.lidb.safetensors"
    with pytest.raises(InputError, match="no such file"):
        load_lidb(path, small.SITES)
    save_lidb(path, small.person())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="truncated"):
        load_lidb(path, small.SITES)
    assert lidb_header(path) is None


def test_nothing_is_written_that_could_not_be_read(tmp_path: Path) -> None:
    path, lidb = tmp_path / "x.lidb.safetensors", small.person()
    for value, dtype in ((float("nan"), torch.float32), (1e6, torch.float16)):
        lidb.numbers[3] = value
        with pytest.raises(InputError, match="nothing was written"):
            save_lidb(path, lidb, dtype)
    with pytest.raises(ValueError, match="expected, got"):
        save_lidb(path, dataclasses.replace(lidb, numbers=lidb.numbers[1:]))
    assert not any(tmp_path.iterdir())


def test_the_header_alone(tmp_path: Path) -> None:
    save_lidb(tmp_path / "x.lidb.safetensors", small.person())
    header = lidb_header(tmp_path / "x.lidb.safetensors")
    assert header is not None and header["trigger"] == "sks" and header["basis"] == "seed:0"
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert lidb_header(tmp_path / "other.safetensors") is None
