"""Memory: what a sequence remembers between tasks: the strategy's state, the router's prototypes, old answers' digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.config.continual import RouterConfig
from molora.continual.answers import OPEN, features, inputs_of, on_route, prompt
from molora.continual.router import PrototypeRouter
from molora.continual.strategy import Strategy
from molora.data.prompts import Example, encode
from molora.data.tasks import Task
from molora.disk.atomic import write_folder
from molora.disk.manifest import read_json, verify_folder
from molora.evaluation.runner import inference

PROBE = 16  # held-out records per task whose logits are compared ever after
FEATURE_BATCH = 64


class Memory:
    """Grows by one task at a time; saved with each stage and read by the next."""

    def __init__(self, strategy: Strategy, router: RouterConfig | None) -> None:
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
        if self.router is not None and self.settings is not None:
            first = [prompt(example) for example in examples]
            found = features(model, tokenizer, first, FEATURE_BATCH, self.settings.depth)
            self.router.fit(task.name, found, seed)

    def infer(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example]
    ) -> list[str] | None:
        """The task that the router takes each held-out example for; None without a router."""
        if self.router is None or self.settings is None:
            return None
        if task.name not in self._features:
            self._features[task.name] = features(
                model, tokenizer, [prompt(e) for e in examples], FEATURE_BATCH, self.settings.depth
            )
        return self.router.predict(self._features[task.name])

    def unchanged(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        routes: Sequence[str],
        length: int,
    ) -> dict[str, bool]:
        """Whether the logits of each task seen are bit by bit what they were after its own stage; notes new tasks'."""
        found = {}
        for task, route in zip(tasks, routes, strict=True):
            records = list(task.eval)[:PROBE]
            batch = inputs_of([encode(task, r, tokenizer, length) for r in records], model, tokenizer)
            with inference(model), on_route(model, route):
                logits = model(**batch).logits.float().cpu().contiguous()
            digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
            found[task.name] = self.digests.setdefault(task.name, digest) == digest
        return found

    def save(self, folder: Path) -> None:
        """Write everything, whole or not at all."""
        tensors = {
            f"strategy/{name}": value.detach().cpu().contiguous()
            for name, value in self.strategy.tensors().items()
        }
        if self.router is not None:
            tensors |= {f"router/{name}": value.contiguous() for name, value in self.router.tensors().items()}
        plain = {"strategy": self.strategy.plain(), "digests": self.digests}
        with write_folder(folder) as temporary:
            save_file(tensors, temporary / "memory.safetensors")
            (temporary / "memory.json").write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")

    def load(self, folder: Path, tasks: Sequence[Task]) -> None:
        """Read what `save` wrote; AdapterError where it is damaged."""
        verify_folder(folder)
        tensors, plain = load_file(folder / "memory.safetensors"), read_json(folder / "memory.json")
        own = {
            name.removeprefix("strategy/"): t for name, t in tensors.items() if name.startswith("strategy/")
        }
        self.strategy.restore(own, plain["strategy"])
        self.digests = dict(plain["digests"])
        if self.router is not None:
            centres = {
                name.removeprefix("router/"): t for name, t in tensors.items() if name.startswith("router/")
            }
            self.router.restore(centres, [task.name for task in tasks])


def shown_route(model: Any, task: Task, known: bool) -> str | None:
    """Who answers for a task whose id is given: its own experts, everybody, or (still unknown) nobody."""
    gate = model.active_peft_config.gate
    if gate.scope == "constant":
        return OPEN
    if known:
        return task.name
    return None if gate.scope == "task" else OPEN
