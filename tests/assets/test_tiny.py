"""The embedded base loads through the stock Auto classes, is small, and fails on the demo tasks."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from molora.assets import TINY_VERSIONS, tiny_path
from molora.data.synthetic import GENERATORS, generate


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval()


def _exact_match(model: PreTrainedModel, name: str, n: int) -> float:
    """Share of held-out items answered exactly by greedy generation from left-padded prompts."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path(), padding_side="left")
    items = generate(name, n, 0, "eval")
    prompts = tokenizer([item["prompt"] for item in items], return_tensors="pt", padding=True)
    out = model.generate(**prompts, max_new_tokens=24, do_sample=False)
    answers = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(a == item["target"] for a, item in zip(answers, items, strict=True)) / n


def test_tokenizer_round_trips_every_byte() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    text = "reverse(hé)=\n\t €𝄞" + "".join(map(chr, range(32, 127)))
    ids = tokenizer(text)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *(byte + 3 for byte in text.encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 259
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("version", TINY_VERSIONS)
def test_package_weight_is_small(version: str) -> None:
    assert (tiny_path(version) / "model.safetensors").stat().st_size <= 8_000_000
    assert (tiny_path(version) / "README.md").read_text().startswith("---\nlicense: apache-2.0")


@pytest.mark.parametrize("name", ["copy", "reverse", "upper"])
def test_base_has_its_general_skills(tiny: PreTrainedModel, name: str) -> None:
    assert _exact_match(tiny, name, 50) >= 0.9


@pytest.mark.parametrize("name", [g.name for g in GENERATORS.values() if not g.general])
def test_base_alone_fails_on_demo_tasks(tiny: PreTrainedModel, name: str) -> None:
    assert _exact_match(tiny, name, 50) <= 0.2
