"""Memory: what a sequence remembers between tasks: the strategy's state, earlier runs' prototypes, old answers' digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.config.continual import PrototypesConfig
from molora.continual.router import PrototypeRouter, features
from molora.continual.strategy import Strategy
from molora.data.prompts import Example
from molora.data.tasks import Task
from molora.disk.atomic import write_folder
from molora.disk.manifest import read_json, verify_folder

TENSORS_FILE = "memory.safetensors"
FEATURE_BATCH = 64


class Memory:
    """Grows by one task at a time; saved after each turn and read by the next."""

    def __init__(self, strategy: Strategy, router: PrototypesConfig | None) -> None:
        self.strategy = strategy
        self.settings = router
        self.router = None if router is None else PrototypeRouter(router.clusters, router.metric)
        self.digests: dict[str, str] = {}
        self._features: dict[str, Tensor] = {}  # of held-out records; the base is frozen, so once is enough

    def learn(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        examples: Sequence[Example],
        seed: int,
    ) -> None:
        """Prototypes of a task from its training examples."""
        if self.router is not None:
            self.router.fit(task.name, self._read(model, tokenizer, examples), seed)

    def infer(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example]
    ) -> list[str] | None:
        """The task that the run's prototypes take each held-out example for; None without any."""
        if self.router is None:
            return None
        if task.name not in self._features:
            self._features[task.name] = self._read(model, tokenizer, examples)
        return self.router.predict(self._features[task.name])

    def _read(self, model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Tensor:
        assert self.settings is not None
        prompts = [example.prompt for example in examples]
        return features(model, tokenizer, prompts, FEATURE_BATCH, self.settings.depth)

    def unchanged(self, task: str, logits: Tensor) -> bool:
        """Whether a task's logits are bit by bit what they were when this was first asked, after its own turn."""
        digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        return self.digests.setdefault(task, digest) == digest

    def save(self, folder: Path) -> None:
        """Write everything, whole or not at all."""
        parts = {"strategy": self.strategy.tensors(), "router": self.router.tensors() if self.router else {}}
        tensors = {
            f"{part}/{name}": value.detach().cpu().contiguous()
            for part, found in parts.items()
            for name, value in found.items()
        }
        plain = {"strategy": self.strategy.plain(), "digests": self.digests}
        with write_folder(folder) as temporary:
            save_file(tensors, temporary / TENSORS_FILE)
            (temporary / "memory.json").write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")

    def load(self, folder: Path, tasks: Sequence[Task]) -> None:
        """Read what `save` wrote; AdapterError where it is damaged."""
        verify_folder(folder)
        plain = read_json(folder / "memory.json")
        self.strategy.restore(stored(folder, "strategy"), plain["strategy"])
        self.digests = dict(plain["digests"])
        if self.router is not None:
            self.router.restore(stored(folder, "router"), [task.name for task in tasks])


def stored(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part of a memory on disk: "strategy" or "router"."""
    tensors, start = load_file(folder / TENSORS_FILE), f"{part}/"
    return {name.removeprefix(start): found for name, found in tensors.items() if name.startswith(start)}
