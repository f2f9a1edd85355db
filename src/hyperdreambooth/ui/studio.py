"""The work behind the page: one queue for the one base, people and drawings on the disk, no Gradio.

Everything that the page shows is read from the folders. So a tab may be closed at any time, and a program
that is killed leaves what it has; the next one says so, and goes on when it is asked to.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Condition, Event, Thread
from typing import TypeVar

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.files import InputError, discard
from hyperdreambooth.ui.crops import take_over
from hyperdreambooth.ui.drawing import Stopped, check, draw, labels
from hyperdreambooth.ui.making import Maker
from hyperdreambooth.ui.records import Drawing, Person, Record, every, new_folder, read, told_apart, write

logger = logging.getLogger("hyperdreambooth")

Explain = Callable[[Exception], str | None]
"""An error → the sentence that a user reads; None for a bug."""
Kind = TypeVar("Kind", bound=Record)

BUG = "Something went wrong that should not; the terminal in which the page was started shows what"
_CUT_OFF = "The program ended in the middle of this. What was made is kept; press Go on to continue"
_STOPPED = "Stopped. What was made is kept; press Go on to continue"
_DRAW_STEPS = 25


class Studio:
    """People, drawings and the queue of one page.

    Args:
        out: the folder in which everything is kept.
        maker: what makes people; drawings use its base.
        explain: says what went wrong.
    """

    def __init__(self, out: Path, maker: Maker, explain: Explain) -> None:
        self.out, self.maker, self._explain = out, maker, explain
        self._waiting: deque[Path] = deque()
        self._now: Path | None = None
        self._stop, self._closed = Event(), False
        self._changed = Condition()
        self._resume()
        self._thread = Thread(target=self._work, name="studio", daemon=True)
        self._thread.start()

    # ---- what is there ------------------------------------------------------------------------------------

    def person_folder(self, key: str) -> Path:
        """Returns the folder of a person; a key from a page may be anything.

        Raises:
            InputError: there is no such person.
        """
        return self._folder("people", key)

    def drawing_folder(self, key: str) -> Path:
        """Returns the folder of a drawing.

        Raises:
            InputError: there is no such drawing.
        """
        return self._folder("drawings", key)

    def _folder(self, kind: str, key: str) -> Path:
        home = self.out / kind
        if key not in {path.name for path in home.glob("[!.]*")}:
            raise InputError(f"{key}: not here any more; choose another")
        return home / key

    def people(self) -> dict[str, Person]:
        """Returns everybody by key, the newest first."""
        return every(self.out / "people", Person)

    def drawings(self) -> dict[str, Drawing]:
        """Returns the drawings by key, the newest first."""
        return every(self.out / "drawings", Drawing)

    def place(self, folder: Path) -> int:
        """Returns how many jobs come before one that waits."""
        with self._changed:
            before = list(self._waiting)
            return before.index(folder) + (self._now is not None) if folder in before else 0

    # ---- what may be asked for ----------------------------------------------------------------------------

    def add(
        self,
        crops: Path,
        name: str,
        changed: Mapping[str, int],
        anyway: bool = False,
        notes: Sequence[str] = (),
    ) -> str:
        """Queues a person who is made from a folder of crops, and returns the key.

        Raises:
            InputError: there is no name.
        """
        if not name.strip():
            raise InputError("name: expected a name for this person; write one")
        folder = new_folder(self.out / "people", name)
        take_over(crops, folder / "photos")
        person = Person(name=name.strip()[:60], changed=dict(changed), anyway=anyway, notes=tuple(notes))
        write(folder, person)
        self._push(folder)
        return folder.name

    def draw(self, drawing: Drawing) -> str:
        """Queues a drawing, and returns its key.

        Raises:
            InputError: a person who is gone or not made yet, or too many pictures.
        """
        check(drawing)
        people = self.people()
        wanted = [*drawing.weights, *([drawing.beside] if drawing.beside in people else [])]
        for key in wanted:
            if read(self.person_folder(key), Person).kept is None:
                raise InputError(f"{people[key].name} has no pictures yet; wait for the first ones")
        names = told_apart({key: person.name for key, person in people.items()})
        folder = new_folder(self.out / "drawings", "drawing")
        write(folder, drawing.model_copy(update={"labels": labels(drawing, names)}))
        self._push(folder)
        return folder.name

    def stop(self, folder: Path) -> None:
        """Ends a job after the step or picture in progress, or takes it out of the queue."""
        with self._changed:
            if folder == self._now:
                self._stop.set()
            elif folder in self._waiting:
                self._waiting.remove(folder)
                _update(folder, state="stopped", message=_STOPPED)

    def go_on(self, folder: Path) -> None:
        """Queues a job that was stopped, cut off or failed."""
        with self._changed:
            if folder == self._now or folder in self._waiting:
                return
        _update(folder, state="waiting", message="")
        self._push(folder)

    def keep(self, key: str, step: int) -> None:
        """Writes the files of a person as it was after a step.

        Raises:
            InputError: the person is being made, or there is no such step.
        """
        folder = self.person_folder(key)
        self._check_idle(folder)
        self.maker.keep(folder, step)

    def delete(self, key: str) -> None:
        """Deletes everything of a person, and the drawings that show it.

        Raises:
            InputError: the person is being made.
        """
        folder = self.person_folder(key)
        with self._changed:
            if folder in self._waiting:
                self._waiting.remove(folder)
        self._check_idle(folder)
        for name, drawing in self.drawings().items():
            if key in (*drawing.weights, drawing.beside):
                home = self.drawing_folder(name)
                self.stop(home)
                self._check_idle(home)
                discard(home)
        discard(folder)

    def _check_idle(self, folder: Path) -> None:
        with self._changed:
            if folder == self._now:
                raise InputError("this is being worked on; press Stop first, and wait a moment")

    def close(self) -> None:
        """Stops the job in progress after its step, so that its checkpoint is written, and ends."""
        with self._changed:
            self._closed = True
            self._stop.set()
            self._changed.notify_all()
        self._thread.join()

    # ---- the queue ----------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Queues what waited when the program ended, and marks what was cut off."""
        jobs = {self.out / "people" / key: one for key, one in self.people().items()}
        jobs |= {self.out / "drawings" / key: one for key, one in self.drawings().items()}
        for folder, job in sorted(jobs.items(), key=lambda entry: entry[1].made):
            if job.state == "waiting":
                self._waiting.append(folder)
            elif job.state == "running":
                _update(folder, state="stopped", message=_CUT_OFF)

    def _push(self, folder: Path) -> None:
        with self._changed:
            self._waiting.append(folder)
            self._changed.notify_all()

    def _next(self) -> Path | None:
        """Waits for the next job; None once the studio is closed."""
        with self._changed:
            self._now = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            self._stop.clear()
            self._now = self._waiting.popleft()
            return self._now

    def idle(self, timeout: float | None = None) -> bool:
        """Waits until nothing is left to do; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._now is None and not self._waiting, timeout)

    def _work(self) -> None:
        while (folder := self._next()) is not None:
            state, message = "running", ""
            try:
                _update(folder, state=state, message=message)
                self._job(folder)
                state = "stopped" if self._stop.is_set() else "done"
                message = _STOPPED if self._stop.is_set() else ""
            except Stopped:
                state, message = "stopped", _STOPPED
            except Exception as error:  # whatever it is, the page goes on, and says so
                state, message = "failed", self.said(error)
            try:
                _update(folder, state=state, message=message)
            except (InputError, OSError) as error:  # a full disk, or a folder that somebody deleted
                logger.warning(f"{folder}: its state cannot be written ({error})")

    def _job(self, folder: Path) -> None:
        if folder.parent.name == "people":
            self.maker.make(folder, self._stop)
        else:
            draw(self.maker.base, self._open, folder, self._stop, _DRAW_STEPS, self.maker.guidance)

    def _open(self, key: str) -> Adapter:
        return self.maker.open(self.person_folder(key))

    def said(self, error: Exception) -> str:
        """Returns the sentence about an error; what only a developer can mend goes to the log."""
        words = self._explain(error)
        if words is None:
            logger.error("the page failed", exc_info=error)
        return words or BUG


def _update(folder: Path, **changes: str) -> None:
    """Changes the record of a job."""
    kind = Person if folder.parent.name == "people" else Drawing
    write(folder, read(folder, kind).model_copy(update=changes))
