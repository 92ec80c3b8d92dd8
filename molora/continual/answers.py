"""What a model answers to held-out records under one task's route or another's, each worked out once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.data.clusters import mean_vector
from molora.data.collate import collate, pad_token
from molora.data.prompts import Example, encode, render
from molora.data.tasks import Task
from molora.evaluation.generate import batches_by_length, generate_answers
from molora.evaluation.metrics import match_label
from molora.evaluation.runner import inference
from molora.evaluation.score import Limits, only_classes
from molora.tuner.api import routing

BASE = None  # the route of the base without experts
OPEN = ""  # the route of nobody in particular: the gate decides


class Answers:
    """One task's held-out records, and the model's answer to each: logits of a classifier, or a text.

    Args:
        model: a PEFT model, in eval mode.
        tokenizer: its tokenizer.
        task: the task.
        limits: batch sizes and lengths.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> None:
        self.model, self.tokenizer, self.task, self.limits = model, tokenizer, task, limits
        self.examples = [encode(task, record, tokenizer, limits.max_length) for record in task.eval]
        self._known: dict[str | None, dict[int, Any]] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def right(self, routes: Sequence[str | None], classes: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each record is answered right.

        Args:
            routes: of each record, the task whose experts answer, OPEN or BASE.
            classes: of each record, the classes a classifier may choose from.
        """
        for route in dict.fromkeys(routes):
            self._answer(route, [i for i, other in enumerate(routes) if other == route])
        return [self._is_right(i, self._known[route][i], classes[i]) for i, route in enumerate(routes)]

    def _answer(self, route: str | None, rows: Sequence[int]) -> None:
        known = self._known.setdefault(route, {})
        missing = [i for i in rows if i not in known]
        if not missing:
            return
        with on_route(self.model, route):
            if self.task.task_type == "SEQ_CLS":
                for chosen, batch in self._batches(missing):
                    logits = self.model(**batch).logits.float().cpu()
                    known.update(zip(chosen, logits, strict=True))
            else:
                prompts = [list(prompt(self.examples[i])) for i in missing]
                texts = generate_answers(
                    self.model, self.tokenizer, prompts, batch_size=self.limits.batch_size,
                    max_new_tokens=self.limits.max_new_tokens, num_beams=self.limits.num_beams,
                )  # fmt: skip
                known.update(zip(missing, texts, strict=True))

    def _batches(self, rows: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        examples = [self.examples[i] for i in rows]
        for part in batches_by_length([len(e.input_ids) for e in examples], self.limits.batch_size):
            yield [rows[i] for i in part], inputs_of([examples[i] for i in part], self.model, self.tokenizer)

    def _is_right(self, row: int, answer: Any, classes: Sequence[int]) -> bool:
        if self.task.task_type == "SEQ_CLS":
            return int(only_classes(answer.unsqueeze(0), classes).argmax()) == self.examples[row].labels
        target = render(self.task, self.task.eval[row])[1]
        if self.task.metric == "accuracy" and self.task.labels:
            return match_label(answer, self.task.labels) == target
        return answer.strip() == target.strip()


def on_route(model: Any, route: str | None) -> AbstractContextManager[Any]:
    """The context in which a task's experts answer, the gate alone (OPEN), or the base (BASE)."""
    if route is BASE:
        return model.disable_adapter()
    return nullcontext() if route == OPEN else routing(model, task_ids=route, by="task")


def prompt(example: Example) -> Sequence[int]:
    """The tokens a model is given before it answers."""
    return example.input_ids[: example.prompt_length]


def inputs_of(
    examples: Sequence[Example], model: Any, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Padded input_ids and attention_mask of whole examples on the model's device, and the targets of generative models.

    They say where the prompt ends, which is what gates read in training and when the model answers.
    """
    batch = collate(examples, pad_token(tokenizer))
    keys = ["input_ids", "attention_mask"]
    if batch["labels"].dim() == 2:
        keys.append("labels")
    device = next(model.parameters()).device
    return {key: batch[key].to(device) for key in keys}


def features(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    depth: float = 1.0,
) -> Tensor:
    """Frozen features (sample, d) of prompts (token ids): mean hidden states of the base without experts, of unit length.

    `depth`: 0 are the embeddings, 1 the last layer's output, 0.5 that of the middle layer.
    """
    rows: dict[int, Tensor] = {}
    pad = pad_token(tokenizer)
    device = next(model.parameters()).device
    given = [list(tokens) for tokens in prompts]
    base = model.get_base_model()
    reader = base.get_encoder() if getattr(base.config, "is_encoder_decoder", False) else base
    with inference(model), model.disable_adapter():
        for part in batches_by_length([len(p) for p in given], batch_size):
            longest = max(len(given[i]) for i in part)
            ids = torch.tensor([given[i] + [pad] * (longest - len(given[i])) for i in part], device=device)
            lengths = torch.tensor([len(given[i]) for i in part], device=device)
            mask = torch.arange(longest, device=device) < lengths.unsqueeze(1)
            out = reader(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
            layer = round(depth * (len(out.hidden_states) - 1))
            rows.update(zip(part, mean_vector(out.hidden_states[layer], mask).cpu(), strict=True))
    return torch.stack([rows[i] for i in range(len(given))])
