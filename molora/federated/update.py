"""A client's update, checked before it is used: its record, its base, its settings, its tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from molora.config.federated import AGGREGATORS
from molora.disk.card import WEIGHTS_FILE
from molora.disk.fingerprint import differences
from molora.disk.manifest import MANIFEST
from molora.disk.tensors import digest
from molora.errors import AdapterError, MoLoraError
from molora.federated.aggregate import A, B
from molora.federated.record import ADAPTER, RECORD_FILE, adapter_hash, read_record
from molora.forward.mount import PLAIN
from molora.store.adapter import read_config
from molora.tuner.config import MoLoraConfig
from molora.tuner.parts import scaling_of
from molora.tuner.placement import experts_at
from molora.tuner.targets import matches

MOST_RECORDS = 10**9
# Of a config: notes that differ between copies, and what clients may choose where ranks may differ.
_NOTES = {
    "auto_mapping",
    "base_fingerprint",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "weights_sha256",
}
_RANKS = {"r", "rank_pattern", "lora_alpha", "alpha_pattern", "scaling", "use_rslora"}


# What values of a wrong form in a config can end in, wherever they are first used: one client must not end a round.
_OF_CRAFTED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError)


class Unusable(Exception):
    """An update that cannot be used: the fault in a word or two, and the reason in a sentence."""

    def __init__(self, fault: str, reason: str) -> None:
        super().__init__(reason)
        self.fault, self.reason = fault, reason


class Start(NamedTuple):
    """The adapter that the clients of a round start from."""

    number: int
    folder: Path
    sha256: str
    config: MoLoraConfig
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """A usable update; its experts are in the scaling of the start."""

    client: str
    records: int
    tensors: dict[str, Tensor]


def read_start(number: int, folder: Path) -> Start:
    """The adapter that a round starts from; AdapterError where it is damaged."""
    config = read_config(folder)
    return Start(number, folder, adapter_hash(folder), config, _tensors(folder, config))


def read_update(client: str, folder: Path, start: Start, aggregate: str) -> Update:
    """A client's update, everything checked before it is used; nothing is unpickled.

    Raises:
        Unusable: with the first thing that is wrong with it.
    """
    spec = AGGREGATORS[aggregate]
    try:
        if not (folder / RECORD_FILE).exists():
            raise Unusable("missing", f"nothing has come: {folder} has no {RECORD_FILE}.")
        record = read_record(folder)
        _check_record(record, client, start)
        if not (folder / ADAPTER / MANIFEST).is_file() or adapter_hash(folder / ADAPTER) != record["adapter"]:
            raise Unusable("damaged", "its adapter is not the one that its record names; copy both again.")
        config = read_config(folder / ADAPTER)
        _check_config(config, start.config, aggregate)
        tensors = _tensors(folder / ADAPTER, config)
        _check_tensors(tensors, start.tensors, any_rank=spec.any_rank, keeps_A=spec.keeps_A)
        return Update(client, record["records"], _rescaled(tensors, config, start.config))
    except (MoLoraError, OSError) as error:
        raise Unusable("damaged", str(error).splitlines()[0]) from error
    except _OF_CRAFTED as error:
        raise Unusable("damaged", f"its adapter_config.json cannot be read: {error}.") from error


def _check_record(record: dict[str, Any], client: str, start: Start) -> None:
    if record["client"] != client:
        raise Unusable("wrong client", f"it says that {record['client'][:60]!r} wrote it.")
    if record["round"] != start.number:
        raise Unusable("late", f"it belongs to round {record['round']}, and this is round {start.number}.")
    if record["start"] != start.sha256:
        raise Unusable("late", f"it started from another adapter than round {start.number} does.")
    if not 1 <= record["records"] <= MOST_RECORDS:
        raise Unusable("damaged", f"{record['records']} training records; allowed: 1 to {MOST_RECORDS:,}.")


def _check_config(config: MoLoraConfig, start: MoLoraConfig, aggregate: str) -> None:
    old, new = start.base_fingerprint or {}, config.base_fingerprint or {}
    if not new.get("values") or (found := differences(old, new)):
        raise Unusable("other base", found[0] if new.get("values") else "it does not say what its base is.")
    one, other = start.to_dict(), config.to_dict()
    names = {field.name for field in fields(start)} - _NOTES
    differing = sorted(name for name in names if one.get(name) != other.get(name))
    if strange := [name for name in differing if name not in _RANKS]:
        raise Unusable("other settings", f"its adapter differs in {', '.join(strange)}.")
    if differing and not AGGREGATORS[aggregate].any_rank:
        text = ", ".join(f"{name} {other[name]} instead of {one[name]}" for name in differing)
        raise Unusable("different rank", f"{text}, which aggregate: {aggregate} cannot; flora can.")


def _tensors(folder: Path, config: MoLoraConfig) -> dict[str, Tensor]:
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / WEIGHTS_FILE} is damaged: {error}.", hint="copy it again.") from error
    if config.weights_sha256 not in (None, digest(tensors, adapter="")):
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} does not hold the tensors that were saved.", hint="copy it again."
        )
    return tensors


def _check_tensors(
    given: dict[str, Tensor], start: dict[str, Tensor], *, any_rank: bool, keeps_A: bool
) -> None:
    missing, strange = sorted(start.keys() - given.keys()), sorted(given.keys() - start.keys())
    if missing or strange:
        listed = [
            f"{key[:200]!r} {what}"
            for what, keys in (("missing", missing), ("unknown", strange))
            for key in keys
        ]
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        raise Unusable("wrong keys", f"{', '.join(listed[:3])}{more}.")
    for key, tensor in sorted(given.items()):  # A before its B
        shape, wanted = tensor.shape, start[key].shape
        axis = {A: 1, B: 2}.get(key[-len(A) :]) if any_rank and tensor.dim() == 3 else None
        if axis is not None:
            shape, wanted = (torch.Size([*full[:axis], *full[axis + 1 :]]) for full in (shape, wanted))
        if shape != wanted or tensor.dtype != start[key].dtype:
            text = f"{tuple(tensor.shape)} of {tensor.dtype}, expected {tuple(start[key].shape)} of {start[key].dtype}"
            raise Unusable("wrong shapes", f"{key} is {text}.")
        if axis == 2 and tensor.shape[2] != given[key.removesuffix(B) + A].shape[1]:
            raise Unusable("wrong shapes", f"{key} and its A have different ranks.")
        if not torch.isfinite(tensor).all():
            raise Unusable("not finite", f"{key} holds NaN or infinity.")
        if keeps_A and key.endswith(A) and not torch.equal(tensor, start[key]):
            raise Unusable("changed A", f"{key} is not the start's, and nobody trains it.")


def _rescaled(tensors: dict[str, Tensor], config: MoLoraConfig, start: MoLoraConfig) -> dict[str, Tensor]:
    """The tensors with B such that `B A` means the same under the start's scalings."""
    made = dict(tensors)
    for key in (key for key in tensors if key.endswith(B)):
        layer = key.removesuffix(f".{B}").removeprefix("base_model.model.")
        names = [PLAIN] if matches(start.plain_targets, layer) else experts_at(start, layer)
        ratios = [scaling_of(config, name, layer) / scaling_of(start, name, layer) for name in names]
        if any(ratio != 1 for ratio in ratios):
            made[key] = tensors[key].double() * torch.tensor(ratios, dtype=torch.float64)[:, None, None]
    return made
