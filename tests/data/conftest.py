"""A byte-level tokenizer built on the spot, with and without the special tokens real ones differ in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# No deadlines: the machine that runs the tests may be busy. The same examples every time.
settings.register_profile(
    "molora", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("molora")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(
    *,
    bos: bool = True,
    end_texts: bool = False,
    merges: list[tuple[str, str]] | None = None,
    **special: str | None,
) -> PreTrainedTokenizerFast:
    """One token a byte (and the `merges`), `<bos>` in front when asked, `<eos>` behind with `end_texts`."""
    merges = merges or []
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<bos>", "<eos>", "<pad>", *alphabet, *(a + b for a, b in merges)]
    vocab = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    form = ("<bos> " if bos else "") + "$A" + (" <eos>" if end_texts else "")
    core.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in named.items() if v is not None})


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()
