"""A person from photo to pictures, on both kinds of databases."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from services import BOTH, Running, running_on

from hyperdreambooth.files import load_tensors
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.marks import SOURCE_TYPE
from hyperdreambooth.serve.tasks import Studio


@pytest.fixture
def either(config: ServeConfig, studio: Studio, database_url: str) -> Iterator[Running]:
    yield from running_on(config.model_copy(update={"database": database_url}), studio)


@BOTH
def test_from_a_photo_to_pictures(either: Running, tmp_path: Path) -> None:
    client, job = either.client, either.person(consent="self")
    assert (job["status"], job["position"]) == ("queued", 1)
    either.work()
    done = either.job(job["id"])
    assert done["status"] == "succeeded" and done["result"]["steps"] == 2, done
    person = client.get(f"/v1/people/{done['person']}").json()
    assert (person["status"], person["consent"], person["rank"]) == ("succeeded", "self", 4)
    for form in ("kohya", "diffusers", "lidb"):
        answer = client.get(f"/v1/people/{done['person']}/lora", params={"format": form})
        file = tmp_path / f"{form}.safetensors"
        file.write_bytes(answer.content)
        assert load_tensors(file)[1]["hyperdreambooth.consent"] == "self"
    assert "photos show themselves" in client.get(f"/v1/people/{done['person']}/card").text
    asked = {"prompt": "a [V] face", "adapters": [{"person": done["person"]}], "n": 2, "steps": 2}
    waiting = client.post("/v1/images/generations", json={**asked, "background": True})
    assert waiting.status_code == 202
    either.work()
    shown = either.job(waiting.json()["id"])
    assert len(shown["result"]["data"]) == 2, shown
    picture = client.get(shown["result"]["data"][0]["url"])
    assert picture.headers["content-type"] == "image/png"
    assert SOURCE_TYPE.encode() in picture.content
    assert Image.open(io.BytesIO(picture.content)).size == (32, 32)
