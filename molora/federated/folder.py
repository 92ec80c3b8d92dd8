"""The folder of a server of federated rounds, and how adapters and decisions are written into it.

`round-0`, the first adapter, `round-N`, the adapter after round N, and `decisions.jsonl`, a line for
every decision. A round is over once its adapter is there, which appears whole or not at all; nothing else is state.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from molora.disk.atomic import recover, sweep, write_file, write_folder, write_json
from molora.disk.card import CONFIG_FILE, WEIGHTS_FILE
from molora.disk.manifest import MANIFEST, read_json
from molora.disk.tensors import digest
from molora.errors import AdapterError
from molora.store.adapter import read_config

LOG_FILE = "decisions.jsonl"


def adapter_of(folder: Path, number: int) -> Path:
    """Where the adapter is that a round ended with."""
    return folder / f"round-{number}"


def rounds_done(folder: Path) -> list[int]:
    """The numbers of the adapters that a server has, 0 for the first, after removing what killed writers left."""
    sweep(folder)
    names = [entry.name for entry in folder.glob("round-*") if re.fullmatch(r"round-\d+", entry.name)]
    return sorted(int(name.removeprefix("round-")) for name in names)


def copy_adapter(source: Path, target: Path) -> None:
    """The same adapter in another folder, verified; AdapterError for none."""
    read_config(recover(source))
    with write_folder(target) as folder:
        for file in source.iterdir():
            if file.name != MANIFEST:
                shutil.copy2(file, folder / file.name)


def write_adapter(like: Path, tensors: Mapping[str, Tensor], target: Path) -> None:
    """An adapter like that of a folder with other tensors, atomically."""
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    with write_folder(target, size=sum(value.nbytes for value in tensors.values())) as folder:
        for file in like.iterdir():
            if file.name not in (MANIFEST, WEIGHTS_FILE, CONFIG_FILE):
                shutil.copy2(file, folder / file.name)
        save_file(dict(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config = read_json(like / CONFIG_FILE)
        write_json(folder / CONFIG_FILE, {**config, "weights_sha256": digest(tensors, adapter="")})


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a server's log; AdapterError where somebody damaged it."""
    file = folder / LOG_FILE
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        found = [json.loads(line) for line in lines]
        if not all(isinstance(line, dict) and isinstance(line.get("round"), int) for line in found):
            raise ValueError("a line names no round")
    except ValueError as error:
        raise AdapterError(
            f"{file} is damaged: {error}.", hint="move it away; a new one is begun."
        ) from error
    return found


def repeats(folder: Path, number: int) -> int:
    """How often a round was repeated so far."""
    return sum(line["round"] == number and line.get("outcome") == "repeated" for line in read_log(folder))


def write_log(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replace a server's log."""
    write_file(folder / LOG_FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())
