"""Many identities in one step must be what each would be alone, and a kill must not change a bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperdreambooth.base.denoise import add_noise, sample_noise
from hyperdreambooth.base.load import Base
from hyperdreambooth.config import load_config
from hyperdreambooth.faces.dataset import read_faces
from hyperdreambooth.faces.image import open_photo, to_pixels
from hyperdreambooth.files import InputError
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.weights import delta_products
from hyperdreambooth.preopt import train as preopt
from hyperdreambooth.preopt.train import PreoptConfig, Stage, preoptimize, train_group
from hyperdreambooth.runs import rng

SMALL: dict[str, Any] = {
    "down_dim": 8,
    "up_dim": 6,
    "steps": 3,
    "lr": 5e-3,
    "warmup": 2,
    "identities_per_batch": 2,
}


def config(**fields: Any) -> PreoptConfig:
    return PreoptConfig(**{**SMALL, **fields})


def crowd(base: Base, photos: Path, cache: Path, settings: PreoptConfig) -> tuple[Stage, list[preopt.Person]]:
    stage = preopt.prepare(base, settings)
    return stage, preopt.load_people(stage, read_faces(photos), cache)


def alone(stage: Stage, people: list[preopt.Person]) -> Tensor:
    return torch.cat([train_group(stage, [person])[0] for person in people])


@pytest.mark.parametrize(
    "fields", [{}, {"photos_per_step": 2, "rank": 2}, {"text_encoder": False, "size_weight": 0.1}]
)
def test_together_is_alone_whatever_the_composition(
    micro_base: Base, micro_photos: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    stage, people = crowd(micro_base, micro_photos, tmp_path, config(steps=20, **fields))
    people = people[:5]
    together, losses = train_group(stage, people)
    assert together.shape == (5, stage.layout.size)
    assert losses.shape == (20, 5)
    assert (together - alone(stage, people)).abs().max() <= 1e-5
    order = [3, 0, 4]  # other company, other places
    shuffled, _ = train_group(stage, [people[k] for k in order])
    assert (together[order] - shuffled).abs().max() <= 1e-5
    moved = (together - stage.start).norm(dim=1)
    assert moved.min() > 0.01
    assert torch.cdist(together, together).fill_diagonal_(torch.inf).min() > 0.01


def test_a_step_is_plain_adam_on_the_written_loss(
    micro_base: Base, micro_photos: Path, tmp_path: Path
) -> None:
    """An oracle that wears nothing: ΔW is added to the weights, in the way of the paper's equations."""
    settings = config(steps=2, warmup=0, clip=1e-3, photos_per_step=2, timestep_bias=2)
    stage, people = crowd(micro_base, micro_photos, tmp_path, settings)
    person = people[1]
    numbers = stage.start[None].clone().requires_grad_()
    adam = torch.optim.Adam([numbers], lr=settings.lr)
    for step in range(2):
        adam.param_groups[0]["lr"] = settings.lr * (1.0, 0.5)[step]
        loss = naive_loss(stage, person, numbers, step)
        numbers.grad = torch.autograd.grad(loss, numbers)[0]
        assert numbers.grad.norm() > settings.clip
        torch.nn.utils.clip_grad_norm_([numbers], settings.clip)
        adam.step()
    got, _ = train_group(stage, [person])
    assert (got - numbers.detach()).abs().max() < 1e-4 * settings.lr / 5e-3


def naive_loss(stage: Stage, person: preopt.Person, numbers: Tensor, step: int) -> Tensor:
    base, seed = stage.base, stage.config.seed
    deltas = {
        name: stage.basis.up[name] @ product[0] @ stage.basis.down[name]
        for name, product in delta_products(stage.layout, numbers).items()
    }
    order = torch.randperm(len(person.captions), generator=rng(seed, person.name, step, "photo")).tolist()
    losses: list[Tensor] = []
    for k in range(2):
        latents, prompt = person.latents[order[k]][None], person.captions[order[k]]
        key, bias = (seed, person.name, step, k), stage.config.timestep_bias
        noise, timestep = sample_noise(base, tuple(latents.shape[1:]), *key, bias=bias)
        hidden = wearing(base.pipe.text_encoder, "text_encoder", deltas, base.tokenize([prompt]))[0]
        noisy = add_noise(base, latents, noise[None], timestep[None])
        answer = wearing(base.pipe.unet, "unet", deltas, noisy, timestep[None], encoder_hidden_states=hidden)[
            0
        ]
        losses.append((answer - noise).square().mean())
    return (losses[0] + losses[1]) / 2


def wearing(module: torch.nn.Module, part: str, deltas: dict[str, Tensor], *args: Any, **more: Any) -> Any:
    from hyperdreambooth.shapes import canonical

    weights = {
        f"{path}.weight": layer.weight + deltas[name]
        for path, layer in module.named_modules()
        if (name := canonical(part, path)) in deltas and isinstance(layer, torch.nn.Linear)
    }
    assert weights
    return torch.func.functional_call(module, weights, args, more)


def test_one_person_is_learnt_and_the_base_is_left_alone(
    micro_base: Base, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = torch.zeros((), dtype=torch.int64) + 300  # one timestep and one noise: the loss itself must fall

    def fixed(base: Base, shape: tuple[int, ...], *key: int | str, **_: float) -> tuple[Tensor, Tensor]:
        return torch.randn(shape, generator=rng(0, key[1])), still

    monkeypatch.setattr(preopt, "sample_noise", fixed)
    before = {name: p.clone() for name, p in micro_base.components["unet"].state_dict().items()}
    stage, people = crowd(micro_base, micro_photos, tmp_path, config(steps=60, lr=3e-2))
    _, losses = train_group(stage, people[:2])
    assert (losses[-5:].mean(0) < 0.9 * losses[:5].mean(0)).all()
    after = micro_base.components["unet"].state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_rates_and_clipping() -> None:
    settings = config(steps=100, warmup=9, lr=1.0)
    rates = [preopt.learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9], abs=0.01)
    assert 0 < rates[-1] < 0.001
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(preopt.clip_rows(gradient, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_bank_says_how_it_was_made_and_resumes(
    micro_base: Base, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, photos = tmp_path / "bank", shutil.copytree(micro_photos, tmp_path / "photos")
    bank = preoptimize(micro_base, photos, out, config())
    assert bank.identities == [f"person-{k}" for k in range(6)]
    assert bank.manifest["base_fingerprint"] == micro_base.fingerprint
    assert bank.manifest["config"]["steps"] == 3
    assert bank.manifest["basis_source"] == "seed:0"
    stage = preopt.prepare(micro_base, config())
    assert bank.manifest["site_fingerprint"] == stage.layout.fingerprint
    assert torch.equal(bank.start, stage.start)
    assert torch.isfinite(bank.figure("last_loss")).all()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all({"first_loss", "last_loss", "seconds"} <= line.keys() for line in lines)

    shutil.copytree(photos / "person-0", photos / "aaron")  # a new person joins a finished bank
    calls: list[list[str]] = []
    real = preopt.train_group

    def spy(stage: Stage, people: list[preopt.Person], *rest: Any) -> tuple[Tensor, Tensor]:
        calls.append([person.name for person in people])
        return real(stage, people, *rest)

    monkeypatch.setattr(preopt, "train_group", spy)
    monkeypatch.setattr(Base, "encode_images", None)  # those very photos are in the cache
    grown = preoptimize(micro_base, photos, out, config())
    assert calls == [["aaron"]]
    assert torch.equal(grown.numbers(bank.identities), bank.numbers())


def test_adapting_the_unet_alone_encodes_each_prompt_once(
    micro_base: Base, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, people = crowd(micro_base, micro_photos, tmp_path, config(text_encoder=False))
    assert {site.component for site in stage.layout.sites} == {"unet"}
    encoded: list[int] = []
    real = Base.encode_prompts

    def spy(self: Base, tokens: Tensor) -> dict[str, Tensor]:
        encoded.append(len(tokens))
        return real(self, tokens)

    monkeypatch.setattr(Base, "encode_prompts", spy)
    numbers, _ = train_group(stage, people)
    assert encoded == [2]  # two different captions
    for _ in range(2):  # and once for all groups that share a cache
        cached, _ = train_group(stage, people, cache=tmp_path)
        assert encoded == [2, 2] and torch.equal(cached, numbers)


def test_captions_have_the_bases_words_and_without_one_are_the_prompt(
    micro_base: Base, micro_photos: Path, tmp_path: Path
) -> None:
    photos = shutil.copytree(micro_photos, tmp_path / "photos")
    (photos / "person-0" / "0.txt").write_text("a [V] {class_word}, smiling")
    (photos / "person-0" / "1.txt").unlink()
    _, people = crowd(micro_base, photos, tmp_path / "cache", config())
    assert people[0].captions[:2] == ("a sks face, smiling", "a sks face")
    direct = micro_base.encode_images(to_pixels(open_photo(photos / "person-0" / "1.png"), 32)[None])
    assert torch.allclose(people[0].latents[1], direct[0], atol=1e-5)


def test_bf16_trains_float32_numbers(micro_base: Base, micro_photos: Path, tmp_path: Path) -> None:
    stage, people = crowd(micro_base, micro_photos, tmp_path, config(precision="bf16"))
    numbers, losses = train_group(stage, people)
    assert numbers.dtype == losses.dtype == torch.float32
    exact, _ = train_group(preopt.prepare(micro_base, config()), people)
    assert not torch.equal(numbers, exact)
    assert (numbers - exact).abs().max() < 0.05


def test_refusals(micro_base: Base, micro_photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "bank"
    with pytest.raises(InputError, match="no such photo or folder"):
        preoptimize(micro_base, tmp_path / "nobody", out, config())
    assert not out.exists()
    preoptimize(micro_base, micro_photos, out, config(steps=1))
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"config\.lr.*0\.005.*0\.5"):
        preoptimize(micro_base, micro_photos, out, config(steps=1, lr=0.5))
    with pytest.raises(InputError, match='class_word was "face", now "dog"'):
        preoptimize(micro_base.with_words("sks", "dog"), micro_photos, out, config(steps=1))
    with pytest.raises(InputError, match="base_fingerprint"):
        preoptimize(replace(micro_base, fingerprint="f" * 16), micro_photos, out, config(steps=1))
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_person_whose_training_diverges_is_named(
    micro_base: Base, micro_photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"person-0.*lower the learning rate"):
        preoptimize(micro_base, micro_photos, tmp_path / "bank", config(lr=1e30, warmup=0))
    assert len(Bank.open(tmp_path / "bank")) == 0


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["steps=0"], "steps"),
        (["stepz=1"], "stepz"),
        (["rank=64"], "rank 64 needs"),
        (["precision=fp8"], "precision"),
    ],
)
def test_config_errors_are_one_line(sets: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        load_config(PreoptConfig, None, sets)
    assert "\n" not in str(caught.value)


KILLED = """
import multiprocessing, random, resource, signal, sys
from pathlib import Path
import torch
from hyperdreambooth.base.load import load_base
from hyperdreambooth.preopt.train import PreoptConfig, preoptimize

torch.set_num_threads(1)
source, photos, out, kills, steps = sys.argv[1:]
base = load_base(source, "cpu")
config = PreoptConfig(down_dim=8, up_dim=6, steps=int(steps), lr=5e-3, identities_per_batch=1)

def work(folder, seconds):
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of computing, so a busy machine changes nothing
    preoptimize(base, Path(photos), Path(out, folder), config)

def finished(folder, seconds):
    child = multiprocessing.get_context("fork").Process(target=work, args=(folder, seconds))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGPROF), child.exitcode
    return child.exitcode == 0

assert finished("whole", 0)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
seconds, rng, killed = used.ru_utime + used.ru_stime, random.Random(0), 0
while not finished("killed", rng.uniform(0.01, 0.4) * seconds if killed < int(kills) else 0):
    killed += 1
print(killed)
"""


def killed_and_resumed(base: Path, photos: Path, out: Path, kills: int, steps: int) -> int:
    """Runs a bank through in one go, and another killed at random moments; one interpreter, a fork each.

    The kernel kills, by a signal nobody handles: like kill -9, not a line of Python runs after it.
    """
    command = [sys.executable, "-c", KILLED, str(base), str(photos), str(out), str(kills), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    whole, killed = Bank.open(out / "whole"), Bank.open(out / "killed")
    assert whole.identities == killed.identities
    assert len(whole) == 6
    assert torch.equal(whole.numbers(), killed.numbers())
    for name in ("first_loss", "last_loss"):
        assert torch.equal(whole.figure(name), killed.figure(name))
    shards = sorted(path.name for path in (out / "whole").glob("shard-*"))
    for name in shards:
        assert (out / "whole" / name).read_bytes() == (out / "killed" / name).read_bytes()
    return int(done.stdout)


def test_killed_at_random_moments_is_the_same_bank(
    micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    assert killed_and_resumed(micro_dir, micro_photos, tmp_path, kills=4, steps=4) >= 2


@pytest.mark.slow
def test_killed_ten_times_is_the_same_bank(micro_dir: Path, micro_photos: Path, tmp_path: Path) -> None:
    assert killed_and_resumed(micro_dir, micro_photos, tmp_path, kills=10, steps=20) >= 2
