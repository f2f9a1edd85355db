"""An object store on this machine: moto's S3 server in a process of its own, on a free port."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_SERVER = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
# names and passwords of nobody: the server takes any
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nobody",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Runs a server and yields the environment variables of its clients; it ends with this process."""
    words = [sys.executable, "-W", "ignore", "-c", _SERVER]
    quiet = subprocess.DEVNULL  # a line for each request
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        port = int(server.stdout.readline())
        yield {**VARIABLES, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        server.stdin.close()


@contextmanager
def bucket(name: str) -> Iterator[str]:
    """Yields the URL of a new bucket, which this process and its children reach."""
    with s3_server() as variables, pytest.MonkeyPatch.context() as patch:
        for key, value in variables.items():
            patch.setenv(key, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # fsspec would go on asking an earlier server
        s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
        yield f"s3://{name}"
