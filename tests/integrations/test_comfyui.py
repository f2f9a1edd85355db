"""The nodes inside a real ComfyUI, on the smallest checkpoint that it takes for SD 1.5.

COMFYUI_DIR names a checkout of ComfyUI, and COMFYUI_PYTHON the Python that runs it, with this package
installed; without it, it is the Python of the tests.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import node
import originals
import pytest
from PIL import Image

import micro
from hyperdreambooth import Base, load_adapter

COMFYUI = Path(os.environ.get("COMFYUI_DIR", "none"))
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
SIDE = 64
WORKFLOWS = sorted((node.NODE / "example_workflows").glob("*.json"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (COMFYUI / "main.py").is_file(), reason="no ComfyUI: COMFYUI_DIR names none"),
]


@dataclass
class Home:
    """A folder as ComfyUI's `--base-directory` wants it, and the base that is its checkpoint."""

    folder: Path
    base: Base


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("comfyui")
    for part in ("custom_nodes", "models/checkpoints", "models/loras", "input", "output", "user"):
        (folder / part).mkdir(parents=True)
    (folder / "custom_nodes" / "hyperdreambooth").symlink_to(node.NODE)
    pipe = originals.smallest()
    originals.save_checkpoint(pipe, folder / "models" / "checkpoints" / "tiny.safetensors")
    base = Base.from_pipeline(pipe, "tiny", resolution=SIDE)
    made = micro.hypernet(tmp_path_factory.mktemp("hypernet"), base)
    shutil.copytree(made, folder / "models" / "hyperdreambooth" / "people")
    Image.radial_gradient("L").convert("RGB").save(folder / "input" / "photo.png")
    return Home(folder, base)


def test_nodes_in_the_process_of_comfyui(home: Home) -> None:
    checkpoint = home.folder / "models" / "checkpoints" / "tiny.safetensors"
    script = Path(__file__).with_name("in_comfyui.py")
    command = [PYTHON, script, COMFYUI, checkpoint, home.folder / "models", "people", str(SIDE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["fingerprint"] == home.base.fingerprint
    assert found["unet"] < 1e-5  # the same function, not only the same numbers
    for part in ("unet", "vae"):
        assert found["sharing"][part][1] == 0, "bytes that are not ComfyUI's"
    for lora in (found["prediction"], found["finetuned"]):
        assert lora["sites"] == len(home.base.sites) and lora["others"] == []
        assert lora["worst"] < 1e-5
    assert found["interrupted"] == [1, 2, 3]
    assert (found["crop"], found["trigger"]) == ([1, SIDE, SIDE, 3], "sks")


@dataclass
class Server:
    """A running ComfyUI, which answers when it can: a training takes all cores."""

    client: httpx.Client

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Runs a workflow and returns its entry in the history."""
        asked = self.client.post("/prompt", json={"prompt": graph})
        assert asked.status_code == 200, asked.text
        name = asked.json()["prompt_id"]
        while name not in (history := self.client.get(f"/history/{name}").json()):
            time.sleep(0.2)
        return history[name]


@pytest.fixture(scope="module")
def server(home: Home) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(home.folder)]
    options += ["--database-url", f"sqlite:///{home.folder / 'comfyui.db'}", "--disable-all-custom-nodes"]
    options += ["--whitelist-custom-nodes", "hyperdreambooth"]
    command = [PYTHON, str(COMFYUI / "main.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if "To see the GUI" in line:
            break
    else:
        pytest.fail("".join(lines[-40:]))
    rest = threading.Thread(target=lines.extend, args=(process.stdout,))
    rest.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None) as client:
        yield Server(client)
    process.terminate()
    process.wait()
    rest.join()
    process.stdout.close()


def workflow(text: str, **changed: Any) -> dict[str, Any]:
    """From a photo to a picture: a prompt as ComfyUI's API takes it."""
    person = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "photo": ["2", 0], "hypernet": ["3", 0]}
    person |= {"steps": 2, "rank": 2, "resolution": SIDE, "find_face": False, "seed": 0, **changed}
    sampler = {"model": ["5", 0], "positive": ["7", 0], "negative": ["8", 0], "latent_image": ["9", 0]}
    sampler |= {
        "seed": 0,
        "steps": 2,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1,
    }
    nodes = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": "tiny.safetensors"}),
        "2": ("LoadImage", {"image": "photo.png"}),
        "3": ("HdbHypernetLoader", {"name": "people"}),
        "4": ("HdbPersonLora", person),
        "5": ("HdbWearPerson", {"model": ["1", 0], "clip": ["1", 1], "lora": ["4", 0], "strength": 1.0}),
        "6": ("StringReplace", {"string": text, "find": "[V]", "replace": ["4", 1]}),
        "7": ("CLIPTextEncode", {"clip": ["5", 1], "text": ["6", 0]}),
        "8": ("CLIPTextEncode", {"clip": ["5", 1], "text": ""}),
        "9": ("EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": 1}),
        "10": ("KSampler", sampler),
        "11": ("VAEDecode", {"samples": ["10", 0], "vae": ["1", 2]}),
        "12": ("SaveImage", {"images": ["11", 0], "filename_prefix": "person"}),
        "13": ("SaveLoRANode", {"lora": ["4", 0], "prefix": "loras/person"}),
        "14": ("PreviewImage", {"images": ["4", 2]}),
    }
    return {name: {"class_type": kind, "inputs": given} for name, (kind, given) in nodes.items()}


def cached(entry: dict[str, Any]) -> list[str]:
    """The nodes that ComfyUI did not run again."""
    messages = dict(entry["status"]["messages"])
    return messages["execution_cached"]["nodes"]


def picture(server: Server, entry: dict[str, Any], number: str) -> Image.Image:
    where = entry["outputs"][number]["images"][0]
    return Image.open(io.BytesIO(server.client.get("/view", params=where).content))


def test_workflow_ends_in_a_picture(server: Server, home: Home) -> None:
    entry = server.run(workflow("a photo of a [V] face"))
    assert entry["status"]["status_str"] == "success", entry["status"]
    drawn = picture(server, entry, "12")
    assert drawn.size == (SIDE, SIDE)
    assert picture(server, entry, "14").size == (SIDE, SIDE)
    saved = load_adapter(next((home.folder / "output" / "loras").glob("person_*.safetensors")), home.base)
    assert {*saved.factors} == {site.name for site in home.base.sites}

    again = server.run(workflow("a drawing of a [V] face"))
    assert "4" in cached(again)  # the same photo is not trained again
    other = server.run(workflow("a drawing of a [V] face", seed=1))
    assert "4" not in cached(other)  # and on a checkpoint that wore a person meanwhile, it is
    assert other["status"]["status_str"] == "success", other["status"]
    assert picture(server, other, "12").tobytes() != picture(server, again, "12").tobytes()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_example_workflow_fits_the_nodes(server: Server, file: Path) -> None:
    known = server.client.get("/object_info").json()
    for one in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
        inputs = [name for kind in known[one["type"]]["input_order"].values() for name in kind]
        assert {given["name"] for given in one["inputs"]} <= {*inputs, "upload"}, one["type"]
        if one["type"].startswith("Hdb"):
            widgets = [given["name"] for given in one["inputs"] if "widget" in given]
            # a seed that changes by itself would train the person again at every run
            assert len(one["widgets_values"]) == len(widgets), one["type"]


def test_mix_of_two_people_is_drawn(server: Server) -> None:
    graph = workflow("a photo of a [V] face")
    graph["15"] = {"class_type": "HdbPersonLora", "inputs": {**graph["4"]["inputs"], "seed": 1}}
    people = {"person_1": ["4", 0], "weight_1": 0.5, "person_2": ["15", 0], "weight_2": 0.5}
    graph["16"] = {"class_type": "HdbPersonMix", "inputs": people}
    graph["5"]["inputs"]["lora"] = ["16", 0]
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]


def test_checkpoint_that_wears_a_lora_is_told_so(server: Server) -> None:
    graph = workflow("a photo of a [V] face")
    graph["15"] = {"class_type": "HdbPersonLora", "inputs": {**graph["5"]["inputs"], **graph["4"]["inputs"]}}
    graph["15"]["inputs"] |= {"model": ["5", 0], "clip": ["5", 1]}
    del graph["15"]["inputs"]["lora"], graph["15"]["inputs"]["strength"]
    graph["13"]["inputs"]["lora"] = ["15", 0]
    entry = server.run(graph)
    error = dict(entry["status"]["messages"])["execution_error"]
    assert "expected a checkpoint without LoRAs, got one with" in error["exception_message"]
