"""Answers to many prompts, greedy, by beams or drawn: left padding, batches of similar length, original order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from molora.data.collate import batches_by_length, pad_token, padded
from molora.evaluation.draws import Draws


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    draws: Draws | None = None,
    after_batch: Callable[[Sequence[int]], None] | None = None,
) -> list[str]:
    """The generated text of each prompt (token ids), special tokens removed, in the order given.

    draws: how they are drawn; without it nothing is sampled.
    after_batch: called with the places of the prompts that have just been answered together.
    Prompts are left-padded; which prompts share a batch depends on their lengths only.
    """
    pad = pad_token(tokenizer)
    config = greedy(model, tokenizer, max_new_tokens=max_new_tokens, num_beams=num_beams, pad_token_id=pad)
    answers = [""] * len(prompts)
    for chosen in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        drawn = None if draws is None else draws.processors(chosen, max_new_tokens)
        texts = answer_together(model, tokenizer, [prompts[i] for i in chosen], config, processors=drawn)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
        if after_batch is not None:
            after_batch(chosen)
    return answers


def answer_together(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    streamer: Any = None,
    processors: LogitsProcessorList | None = None,
) -> list[str]:
    """The generated texts of one batch of prompts (token ids), left-padded, by this config alone."""
    input_ids = padded(rows, pad_token(tokenizer), side="left")
    mask = padded([[1] * len(row) for row in rows], 0, side="left")
    with without_own_config(model, config):
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            streamer=streamer,
            logits_processor=processors,
        )
    starts_fresh = bool(getattr(model.config, "is_encoder_decoder", False))
    new = output if starts_fresh else output[:, input_ids.shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


_STARTS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
"""What a model's own config says of how a text begins, which is no matter of how it is searched for."""


def greedy(model: Any, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> GenerationConfig:
    """The whole config of a search for the most probable text: nothing is sampled, punished, suppressed or forced."""
    own = getattr(model, "generation_config", None)
    starts = {name: getattr(own, name, None) for name in _STARTS}
    return GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, use_cache=True, repetition_penalty=1.0,
        encoder_repetition_penalty=1.0, no_repeat_ngram_size=0, encoder_no_repeat_ngram_size=0, min_length=0, length_penalty=1.0,
        early_stopping=False, num_return_sequences=1, num_beam_groups=1, diversity_penalty=0.0, guidance_scale=None,
        **starts, **settings,
    )  # fmt: skip


@contextmanager
def without_own_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Without the model's own generation config: what one leaves open, generate() would take from it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, base.generation_config = base.generation_config, config
    try:
        yield
    finally:
        base.generation_config = own
