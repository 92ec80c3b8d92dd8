"""What can be fused: ordinary LoRA folders, and an expert or a task's experts of a molora adapter or run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from molora.config.suggest import options
from molora.disk.card import CONFIG_FILE, WEIGHTS_FILE
from molora.disk.manifest import read_json, sha256
from molora.errors import AdapterError, ConfigError
from molora.models.build import load_trained
from molora.store.adapter import read_config
from molora.store.lora_export import export_lora
from molora.store.lora_folder import LoraFolder, read_lora
from molora.store.runs import Run

Folders = Mapping[str, str | os.PathLike[str]]


class Source:
    """An expert to fuse: its factors by layer, what it was named and where it came from."""

    def __init__(self, name: str, lora: LoraFolder, folder: Path, part: str = "") -> None:
        self.name, self.lora, self.part = name, lora, part
        self.folder = folder.name
        self.sha256 = sha256(folder / WEIGHTS_FILE)

    def described(self) -> dict[str, str]:
        """For fusion.json: no path of this machine."""
        part = {"part": self.part} if self.part else {}
        return {"name": self.name, "folder": self.folder, **part, "sha256": self.sha256}


def read_sources(
    folders: Folders,
    experts: Mapping[str, str] | None = None,
    tasks: Mapping[str, str] | None = None,
    allow_other_base: bool = False,
) -> list[Source]:
    """The experts of these folders, in their order.

    Args:
        folders: name -> a LoRA folder, a molora adapter folder, or a run.
        experts: name -> the expert meant, of an adapter or a run.
        tasks: name -> the task whose experts are meant.
        allow_other_base: load an adapter on a base with other weights than its own.

    Raises:
        ConfigError: no folder, names that no folder has, an expert of an ordinary LoRA, none named of several.
        AdapterError: a folder that is damaged, or a LoRA variant that is no product of two factors (DoRA and others).
    """
    experts, tasks = experts or {}, tasks or {}
    if not folders:
        raise ConfigError("fuse needs at least one expert: {name: folder}.")
    for what, chosen in (("experts", experts), ("tasks", tasks)):
        for name in chosen:
            if name not in folders:
                raise ConfigError(f"{what} names {name!r}.{options(name, list(folders), 'Sources')}")
    found = []
    for name, given in folders.items():
        if name in experts and name in tasks:
            raise ConfigError(f"{name}: give an expert or a task of it, not both.")
        found.append(_read(name, Path(given), experts.get(name), tasks.get(name), allow_other_base))
    return found


def _read(name: str, given: Path, expert: str | None, task: str | None, allow_other_base: bool) -> Source:
    folder = given if (given / CONFIG_FILE).is_file() else Run.find(given).trained_adapter
    stored = read_json(folder / CONFIG_FILE)
    if not isinstance(stored, dict) or stored.get("peft_type") != "MOLORA":
        if expert is not None or task is not None:
            raise ConfigError(
                f"{name}: {folder} is one ordinary LoRA, without experts or tasks; leave them out."
            )
        return Source(name, read_lora(folder), folder)
    config = read_config(folder)
    if expert is None and task is None:
        names = config.expert_names or []
        if len(names) != 1:
            raise ConfigError(
                f"{name}: {folder} has several experts ({', '.join(names)}); say which is meant.",
                hint=f"experts={{{name!r}: ...}} or tasks={{{name!r}: ...}}; on the command line --expert {name}=EXPERT or "
                f"--task {name}=TASK.",
            )
        expert = names[0]
    model, _, _ = load_trained(given, device="cpu", allow_other_base=allow_other_base)
    with tempfile.TemporaryDirectory() as temporary:
        out = export_lora(model, Path(temporary) / "lora", expert=expert, task=task)
        lora = read_lora(out)
    part = f"expert {expert}" if expert is not None else f"task {task}"
    return Source(name, lora, folder, part)


def check_alike(sources: list[Source]) -> None:
    """AdapterError where layers of one name differ in shape, and so the sources' bases."""
    shapes: dict[str, tuple[Source, tuple[int, int]]] = {}
    for source in sources:
        for key, (A, B) in source.lora.factors.items():
            first, shape = shapes.setdefault(key, (source, (B.shape[0], A.shape[1])))
            if shape != (B.shape[0], A.shape[1]):
                raise AdapterError(
                    f"{source.name} maps {A.shape[1]} to {B.shape[0]} at {key}, but {first.name} {shape[1]} to {shape[0]}.",
                    hint="fuse LoRAs of one base only.",
                )
            if (rank := source.lora.rank(key)) != A.shape[0]:
                raise AdapterError(
                    f"{source.name}: {key} has rank {A.shape[0]}, but its config says {rank}.",
                    hint="copy the folder again.",
                )
