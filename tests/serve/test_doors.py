"""Keys, limits, order numbers, waiting, events and health: what a client meets."""

from __future__ import annotations

import base64
import io
import json
import threading
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from services import Running, face
from sqlalchemy import select
from torch import Tensor

from hyperdreambooth.files import InputError
from hyperdreambooth.serve import auth
from hyperdreambooth.serve.auth import SCOPES, Caller, RateLimit, add_key, revoke_key
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.marks import SOURCE_TYPE
from hyperdreambooth.serve.run import check
from hyperdreambooth.serve.tables import File, Job, Key


def key(running: Running, name: str, *scopes: str, per_minute: int = 600, people: int = 9) -> dict[str, str]:
    with running.database.write() as session:
        text = add_key(session, name, scopes or SCOPES, per_minute, people)
    return {"Authorization": f"Bearer {text}"}


def test_photos_come_as_data_uris_too_and_an_idempotency_key_makes_one_job(running: Running) -> None:
    uri = f"data:image/png;base64,{base64.b64encode(face()).decode()}"
    body, once = {"photos": [uri], "consent": "self"}, {"Idempotency-Key": "a-1"}
    first = running.client.post("/v1/people", json=body, headers=once)
    again = running.client.post("/v1/people", json=body, headers=once)
    assert first.status_code == again.status_code == 202
    assert first.headers["location"] == again.headers["location"]
    other = running.client.post("/v1/people", json={**body, "consent": "consented"}, headers=once)
    assert other.status_code == 422 and "Idempotency-Key" in other.json()["error"]["message"]
    assert len(running.client.get("/v1/people").json()["data"]) == 1


def test_without_keys_only_programs_on_this_machine_are_served(running: Running) -> None:
    get = running.client.get
    assert get("/v1/people").status_code == 200
    assert get("/v1/people", headers={"Host": "rebound.example:8000"}).status_code == 403
    assert get("/v1/people", headers={"Origin": "https://page.example"}).status_code == 403
    assert get("/v1/people", headers={"X-Forwarded-For": "8.8.8.8"}).status_code == 403
    assert get("/v1/people", headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200


def test_an_address_for_others_needs_keys(config: ServeConfig) -> None:
    outside = config.model_copy(update={"host": "0.0.0.0"})
    with pytest.raises(InputError, match="there are no API keys"):
        check(outside)


def test_keys_are_hashed_have_scopes_and_can_be_revoked(running: Running) -> None:
    get, mine = running.client.get, key(running, "drawer", "images")
    assert get("/v1/people").status_code == 401  # from the first key on, everybody needs one
    assert get("/v1/people", headers=mine).status_code == 200
    assert running.client.post("/v1/people", headers=mine).status_code == 403
    assert get("/metrics", headers=mine).status_code == 403
    assert get("/v1/people", headers={"Authorization": mine["Authorization"][:-1] + "~"}).status_code == 401
    secret = mine["Authorization"].rpartition("_")[2]
    with running.database.read() as session:
        assert secret not in str([vars(one) for one in session.scalars(select(Key))])
    with running.database.write() as session:
        revoke_key(session, "drawer")
    assert get("/v1/people", headers=mine).status_code == 401


def test_what_belongs_to_another_key_is_not_found(running: Running) -> None:
    mine, theirs = key(running, "mine"), key(running, "theirs")
    files = {"photos": ("a.png", face())}
    asked = running.client.post("/v1/people", data={"consent": "self"}, files=files, headers=mine)
    running.work()
    job = running.client.get(asked.headers["location"], headers=mine).json()
    person = job["person"]
    for method, address in (
        ("GET", f"/v1/jobs/{job['id']}"), ("DELETE", f"/v1/jobs/{job['id']}"),
        ("GET", f"/v1/jobs/{job['id']}/events"), ("GET", f"/v1/people/{person}"),
        ("GET", f"/v1/people/{person}/lora"), ("GET", f"/v1/people/{person}/card"),
        ("DELETE", f"/v1/people/{person}"),
    ):  # fmt: skip
        assert running.client.request(method, address, headers=theirs).status_code == 404, address
    drawing = {"prompt": "a [V] face", "adapters": [{"person": person}]}
    answer = running.client.post("/v1/images/generations", json=drawing, headers=theirs)
    assert answer.status_code == 404
    assert running.client.get(f"/v1/people/{person}/lora", headers=mine).status_code == 200


def test_rate_quota_and_a_full_queue_say_when_to_come_again(running: Running) -> None:
    few = key(running, "few", per_minute=2)
    answers = [running.client.get("/v1/jobs", headers=few) for _ in range(3)]
    assert [one.status_code for one in answers] == [200, 200, 429]
    assert int(answers[2].headers["retry-after"]) >= 1
    none = key(running, "none", people=0)
    files = {"photos": ("a.png", face())}
    refused = running.client.post("/v1/people", data={"consent": "self"}, files=files, headers=none)
    assert refused.status_code == 403 and "may keep 0 people" in refused.text


def test_a_full_queue_is_429(config: ServeConfig, running: Running) -> None:
    object.__setattr__(running.service, "config", config.model_copy(update={"most_waiting": 1}))
    running.person()
    files = {"photos": ("a.png", face())}
    full = running.client.post("/v1/people", data={"consent": "self"}, files=files)
    assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
    assert not list(running.service.store.work.iterdir())  # the photos of the second one are gone


def test_one_key_fills_only_its_share_of_the_queue(config: ServeConfig, running: Running) -> None:
    small = config.model_copy(update={"most_waiting": 5, "key_share": 0.5})
    object.__setattr__(running.service, "config", small)
    greedy, other = key(running, "greedy"), key(running, "other")
    assert small.waiting_of_a_key == 2

    def ask(who: dict[str, str]) -> Any:
        data, files = {"consent": "self"}, {"photos": ("a.png", face())}
        return running.client.post("/v1/people", data=data, files=files, headers=who)

    asked = [ask(who) for who in (greedy, greedy, greedy, other)]
    assert [one.status_code for one in asked] == [202, 202, 429, 202]
    assert int(asked[2].headers["retry-after"]) >= 1 and "2 jobs of this key" in asked[2].text
    assert [asked[k].json()["position"] for k in (0, 1, 3)] == [1, 2, 2]  # each place when it was asked for
    running.work()
    assert ask(greedy).status_code == 202


def test_a_bucket_of_requests_fills_again() -> None:
    limit, who = RateLimit(), Caller("k", SCOPES, 60, 1, 1)
    assert [limit.wait(who, 0.0) for _ in range(60)] == [0.0] * 60
    assert limit.wait(who, 0.0) == pytest.approx(1.0)
    assert limit.wait(who, 1.0) == 0.0 and limit.wait(who, 1.0) > 0


def test_people_who_wait_are_made_in_one_batch_and_each_as_if_alone(running: Running) -> None:
    jobs = [running.person(face(seed)) for seed in (1, 2, 3)]
    assert [job["position"] for job in jobs] == [1, 2, 3]
    assert running.worker.work_once() and not running.worker.work_once()
    together = [running.job(job["id"]) for job in jobs]
    assert {job["status"] for job in together} == {"succeeded"}
    alone = running.person(face(2))
    running.work()
    result = running.job(alone["id"])["result"]
    assert result == pytest.approx(together[1]["result"], abs=1e-4)
    for form, apart in (("lidb", 0.0), ("diffusers", 0.01)):  # Adam makes much of a gradient that is nearly 0
        one, other = (_numbers(running, job["person"], form) for job in (jobs[1], alone))
        assert (one - other).norm() <= apart * other.norm()


def _numbers(running: Running, person: str, form: str) -> Tensor:
    """All numbers of a file."""
    content = running.client.get(f"/v1/people/{person}/lora", params={"format": form}).content
    return torch.cat([tensor.flatten() for _, tensor in sorted(safetensors.torch.load(content).items())])


def test_photos_are_deleted_after_the_job_unless_asked_to_be_kept(running: Running) -> None:
    gone, kept = running.person(face(1)), running.person(face(2), keep_photos=True)
    running.work()
    with running.database.read() as session:
        photos = list(session.scalars(select(File.owner).where(File.kind == "photo")))
        requests = list(session.scalars(select(Job.request)))
    assert photos == [kept["person"]] and requests == [{}, {}]
    kinds = {path.name for path in (running.config.data / "files" / gone["person"]).iterdir()}
    assert len(kinds) == 4  # three LoRAs and the card


def test_a_job_can_be_canceled_while_it_waits_and_while_it_runs(running: Running) -> None:
    waiting = running.person(face(1))
    canceled = running.client.delete(f"/v1/jobs/{waiting['id']}").json()
    assert canceled["status"] == "canceled"
    assert not (running.config.data / "files" / waiting["person"]).exists() or not list(
        (running.config.data / "files" / waiting["person"]).iterdir()
    )
    at_work = running.person(face(2))
    tell = running.worker.tell

    def cancel(progress: dict[str, Any]) -> bool:
        if progress["stage"] == "finetune":
            running.client.delete(f"/v1/jobs/{at_work['id']}")
        return tell(progress)

    running.worker.tell = cancel
    running.work()
    assert running.job(at_work["id"])["status"] == "canceled"
    assert running.client.get(f"/v1/people/{at_work['person']}/lora").status_code == 404
    assert running.client.delete(f"/v1/jobs/{at_work['id']}").json()["status"] == "canceled"


def test_a_bad_person_in_a_batch_fails_alone(config: ServeConfig, running: Running, models: Any) -> None:
    del config, models
    jobs = [running.person(face(1)), running.person(face(2))]
    running.client.post(
        "/v1/people", data={"consent": "self", "rank": "1"}, files={"photos": ("a.png", face(3))}
    )
    running.work()
    assert {running.job(job["id"])["status"] for job in jobs} == {"succeeded"}


def test_pictures_have_the_shape_of_openais(running: Running) -> None:
    done = running.person()
    running.work()
    worker = threading.Thread(target=running.worker.run)
    worker.start()
    asked = {"prompt": "a [V] face", "adapters": [{"person": done["person"], "weight": 0.8}], "steps": 2}
    answer = running.client.post("/v1/images/generations", json={**asked, "output_format": "jpeg"})
    bare = running.client.post("/v1/images/generations", json={"prompt": "a face", "steps": 2, "n": 2})
    wrong = running.client.post("/v1/images/generations", json={**asked, "size": "31x31"})
    running.worker.close()
    worker.join()
    assert answer.status_code == 200, answer.text
    content = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(content)).format == "JPEG" and SOURCE_TYPE.encode() in content
    assert len(bare.json()["data"]) == 2 and bare.json()["created"] > 0
    assert wrong.status_code == 422 and "size" in wrong.json()["error"]["message"]


def test_events_follow_a_job_to_its_end(running: Running) -> None:
    job = running.person()
    running.work()
    with running.client.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert lines[0] == "event: job" and json.loads(lines[1][5:])["status"] == "succeeded"


def test_health_and_figures(running: Running) -> None:
    assert running.client.get("/healthz").json() == {"status": "ok"}
    assert running.client.get("/readyz").status_code == 503
    running.worker.sign_in()
    assert running.client.get("/readyz").json() == {"status": "ready", "workers": 1}
    running.person()
    running.client.get("/v1/jobs/secret-id")
    page = running.client.get("/metrics").text
    assert 'hdb_jobs{kind="person",state="queued"} 1.0' in page and "secret-id" not in page
    assert running.client.get("/openapi.json").json()["paths"].keys() >= {
        "/v1/people",
        "/v1/images/generations",
    }


def test_the_log_has_nothing_of_a_caller(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        done = running.person()
        running.work()
        asked = {"prompt": "a [V] SECRET", "adapters": [{"person": done["person"]}], "background": True}
        running.client.post("/v1/images/generations", json={**asked, "steps": 2})
        running.work()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("hyperdreambooth")]
    assert ours and not any("SECRET" in line or done["person"] in line for line in ours)


def test_the_server_secret_is_only_the_owners(config: ServeConfig) -> None:
    config.data.mkdir()
    secret = auth.webhook_secret(config.data, "k")
    assert secret == auth.webhook_secret(config.data, "k") != auth.webhook_secret(config.data, "other")
    assert (config.data / "secret").stat().st_mode & 0o077 == 0


def test_content_that_the_operators_filter_refuses_fails(running: Running) -> None:
    done = running.person()
    running.work()
    refuse = running.worker.studio
    refuse.refuses = lambda kind, content: "no hats" if kind == "prompt" and "hat" in content else None
    try:
        asked = {"prompt": "a [V] hat", "adapters": [{"person": done["person"]}], "background": True}
        job = running.client.post("/v1/images/generations", json=asked).json()
        running.work()
        assert running.job(job["id"])["error"] == "prompt: refused by the content filter (no hats)"
    finally:
        refuse.refuses = None
