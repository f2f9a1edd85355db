"""Every unit is done exactly once, whoever dies, and a slow machine holds nobody."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperdreambooth.cluster.desk import LOSSES, Desk, in_order


def simulate(units: int, speeds: list[float]) -> tuple[float, int]:
    """Returns when the last result came, by a clock of its own, and how often a unit was given out."""
    desk, now, count = Desk(range(units)), 0.0, 0
    idle, busy = {str(k) for k in range(len(speeds))}, list[tuple[float, str]]()
    while not desk.finished:
        for worker, _, _ in desk.hand_out(set(idle), now):
            count += 1
            idle.remove(worker)
            heapq.heappush(busy, (now + 1 / speeds[int(worker)], worker))
        now, worker = heapq.heappop(busy)
        idle.add(worker)
        desk.done(worker, now)
    return now, count


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_whoever_is_lost_every_unit_is_done_once_and_in_order(data: st.DataObject) -> None:
    units = data.draw(st.integers(0, 12))
    ahead = data.draw(st.none() | st.integers(1, 4))
    desk, names = Desk([f"unit-{k}" for k in range(units)], ahead), (f"worker-{k}" for k in itertools.count())
    idle, busy, results = {next(names), next(names), next(names)}, set[str](), list[tuple[int, str]]()
    losses, held = 0, dict[str, tuple[int, str]]()
    for now in itertools.count():
        for worker, number, unit in desk.hand_out(set(idle), now):
            assert unit == f"unit-{number}"
            idle.remove(worker)
            busy.add(worker)
            held[worker] = (number, unit)
            done = {n for n, _ in results}
            assert ahead is None or number < ahead + min(n for n in range(units) if n not in done)
        if desk.finished:
            break
        assert busy, "units are left and nobody works"
        worker = data.draw(st.sampled_from(sorted(busy)))
        busy.remove(worker)
        if losses < LOSSES - 1 and data.draw(st.booleans()):
            losses += 1
            desk.lost(worker)
            idle.add(next(names))  # its replacement
        else:
            number = desk.done(worker, now)
            assert number in (None, held[worker][0])
            if number is not None:
                results.append(held[worker])
            idle.add(worker)
    assert sorted(results) == [(k, f"unit-{k}") for k in range(units)]
    assert list(in_order(results)) == [f"unit-{k}" for k in range(units)]


@pytest.mark.parametrize("units", [24, 40, 100])
def test_a_machine_ten_times_slower_holds_nobody(units: int) -> None:
    ideal = units / (1 + 1 + 0.1)
    assert simulate(units, [1, 1, 0.1])[0] <= 1.15 * ideal


def test_equal_machines_do_nothing_twice() -> None:
    rng = random.Random(0)
    speeds = [rng.uniform(0.9, 1.1) for _ in range(8)]
    seconds, count = simulate(100, speeds)
    assert count == 100
    assert seconds <= -(-100 // 8) / 0.9


def test_nothing_is_read_before_it_is_wanted() -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for k in range(1000):
            read.append(k)
            yield k

    desk = Desk(source(), ahead=4)
    assert [unit for _, _, unit in desk.hand_out("abcdefgh", 0.0)] == [0, 1, 2, 3]
    assert len(read) == 5  # one is waiting
    desk.done("b", 1.0)
    assert not [*desk.hand_out("b", 1.0)]  # the first is still open
    desk.done("a", 1.0)
    assert [unit for _, _, unit in desk.hand_out("ab", 1.0)] == [4, 5]


def test_the_first_of_two_results_counts() -> None:
    desk = Desk(range(3))
    assert [number for _, number, _ in desk.hand_out(["slow", "fast"], 0.0)] == [0, 1]
    assert desk.done("fast", 1.0) == 1
    assert [number for _, number, _ in desk.hand_out(["fast"], 1.0)] == [2]
    assert desk.done("fast", 2.0) == 2
    assert [number for _, number, _ in desk.hand_out(["fast"], 2.0)] == [0]
    assert not [*desk.hand_out(["third"], 2.0)]  # two are enough
    assert desk.lost("slow") is None
    assert desk.done("fast", 3.0) == 0
    assert desk.finished


def test_a_unit_that_kills_its_workers_ends_the_job() -> None:
    desk = Desk(["poison"])
    with pytest.raises(OSError, match=f"{LOSSES} workers died over unit 0"):
        for k in range(LOSSES):
            assert len([*desk.hand_out([str(k)], 0.0)]) == 1
            desk.lost(str(k))


def test_a_loss_before_the_first_unit_is_nothing() -> None:
    assert Desk([1]).lost("somebody") is None
