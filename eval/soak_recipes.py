"""What `eval.soak` trains: one small recipe for each way in which a run can be interrupted."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

NAME = "soak"
GROWTH = {
    "task": {"name": "upper", "source": "synthetic", "generator": "upper", "train_size": 16, "eval_size": 4},
    "train": {"max_steps": 6, "batch_size": 4, "lr": 0.01, "log_every": 2, "save_every": 2},
}


def _tasks(**change: Any) -> dict[str, Any]:
    """Two tasks of 20 and 13 records: with batches of 7 the last of an epoch is small."""
    return {
        name: {"source": "synthetic", "generator": name, "train_size": size, "eval_size": 4, **change}
        for name, size in (("copy", 20), ("reverse", 13))
    }


def _recipe(data: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    return {
        "name": NAME,
        "base": "molora/tiny",
        "output": "runs",
        "adapter": {
            "num_experts": 3,
            "r": 2,
            "lora_dropout": 0.1,
            "gate": {"kind": "top_k", "top_k": 2},
            "aux_losses": {"balance": 0.01},
        },
        "data": {"max_length": 48, "tasks": _tasks(), **(data or {})},
        "train": {"max_steps": 8, "batch_size": 7, "lr": 0.01, "log_every": 2, "save_every": 3, **train},
        "eval": {"batch_size": 4, "max_new_tokens": 4, "modes": ["gate"]},
    }


def _sequence(strategy: str) -> dict[str, Any]:
    recipe = _recipe(max_steps=4, save_every=2)
    recipe["adapter"] = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1}
    return {**recipe, "eval": {"batch_size": 4, "max_new_tokens": 2}, "continual": {"strategy": strategy}}


def _two_processes() -> dict[str, Any]:
    recipe = _recipe(
        devices=2, accelerator="cpu", strategy="ddp", batch_size=4, save_every=1, keep_checkpoints=2
    )
    # One task decides alone in some batches, so one expert or the other is idle there.
    recipe["adapter"] = {"num_experts": 2, "r": 2, "lora_dropout": 0.1, "gate": {"kind": "task"}}
    recipe["eval"]["modes"] = ["task"]
    return recipe


@dataclass(frozen=True)
class Kind:
    """A recipe, the verb that runs it, and the name of the run that the verb makes."""

    recipe: dict[str, Any]
    verb: str = "train"
    name: str = NAME
    weight: int = 3  # how often it is interrupted, beside the others

    def arguments(self, resume: bool) -> list[str]:
        """The command line, for a folder with `recipe.yaml` (and, to grow, `grow.yaml` and a trained run)."""
        what = [f"runs/{NAME}", "--recipe", "grow.yaml"] if self.verb == "add-expert" else ["recipe.yaml"]
        return [self.verb, *what, *(["--resume"] if resume else [])]

    @property
    def processes(self) -> int:
        """How many train together."""
        return int(self.recipe["train"].get("devices", 1))

    def parent(self) -> Kind:
        """What trains the run that grows."""
        return Kind(copy.deepcopy(self.recipe))


KINDS: dict[str, Kind] = {
    "training": Kind(_recipe()),
    "accumulation": Kind(_recipe(accumulate=2, max_steps=6, save_every=2)),
    "validation": Kind(_recipe(val_every=2)),
    "a checkpoint each step": Kind(_recipe(save_every=1, keep_checkpoints=2)),
    "two workers": Kind(_recipe({"workers": 2}, save_every=2)),
    "bf16": Kind(_recipe(precision="bf16-mixed", save_every=2)),
    "add-expert": Kind(_recipe(max_steps=2), "add-expert", f"{NAME}-upper"),
    "sequence": Kind(_sequence("color"), "continual"),
    "sequence, slao": Kind(_sequence("slao"), "continual"),
    "two processes": Kind(_two_processes(), weight=2),
}
