"""Ways to damage a file: bytes of any file, values of JSON and YAML, the header of safetensors, lines of text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Mutation = Callable[[bytes, random.Random], bytes]
_STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "None",
    "x" * 5000, "\ud800", "../../etc/passwd", "/dev/zero", "\x1b[2J", [], [[]], {}, {"": 0}, ["x"] * 50, [1e9],
    {"x": {"y": None}},
)  # fmt: skip
_TEXTS = (
    b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 50_000, b"1" * 5000, b'{"a":' * 5000, b"\x00" * 64,
    b"\xef\xbb\xbf{}", b"a: b: c", b"d: 2020-99-99", b"!!python/object:os.system x", b"- x", b"%PDF-1.4", b"PK\x03\x04",
)  # fmt: skip


def _flipped(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _flipped_early(data: bytes, rng: random.Random) -> bytes:
    """Where a header is."""
    first = min(len(data), rng.choice([16, 256, 4096]))
    return _flipped(data[:first], rng) + data[first:]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _lost(data: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data) + 1)
    return data[:first] + data[first + rng.choice([1, 8, 100]) :]


def _inserted(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice([b"\x00", b"\xff", b'"', b"\n", b"{", b",", rng.randbytes(8)]) + data[at:]


def _other(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(_TEXTS)


def _number(data: bytes, rng: random.Random) -> bytes:
    """A number in binary, as lengths and offsets are."""
    size = rng.choice([4, 8])
    at = rng.randrange(max(1, min(len(data), 4096) - size))
    value = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data)]) % 2 ** (8 * size)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def _lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    way = rng.randrange(5)
    if way == 0:
        del lines[at]
    elif way == 1:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif way == 2:
        lines[at] = _flipped(lines[at], rng)
    elif way == 3:
        lines[at] = rng.choice(_TEXTS)
    else:
        lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    return b"\n".join(lines)


BYTES: tuple[Mutation, ...] = (_flipped, _flipped_early, _cut, _lost, _inserted, _other, _number)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value[:20])
    for key, child in children:
        yield from _places(child, (*path, key))


def changed(value: Any, rng: random.Random) -> Any:
    """``value`` with one of its values taken away, given another name, or made a strange one."""
    *path, last = rng.choice([place for place in _places(value) if place] or [("x",)])
    if not isinstance(value, (dict, list)):
        return rng.choice(_STRANGE)
    parent = value
    for key in path:
        parent = parent[key]
    way = rng.randrange(6)
    if way == 0:
        del parent[last]
    elif way == 1 and isinstance(parent, dict):
        parent[f"{last}x"] = parent.pop(last)
    elif way == 2 and isinstance(parent[last], str):
        parent[last] = rng.choice([f"{parent[last]}x", parent[last].upper(), parent[last][:-1], f"[{parent[last]}"])
    elif way == 3 and isinstance(parent[last], (int, float)) and not isinstance(parent[last], bool):
        parent[last] = rng.choice([-parent[last], parent[last] + 1, parent[last] * 1000, str(parent[last])])
    else:
        parent[last] = rng.choice(_STRANGE)
    return value


def _json(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return _flipped(data, rng)
    for _ in range(rng.choice([1, 1, 1, 3])):
        value = changed(value, rng)
    return json.dumps(value).encode()


def _yaml(data: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(changed(yaml.safe_load(data), rng), allow_unicode=False).encode(errors="surrogatepass")


def _json_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    if not lines:
        return data
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    """A header that is JSON, of the right length, and says something else."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    way, name = rng.randrange(5), rng.choice(names)
    if way == 0:
        header[name]["dtype"] = rng.choice(["I8", "U8", "BOOL", "I32", "I64", "F16", "BF16", "F64", "F8_E4M3", "C64"])
    elif way == 1:
        header[name]["shape"] = rng.choice(
            [header[name]["shape"][::-1], [1, *header[name]["shape"]], [], [-1], [2**40]]
        )
    elif way == 2:
        header[f"{name}.x"] = header.pop(name)
    elif way == 3:
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    else:
        header = changed(header, rng)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def mutations_of(file: Path) -> tuple[Mutation, ...]:
    """Those that fit a file by its ending; each kind of its own is as frequent as all others together."""
    own: dict[str, tuple[Mutation, ...]] = {
        ".json": (_json,), ".jsonl": (_json_lines, _lines), ".yaml": (_yaml,), ".safetensors": (_safetensors,),
        ".csv": (_lines,), ".jinja": (_lines,), ".txt": (_lines,),
    }  # fmt: skip
    return (*(own.get(file.suffix, ()) * (len(BYTES) // 2)), *BYTES)
