"""After DELETE no byte of a person is anywhere in the folder of the service, and nobody else lost one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from PIL import Image
from services import Running, face
from sqlalchemy import update

from hyperdreambooth.serve.delete import delete_person, expire
from hyperdreambooth.serve.store import Made
from hyperdreambooth.serve.tables import Job


def pieces(contents: list[bytes]) -> set[bytes]:
    """Short parts of what may not be found any more; none of them is so plain that it is everywhere."""
    parts = {content[at : at + 24] for content in contents for at in range(64, len(content) - 24, 499)}
    return {part for part in parts if len(set(part)) > 12}


def found(folder: Path, parts: set[bytes]) -> list[str]:
    """The files below a folder, the database's among them, in which one of the parts stands."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [str(path) for path, content in files.items() if any(part in content for part in parts)]


def test_nothing_of_a_person_is_left_on_the_disk(running: Running) -> None:
    photo = face(7)
    gone, stays = running.person(photo, keep_photos=True), running.person(face(8), keep_photos=True)
    running.work()
    prompt = "a [V] face with a very particular hat"
    both = [{"person": gone["person"]}, {"person": stays["person"]}]
    asked: dict[str, Any] = {"prompt": prompt, "adapters": both, "steps": 2, "background": True}
    running.client.post("/v1/images/generations", json=asked)
    running.work()
    running.client.post("/v1/images/generations", json=asked)  # this one waits, with its prompt
    data, folder = running.config.data, running.config.data / "files" / gone["person"]
    contents = [path.read_bytes() for path in folder.iterdir()]
    contents += [
        Image.open(path).convert("RGB").tobytes()
        for path in folder.iterdir()
        if b"PNG" in path.read_bytes()[:8]
    ]
    others = {path: path.read_bytes() for path in (data / "files" / stays["person"]).iterdir()}
    own = {part for part in pieces(contents) if not any(part in other for other in others.values())}
    parts = {*own, b"very particular hat"}
    assert found(data, parts)

    proof = running.client.delete(f"/v1/people/{gone['person']}").json()
    assert proof["left"] == {"files": 0, "rows": 0} and proof["rows"]["jobs"] == 3, proof
    assert sorted(one["kind"] for one in proof["files"]) == [
        "card", "diffusers", "kohya", "lidb", "photo", "picture",
    ]  # fmt: skip
    assert not found(data, parts)
    assert {path: path.read_bytes() for path in others} == others
    assert running.client.get(f"/v1/people/{gone['person']}").status_code == 404
    assert running.client.get(f"/v1/people/{stays['person']}").status_code == 200


def test_a_person_deleted_while_being_made_leaves_nothing_either(running: Running) -> None:
    job, tell = running.person(), running.worker.tell

    def delete(progress: dict[str, Any]) -> bool:
        if progress["stage"] == "finetune":
            delete_person(running.database, running.service.store, job["person"], "local")
        return tell(progress)

    running.worker.tell = delete
    running.work()
    assert not list(running.service.store.files.iterdir()) and not list(running.service.store.work.iterdir())
    assert running.client.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_what_was_left_behind_by_a_killed_process_is_swept(running: Running) -> None:
    done, store = running.person(), running.service.store
    running.work()
    for orphan in (store.files / "person_gone" / "abc", store.work / "job_gone-1" / "abc"):
        orphan.parent.mkdir()
        orphan.write_bytes(b"x")
    (store.files / done["person"] / "never-published").write_bytes(b"x")
    running.worker.sign_in()
    assert [folder.name for folder in store.files.iterdir()] == [done["person"]]
    assert len(list((store.files / done["person"]).iterdir())) == 4 and not list(store.work.iterdir())


def test_files_that_are_swept_before_they_are_published_are_written_again(running: Running) -> None:
    store, made = running.service.store, [Made("photo", b"x", "image/png")] * 2
    store.stage("person_new", made)
    with running.database.write() as session:
        assert store.sweep(session) == 1
        store.publish(session, "person_new", made, "person_new")
    assert [file.read_bytes() for file in (store.files / "person_new").iterdir()] == [b"x"]


def test_pictures_and_failures_expire_and_people_stay(running: Running) -> None:
    done = running.person()
    running.work()
    asked = {"prompt": "a [V] face", "adapters": [{"person": done["person"]}], "background": True, "steps": 2}
    job = running.client.post("/v1/images/generations", json=asked).json()
    running.work()
    assert expire(running.database, running.service.store, 1.0) == 0
    with running.database.write() as session:
        session.execute(update(Job).values(ended=time.time() - 7200))
    assert expire(running.database, running.service.store, 1.0) == 1
    assert running.client.get(f"/v1/jobs/{job['id']}").status_code == 404
    assert running.client.get(f"/v1/people/{done['person']}/lora").status_code == 200
