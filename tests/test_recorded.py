"""Pictures whose denoiser's call is recorded and replayed are the plain ones, byte for byte."""

from __future__ import annotations

import pytest
import torch

from graphs import RecordedGraph
from hyperdreambooth import captured
from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.generate import generate_images
from hyperdreambooth.lora.relax import fresh


def test_recorded_pictures_are_the_plain_ones(micro_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """One person, none, and two people in batches that are not worn alike."""
    people = [
        Adapter(
            {s: (down, torch.randn(up.shape)) for s, (down, up) in fresh(micro_base.sites, 1, k).items()},
            "sks", micro_base.fingerprint, "micro",
        )
        for k in range(2)
    ]  # fmt: skip
    asked = [None, people[0], [people[0], people[0], people[1], people[0], people[1]]]

    def drawn() -> list[list[bytes]]:
        return [
            [
                image.tobytes()
                for image in generate_images(
                    micro_base, ["a [V] face"] * 5 if isinstance(who, list) else "a [V] face", who,
                    steps=5, batch=2, images=1 if isinstance(who, list) else 2,
                )
            ]
            for who in asked
        ]  # fmt: skip

    plain, graphs = drawn(), list[RecordedGraph]()

    def graph(device: torch.device) -> RecordedGraph:
        graphs.append(RecordedGraph(device))
        return graphs[-1]

    monkeypatch.setitem(captured.GRAPHS, "cpu", graph)
    assert drawn() == plain
    assert [one.replays for one in graphs] == [3] * 5
    assert "forward" not in vars(micro_base.denoiser)
