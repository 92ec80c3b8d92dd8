"""What a client sends: its adapter, as `molora.save` writes it, and a small record of what it was made of.

    <folder>/adapter/      config, safetensors and manifest; experts, gates and heads, never weights of the base
    <folder>/update.json   client, round, hash of the adapter it started from, hash of its own, number of records

The record ends with its own hash. Hashes tell of damage and of mix-ups; they are no signature: who may send is for the
transport to decide.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from molora.config.names import check_name
from molora.disk.adapter_files import check_links
from molora.disk.atomic import write_json
from molora.disk.manifest import MANIFEST, read_json, sha256
from molora.errors import AdapterError
from molora.store.adapter import save

ADAPTER, RECORD_FILE = "adapter", "update.json"
_FORMAT = 1
_LARGEST = 10_000  # bytes of a record
_FORM = {
    "format": int,
    "client": str,
    "round": int,
    "start": str,
    "adapter": str,
    "records": int,
    "sha256": str,
}


def send(
    model: nn.Module,
    folder: str | os.PathLike[str],
    start: str | os.PathLike[str],
    *,
    client: str,
    round: int,
    records: int,
) -> Path:
    """Write the update of a client, the record last; an earlier one in this folder is replaced.

    Args:
        model: what the client trained.
        start: the adapter folder that it started from.
        records: how many records it trained on, its weight.
    """
    folder = Path(folder)
    adapter = save(model, folder / ADAPTER)
    facts = {
        "format": _FORMAT,
        "client": check_name(client, "client"),
        "round": round,
        "start": adapter_hash(Path(start)),
        "adapter": adapter_hash(adapter),
        "records": records,
    }
    write_json(folder / RECORD_FILE, {**facts, "sha256": _hash(facts)})
    return folder


def adapter_hash(folder: Path) -> str:
    """What identifies an adapter: the hash of its manifest, which has those of all its files."""
    return sha256(folder / MANIFEST)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of an update; AdapterError where it is damaged or none."""
    check_links(folder)
    if (folder / RECORD_FILE).stat().st_size > _LARGEST:
        raise AdapterError(f"{folder / RECORD_FILE} is larger than {_LARGEST:,} bytes.")
    record = read_json(folder / RECORD_FILE)
    if not isinstance(record, dict) or {key: type(value) for key, value in record.items()} != _FORM:
        raise AdapterError(f"{folder / RECORD_FILE} is no record of an update: it needs {', '.join(_FORM)}.")
    if record["format"] != _FORMAT or record["sha256"] != _hash(record):
        raise AdapterError(f"{folder / RECORD_FILE} is not as it was written (its sha256 or format differs).")
    return record


def _hash(record: dict[str, Any]) -> str:
    facts = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
