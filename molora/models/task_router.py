"""Teach an adapter's task router from prompts, and ask it which task a prompt belongs to."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.calls.call import Call
from molora.config.suggest import did_you_mean
from molora.data.clusters import TextClusters, inference
from molora.data.collate import pad_token, padded_batches
from molora.data.prompts import prompt_within
from molora.errors import ConfigError, DataError
from molora.forward.task_naming import mean_of, read_base
from molora.forward.task_router import TaskRouter
from molora.progress import phase
from molora.store.adapter import active_adapter, peft_model
from molora.tuner.api import find_context
from molora.tuner.router import give_router, take_router


class NamedTask(NamedTuple):
    """What a router says of one prompt."""

    task: str | None  # None: it is like no task that was learned, where the router tells those apart
    posteriors: dict[str, float]  # how likely each task is; they sum to 1
    log_density: float  # of the prompt's features under the likeliest task


def fit_router(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[str]],
    *,
    router: Any = None,
    adapter_name: str | None = None,
    batch_size: int = 16,
    max_length: int = 512,
) -> None:
    """Teach an adapter's task router which prompts belong to which task. What it learned before stays, and counts.

    The base alone reads each prompt, forward only and up to an early block; nothing is kept but sums. Of a task with more
    prompts than the router's `records`, so many are drawn at random. Tasks may come one after another, in any order: older
    tasks' numbers never change.

    Args:
        model: what `get_peft_model` or `load` returned.
        tokenizer: its tokenizer.
        prompts: task -> texts as the model is given them, after any template, without the answer.
        router: makes the router (a RouterConfig, a map of its fields, or a kind), where the config named none.
        adapter_name: which adapter; may be left out where one is active.
        batch_size: prompts a forward pass.
        max_length: tokens of a prompt that are read: its last ones (a classifier's first ones).

    Raises:
        ConfigError: the adapter has no router, or does not know a task. DataError: a task without prompts, a prompt without
            tokens, hidden states that are not finite.
    """
    model = peft_model(model)
    adapter = active_adapter(model, adapter_name)
    context = find_context(model)
    check_prompts(prompts, context.adapters[adapter].task_map.ids, adapter)
    if router is not None:
        give_router(model.get_base_model(), context, adapter, router)
    try:
        most = router_of(model, adapter).settings.records
        tokens = {
            task: [_tokens(model, tokenizer, text, max_length) for text in drawn(texts, most, seed=0)]
            for task, texts in prompts.items()
        }
        learn_prompts(model, tokenizer, tokens, adapter, batch_size)
    except BaseException:
        if router is not None:  # so that a second try may give it
            take_router(model.get_base_model(), context, adapter)
        raise


def learn_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    adapter: str,
    batch_size: int = 16,
) -> None:
    """`fit_router` from prompts that are token ids already."""
    router, task_map = router_of(model, adapter), find_context(model).adapters[adapter].task_map
    check_prompts(prompts, task_map.ids, adapter)
    found = {}
    for task, rows in prompts.items():
        read = features(model, tokenizer, rows, adapter, batch_size)
        found[task_map.ids[task]] = _by_centre(router, task_map.ids[task], read)
    router.learn(found)


def check_prompts(prompts: Mapping[str, Sequence[Any]], tasks: Mapping[str, int], adapter: str) -> None:
    """ConfigError for tasks that the adapter does not have, DataError for tasks without prompts."""
    for task, rows in prompts.items():
        if task not in tasks:
            raise ConfigError(
                f"adapter {adapter!r} has no task {task!r}.{did_you_mean(task, tasks)} "
                f"Its tasks: {', '.join(tasks) or 'none'}.",
                hint="model.add_expert(NAME, tasks=[TASK]) gives it one more.",
            )
        _no_text(rows, f"the prompts of task {task!r}")
        if not len(rows):
            raise DataError(
                f"task {task!r} has no prompts for the router to learn from.",
                hint="leave it out, or give some.",
            )


def _no_text(prompts: Any, what: str) -> None:
    if isinstance(prompts, str):
        raise DataError(f"{what} are one text, {prompts[:40]!r}.", hint="give a list of texts.")


def _by_centre(router: TaskRouter, task: int, read: Tensor) -> list[Tensor]:
    """Features (sample, d) of a task by its centre: those it has already, or new ones by k-means."""
    if router.centres == 1:
        return [read]
    if task in router.learned:
        nearest = router.centre_of(task, read).to(read.device)
    else:
        prepared = router.kind.prepared(read)
        count = min(router.centres, len(torch.unique(prepared.float(), dim=0)))
        nearest = TextClusters.fit(prepared, count).assign(prepared)
    return [read[nearest == centre] for centre in range(router.centres)]


def route(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    adapter_name: str | None = None,
    batch_size: int = 16,
    max_length: int = 512,
) -> list[NamedTask]:
    """The task of each prompt, as the model itself names it where it is called without task ids.

    Args:
        model: what `get_peft_model` or `load` returned, its router fitted.
        tokenizer: its tokenizer.
        prompts: texts as the model is given them.
        adapter_name: which adapter; may be left out where one is active.
        batch_size: prompts a forward pass.
        max_length: tokens of a prompt that are read: its last ones (a classifier's first ones).

    Raises:
        ConfigError: the adapter has no router, or one that has learned nothing. DataError: a prompt without tokens, hidden
            states that are not finite.
    """
    model = peft_model(model)
    adapter = active_adapter(model, adapter_name)
    _no_text(prompts, "the prompts")
    tokens = [_tokens(model, tokenizer, text, max_length) for text in prompts]
    return named_prompts(model, tokenizer, tokens, adapter, batch_size)


def named_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    adapter: str | None = None,
    batch_size: int = 16,
) -> list[NamedTask]:
    """`route` of prompts that are token ids already."""
    adapter = active_adapter(model, adapter)
    router, task_map = router_of(model, adapter), find_context(model).adapters[adapter].task_map
    if not router.learned:
        raise ConfigError(
            f"the router of adapter {adapter!r} has learned no task yet.",
            hint="molora.fit_router(model, tokenizer, {task: prompts}) teaches it.",
        )
    if not prompts:
        return []
    guess = router.guess(features(model, tokenizer, prompts, adapter, batch_size))
    names = [task_map.name(task) for task in guess.ids]
    found = [None if task is None else task_map.name(task) for task in router.named(guess)]
    rows = zip(found, guess.posteriors.tolist(), guess.log_densities.tolist(), strict=True)
    return [NamedTask(task, dict(zip(names, shares, strict=True)), density) for task, shares, density in rows]


def router_of(model: Any, adapter: str) -> TaskRouter:
    """An adapter's router; ConfigError where it has none."""
    router: TaskRouter | None = find_context(model).adapters[adapter].router
    if router is None:
        raise ConfigError(
            f"adapter {adapter!r} has no task router.",
            hint="set adapter.router: gaussian in the recipe; in Python MoLoraConfig(router=RouterConfig()), or "
            "molora.fit_router(..., router='gaussian') for an adapter that is trained.",
        )
    return router


def names_tasks(model: Any) -> bool:
    """Whether the active adapter names the tasks of prompts by itself: it has a router that has learned some."""
    router: TaskRouter | None = find_context(model).adapters[str(model.active_adapter)].router
    return router is not None and bool(router.learned)


def features(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    adapter: str,
    batch_size: int,
) -> Tensor:
    """What the router reads (sample, d) of prompts (token ids): means of the base's early hidden states, float64."""
    context, base = find_context(model), model.get_base_model()
    if any(point.merged for point in context.points or ()):
        raise ConfigError(
            "the adapter is merged into the base, which the router must read alone.",
            hint="call model.unmerge_adapter() first.",
        )
    rows: dict[int, Tensor] = {}
    counted = phase("reading prompts", len(prompts), "prompts", minor=True)
    with inference(model), counted as shown:
        for part, ids, mask in padded_batches(prompts, pad_token(tokenizer), batch_size, model.device):
            inputs = {"input_ids": ids, "attention_mask": mask.long()}
            states = read_base(context, Call(), adapter, base, inputs)
            rows.update(zip(part, mean_of(*states).cpu(), strict=True))
            shown.advance(len(part))
    return torch.stack([rows[i] for i in range(len(prompts))])


def drawn(prompts: Sequence[Any], most: int, seed: int) -> list[Any]:
    """At most so many of a task's prompts, at random but in their order: files are often sorted."""
    if len(prompts) <= most:
        return list(prompts)
    return [prompts[i] for i in sorted(random.Random(seed).sample(range(len(prompts)), most))]


def _tokens(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[int]:
    """A prompt's tokens as models of this sort are trained on them."""
    base = model.get_base_model()
    kind = "CAUSAL_LM" if base.can_generate() else "SEQ_CLS"
    if getattr(base.config, "is_encoder_decoder", False):
        kind = "SEQ_2_SEQ_LM"
    found = prompt_within(tokenizer, text, max_length, kind)
    if not len(found):
        raise DataError(
            f"a prompt has no tokens: {text!r}.",
            hint="a task router needs at least one; leave empty prompts out.",
        )
    return found
