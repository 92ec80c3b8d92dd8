"""The experts of each token: their mean is what statistics count, and a gate of the sequence reads the prompt alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from molora import record_routing
from molora.assets import tiny_path
from molora.evaluation.routing import summarise
from molora.evaluation.tokens import token_view
from tests.zoo import molora_model

PROMPT, ANSWER = [5, 6, 7, 8], [9, 10]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_path())


@pytest.mark.parametrize("gate", ["top2-group", "soft-linear", "top2-block"])
def test_means_are_those_of_the_statistics(tokenizer, gate):
    model = molora_model("llama", gate, tasks=None).eval()
    view = token_view(model, tokenizer, PROMPT, ANSWER)
    with torch.no_grad(), record_routing(model) as record:
        model(input_ids=torch.tensor([PROMPT + ANSWER]))
    summary = summarise("gate", {"x": (record.tokens, record.table())})
    assert list(view.weights) == list(summary.layers) and len(view.tokens) == 6
    for layer, rows in view.weights.items():
        means = torch.tensor(rows).mean(0).tolist()
        assert dict(zip(view.experts, means, strict=True)) == pytest.approx(
            summary.layers[layer]["x"], abs=1e-4
        )
    name, weight = view.top("0", 2)
    assert weight == max(view.weights["0"][2]) and view.experts[view.weights["0"][2].index(weight)] == name


def test_a_gate_of_the_sequence_reads_the_prompt_alone(tokenizer):
    model = molora_model("llama", "sequence-mean", tasks=None).eval()
    alone, answered = (token_view(model, tokenizer, PROMPT, answer) for answer in ((), ANSWER))
    first = torch.tensor(answered.weights["0"])
    assert torch.allclose(first, first[:1].expand_as(first)) and len(first) == 6
    assert torch.allclose(first[0], torch.tensor(alone.weights["0"])[0], atol=1e-6)
