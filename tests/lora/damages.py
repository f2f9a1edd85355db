"""Ways to damage a LoRA file: each makes one that cannot be right, of a whole one and a source of chance."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Header = dict[str, Any]


def split(blob: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def join(header: Header | str | bytes, data: bytes) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw + data


def tensors(header: Header) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def truncated(blob: bytes, chance: random.Random) -> bytes:
    return blob[: chance.randrange(len(blob))]


def prolonged(blob: bytes, chance: random.Random) -> bytes:
    return blob + chance.randbytes(chance.randint(1, 99))


def another_length(blob: bytes, chance: random.Random) -> bytes:
    true = int.from_bytes(blob[:8], "little")
    lengths = [0, 1, true - 1, true + 1, len(blob), 2**32, 2**40, 2**63, 2**64 - 1, chance.randrange(true)]
    return struct.pack("<Q", chance.choice(lengths)) + blob[8:]


def another_dtype(blob: bytes, chance: random.Random) -> bytes:
    header, data = split(blob)
    entry = header[chance.choice(tensors(header))]
    entry["dtype"] = chance.choice(
        ["I64", "BOOL", "U8", "F64", "F16", "F8_E4M3", "", "f32", None, 7, ["F32"]]
    )
    return join(header, data)


def another_shape(blob: bytes, chance: random.Random) -> bytes:
    header, data = split(blob)
    entry = header[chance.choice(tensors(header))]
    shape = list(entry["shape"])
    wrong: list[Any] = [
        [*shape, 2],
        [7],
        [0],
        [-1, *shape],
        [1.5],
        None,
        "12",
        [10**30],
        [2**40, 2**40],
        [[]] * 9,
    ]
    entry["shape"] = chance.choice(wrong)
    return join(header, data)


def turned_round(blob: bytes, chance: random.Random) -> bytes:
    """A matrix of the right size and the wrong shape."""
    header, data = split(blob)
    entry = header[chance.choice([n for n in tensors(header) if header[n]["shape"] not in ([], [1])])]
    size = 1
    for side in entry["shape"]:
        size *= side
    entry["shape"] = [1, size, 1] if chance.random() < 0.5 else [size, 1]
    return join(header, data)


def other_offsets(blob: bytes, chance: random.Random) -> bytes:
    header, data = split(blob)
    entry = header[chance.choice(tensors(header))]
    start, end = entry["data_offsets"]
    wrong: list[Any] = [
        [end, start],
        [start + 4, end + 4],
        [start, end + 4],
        [start],
        [],
        None,
        [-4, end],
        ["0", end],
    ]
    entry["data_offsets"] = chance.choice(wrong)
    return join(header, data)


def a_bad_number(blob: bytes, chance: random.Random) -> bytes:
    header, data = split(blob)
    start, end = header[chance.choice(tensors(header))]["data_offsets"]
    at = start + 4 * chance.randrange((end - start) // 4)
    bad = struct.pack("<f", chance.choice([float("nan"), float("inf"), float("-inf")]))
    return join(header, data[:at] + bad + data[at + 4 :])


def a_key_of_nothing(blob: bytes, chance: random.Random) -> bytes:
    header, data = split(blob)
    name = chance.choice(tensors(header))
    strange = [
        "unet.x.lora_A.weight", "unet.conv_in.lora_A.weight", "a", "", "lora_unet_x.hada_w1_a", "x.alpha",
        "x.dora_scale", "../../etc/passwd", "\u0000", "lora_A.weight", "🙂" * 50,
    ]  # fmt: skip
    entry = header.pop(name)
    return join({**header, chance.choice(strange): entry}, data)


def half_missing(blob: bytes, chance: random.Random) -> bytes:
    """One matrix taken out, cleanly."""
    header, data = split(blob)
    gone = chance.choice([name for name in tensors(header) if not name.endswith(".alpha")])
    start, end = header.pop(gone)["data_offsets"]
    for name in tensors(header):
        if header[name]["data_offsets"][0] >= end:
            header[name]["data_offsets"] = [at - (end - start) for at in header[name]["data_offsets"]]
    return join(header, data[:start] + data[end:])


def a_name_twice(blob: bytes, chance: random.Random) -> bytes:
    header, data = split(blob)
    name = chance.choice(tensors(header))
    text = json.dumps(header)
    return join(text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}", data)


def of_another_base(blob: bytes, chance: random.Random) -> bytes:
    """Whole in itself, one matrix two numbers wider."""
    header, data = split(blob)
    order = sorted(tensors(header), key=lambda name: header[name]["data_offsets"][0])
    grown = chance.choice([name for name in order if header[name]["shape"] not in ([], [1])])
    made, at = b"", 0
    for name in order:
        start, end = header[name]["data_offsets"]
        body = data[start:end]
        if name == grown:
            shape = header[name]["shape"]
            shape[-1] += 2
            size = 4
            for side in shape:
                size *= side
            body = body.ljust(size, b"\0")
        header[name]["data_offsets"] = [at, at + len(body)]
        made, at = made + body, at + len(body)
    return join(header, made)


def no_safetensors(blob: bytes, chance: random.Random) -> bytes:
    pickle = b"\x80\x02c__builtin__\nexec\nq\x00X\x04\x00\x00\x001/0\nq\x01\x85q\x02Rq\x03."
    kinds = [
        b"", b"\0" * 8, b"PK\x03\x04" + blob, pickle, pickle * 50, chance.randbytes(chance.randrange(4000)),
        b"\x89PNG\r\n\x1a\n" + blob, b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1",
    ]  # fmt: skip
    return chance.choice(kinds)


def a_strange_header(blob: bytes, chance: random.Random) -> bytes:
    _, data = split(blob)
    deep = "[" * 9000 + "]" * 9000
    kinds: list[str | bytes] = [
        "[]", "null", "1", "{", '"', '{"a": ' + deep + "}", '{"__metadata__": {"a": 1}}',
        '{"__metadata__": []}',
        '{"a": NaN}', b"\xff\xfe" * 50, '{"a": {}}', '{"a": []}', deep, '"' + '\\"' * 5000, "{}",
        '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 4]}}',
    ]  # fmt: skip
    return join(chance.choice(kinds), data)


DAMAGES: dict[Callable[[bytes, random.Random], bytes], int] = {
    truncated: 120, prolonged: 40, another_length: 50, another_dtype: 60, another_shape: 60, turned_round: 40,
    other_offsets: 50, a_bad_number: 60, a_key_of_nothing: 60, half_missing: 40, a_name_twice: 30,
    of_another_base: 40, no_safetensors: 40, a_strange_header: 50,
}  # fmt: skip
