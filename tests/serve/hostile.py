"""Requests of somebody who wants to break the service; each is made from a number, so it can be repeated."""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from services import face

SQL = [
    "' OR 1=1 --",
    "'; DROP TABLE jobs; --",
    '" UNION SELECT digest FROM keys --',
    "1); DELETE FROM people; --",
]
PATHS = [
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/secret",
    "....//service.db",
    "/etc/passwd",
    "C:\\windows\\win.ini",
    "person_%00",
    "file:///etc/passwd",
    "..\\..\\secret",
    "~root",
    "files/../../secret",
]
TEXTS = [
    *SQL,
    *PATHS,
    "\0",
    "\ud800",
    "\x1b[2J",
    "A" * 100_000,
    "${jndi:ldap://x}",
    "{{7*7}}",
    "%s%n",
    "\u202e",
    "",
    " ",
]
NUMBERS: list[Any] = [-1, 0, 1.5, 1e308, -1e308, 2**63, 2**64, 10**400, True, None, "1", [], {}, "NaN"]
IDS = ["person_" + "0" * 32, "job_" + "f" * 32, "file_" + "a" * 32, "' OR 1=1 --", "%00", "..", "x" * 3000]
ADDRESSES = [
    "/v1/people/{}",
    "/v1/people/{}/lora",
    "/v1/people/{}/card",
    "/v1/jobs/{}",
    "/v1/jobs/{}/events",
    "/v1/files/{}",
    "/{}",
    "/v1/{}",
    "/static/{}",
]
FIELDS = ["consent", "steps", "rank", "seed", "keep_photos", "webhook", "photos", "name", "__proto__", "key"]
HOOKS = [
    "http://127.0.0.1:22/",
    "http://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
    "https://[::1]/",
    "https://localhost/",
    "gopher://x",
    "https://user:pw@h/",
    "https://h/\r\nX: y",
]


@dataclass(frozen=True)
class Request:
    """A request that need not be any good."""

    method: str
    address: str
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header says anything."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows or b"\0" * 4096)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )


def content(rng: random.Random) -> bytes:
    """Something that is called a photo."""
    good = face(rng.randrange(5))
    cut = rng.randrange(len(good))
    return rng.choice(
        [
            b"",
            good[:cut],
            good[:cut] + rng.randbytes(50) + good[cut:],
            png(100_000, 100_000),
            png(8000, 8000),
            png(2**31 - 1, 1),
            png(0, 0),
            png(16, 16),
            rng.randbytes(5000),
            b"GIF89a" + rng.randbytes(99),
            b"%!PS-Adobe\n(/etc/passwd) run",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"PK\3\4" + b"\0" * 200,
            b"II*\0" + rng.randbytes(300),
            b"\xff\xd8\xff\xe0" + rng.randbytes(300),
            b"RIFF\xff\xff\xff\xffWEBPVP8 ",
            b"\0\0\0\x20ftypheic" + rng.randbytes(300),
        ]
    )


def form(rng: random.Random) -> Request:
    """A multipart form with strange fields, names and photos."""
    border = rng.choice(["xx", "x" * 70, "x" * 300, "'"])
    parts = list[bytes]()
    for _ in range(rng.choice([0, 1, 3, 30])):
        name, value = rng.choice(FIELDS), rng.choice(TEXTS).encode(errors="surrogatepass")
        parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value)
    parts.append(b'Content-Disposition: form-data; name="consent"\r\n\r\nself')
    for _ in range(rng.choice([0, 1, 1, 1, 2, 20])):
        file = rng.choice([*PATHS, "a.png", "\0", "x" * 999]).encode(errors="replace")
        head = (
            b'Content-Disposition: form-data; name="photos"; filename="'
            + file
            + b'"\r\nContent-Type: image/png'
        )
        parts.append(head + b"\r\n\r\n" + content(rng))
    ends = rng.choice([b"--\r\n", b"", b"\r\n", b"--\r\n--"])
    body = (
        b"".join(f"--{border}\r\n".encode() + part + b"\r\n" for part in parts)
        + f"--{border}".encode()
        + ends
    )
    kind = rng.choice(
        [f"multipart/form-data; boundary={border}", "multipart/form-data", "multipart/form-data; boundary="]
    )
    return Request("POST", "/v1/people", {"Content-Type": kind}, body)


def uris(rng: random.Random) -> Request:
    """People from JSON, with addresses that would be read or fetched elsewhere."""
    good = f"data:image/png;base64,{base64.b64encode(content(rng)).decode()}"
    photos: list[Any] = [good, "file:///etc/passwd", "http://127.0.0.1/", "/etc/passwd", "data:,x", 5, None]
    body: dict[str, Any] = {"consent": rng.choice(["self", "", 1, *SQL]), "photos": [rng.choice(photos)]}
    body |= {rng.choice(FIELDS): rng.choice([*TEXTS, *NUMBERS]) for _ in range(rng.randrange(3))}
    body |= {"webhook": rng.choice(HOOKS)} if rng.random() < 0.3 else {}
    return Request("POST", "/v1/people", {"Content-Type": "application/json"}, dumped(body))


def drawing(rng: random.Random) -> Request:
    """Pictures with wrong types, sizes, people and prompts."""
    body: dict[str, Any] = {"prompt": rng.choice([*TEXTS, "a [V] face"]), "background": True}
    keys = ["n", "size", "seed", "steps", "guidance", "adapters", "model", "user", "negative_prompt", "extra"]
    for key in rng.sample(keys, rng.randrange(4)):
        body[key] = rng.choice(
            [
                *NUMBERS,
                *TEXTS,
                "99999x99999",
                "0x0",
                [{"person": rng.choice(IDS)}],
                [{"person": rng.choice(IDS), "weight": rng.choice(NUMBERS)}] * 50,
            ]
        )
    return Request("POST", "/v1/images/generations", {"Content-Type": "application/json"}, dumped(body))


def dumped(body: Any) -> bytes:
    return json.dumps(body).encode(errors="surrogatepass")


def junk(rng: random.Random) -> Request:
    """Bodies that are no JSON, or too deep, or of another kind than they say."""
    bodies = [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"null",
        b"[]",
        b'"x"',
        b"{",
        rng.randbytes(999),
        b"1" * 9999,
        b'{"prompt": NaN}',
        b'{"n": Infinity, "prompt": "x"}',
        b"\xff\xfe{\0}\0",
        b"",
    ]
    kind = rng.choice(
        ["application/json", "text/plain", "", "application/xml", "application/json; charset=utf-7", "/"]
    )
    address = rng.choice(["/v1/people", "/v1/images/generations"])
    return Request("POST", address, {"Content-Type": kind}, rng.choice(bodies))


def address(rng: random.Random) -> Request:
    """Ids of other people, paths and SQL in addresses and queries."""
    where = rng.choice(ADDRESSES).format(rng.choice([*IDS, *PATHS, *SQL]))
    query = rng.choice(
        [
            "",
            "?format=../x",
            "?after=' OR 1=1",
            "?after=%00",
            "?after=99999999999999999999",
            "?format=kohya%0d%0a",
        ]
    )
    safe = (where + query).replace(" ", "%20").replace("\\", "%5c").encode(errors="replace").decode()
    return Request(
        rng.choice(["GET", "GET", "DELETE", "POST", "PUT", "PATCH", "OPTIONS", "TRACE", "HEAD"]), safe
    )


def headers(rng: random.Random) -> Request:
    """Wrong keys and headers of strange sizes and contents."""
    keys = [
        "Bearer hdb_" + "0" * 16 + "_x",
        "Bearer",
        "Basic eDp5",
        "Bearer " + rng.choice(SQL),
        "Bearer hdb__",
        "Bearer " + "x" * 9000,
        "Bearer hdb_\u00e9_\u00e9",
    ]
    extra: dict[str, str] = {"Authorization": rng.choice(keys)} if rng.random() < 0.5 else {}
    extra |= (
        {"Idempotency-Key": rng.choice(["x" * 5000, "\u00e9", "' OR 1=1 --", " "])}
        if rng.random() < 0.5
        else {}
    )
    extra |= {f"X-{k}": "y" * 1000 for k in range(40)} if rng.random() < 0.1 else {}
    extra |= {"X-Huge": "y" * 200_000} if rng.random() < 0.1 else {}
    extra |= (
        {"Content-Length": rng.choice(["99999999999999", "-1", "1e9", "0"])} if rng.random() < 0.1 else {}
    )
    return Request(
        "POST", "/v1/people", {"Content-Type": "application/json", **extra}, b'{"consent": "self"}'
    )


KINDS: list[Callable[[random.Random], Request]] = [form, uris, drawing, junk, address, headers]


def request(number: int) -> Request:
    """The hostile request of a number."""
    rng = random.Random(number)
    return KINDS[number % len(KINDS)](rng)
