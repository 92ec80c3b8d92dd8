"""Greedy (or beam) answers to many prompts: left padding, batches of similar length, original order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from molora.data.collate import batches_by_length, pad_token, padded


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
) -> list[str]:
    """The generated text of each prompt (token ids), special tokens removed, in the order given.

    Nothing is sampled. Prompts are left-padded; which prompts share a batch depends on their lengths only.
    """
    pad = pad_token(tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    starts_fresh = bool(getattr(model.config, "is_encoder_decoder", False))
    answers = [""] * len(prompts)
    for chosen in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        rows = [prompts[i] for i in chosen]
        input_ids = padded(rows, pad, side="left")
        mask = padded([[1] * len(row) for row in rows], 0, side="left")
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
        )
        new = output if starts_fresh else output[:, input_ids.shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = text
    return answers
