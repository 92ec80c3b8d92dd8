"""Edits that eval/fuzz_inputs.py makes of good files: of bytes, of trees of values, of headers, of whole files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

NAMES = (
    "", " ", ".", "..", "/abs", "../up", "a/b", "a\\b", "con", "NUL", "a\x00b", "a\u202eb", "e\u0301", "\ud800", "x" * 300,
    "keys", "default", "base_model", "weight", "0", "-1", "latest", "None", "ref", "a.b", "a b", "a\nb", "*", "[a]", "{a}", "<b>",
    "~", "-x", "lora_A", "forward", "__class__", "\U0001f600", "a:b", "$HOME", "%s", "\ufeff", "COM1.txt", "expert_0", "items",
    "training",
)  # fmt: skip


ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 0.5, -0.5, 1e308, 1e-300, float("nan"), float("inf"), 2**31, 2**63, -(2**63), 10**30,
    "", " ", "0", "1e9", "true", "null", "x" * 300, "../up", "/abs", "a/b", "a\x00b", "a\u202eb", "\u00e9", "\ud800", "con",
    "latest", ".", "..", "all-linear", "*", "(", "(a+)+$", "{0}", "%s", [], [[]], [None], [1, 2, 3], ["q_proj"], ["a", "a"],
    {}, {"": 1}, {"a": {}}, {"expert_0": -1}, {"expert_0": float("nan")}, {"alpha": ["expert_0"]}, {"kind": "task"},
)  # fmt: skip
BITS = (b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud800",
        b"NaN", b"1e999", b"\xc3\x28", b"\x1f\x8b", b"&a", b"*a", b"!!python/object:os.system", b"- ", b"\t", b"  ")  # fmt: skip


def bent_bytes(chance: Random, data: bytes) -> bytes:
    """One to three edits: flipped, cut, doubled, moved or strange bytes."""
    for _ in range(chance.randint(1, 3)):
        at, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        end = min(end, at + chance.choice((1, 4, 64, 4096)))
        part = data[at:end]
        data = chance.choice(
            (
                data[:at] + bytes(b ^ 1 << chance.randrange(8) for b in part) + data[end:],
                data[:at] + data[end:],
                data[:at] + part * 2 + data[end:],
                data[:at],
                data[:at] + chance.choice(BITS) * chance.choice((1, 1, 1, 200)) + data[at:],
                part,
            )
        )
    return data


def bent_tree(chance: Random, tree: Any) -> Any:
    """One to three edits of a tree of mappings and lists: odd values, lost, renamed, added or swapped entries."""
    tree = deepcopy(tree)
    for _ in range(chance.randint(1, 3)):
        places = [*_places(tree)]
        if not places:
            return chance.choice(ODD)
        holder, key = chance.choice(places)
        other_holder, other = chance.choice(places)
        edit = chance.randrange(8)
        if edit < 4:
            holder[key] = deepcopy(chance.choice(ODD))
        elif edit == 4:
            del holder[key]
        elif edit == 5:
            holder[key] = deepcopy(other_holder[other])
        elif edit == 6 and isinstance(holder, dict):
            holder[chance.choice((f"{key}x", "", "\u202e", "r", "name", "x" * 100))] = holder.pop(key)
        else:
            holder[key] = chance.choice(
                ([holder[key]], {"a": holder[key]}, str(holder[key]), [holder[key]] * 2)
            )
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from _places(value)


def bent_tensors(chance: Random, data: bytes) -> bytes:
    """A safetensors file with an edited header that is again well-formed on the outside."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = chance.randrange(4)
    if kind == 0:
        text = bent_bytes(chance, json.dumps(header).encode())
    else:
        text = json.dumps(bent_tree(chance, header), default=str).encode()
    if kind == 1:
        body = bent_bytes(chance, body)
    length = len(text) if kind < 3 else chance.choice((0, 1, len(text) - 1, len(text) + 8, 2**40, 2**63))
    return struct.pack("<Q", length) + text + body


def bent_files(chance: Random, folder: Path) -> None:
    """Make one file of a folder another kind of thing, empty, or another name's."""
    file = chance.choice(sorted(folder.iterdir()))
    data = file.read_bytes()
    file.unlink()
    edit = chance.randrange(4)
    if edit == 0:
        file.mkdir()
    elif edit == 1:
        file.symlink_to(chance.choice(("/etc/hostname", "absent", ".", "/dev/null")))
    elif edit == 2:
        file.write_bytes(b"")
    else:
        file.with_name(chance.choice(("adapter_model.bin", "x", "\u202e"))).write_bytes(data)


def replaced(chance: Random, file: Path) -> None:
    """Put a folder, nothing or an empty file in a file's place."""
    file.unlink()
    edit = chance.randrange(3)
    if edit == 0:
        file.mkdir()
    elif edit == 1:
        file.write_bytes(b"")
