"""The work behind the page, without a page: what is made, kept, stopped, cut off and deleted."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from studios import CONFIG, add, crops_of, finished, opened, without_scorers

from hyperdreambooth.adapter import FILES, Adapter, load_adapter
from hyperdreambooth.files import InputError
from hyperdreambooth.ui.making import Maker, look_steps, propose
from hyperdreambooth.ui.records import Person, Seen, look_file, looks, losses, nearest, read, write
from hyperdreambooth.ui.studio import BUG


@pytest.fixture
def photo(micro_photos: Path) -> Path:
    return micro_photos / "person-0" / "0.png"


def expected(maker: Maker, folder: Path, steps: int) -> Adapter:
    """What `Personalizer` makes of the same crop in so many steps."""
    assert maker.personalizer is not None
    config = CONFIG.model_copy(update={"steps": steps})
    return maker.personalizer.personalize(folder / "photos" / "0.png", config=config)


def same(one: Adapter, other: Adapter) -> bool:
    return all(
        torch.allclose(up @ down, other.factors[site][1] @ other.factors[site][0], atol=1e-6)
        for site, (down, up) in one.factors.items()
    )


def test_a_person_is_what_personalize_makes(maker: Maker, photo: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "out", without_scorers(maker)) as studio:
        folder = add(studio, photo, tmp_path)
        person = finished(studio, folder)
        assert (person.state, person.message, person.name) == ("done", "", "Ana")
        assert person.kept == person.proposed == person.last == CONFIG.steps
        assert "last step" in person.why
        assert [one.step for one in looks(folder)] == [0, 1, 2, 3, 4]
        assert [step for step, _ in losses(folder)] == [1, 2, 3, 4]
        for form in ("kohya", "diffusers"):
            made = load_adapter(folder / person.files[form], maker.base)
            assert same(made, expected(maker, folder, 4))
        assert all((folder / name).is_file() for name in person.files.values())


def test_the_step_that_is_kept_is_a_training_of_so_many_steps(
    maker: Maker, photo: Path, tmp_path: Path
) -> None:
    with opened(tmp_path / "out", maker) as studio:
        folder = add(studio, photo, tmp_path)
        person = finished(studio, folder)
        sums = [sum(score or 0 for score in one.scores.values()) for one in looks(folder)]
        assert person.kept == looks(folder)[sums.index(max(sums))].step
        for step in (0, 2):
            studio.keep(folder.name, step)
            made = load_adapter(folder / FILES["diffusers"], maker.base)
            assert same(made, expected(maker, folder, step)) and read(folder, Person).kept == step
            assert (folder / "picture.png").read_bytes() == look_file(folder, step, "-0.png").read_bytes()


def test_stopped_and_gone_on_is_as_if_nothing_had_happened(maker: Maker, photo: Path, tmp_path: Path) -> None:
    calm = without_scorers(maker)
    with opened(tmp_path / "out", calm) as studio:
        whole = add(studio, photo, tmp_path, "whole")
        finished(studio, whole)
        crops = crops_of([photo], tmp_path / "half")
        folder = studio.out / "people" / "half"
        folder.mkdir()
        (folder / "photos").mkdir()
        for file in crops.iterdir():
            (folder / "photos" / file.name).write_bytes(file.read_bytes())
        write(folder, Person(name="half", state="stopped"))
        halt = _after(2)
        calm.make(folder, halt)
        assert read(folder, Person).kept == 2 and [step for step, _ in losses(folder)] == [1, 2]
        studio.go_on(folder)
        assert finished(studio, folder).state == "done"
        one, other = (load_adapter(each / FILES["diffusers"], maker.base) for each in (whole, folder))
        assert all(torch.equal(one.factors[site][0], other.factors[site][0]) for site in one.factors)


class _After(Event):
    """Is set once it has been asked so many times: the finetune asks after every step."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    def is_set(self) -> bool:
        self._left -= 1
        return self._left <= 0


def _after(times: int) -> Event:
    return _After(times)


def test_what_a_killed_program_leaves(maker: Maker, photo: Path, tmp_path: Path) -> None:
    """What waited is made without being asked; what was cut off says so, and goes on when it is asked to."""
    out = tmp_path / "out"
    for name, state in (("cut", "running"), ("patient", "waiting")):
        folder = out / "people" / name
        crops_of([photo], folder / "photos")
        write(folder, Person.model_validate({"name": name, "state": state}))
    (out / "people" / "cut" / "training").mkdir()
    with opened(out, maker) as studio:
        assert finished(studio, out / "people" / "patient").state == "done"
        cut = read(out / "people" / "cut", Person)
        assert cut.state == "stopped" and "press Go on" in cut.message
        studio.go_on(out / "people" / "cut")
        assert finished(studio, out / "people" / "cut").state == "done"


def test_a_job_that_waits_can_be_taken_out_of_the_queue(maker: Maker, photo: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "out", maker) as studio, maker.base.lock:  # so that the first job cannot go on
        first = add(studio, photo, tmp_path, "first")
        second = add(studio, photo, tmp_path, "second")
        third = add(studio, photo, tmp_path, "third")
        assert studio.place(third) >= 2
        studio.stop(second)
        assert read(second, Person).state == "stopped"
        assert studio.place(third) >= 1
        studio.delete(third.name)
        assert not third.exists()
        studio.stop(first)
        studio.stop(first)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (InputError("rank: expected at most 8, got 99"), "rank: expected at most 8, got 99"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the device has too little memory"),
        (MemoryError(), "the machine has too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "the machine has too little memory"),
        (OSError(28, "No space left on device"), "the disk is full"),
        (KeyError("oops"), BUG),
    ],
)
def test_errors_are_sentences_and_the_queue_goes_on(
    maker: Maker,
    photo: Path,
    tmp_path: Path,
    error: Exception,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise error

    with opened(tmp_path / "out", maker) as studio, caplog.at_level(logging.ERROR, "hyperdreambooth"):
        with monkeypatch.context() as patch:
            patch.setattr(Maker, "_train", fail)
            bad = finished(studio, add(studio, photo, tmp_path, "bad"))
        assert bad.state == "failed" and bad.message.startswith(sentence)
        assert "Traceback" not in bad.message
        assert ("oops" in caplog.text) == (sentence == BUG)
        studio.go_on(studio.out / "people" / "bad")
        assert finished(studio, studio.out / "people" / "bad").state == "done"


def test_a_strange_photo_is_only_predicted_unless_asked(maker: Maker, photo: Path, tmp_path: Path) -> None:
    strange = replace(maker, distance=lambda photos: (1.7, "the photo is unlike those of the training"))
    with opened(tmp_path / "out", strange) as studio:
        folder = add(studio, photo, tmp_path)
        person = finished(studio, folder)
        assert person.kept == 0 and not losses(folder) and "left out" in person.why
        assert same(load_adapter(folder / FILES["kohya"], maker.base), expected(maker, folder, 0))
        crops = crops_of([photo], tmp_path / "again")
        key = studio.add(crops, "Ana", {}, anyway=True)
        assert finished(studio, studio.person_folder(key)).last == CONFIG.steps


def test_deleting_a_person_leaves_nothing(maker: Maker, photo: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "out", maker) as studio:
        folder = add(studio, photo, tmp_path)
        finished(studio, folder)
        studio.delete(folder.name)
        assert not [file for file in studio.out.rglob("*") if file.is_file()]


@pytest.mark.parametrize("key", ["../out", "..", "", ".", "nobody", "/etc", "ana/../ana"])
def test_a_key_of_a_page_is_the_name_of_a_person(maker: Maker, photo: Path, tmp_path: Path, key: str) -> None:
    with opened(tmp_path / "out", maker) as studio, pytest.raises(InputError, match="not here"):
        studio.person_folder(key)


def test_names_become_folders_of_their_own(maker: Maker, photo: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "out", maker) as studio:
        found = [add(studio, photo, tmp_path / str(k), "../Ána B.").name for k in range(2)]
        assert found == ["ana-b", "ana-b-2"]
        assert add(studio, photo, tmp_path, "王").name == "person"
        with pytest.raises(InputError, match="name"):
            studio.add(tmp_path, "  ", {})
        for folder in (studio.out / "people").iterdir():
            studio.stop(folder)


@pytest.mark.parametrize("last", [1, 3, 4, 23, 25, 40, 400])
def test_the_looks_are_few_and_even(last: int) -> None:
    steps = [*look_steps(last)]
    assert steps[0] == 0 and steps[-1] == last and len(steps) <= 8
    pitch = steps[1] - steps[0]
    assert all(step % pitch == 0 for step in steps[:-1])


def test_the_proposal_weighs_likeness_against_prompt() -> None:
    seen = [
        Seen(0, {"identity": 0.2, "prompt": 1.0}, ()),
        Seen(5, {"identity": 0.8, "prompt": 0.9}, ()),
        Seen(9, {"identity": 0.9, "prompt": 0.6}, ()),
    ]
    assert propose(seen, judged=True)[0] == 5
    assert propose(seen, judged=False)[0] == 9
    assert (found := nearest(seen, 6)) is not None and found.step == 5
