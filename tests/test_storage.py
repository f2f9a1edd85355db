"""A folder is the same wherever it lies: on a disk, in memory, in an object store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import objects
from hyperdreambooth.files import InputError
from hyperdreambooth.storage import Store, digest


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with objects.bucket("faces") as url:
        yield url


@pytest.fixture(params=["disk", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    places = {"disk": lambda: tmp_path, "memory": lambda: f"memory://{tmp_path.name}"}
    places["s3"] = lambda: f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return Store(places[request.param]()) / "bank"


def test_what_is_written_is_read(store: Store) -> None:
    assert store.names() == [] and not store.exists("a-1")
    content = bytes(range(256))
    store.write("a-1", b"old")
    store.write("a-1", content)
    name = store.add(content)
    assert name == store.add(content) == f"{digest(content).hex()}.safetensors"
    assert store.names() == sorted(["a-1", name]) and store.exists("a-1")
    assert store.names(".safetensors") == [name]
    assert store.read(name) == store.read("a-1") == content
    pieces = [("a-1", 250, 10), (name, 3, 2), ("a-1", 0, -1)]
    assert store.pieces(pieces) == [content[250:], content[3:5], content]
    assert store.pieces([]) == []
    with pytest.raises(FileNotFoundError):
        store.read("none")
    with pytest.raises(FileNotFoundError):
        store.pieces([("a-1", 0, 1), ("none", 0, 1)])
    store.delete(["none", name])
    assert store.names() == ["a-1"]
    deeper = store / "deep"
    deeper.write("c", b"")
    assert deeper.names() == ["c"] and deeper.read("c") == b"" and "a-1" in store.names()
    assert deeper.here == Store(str(deeper)).here != store.here


def test_a_folder_on_a_disk_is_itself(tmp_path: Path) -> None:
    store = Store(tmp_path) / "deep"
    assert store.local == store.here == tmp_path / "deep" and str(store) == str(tmp_path / "deep")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".a.tmp").touch()
    assert store.names() == [] and Store(store).local == store.local
    assert Store(tmp_path / "a::b").local == tmp_path / "a::b"  # fsspec would read it as two places


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nonsense://x/y", "expected a folder or a URL"),
        ("oss://x/y", "needs a package that is not there"),
    ],
)
def test_a_place_that_nobody_reaches_is_one_line(place: str, words: str) -> None:
    with pytest.raises(InputError, match=f"{place}: .*{words}"):
        Store(place)


@pytest.mark.usefixtures("s3")
def test_what_a_store_refuses_names_the_place() -> None:
    with pytest.raises(InputError, match=r"s3://nobody-has-this/bank: .*bucket does not exist"):
        Store("s3://nobody-has-this/bank").write("a", b"a")
