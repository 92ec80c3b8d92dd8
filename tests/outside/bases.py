"""A tiny base with the embedded tokenizer, and mixtures on it, for trials with other libraries."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from molora import GateConfig, MoLoraConfig
from molora.assets import tiny_path

TASKS = ("alpha", "beta")
GATES = {
    "token": GateConfig(select="top_k", top_k=2, share="group"),
    "sequence": GateConfig(scope="sequence", select="dense", share="block"),
    "task": GateConfig(scope="task", share="global"),
}
TEXTS = [
    "one and two are three",
    "blue and red",
    "a short text",
    "to be or not to be",
    "up or down",
    "yes",
    "no",
    "so",
]


def tokenizer() -> Any:
    """The embedded byte-level tokenizer."""
    return AutoTokenizer.from_pretrained(tiny_path())


def base(vocab: int = 259, seed: int = 0) -> LlamaForCausalLM:
    """A freshly initialised Llama of two layers for that tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def config(gate: str, **settings: Any) -> MoLoraConfig:
    """Three experts on attention; tasks only where the gate reads them."""
    given = (
        {"tasks": {"alpha": ["expert_0"], "beta": ["expert_1"]}}
        if gate == "task"
        else {"aux_losses": {"balance": 0.5}}
    )
    return MoLoraConfig(
        num_experts=3, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], gate=GATES[gate],
        task_type="CAUSAL_LM", **{**given, **settings},
    )  # fmt: skip


def mixture(gate: str, **settings: Any) -> Any:
    """A mixture on the base, not yet trained."""
    model = base()
    torch.manual_seed(1)
    return get_peft_model(model, config(gate, **settings))


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
