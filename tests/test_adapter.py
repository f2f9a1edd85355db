"""One type over LiDB and LoRA: what is loaded is what was saved in any form; foreign files are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hyperdreambooth.adapter import Adapter, read_adapter
from hyperdreambooth.apps.inspect import summary
from hyperdreambooth.files import InputError, load_tensors
from hyperdreambooth.lidb.basis import Basis, basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.shapes import Factors, Site

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
SITES = (
    Site("text_encoder.encoder.layers.0.self_attn.q_proj", 12, 12),
    Site(f"{BLOCK}.attn1.to_q", 16, 16),
    Site(f"{BLOCK}.attn2.to_k", 12, 16),
)
BASE = "0123456789abcdef"


def person(
    rank: int = 1, source: str = "seed:0", sites: tuple[Site, ...] = SITES, seed: int = 1
) -> tuple[Lidb, Basis]:
    layout = Layout(sites, rank, 8, 5)
    basis = replace(seeded_basis(sites, 8, 5, 0), source=source)
    row = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    return Lidb(row, layout, source, basis_fingerprint(basis), BASE, "sks", "some/base"), basis


def adapter(rank: int = 1, seed: int = 1) -> Adapter:
    return Adapter.from_lidb(*person(rank, seed=seed), family="sd1")


def distance(one: Factors, two: Factors) -> float:
    """Largest relative difference of ΔW over all sites."""
    assert one.keys() == two.keys()
    pairs = [(one[k][1] @ one[k][0], two[k][1] @ two[k][0]) for k in one]
    return max(((a - b).norm() / a.norm()).item() for a, b in pairs)


def forbidden(source: str) -> Basis:
    raise AssertionError(f"bases of {source} need no hypernetwork")


def test_a_lidb_comes_back_exactly(tmp_path: Path) -> None:
    made = adapter(2)
    made.save(tmp_path / "x.lidb.safetensors", "lidb")
    back = read_adapter(tmp_path / "x.lidb.safetensors", SITES, BASE, forbidden)
    assert back.kind == made.kind == "lidb" and back.rank == 2 and back.lidb is not None
    assert (back.trigger, back.base_fingerprint, back.base_source) == ("sks", BASE, "some/base")
    for name, (down, up) in made.factors.items():
        assert torch.equal(down, back.factors[name][0]) and torch.equal(up, back.factors[name][1])
    assert back.metadata["basis"] == "seed:0"


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_comes_back_as_the_same_delta(tmp_path: Path, form: str) -> None:
    made = adapter(2)
    replace(made, resolution=128).save(tmp_path / "x.safetensors", form)  # type: ignore[arg-type]
    back = read_adapter(tmp_path / "x.safetensors", SITES, BASE)
    assert back.kind == "lora" and back.lidb is None and back.trigger == "sks" and back.resolution == 128
    assert distance(made.factors, back.factors) < 1e-5


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_relaxing_is_exact_and_survives_the_file(tmp_path: Path, form: str) -> None:
    made = adapter()
    relaxed = made.relax(4, seed=3)
    assert relaxed.rank == 4 and relaxed.kind == "lora" and made.kind == "lidb" and made.rank == 1
    assert distance(made.factors, relaxed.factors) < 1e-5
    relaxed.save(str(tmp_path / "x.safetensors"), form)  # type: ignore[arg-type]
    back = read_adapter(str(tmp_path / "x.safetensors"), SITES, BASE)
    assert back.rank == 4 and distance(made.factors, back.factors) < 1e-5


@pytest.mark.parametrize("rank", [-1, 0, 1])
def test_relaxing_below_the_own_rank_is_refused(rank: int) -> None:
    with pytest.raises(InputError, match=f"rank {rank}"):
        adapter(2).relax(rank)


def test_a_relaxed_adapter_is_no_lidb(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a LiDB; use diffusers or kohya"):
        adapter().relax(4).save(tmp_path / "x.safetensors", "lidb")
    with pytest.raises(InputError, match="format 'onnx' is unknown"):
        adapter().save(tmp_path / "x.safetensors", "onnx")  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_learned_bases_come_from_their_hypernetwork(tmp_path: Path) -> None:
    lidb, basis = person(source="hypernet:abc")
    Adapter.from_lidb(lidb, basis).save(tmp_path / "x.lidb.safetensors", "lidb")
    asked: list[str] = []

    def basis_of(source: str) -> Basis:
        asked.append(source)
        return basis

    back = read_adapter(tmp_path / "x.lidb.safetensors", SITES, BASE, basis_of)
    assert asked == ["hypernet:abc"] and distance(back.factors, Adapter.from_lidb(lidb, basis).factors) == 0
    with pytest.raises(InputError, match=r"its basis is hypernet:abc; name .*--hypernet"):
        read_adapter(tmp_path / "x.lidb.safetensors", SITES, BASE)
    other = seeded_basis(SITES, 8, 5, 9)
    with pytest.raises(InputError, match=f"{basis_fingerprint(basis)}.*{basis_fingerprint(other)}"):
        read_adapter(tmp_path / "x.lidb.safetensors", SITES, BASE, lambda _: other)


def test_another_base_is_refused_with_the_file_and_both_fingerprints(tmp_path: Path) -> None:
    adapter().save(tmp_path / "x.lidb.safetensors", "lidb")
    with pytest.raises(InputError, match=rf"x\.lidb\.safetensors: made for base {BASE}.*{'f' * 16}"):
        read_adapter(tmp_path / "x.lidb.safetensors", SITES, "f" * 16)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_names_its_base_and_a_strangers_does_not(tmp_path: Path, form: str) -> None:
    adapter().relax(2).save(tmp_path / "x.safetensors", form)  # type: ignore[arg-type]
    assert read_adapter(tmp_path / "x.safetensors", SITES, "f" * 16).base_fingerprint == BASE
    replace(adapter().relax(2), base_fingerprint="").save(tmp_path / "y.safetensors", form)  # type: ignore[arg-type]
    assert read_adapter(tmp_path / "y.safetensors", SITES, "f" * 16).base_fingerprint == ""


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e300])
def test_a_weight_that_makes_no_numbers_is_refused(weight: float) -> None:
    with pytest.raises(InputError, match=r"weight .*expected a finite number"):
        _ = weight * adapter()


def test_a_rank_that_no_file_can_have_is_refused_with_the_limit() -> None:
    for work in (lambda rank: adapter().relax(rank), lambda rank: adapter().truncate(rank)):
        with pytest.raises(InputError, match=r"rank 25: expected 1 to 24, .*text_encoder"):
            work(25)
        work(24)


def test_the_norm_of_a_huge_delta_is_a_number() -> None:
    huge = (1e30 * adapter()).factors
    assert all(
        0 < norm < float("inf") for norm in summary(replace(adapter(), factors=huge))["delta_norm"].values()
    )


def no_file(path: Path) -> None:
    del path


def truncated(path: Path) -> None:
    adapter().save(path, "lidb")
    path.write_bytes(path.read_bytes()[:-5])


def pickle(path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, path)


def something_else(path: Path) -> None:
    save_file({"vae.conv": torch.zeros(2)}, path)


def nan(path: Path) -> None:
    poisoned = adapter().factors
    tensors = {f"{name}.lora_{'AB'[k]}.weight": pair[k][0] for name, pair in poisoned.items() for k in (0, 1)}
    save_file({name: (tensor * float("nan")).contiguous() for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("spoil", [no_file, truncated, pickle, something_else, nan])
def test_what_is_no_adapter_gets_one_line(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors") as error:
        read_adapter(tmp_path / "x.safetensors", SITES, BASE)
    assert "\n" not in str(error.value)


def test_the_header_names_the_resolution_that_the_adapter_knows(tmp_path: Path) -> None:
    wide = (Site(f"{BLOCK}.attn2.to_k", 1024, 16),)  # Stable Diffusion 2
    lidb, basis = person(sites=wide)
    for side, version in ((768, "sd_v2_v"), (512, "sd_v2")):
        made = Adapter.from_lidb(replace(lidb, resolution=side), basis)
        made.save(tmp_path / "x.safetensors", "kohya")
        header = load_tensors(tmp_path / "x.safetensors")[1]
        assert header["ss_base_model_version"] == version and header["ss_resolution"] == f"({side}, {side})"
        assert (made.relax(2).resolution, (0.5 * made + made).resolution) == (side, side)


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: up @ down for name, (down, up) in adapter.factors.items()}


def test_adding_is_exact_and_truncating_says_its_error() -> None:
    person, style = adapter(1), replace(adapter(2).relax(3), trigger="", base_fingerprint="", base_source="")
    ours, theirs = deltas(person), deltas(style)
    wanted = {name: delta + 0.5 * theirs[name] for name, delta in ours.items()}
    merged = 0.5 * style + person
    assert merged.rank == 4 and merged.kind == "lora"
    assert (merged.trigger, merged.base_fingerprint, merged.base_source) == ("sks", BASE, "some/base")
    for name, delta in deltas(merged).items():
        torch.testing.assert_close(delta, wanted[name], rtol=1e-5, atol=1e-5)
    near, error = merged.truncate(2)
    lost = sum(float((delta - wanted[name]).square().sum()) for name, delta in deltas(near).items())
    total = sum(float(delta.square().sum()) for delta in wanted.values())
    assert near.rank == 2 and error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    with pytest.raises(InputError, match="rank 0"):
        merged.truncate(0)


@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(1, 3), st.integers(1, 3))
def test_a_mix_of_lidbs_is_a_lidb_of_the_mixed_delta(a: float, b: float, r: int, q: int) -> None:
    ana, ben = adapter(r, seed=1), adapter(q, seed=2)
    mix = a * ana + ben * b
    assert mix.kind == "lidb" and mix.lidb is not None and mix.rank == r + q == mix.lidb.layout.rank
    again = deltas(Adapter.from_lidb(mix.lidb, person()[1]))
    for name, delta in deltas(mix).items():
        wanted = a * deltas(ana)[name] + b * deltas(ben)[name]
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again[name], wanted, rtol=1e-4, atol=1e-4)


def test_a_mix_of_lidbs_comes_back_from_its_file(tmp_path: Path) -> None:
    mix = replace(adapter(1, seed=1), resolution=64) + adapter(2, seed=2)
    mix.save(tmp_path / "mix.lidb.safetensors", "lidb")
    back = read_adapter(tmp_path / "mix.lidb.safetensors", SITES, BASE)
    assert back.kind == "lidb" and back.rank == 3 and distance(mix.factors, back.factors) < 1e-6


def test_lidbs_over_other_bases_add_up_to_a_lora_and_of_other_base_models_to_nothing() -> None:
    lidb, _ = person(source="seed:0")
    other = Adapter.from_lidb(replace(lidb, basis_fingerprint="0" * 16), person()[1])
    assert (adapter() + other).kind == "lora"
    foreign = replace(adapter(), base_fingerprint="f" * 16)
    for one, two in ((adapter(), foreign), (adapter().relax(2), foreign), (foreign, adapter().relax(2))):
        with pytest.raises(InputError, match="cannot be added"):
            _ = one + two
    with pytest.warns(UserWarning, match="adapters of two bases"):
        assert (adapter().relax(2) + foreign.relax(2)).base_fingerprint == BASE
    narrow = {SITES[0].name: (torch.zeros(1, 1, 3), torch.zeros(1, 12, 1))}
    with pytest.raises(InputError, match=r"12 → 12 in one and 3 → 12 in the other"):
        _ = adapter() + replace(adapter(), factors=narrow, lidb=None)


def test_a_sum_knows_every_trigger_the_persons_first() -> None:
    person, style, light = (replace(adapter(), trigger=word) for word in ("sks", "oil", "sks"))
    mix = person + 0.5 * style + light
    assert mix.trigger == "sks" and mix.triggers == ("sks", "oil")


def test_the_state_dict_is_what_the_file_holds(tmp_path: Path) -> None:
    made = adapter(2)
    made.save(tmp_path / "x.safetensors", "diffusers")
    tensors, state = load_tensors(tmp_path / "x.safetensors")[0], made.state_dict()
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[k], state[k]) for k in state)


def test_the_summary_of_a_lidb_and_of_a_lora() -> None:
    made = adapter()
    entries = summary(made)
    assert (
        entries["kind"] == "lidb"
        and entries["rank"] == 1
        and entries["basis"] == "seed:0"
        and entries["trigger"] == "sks"
    )
    assert made.lidb is not None and entries["numbers"] == made.lidb.layout.size == 3 * 13
    assert entries["sites"] == {"text_encoder": 1, "unet": 2} and (
        entries["down_dim"],
        entries["up_dim"],
    ) == (8, 5)
    for part in ("text_encoder", "unet"):
        own = [up @ down for name, (down, up) in made.factors.items() if name.startswith(f"{part}.")]
        expected = sum(delta.double().square().sum().item() for delta in own) ** 0.5
        assert entries["delta_norm"][part] == pytest.approx(expected, rel=1e-5)
    lora = summary(made.relax(4))
    assert lora["kind"] == "lora" and "basis" not in lora
    assert lora["numbers"] == sum(4 * (site.in_features + site.out_features) for site in SITES)
