"""From text to tokens: chat templates, cutting and the label mask."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from molora.data.records import where_of
from molora.data.render import conversation, label_index, render
from molora.data.templates import fill_template
from molora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from molora.data.tasks import Task

IGNORED = -100  # the label of a position that the loss skips


@dataclass(frozen=True)
class Example:
    """One encoded record.

    input_ids: prompt and target of a causal model; the encoder's input of the others. Its first
    `prompt_length` tokens are the prompt, which is all the model is given to generate from.
    labels: one per input token (-100 on the prompt); the decoder's tokens of a seq2seq model; or one class index.
    cut_prompt, cut_target: how many tokens of each were cut off by `max_length`.
    rejected: the same prompt with the answer that is worse, of a preference.
    """

    input_ids: Sequence[int]
    labels: Sequence[int] | int
    prompt_length: int
    task_id: int
    cut_prompt: int = 0
    cut_target: int = 0
    rejected: Example | None = None

    @property
    def prompt(self) -> Sequence[int]:
        """The tokens a model is given before it answers."""
        return self.input_ids[: self.prompt_length]

    @property
    def learns(self) -> bool:
        """Whether any label reaches the loss; the first token of a causal model is never predicted."""
        if isinstance(self.labels, int):
            return True
        causal = self.prompt_length < len(self.input_ids)
        return any(label != IGNORED for label in (self.labels[1:] if causal else self.labels))

    def compact(self) -> Example:
        """The same example in four bytes per token, to keep many of them in memory."""
        labels = self.labels if isinstance(self.labels, int) else array("i", self.labels)
        rejected = None if self.rejected is None else self.rejected.compact()
        return replace(self, input_ids=array("i", self.input_ids), labels=labels, rejected=rejected)


def encode(
    task: Task, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    """Tokens and labels of a record.

    Causal: prompt and target are tokenised apart, so that training sees the prompt's tokens exactly as generation
    does, and the target ends with the end-of-sequence token. Over `max_length`, the prompt loses its beginning (after
    a start token); only a target that is too long by itself loses its end, and then one prompt token stays.
    Seq2seq: `max_length` holds for each side. Classification heads: a long text loses its end.

    Raises DataError as `render`; ConfigError where the tokenizer lacks a chat template or end-of-sequence token.
    """
    if task.task_type == "SEQ_CLS":
        return _encode_classified(task, record, tokenizer, max_length)
    if task.task_type == "SEQ_2_SEQ_LM":
        return _encode_seq2seq(task, record, tokenizer, max_length)
    prompt, *answers = _causal_tokens(task, record, tokenizer)
    most = max(1, max_length - min(1, len(prompt)))
    # One prompt for both answers of a preference: the longer one decides what is cut of it.
    longest = min(most, max(map(len, answers)))
    prompt, cut_prompt = _cut_start(prompt, max_length - longest, tokenizer)
    made = [
        Example(
            prompt + answer[:most],
            [IGNORED] * len(prompt) + answer[:most],
            len(prompt),
            task.id,
            cut_prompt,
            max(0, len(answer) - most),
        )
        for answer in answers
    ]
    return made[0] if len(made) == 1 else replace(made[0], rejected=made[1])


def _causal_tokens(
    task: Task, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Prompt, target and, of a preference, the rejected answer."""
    texts = [] if task.rejected is None else [fill_template(task.rejected, record)]
    if task.chat_template:
        turns = _turns(task, record)
        prompt, target = _chat_tokens(turns, record, tokenizer)
        others = [[*turns[:-1], {"role": "assistant", "content": text}] for text in texts]
        return [prompt, target, *(_chat_tokens(other, record, tokenizer)[1] for other in others)]
    prompt_text, target_text = render(task, record)
    answers = [[*_tokens(tokenizer, text), _end_token(tokenizer)] for text in (target_text, *texts)]
    return [prompt_tokens(tokenizer, prompt_text), *answers]


def _encode_classified(
    task: Task, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    text = fill_template(task.text, record)
    ids = tokenizer(text, verbose=False)["input_ids"]
    full = len(ids)
    if full > max_length:  # the tokenizer's own truncation keeps its special tokens
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    label = label_index(task, record)
    label = task.classes[label] if task.classes else label
    return Example(ids, label, len(ids), task.id, full - len(ids))


def _encode_seq2seq(
    task: Task, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    prompt, target = render(task, record)
    ids, cut_prompt = _cut_start(tokenizer(prompt, verbose=False)["input_ids"], max_length, tokenizer)

    def answered(text: str) -> Example:
        labels = list(tokenizer(text_target=text, verbose=False)["input_ids"])
        end = _end_token(tokenizer)
        if not labels or labels[-1] != end:
            labels.append(end)
        cut_target = max(0, len(labels) - max_length)
        return Example(ids, labels[:max_length], len(ids), task.id, cut_prompt, cut_target)

    if task.rejected is None:
        return answered(target)
    return replace(answered(target), rejected=answered(fill_template(task.rejected, record)))


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The prompt's tokens, with the special tokens that start a text but not those that end it."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and _tokens(tokenizer, text)[-1:] != ids[-1:]:
        ids.pop()
    return ids


def prompt_within(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, task_type: str
) -> list[int]:
    """A prompt's tokens as `encode` cuts them for a base of this `task_type`, with no room kept for an answer."""
    if task_type == "SEQ_CLS":
        return list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
    if task_type == "CAUSAL_LM":
        return _cut_start(prompt_tokens(tokenizer, text), max_length, tokenizer)[0]
    return _cut_start(tokenizer(text, verbose=False)["input_ids"], max_length, tokenizer)[0]


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], max_length: int
) -> list[int]:
    """A conversation's tokens in the tokenizer's chat format, up to where the next answer begins; its end where it is too long.

    Raises DataError where the format refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        text = str(tokenizer.apply_chat_template([*turns], tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise DataError(f"the tokenizer's chat template refuses the conversation: {error}.") from None
    return _cut_start(_tokens(tokenizer, text), max_length, tokenizer)[0]


def _cut_start(ids: Sequence[int], room: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The last `room` of `ids` (a start token stays first), and how many were cut."""
    cut = max(0, len(ids) - room)
    if cut == 0:
        return list(ids), 0
    starts = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    head = 1 if room > 1 and ids[0] in starts and ids[0] is not None else 0
    return [*ids[:head], *ids[head + cut :]], cut


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token, so no answer could end.",
            hint="set tokenizer.eos_token, or use a base that has one",
        )
    return int(tokenizer.eos_token_id)


def _turns(task: Task, record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation that a record is, or that its prompt and target make."""
    if task.messages is not None:
        return conversation(task.messages, record)
    prompt, target = render(task, record)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]


def _chat_tokens(
    turns: list[dict[str, str]], record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Prompt and target tokens of a conversation in the tokenizer's own chat format.

    The target is what the format writes for the last answer, up to its end-of-sequence token (appended where
    the format writes none). The format brings its own special tokens, so none are added.
    """
    before, whole = _chat_texts(turns, tokenizer, where_of(record))
    end = _end_token(tokenizer)
    target_ids = _tokens(tokenizer, whole[len(before) :])
    if end in target_ids:
        target_ids = target_ids[: len(target_ids) - target_ids[::-1].index(end)]
    else:
        target_ids.append(end)
    return _tokens(tokenizer, before), target_ids


def _chat_texts(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, str]:
    """The conversation as text, up to where the last answer begins, and to its end."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template.",
            hint="use an instruction-tuned base, or write a prompt instead of messages or chat_template",
        )
    try:
        before = str(tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError as error:
        raise DataError(
            f"{where}: the tokenizer's chat template refuses the conversation: {error}."
        ) from None
    if not whole.startswith(before):
        raise DataError(
            f"{where}: the tokenizer's chat template writes the conversation differently once it is answered,"
            " so the answer's tokens cannot be told apart.",
            hint="leave out chat_template and write a prompt in the format of the base",
        )
    return before, whole
