"""Whether a base fits what a recipe asks of it, before anything is trained: its vocabulary, its positions, its kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from molora.config import BaseConfig, RunConfig
from molora.data.module import SplitSummary
from molora.errors import ConfigError, DataError

_POSITIONS = ("position_embeddings", "position_embedding", "wpe", "embed_positions")


def check_base(config: RunConfig, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a base that cannot do what the recipe says; it may be without weights.

    Raises:
        ConfigError: an encoder is to be a language model, the tokenizer has tokens that the base does not, or
            `data.max_length`, where the recipe gives it, is beyond the base's positions.
    """
    refuse_encoder(config.base, model)
    _check_vocabulary(config, model, tokenizer)
    limit = _room(config, model)
    given = "max_length" in config.data.model_fields_set
    if limit is not None and given and config.data.max_length > limit:
        raise _too_long(config, f"data.max_length is {config.data.max_length}", limit)


def check_lengths(config: RunConfig, model: Any, summary: Iterable[SplitSummary]) -> None:
    """Refuse records that do not fit, once they are encoded.

    Raises:
        ConfigError: one is longer than the base's positions.
        DataError: `max_length` leaves nothing of the prompts of a task.
    """
    limit = _room(config, model)
    for split in summary:
        if limit is not None and split.longest > limit:
            what = f"a record of task {split.task!r} ({split.split}) has {split.longest} tokens"
            raise _too_long(config, what, limit)
        if split.records and split.lost_prompts == split.records:
            raise DataError(
                f"task {split.task!r} ({split.split}): data.max_length {config.data.max_length} leaves nothing of any of "
                f"its {split.records} prompts, since its targets fill it.",
                hint="raise data.max_length, or shorten the targets.",
            )


def _room(config: RunConfig, model: Any) -> int | None:
    """Positions for a sample's own tokens."""
    positions = positions_of(model)
    return None if positions is None else positions - (config.adapter.num_virtual_tokens or 0)


def positions_of(model: Any) -> int | None:
    """How many tokens the base's learned or tabled positions hold; None where its positions have no end."""
    sizes = [
        module.num_embeddings - _unused(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
    ]
    return min(sizes, default=None)


def _unused(table: nn.Embedding) -> int:
    """Rows that no position has: those before the first, where numbering begins behind the padding's row."""
    offset = getattr(table, "offset", None)
    if offset is not None:
        return int(offset)
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _too_long(config: RunConfig, what: str, limit: int) -> ConfigError:
    virtual = config.adapter.num_virtual_tokens
    behind = f" behind {virtual} virtual ones" if virtual else ""
    return ConfigError(
        f"{what}, but {config.base.model!r} has positions for {limit} tokens{behind}.",
        hint=f"set data.max_length: {limit} or less.",
    )


def refuse_encoder(base: BaseConfig, model: Any) -> None:
    """Raise ConfigError where an encoder is to be a causal language model."""
    if base.task_type != "CAUSAL_LM":
        return
    config = model.config
    masked = type(config) in AutoModelForMaskedLM._model_mapping.keys()  # noqa: SIM118 (no mapping of its own)
    if masked and hasattr(config, "is_decoder") and not config.is_decoder:
        raise ConfigError(
            f"base.model: {base.model!r} is an encoder ({config.model_type}): each token sees those after it, so it cannot "
            "be a causal language model.",
            hint="set base.task_type: SEQ_CLS, or name a decoder.",
        )


def _check_vocabulary(config: RunConfig, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    table = model.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None)
    highest = max(tokenizer.get_vocab().values(), default=0)
    if rows is not None and highest >= rows:
        raise ConfigError(
            f"base.model: the tokenizer of {config.base.model!r} has tokens up to number {highest}, but the base has "
            f"embeddings for {rows}.",
            hint="use the tokenizer that belongs to the base, or a base whose embeddings were resized and saved.",
        )
