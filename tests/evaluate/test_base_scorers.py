"""A base's scorers against naive arithmetic, on tiny random ResNets beside a copy of the micro base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import cosine_similarity

import micro
from hyperdreambooth.base.load import Base, load_base
from hyperdreambooth.evaluate import face_encoders
from hyperdreambooth.evaluate.base_scorers import (
    BaseScorers,
    Classifier,
    load_base_scorers,
    why_not_scored,
)
from hyperdreambooth.evaluate.face_encoders import Calibration
from hyperdreambooth.evaluate.judge import identity_scores
from hyperdreambooth.evaluate.text import asked, found_share, groups
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError
from micro import LABELS, PHRASES

CPU = torch.device("cpu")


@pytest.fixture
def scored_base(micro_dir: Path, tmp_path: Path) -> Base:
    place = Path(shutil.copytree(micro_dir, tmp_path / "base"))
    micro.scorers(place / "scorers")
    return load_base(place, device="cpu")


@pytest.fixture
def scorers(scored_base: Base) -> BaseScorers:
    found = load_base_scorers(scored_base)
    assert found is not None
    return found


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8)) for _ in range(count)]


def test_a_base_without_scorers_is_judged_by_faces_and_its_prompts_are_not_read(micro_base: Base) -> None:
    pytest.importorskip("dlib")
    found = load_base_scorers(micro_base)
    assert found is not None and found.reader is None and found.judge.name == "dlib"
    noise = pictures(2)
    assert found.summary(noise, ["a face", "sad"], pictures(1, seed=1)) == {"identity": None, "prompt": None}
    assert "no scorers" in why_not_scored(found, "prompt") and "no face" in why_not_scored(found, "identity")
    assert load_base_scorers(micro_base, None) is None


def test_without_any_encoder_nobody_is_judged_and_the_extra_is_named(
    micro_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(face_encoders, "find_spec", lambda name: None)
    assert load_base_scorers(micro_base) is None
    assert "hyperdreambooth[judge]" in why_not_scored(None, "identity")
    with pytest.raises(InputError, match=r"hyperdreambooth\[judge\]"):
        face_encoders.face_encoder("auto")


def test_the_base_s_own_scorer_comes_first_unless_another_is_named(scored_base: Base) -> None:
    pytest.importorskip("dlib")
    own, named = load_base_scorers(scored_base), load_base_scorers(scored_base, "dlib")
    assert own is not None and named is not None
    assert (own.judge.name, named.judge.name) == ("the base's own scorer", "dlib")
    assert own.reader is not None and named.reader is not None


def test_identity_is_the_calibrated_mean_cosine(scorers: BaseScorers, scored_base: Base) -> None:
    generated, others = pictures(3), pictures(2, seed=1)
    model = Classifier(scored_base.scorers / "identity", CPU).model
    with torch.no_grad():
        ours = [model(to_pixels(image, 16)[None]).logits[0] for image in generated]
        theirs = [model(to_pixels(image, 16)[None]).logits[0] for image in others]
    for score, one in zip(scorers.identity(generated, others), ours, strict=True):
        cosines = [float(cosine_similarity(one, other, dim=0)) for other in theirs]
        assert score == pytest.approx(sum((c - 0.2) / 0.7 for c in cosines) / 2, abs=1e-4)
    torch.testing.assert_close(scorers.judge.embed(generated).norm(dim=1), torch.ones(3))
    with pytest.raises(ValueError, match="besides the reference"):
        scorers.identity(generated, [])


@given(same=st.floats(0.5, 1.0), stranger=st.floats(-0.5, 0.4), m=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_person_scores_one_and_a_stranger_zero(same: float, stranger: float, m: int) -> None:
    other = torch.tensor([[1.0, 0.0]])
    at = torch.tensor([same, stranger] * m)
    generated = torch.stack([at, (1 - at.square()).sqrt()], dim=1)
    scores = identity_scores(generated, other, Calibration(same=same, stranger=stranger))
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.0] * m), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("a [V] face", []),
        ("a [V] face, Smiling, in a red hat", ["mood:smiling", "hat:red"]),
        ("a face in a red hat with a feather", ["hat:top"]),
        ("a red hat with a feather beside a red hat", ["hat:top", "hat:red"]),
        ("unsmiling, sadly", []),
        ("sad, sad, sad", ["mood:sad"]),
    ],
)
def test_asked_takes_whole_phrases_and_the_longest(prompt: str, labels: list[str]) -> None:
    assert asked(prompt, PHRASES) == labels


@given(st.lists(st.floats(-5, 5), min_size=5, max_size=5, unique=True))
@settings(max_examples=50, deadline=None)
def test_found_share_counts_the_winner_of_each_group(values: list[float]) -> None:
    labels = LABELS[:5]
    hat = max(labels[:3], key=lambda label: values[labels.index(label)])
    mood = max(labels[3:], key=lambda label: values[labels.index(label)])
    for wanted in (["hat:red"], ["hat:top", "mood:sad"], labels):
        expected = sum(label in (hat, mood) for label in wanted) / len(wanted)
        assert found_share(torch.tensor(values, dtype=torch.float64), labels, wanted) == pytest.approx(
            expected
        )
    assert found_share(torch.tensor(values), labels, []) is None
    assert groups(labels) == {"hat": [0, 1, 2], "mood": [3, 4]}


def test_prompt_and_traits_against_one_by_one(scorers: BaseScorers) -> None:
    images, reader = pictures(3), scorers.reader
    assert reader is not None
    prompts = ["a face, smiling, in a red hat", "a face", "sad"]
    with torch.no_grad():
        logits = [reader.classifier.model(to_pixels(image, 16)[None]).logits[0] for image in images]
    found = scorers.prompt(images, prompts)
    scores = found["prompt"]
    assert scores[1] is None
    hats = [LABELS[int(row[:3].argmax())] == "hat:red" for row in logits]
    moods = [LABELS[3 + int(row[3:5].argmax())] for row in logits]
    assert scores[0] == (hats[0] + (moods[0] == "mood:smiling")) / 2
    assert scores[2] == float(moods[2] == "mood:sad")
    assert found.keys() == {"prompt", "prompt:hat", "prompt:mood"}
    assert found["prompt:hat"] == [float(hats[0]), None, None]
    assert found["prompt:mood"] == [float(moods[0] == "mood:smiling"), None, scores[2]]
    assert reader.trait_names == ("age", "nose")
    torch.testing.assert_close(
        reader.traits(images), torch.stack([row[5:].sigmoid() for row in logits]), atol=1e-5, rtol=0
    )


def test_summary_is_null_where_nothing_can_be_scored(scorers: BaseScorers) -> None:
    images = pictures(2)
    nothing = scorers.summary(images, ["a face", "a [V] face"])
    assert nothing == {"identity": None, "prompt": None}
    full = scorers.summary(images, ["sad", "a face"], pictures(1, seed=4))
    assert full["identity"] == pytest.approx(sum(scorers.identity(images, pictures(1, seed=4))) / 2)
    assert full["prompt"] == scorers.prompt(images[:1], ["sad"])["prompt"][0]
    assert scorers.judge.embed([]).shape == (0, 5)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("identity", {"calibration": None}, "calibration"),
        ("identity", {"calibration": {"same": "high"}}, "same"),
        ("attributes", {"phrases": None}, "phrases"),
        ("attributes", {"phrases": {"hat:blue": "blue hat"}}, "hat:blue"),
    ],
)
def test_a_broken_scorer_is_named(
    scored_base: Base, part: str, change: dict[str, object], words: str
) -> None:
    file = scored_base.scorers / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=words) as caught:
        load_base_scorers(scored_base)
    assert "\n" not in str(caught.value)


def test_a_missing_or_cut_scorer_is_one_line(scored_base: Base) -> None:
    weights = scored_base.scorers / "identity" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="identity"):
        load_base_scorers(scored_base)
    shutil.rmtree(scored_base.scorers / "identity")
    with pytest.raises(InputError, match="identity"):
        load_base_scorers(scored_base)
