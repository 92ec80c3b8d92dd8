"""Speaker: a trained mixture that answers prompts, and says whose task each was taken for and which experts answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from molora.config import RunConfig
from molora.config.suggest import options
from molora.data.clusters import inference
from molora.data.collate import batches_by_length, pad_token
from molora.data.prompts import chat_prompt, prompt_within
from molora.data.templates import fill_template, parse_template
from molora.errors import ConfigError
from molora.evaluation.generate import answer_together, greedy
from molora.evaluation.routing import summarise
from molora.evaluation.tokens import TokenView, token_view
from molora.models.build import load_trained
from molora.models.task_router import named_prompts, names_tasks
from molora.tuner.api import find_context, record_routing, routing

Turn = dict[str, str]
PLAIN = "{prompt}"


@dataclass(frozen=True)
class Search:
    """How an answer is looked for: temperature 0 takes the most probable token, else tokens are drawn."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def config(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """The whole config: nothing of the model's own is left in it."""
        found = greedy(
            model, tokenizer, max_new_tokens=self.max_new_tokens, pad_token_id=pad_token(tokenizer)
        )
        if self.temperature:
            found.update(do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=0)
        return found


@dataclass(frozen=True)
class Answer:
    """`task`: what the prompt was taken for, by the adapter's router or by choice, with the router's `certainty`.

    `by`: who decided which experts answer: `choice`, the `router` (under a task gate, and where experts are hidden from some
    tasks), the `gate` alone, which may see it otherwise than the router, or the `base` without experts.

    `experts`: mean weight of each over the gates and tokens of prompt and answer; empty where the base alone answered.
    """

    text: str
    by: str
    task: str | None = None
    certainty: float | None = None
    experts: Mapping[str, float] = field(default_factory=dict)


class Speaker:
    """Answers as the mixture decides, or as `choose` says.

    Args:
        model: what `load_trained` returned: eval mode, on its device.
        chat: put prompts into the tokenizer's chat template.
        template: how a prompt is written otherwise, with one field.
        max_length: tokens of a prompt that are read: its last ones.

    Raises:
        ConfigError: a base that writes no text, or no chat template where one is asked for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool = False,
        template: str = PLAIN,
        max_length: int = 512,
    ) -> None:
        if not model.get_base_model().can_generate():
            raise ConfigError(
                "this base classifies; it writes no text.",
                hint="`molora eval RUN --predictions` shows its answers.",
            )
        if chat and not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template.", hint="leave out --chat"
            )
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.template, self.max_length = template, max_length
        self.choose()

    def choose(
        self, *, task: str | None = None, experts: Sequence[str] | None = None, base: bool = False
    ) -> None:
        """Answer for this task, with these experts in equal shares, or with the base alone; nothing given: as the gate decides.

        Raises:
            ConfigError: a task or an expert that the adapter does not have, or several of the three.
        """
        if sum((task is not None, experts is not None, base)) > 1:
            raise ConfigError(
                "a task, experts and the base alone exclude each other.", hint="choose one of them"
            )
        for what, names, known in (
            ("task", [task] if task is not None else [], self.model.tasks),
            ("expert", experts or [], self.model.expert_names),
        ):
            for name in names:
                if name not in known:
                    raise ConfigError(
                        f"the adapter has no {what} {name!r}.{options(name, known, f'Its {what}s')}"
                    )
        self.task, self.experts, self.base = task, experts, base

    def tokens(self, prompt: str | Sequence[Turn]) -> list[int]:
        """A prompt, or the turns of a conversation, as the model reads it."""
        if self.chat:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            return chat_prompt(self.tokenizer, turns, self.max_length)
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        (name,) = [name for _, name in parse_template(self.template) if name is not None]
        seq2seq = bool(getattr(self.model.config, "is_encoder_decoder", False))
        kind = "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
        return prompt_within(
            self.tokenizer, fill_template(self.template, {name: text}), self.max_length, kind
        )

    def say(
        self, prompt: str | Sequence[Turn], search: Search, streamer: TextStreamer | None = None
    ) -> Answer:
        """One answer, word by word to `streamer`, and who gave it."""
        ids = self.tokens(prompt)
        named = self._named([ids])[0]
        recording = nullcontext() if self.base else record_routing(self.model)
        with recording as record:
            (text,) = self._generate([ids], search, streamer)
        experts = {} if record is None else summarise("", {"": (record.tokens, record.table())}).by_task[""]
        return Answer(text, self.by, *named, experts)

    def look(self, prompt: str, search: Search | None) -> TokenView:
        """The experts of each token of a prompt, and of its answer where it is to be looked for; decoder-only models.

        Raises:
            ConfigError: the base reads and writes with different parts.
        """
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ConfigError("the tokens of an encoder-decoder are of two texts; molora tokens shows one.")
        ids = self.tokens(prompt)
        said: list[int] = []
        if search is not None:
            said = self.tokenizer(self._generate([ids], search)[0], add_special_tokens=False)["input_ids"]
        with self._chosen():
            return token_view(self.model, self.tokenizer, ids, said)

    def answers(self, prompts: Sequence[str], search: Search, *, batch_size: int = 16) -> Iterator[Answer]:
        """An answer to each prompt, in their order; prompts of like lengths are answered together."""
        rows = [self.tokens(prompt) for prompt in prompts]
        named = self._named(rows, batch_size)
        found: dict[int, Answer] = {}
        recording = nullcontext() if self.base else record_routing(self.model, by_row=True)
        with recording as record:
            for chosen in batches_by_length([len(row) for row in rows], batch_size):
                texts = self._generate([rows[i] for i in chosen], search)
                experts = [{}] * len(chosen) if record is None else record.take_rows(len(chosen))
                for i, text, weights in zip(chosen, texts, experts, strict=True):
                    found[i] = Answer(text, self.by, *named[i], weights)
        yield from (found[i] for i in range(len(rows)))

    @property
    def by(self) -> str:
        """Who decides which experts answer, see `Answer`."""
        if self.base:
            return "base"
        if self.task is not None or self.experts is not None:
            return "choice"
        found = find_context(self.model).adapters[str(self.model.active_adapter)]
        follows = found.config.gate.scope == "task" or bool(found.task_map.isolated)
        return "router" if follows and names_tasks(self.model) else "gate"

    def _named(
        self, rows: Sequence[list[int]], batch_size: int = 16
    ) -> list[tuple[str | None, float | None]]:
        if self.task is not None:
            return [(self.task, None)] * len(rows)
        if self.base or self.experts is not None or not names_tasks(self.model):
            return [(None, None)] * len(rows)
        found = named_prompts(self.model, self.tokenizer, rows, batch_size=batch_size)
        return [(row.task, max(row.posteriors.values(), default=None)) for row in found]

    def _generate(
        self, rows: Sequence[list[int]], search: Search, streamer: TextStreamer | None = None
    ) -> list[str]:
        config = search.config(self.model, self.tokenizer)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and not getattr(self.model.config, "is_encoder_decoder", False):
            config.max_new_tokens = max(1, min(search.max_new_tokens, positions - max(map(len, rows))))
        with inference(self.model), self._chosen():
            return answer_together(self.model, self.tokenizer, rows, config, streamer=streamer)

    @contextmanager
    def _chosen(self) -> Iterator[None]:
        if self.base:
            with self.model.disable_adapter():
                yield
        elif self.task is not None:
            with routing(self.model, task_ids=self.task, by="task"):
                yield
        elif self.experts is not None:
            with routing(self.model, task_ids=next(iter(self.model.tasks), None), experts=self.experts):
                yield
        else:
            yield


def open_speaker(
    run: str | Path, *, task: str | None = None, chat: bool | None = None, allow_other_base: bool = False
) -> Speaker:
    """The mixture of a run or an adapter folder, which reads prompts as the run (or its task) was trained, unless `chat` says."""
    model, tokenizer, config = load_trained(run, allow_other_base=allow_other_base)
    in_chat, template = how_trained(config, task)
    return Speaker(
        model, tokenizer,
        chat=in_chat if chat is None else chat, template=template,
        max_length=512 if config is None else config.data.max_length,
    )  # fmt: skip


def how_trained(config: RunConfig | None, task: str | None = None) -> tuple[bool, str]:
    """How a run's prompts were written: whether in the chat template, else the template with its one field.

    Where tasks differ, or a template has several fields, prompts are taken as they are.
    """
    tasks = [] if config is None else [one for name, one in config.data.tasks.items() if task in (None, name)]
    if tasks and all(one.chat_template or one.messages is not None for one in tasks):
        return True, PLAIN
    shapes = {_shape(one.prompt or PLAIN) for one in tasks}
    return False, shapes.pop() or PLAIN if len(shapes) == 1 else PLAIN


def _shape(template: str) -> str | None:
    """The template with `prompt` as the name of its one field."""
    pieces = parse_template(template)
    if sum(name is not None for _, name in pieces) != 1:
        return None
    texts = [text.replace("{", "{{").replace("}", "}}") for text, _ in pieces]
    return "".join(
        text + ("" if name is None else PLAIN) for text, (_, name) in zip(texts, pieces, strict=True)
    )


def seeded(seed: int) -> None:
    """Draw the same tokens each time."""
    torch.manual_seed(seed)
