"""The estimate of a task's memory: made on a skeleton, checked against what autograd really saves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from typer.testing import CliRunner

import micro
import pipelines
from hyperdreambooth import memory
from hyperdreambooth.apps import cli
from hyperdreambooth.base.denoise import denoise_loss, sample_noise
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.base.readers import networks
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.predictor import load_hypernet
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.memory import _predictor, _training, advise, need, skeleton


def kept(base: Base, batch: int, rank: int) -> int:
    """Bytes that autograd keeps of one real step, without the base's own weights."""
    own = {p.untyped_storage().data_ptr() for m in base.components.values() for p in m.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    factors = {
        s.name: (torch.randn(1, rank, s.in_features).requires_grad_(), torch.randn(1, s.out_features, rank))
        for s in base.sites
    }
    latents = base.encode_images(torch.zeros(1, 3, 32, 32)).expand(batch, -1, -1, -1)
    noise, timestep = sample_noise(base, tuple(latents.shape[1:]), "here")
    with wear(base.components, factors, images=batch), saved_tensors_hooks(pack, lambda tensor: tensor):
        embeddings = base.encode_prompts(base.tokenize(["a person"] * batch))
        denoise_loss(base, latents, embeddings, noise.expand(batch, -1, -1, -1), timestep.expand(batch))
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("name", ["SDXL", "Flux"])
def test_a_skeleton_keeps_what_the_base_keeps(name: str, tmp_path: Path) -> None:
    pipelines.FAMILIES[name]().save_pretrained(tmp_path)
    thin = skeleton(tmp_path, resolution=32)
    real = Base.from_pipeline(pipelines.FAMILIES[name](), name, resolution=32)
    needs = _training(thin, "personalize", FinetuneConfig(batch=3, rank=2), 0)
    # a T5 has read the captions by then, and is let go
    here = {part: network for part, network in networks(real.pipe).items() if part not in real.readers}
    weights = [p for network in here.values() for p in network.parameters()]
    assert needs["trained"] == 16 * sum(2 * (s.in_features + s.out_features) for s in real.sites)
    assert needs["saved"] == pytest.approx(kept(real, 3, 2), rel=0.1)
    assert needs["weights"] == pytest.approx(sum(p.nbytes for p in weights), rel=0.01)


def test_advice_goes_on_until_it_fits_and_each_step_saves(micro_dir: Path) -> None:
    build, config = partial(skeleton, micro_dir), FinetuneConfig(batch=4)
    steps = list(advise(build, "personalize", config, 0))
    assert [words.split()[-1] for words, _ in steps[1:]] == [
        "dtype=bfloat16", "offload=true", "checkpointing=true", "batch=1", "quantize=int8", "quantize=nf4",
    ]  # fmt: skip
    totals = [sum(needs.values()) for _, needs in steps]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)
    assert len(list(advise(build, "personalize", config, totals[2]))) == 3
    many = HypernetConfig(batch=64, encoder="none/none")
    words = [words for words, _ in advise(build, "train", many, 0, bits=["int8"])]
    assert words[-1].endswith(" --set accumulation=64 --set quantize=int8")


def test_training_a_hypernetwork_counts_its_network(micro_dir: Path) -> None:
    thin = skeleton(micro_dir)
    small, wide = (
        need(thin, "train", HypernetConfig(width=w, batch=2, encoder="none/none")) for w in (64, 256)
    )
    assert wide["trained"] > small["trained"] and wide["saved"] == small["saved"]
    assert small["basis"] > 0 and small["encoder"] == 0


def test_the_estimate_is_the_larger_of_training_and_generating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, (tok, t5) = pipelines.sd3(), pipelines.t5(width=40)
    pipe.register_modules(text_encoder_3=t5, tokenizer_3=tok)
    pipe.save_pretrained(tmp_path)
    build = partial(skeleton, tmp_path, resolution=32, skip_sites="^text_encoder")
    sizes = {
        name: sum(tensor.nbytes for tensor in [*part.parameters(), *part.buffers()])
        for name, part in build().pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    config = FinetuneConfig(batch=1)
    readers = sum(size for name, size in sizes.items() if name.startswith("text"))
    for drawn, offload, weights in (
        (1, False, sum(sizes.values()) - sizes["text_encoder_3"]), (1, True, sizes["transformer"]),
        (10_000, False, sum(sizes.values())), (10_000, True, max(readers, *sizes.values())),
    ):  # fmt: skip
        monkeypatch.setattr(memory, "GENERATED", drawn)
        needs = need(build(offload=offload), "personalize", config)
        assert needs["weights"] == weights and (needs["saved"] == 0) == (drawn > 1)


def test_the_hypernetwork_is_counted_where_it_is_known(micro_base: Base, tmp_path: Path) -> None:
    folder = micro.hypernet(tmp_path, micro_base)
    made = load_hypernet(folder)
    numbers = [*made.network.parameters(), *made.network.buffers(), *made.encoder.model.parameters()]
    config = FinetuneConfig()
    assert _predictor(micro_base, config, folder, True) == sum(tensor.nbytes for tensor in numbers)
    assert _predictor(micro_base, config, None, True) == 0
    with pytest.raises(InputError, match=r"config\.json"):
        _predictor(micro_base, config, tmp_path, True)


def doctor(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["doctor", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_doctor_counts_a_single_file_by_the_configs_of_its_like(micro_dir: Path, tmp_path: Path) -> None:
    save_file(dict(micro.unet().state_dict()), tmp_path / "whole.safetensors")
    words = ["--base", str(tmp_path / "whole.safetensors"), "--task", "personalize"]
    code, output = doctor(*words, "--set", f"base_config={micro_dir}")
    assert code == 0 and ": fits (process" in output and "MISSING" not in output
    code, output = doctor(*words)
    assert code == 2 and "set base_config to a pipeline folder of the same architecture" in output
    code, output = doctor("--base", str(tmp_path / "nowhere"))
    assert code == 1 and "nowhere; name a diffusers pipeline folder" in output and "reproduce" not in output


def test_doctor_counts_for_a_device_that_is_not_here(
    micro_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["--base", str(micro_dir), "--task", "personalize", "--device"]
    code, output = doctor(*words, "cuda")
    assert code == 0 and "GiB on cuda, whose free memory is unknown (process" in output
    assert "without the image encoder" in output
    code, output = doctor(*words, "bogus")
    assert code == 2 and "error: device: expected auto or one of those here" in output


@pytest.mark.parametrize(
    ("words", "offline"), [((), True), (("offline=false",), False), (("offline=true",), True)]
)
def test_doctor_asks_the_hub_only_where_the_user_wants_it(
    words: tuple[str, ...], offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def absent(place: str, offline: bool, **_: object) -> None:
        asked.append(offline)
        raise InputError(f"base {place}: not on this machine, and the hub cannot be reached; download it")

    monkeypatch.setattr(memory, "skeleton", absent)
    sets = [part for word in words for part in ("--set", word)]
    code, output = doctor("--base", "owner/none", "--task", "personalize", *sets)
    assert (code, asked) == (2, [offline])
    assert ("--set offline=false" in output) == (not words)


def test_doctor_shows_whether_a_task_fits(micro_dir: Path) -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "--base", str(micro_dir), "--task", "personalize"])
    assert result.exit_code == 0, result.output
    assert ": fits (process" in result.output


def test_resting_parts_lie_on_the_cpu(micro_dir: Path) -> None:
    """The meta device stands for an accelerator: what rests is known by where it is sent."""
    base = load_base(micro_dir, "cpu", offload=True)
    sent: list[tuple[str, torch.device]] = []

    def to(name: str, device: Any) -> None:
        sent.append((name, torch.device(device)))

    for name, module in networks(base.pipe).items():
        module.to = lambda device, name=name: to(name, device)  # type: ignore[method-assign, misc]
    base.denoiser.to_empty(device="meta")
    base.rest({"text_encoder"})
    assert dict(sent) == {
        "vae": torch.device("cpu"), "text_encoder": torch.device("meta"), "unet": torch.device("meta"),
    }  # fmt: skip
