"""Weights of a sum that are found on held-out records, by one of the searches of `searchers.py`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molora.config.suggest import options
from molora.data.collate import batches_by_length, collate, pad_token
from molora.data.prompts import Example, encode
from molora.data.tasks import TaskSet
from molora.errors import ConfigError, DataError
from molora.fusion.fuse import product
from molora.fusion.lora_out import check_fits
from molora.fusion.searchers import SEARCHES, TRIALS, Trial
from molora.fusion.sources import Folders, Source, check_alike, read_sources


@dataclass(frozen=True)
class Found:
    """The best weights by source, every trial in order, and those of equal weights for comparison."""

    weights: dict[str, float]
    trials: list[Trial]
    equal: Trial

    @property
    def best(self) -> Trial:
        return min(self.trials, key=lambda trial: trial.score)

    def to_csv(self) -> str:
        """One line per trial: step, each source's weight, loss, score."""
        rows = [["step", *self.weights, "loss", "score"]]
        for step, trial in enumerate(self.trials):
            rows.append([str(step), *(f"{value:.6g}" for value in (*trial.weights, trial.loss, trial.score))])
        return "".join(",".join(row) + "\n" for row in rows)


def find_weights(
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    folders: Folders,
    tasks: TaskSet,
    *,
    search: str,
    step: float = 0.1,
    trials: int = TRIALS,
    records: int = 64,
    seed: int = 0,
    max_length: int = 512,
    batch_size: int = 32,
    experts: Mapping[str, str] | None = None,
    parts: Mapping[str, str] | None = None,
    allow_other_base: bool = False,
) -> Found:
    """The weights under which the sum of experts has the least loss on held-out records; for `fuse(method="linear")`.

    The loss is the mean per target token of each task, averaged over tasks. The base is not changed. The same
    arguments give the same weights. Score the result on other records: these were chosen for it.

    Args:
        base: the experts' base, a language model.
        folders: as of `fuse`; `experts` and `parts` are its `experts` and `tasks`.
        tasks: whose held-out records (`eval`) are used, at most `records` of each, drawn at random.
        search: grid tries all weights that sum to 1 in multiples of `step`; lorahub and optuna `trials` weights in
            [-1.5, 1.5].

    Raises:
        ConfigError: an unknown search, a grid of too many points, a search without its package.
        DataError: a task without held-out records. AdapterError: as `fuse`.
    """
    if search not in SEARCHES:
        raise ConfigError(f"search is {search!r}.{options(search, SEARCHES)}")
    if records < 1:
        raise ConfigError(f"records is {records}; give at least 1.")
    sources = read_sources(folders, experts, parts, allow_other_base)
    check_alike(sources)
    batches = held_out(tasks, tokenizer, records, max_length, batch_size, seed)
    with summed(base, sources) as weigh:

        def loss(weights: Sequence[float]) -> float:
            weigh(weights)
            return mean_loss(base, batches)

        count = len(sources)
        even = [1 / count] * count
        equal = Trial(tuple(even), found := loss(even), found)
        tried = SEARCHES[search](loss, count, step, trials, seed)
    best = min(tried, key=lambda trial: trial.score)
    return Found(dict(zip((s.name for s in sources), best.weights, strict=True)), tried, equal)


def held_out(
    tasks: TaskSet,
    tokenizer: PreTrainedTokenizerBase,
    records: int,
    max_length: int,
    batch_size: int,
    seed: int,
) -> list[list[dict[str, Tensor]]]:
    """Batches of each task's held-out records, without task ids. DataError for a task that has none to learn from."""
    found = []
    for task in tasks:
        if task.task_type == "SEQ_CLS":
            raise ConfigError(
                f"task {task.name!r} is a classifier's; weights are found by the loss of a language model."
            )
        drawn = random.Random(seed).sample(range(len(task.eval)), min(records, len(task.eval)))
        examples = [encode(task, task.eval[i], tokenizer, max_length) for i in sorted(drawn)]
        examples = [example for example in examples if example.learns]
        if not examples:
            raise DataError(f"task {task.name!r} has no held-out records.", hint="give it `eval`.")
        found.append([*_batches(examples, pad_token(tokenizer), batch_size)])
    return found


def _batches(examples: Sequence[Example], pad: int, size: int) -> Iterator[dict[str, Tensor]]:
    for part in batches_by_length([len(example.input_ids) for example in examples], size):
        batch = collate([examples[i] for i in part], pad)
        del batch["routing_task_ids"]
        yield batch


@torch.no_grad()
def mean_loss(model: Any, tasks: Sequence[Sequence[Mapping[str, Tensor]]]) -> float:
    """The mean loss per target token of each task's batches, averaged over tasks."""
    device, means = next(model.parameters()).device, []
    causal = not model.config.is_encoder_decoder
    for batches in tasks:
        total, count = 0.0, 0
        for batch in batches:
            labels = batch["labels"][:, 1:] if causal else batch["labels"]
            targets = int((labels != -100).sum())
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
            total, count = total + float(loss) * targets, count + targets
        means.append(total / count)
    return sum(means) / len(means)


@contextmanager
def summed(base: nn.Module, sources: Sequence[Source]) -> Iterator[Callable[[Sequence[float]], None]]:
    """The base with `sum_i w_i s_i B_i A_i` added in every layer, in eval mode; yields what sets the weights.

    Raises AdapterError where the base lacks a layer.
    """
    check_fits(base, sources)
    modules, hooks, weights = dict(base.named_modules()), [], [0.0] * len(sources)
    for key in sorted({key for source in sources for key in source.lora.factors}):
        hooks.append(modules[key].register_forward_hook(_added(modules[key], key, sources, weights)))
    training = base.training
    base.eval()

    def weigh(given: Sequence[float]) -> None:
        weights[:] = given

    try:
        yield weigh
    finally:
        base.train(training)
        for hook in hooks:
            hook.remove()


def _added(
    layer: nn.Module, key: str, sources: Sequence[Source], weights: Sequence[float]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook that adds one layer's sum; it reads the weights at every call."""
    like = next(layer.parameters())
    dtype = like.dtype if like.is_floating_point() else torch.float32
    here = [(i, product(source, key)) for i, source in enumerate(sources) if key in source.lora.factors]
    A = torch.cat([p.A for _, p in here]).to(like.device, dtype)
    B = torch.cat([p.B for _, p in here], dim=1).to(like.device, dtype)
    owner = [i for i, p in here for _ in range(p.rank)]  # of each column of B

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        scale = torch.tensor([weights[i] for i in owner], device=A.device, dtype=dtype)
        columns = inputs[0].to(dtype) @ A.mT * scale
        return output + (columns @ B.mT).to(output.dtype)

    return add
