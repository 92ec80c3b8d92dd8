"""The readable description in an adapter folder: molora.json and the model card."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from molora.disk.atomic import write_file, write_json
from molora.disk.fingerprint import describe as describe_base
from molora.disk.manifest import MANIFEST, read_json, write_manifest
from molora.disk.tensors import digest
from molora.version import __version__

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FACTS_FILE = "molora.json"
_ORDERED = (
    "tasks", "task_ids", "rank_pattern", "alpha_pattern", "expert_specs", "always_on", "experts_by_layer", "gate",
)  # fmt: skip


def complete_folder(config: Any, folder: Path, weights_sha256: str | None) -> None:
    """Add molora.json, the tensors' digest and the manifest to what PEFT wrote.

    PEFT sorts the keys of its JSON. Patterns (the first match counts) and tasks are ordered, so these are
    written again in their own order. The manifest lists the weights only if they match that
    digest, which was just taken from the model (transformers writes the config before the weights).
    """
    plain = config.to_dict()
    stored = read_json(folder / CONFIG_FILE)
    ordered = {key: plain[key] for key in _ORDERED}
    write_json(folder / CONFIG_FILE, {**stored, **ordered, "weights_sha256": weights_sha256})
    write_json(folder / FACTS_FILE, facts(config))
    names = [CONFIG_FILE, FACTS_FILE]
    with suppress(FileNotFoundError, SafetensorError):
        if weights_sha256 and digest(load_file(folder / WEIGHTS_FILE), adapter="") == weights_sha256:
            names.append(WEIGHTS_FILE)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder, only=names)
    _say_how_to_load(config, folder)


def _say_how_to_load(config: Any, folder: Path) -> None:
    """Complete the card that PEFT wrote, or write one, so that whoever finds the folder knows what loads it."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    if text is None:
        write_card(config, folder)
    elif "import molora" not in text:
        write_file(card, (text.rstrip() + "\n\n" + "\n".join(_loading(config))).encode())


def _loading(config: Any) -> list[str]:
    known = config.task_map().ids
    use = ["model.generate(**inputs)"]
    if known:
        use = [f"with molora.routing(model, task_ids=[{next(iter(known))!r}]):", f"    {use[0]}"]
    return [
        "## Loading",
        "",
        "```python",
        "import molora",
        "",
        "model = molora.load(base, folder)  # base: the loaded transformers model",
        *use,
        "```",
        "",
        "`import molora` comes before PEFT's and transformers' own loaders too, such as `PeftModel.from_pretrained`: it tells",
        "PEFT of the method. Without it they stop with `KeyError: 'MOLORA'`.",
        "",
    ]


def facts(config: Any) -> dict[str, Any]:
    """Experts with their status, tasks with their ids and experts, base and versions."""
    task_map = config.task_map()
    return {
        "experts": [
            {
                "name": name,
                "status": "frozen" if name in config.frozen_experts else "trainable",
                "tasks": [task for task, weights in task_map.weights.items() if name in weights],
            }
            for name in config.expert_names
        ],
        "tasks": {task: {"id": i, "experts": task_map.weights[task]} for task, i in task_map.ids.items()},
        "base_model": config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "versions": {
            "molora": __version__,
            **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        },
    }


def write_card(config: Any, folder: Path) -> None:
    """README.md: what is in the adapter and how to load it."""
    base = config.base_model_name_or_path or "the base model"
    head = ["library_name: peft", "tags:", "- molora", "- lora", "- mixture-of-experts"]
    if config.base_model_name_or_path and not os.path.isabs(base):
        head.insert(0, f"base_model: {base}")
    known = facts(config)
    gate = config.gate
    lines = [
        "---",
        *head,
        "---",
        "",
        f"# Mixture of {config.num_experts} LoRA experts",
        "",
        f"On `{base}`" + (f": {describe_base(config.base_fingerprint)}." if config.base_fingerprint else "."),
        f"Gate: scope `{gate.scope}`, select `{gate.select}`"
        + (f" (k = {gate.top_k})" if gate.select == "top_k" else "")
        + f", shared per `{gate.share}`. Rank {config.r}, alpha {config.lora_alpha}{_own_ranks(config)}.",
        "",
        "| expert | status | tasks |",
        "|---|---|---|",
        *(f"| {e['name']} | {e['status']} | {', '.join(e['tasks'])} |" for e in known["experts"]),
        "",
        *_loading(config),
    ]
    write_file(folder / "README.md", "\n".join(lines).encode())


def _own_ranks(config: Any) -> str:
    """What to say of experts whose ranks are not the adapter's: imported ones, and those that grew."""
    own = [f"{name} {spec.r}" for name, spec in config.expert_specs.items() if spec.r != config.r]
    return f"; ranks of their own: {', '.join(own)}" if own else ""
