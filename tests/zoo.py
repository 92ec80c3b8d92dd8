"""Tiny models of four architectures, batches for them, and every gate that exists, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from molora import GateConfig, MoLoraConfig, preset
from molora.config.presets.target_patterns import FEED_FORWARD

VOCAB = 50
TASKS = ("alpha", "beta", "gamma")
SHARED = {"alpha": ["expert_0", "expert_1"], "beta": ["expert_1", "expert_2"], "gamma": ["expert_2"]}

ARCHITECTURES = ("llama", "gpt2", "bert", "t5")
CAUSAL = ("llama", "gpt2")
TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}

GATES: dict[str, dict[str, Any]] = {
    "soft-linear": {"select": "dense", "share": "linear"},
    "soft-group": {"select": "dense", "share": "group"},
    "top1-linear": {"select": "top_k", "top_k": 1, "share": "linear"},
    "top2-group": {"select": "top_k", "top_k": 2, "share": "group"},
    "top3-group": {"select": "top_k", "top_k": 3, "share": "group"},
    "top2-block": {"select": "top_k", "transform": "sigmoid", "score": "mlp", "bias": True, "share": "block"},
    "topp-linear": {
        "select": "top_p",
        "top_p": 0.6,
        "renorm": "sum",
        "score": "cosine",
        "temperature": 0.3,
        "share": "linear",
    },
    "topcut-group": {"select": "threshold", "threshold_learned": True, "share": "group"},
    "constant-linear": {"scope": "constant", "select": "dense", "share": "linear"},
    "constant-global": {"scope": "constant", "select": "dense", "share": "global"},
    "sequence-mean": {"scope": "sequence", "select": "dense", "share": "group"},
    "sequence-last": {"scope": "sequence", "pool": "last", "select": "top_k", "top_k": 2, "share": "block"},
    "external-global": {"scope": "external", "feature_dim": 6, "select": "dense", "share": "global"},
    "external-mlp": {"scope": "external", "feature_dim": 6, "score": "mlp", "top_k": 2, "share": "linear"},
    "twopass-global": {"scope": "two_pass", "select": "dense", "share": "global"},
    "twopass-linear": {
        "scope": "two_pass",
        "score": "cosine",
        "norm": "layer",
        "absolute": True,
        "top_k": 2,
        "share": "linear",
    },
    "task-table": {"scope": "task", "score": "table", "select": "dense", "share": "linear"},
    "task-embedding": {
        "scope": "task",
        "score": "embedding",
        "bias": True,
        "select": "dense",
        "share": "global",
    },
    "task-group": {"scope": "task", "share": "group"},
    "task-global": {"scope": "task", "share": "global"},
}
HARD = ("task-group", "task-global")
LEARNED = tuple(name for name in GATES if name not in HARD)
TOKEN = tuple(name for name in GATES if name.startswith(("soft", "top")))
SUM_TO_ONE = tuple(name for name in GATES if name != "top1-linear")

# Llama has every gate. What others add are names of linears, streams, masks and heads, and how a scope or a sharing meets
# them, not how a gate computes: each has every scope and every sharing, and gates that are alike are on one of them.
GATES_ON: dict[str, tuple[str, ...]] = {
    "llama": tuple(GATES),
    "gpt2": ("soft-linear", "top2-group", "top2-block", "constant-global", "sequence-mean", "external-mlp",
             "twopass-linear", "task-table"),
    "bert": ("top1-linear", "soft-group", "top2-block", "constant-linear", "sequence-last", "external-global",
             "twopass-global", "task-embedding", "task-group"),
    "t5": ("topp-linear", "topcut-group", "top2-block", "constant-global", "sequence-mean", "sequence-last", "external-mlp",
           "twopass-global", "task-table", "task-global"),
}  # fmt: skip


def beyond(cases: Iterable[str], *fast: str) -> list[Any]:
    """All of the cases, those that are not named marked as slow."""
    return [pytest.param(case, marks=() if case in fast else pytest.mark.slow) for case in cases]


def pairs(
    names: Sequence[str],
    on: dict[str, tuple[str, ...]] = GATES_ON,
    architectures: Sequence[str] = ARCHITECTURES,
    fast: Sequence[str] = ARCHITECTURES,
) -> list[Any]:
    """(architecture, name) for each of the names that the architecture has; slow for those that are not `fast`."""
    return [
        (a, name) if a in fast else pytest.param(a, name, marks=pytest.mark.slow)
        for a in architectures
        for name in names
        if name in on[a]
    ]


def base_model(
    architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, blocks: int = 2
) -> nn.Module:
    """A freshly initialised model, without dropout, with weights large enough for outputs to differ."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCAB}
    if architecture == "llama":
        config = LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=blocks, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, eos_token_id=None, bos_token_id=None, **common,
        )  # fmt: skip
        model: nn.Module = LlamaForCausalLM(config)
    elif architecture == "gpt2":
        config = GPT2Config(
            n_embd=16, n_layer=blocks, n_head=2, n_positions=64, initializer_range=0.2, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, eos_token_id=None, bos_token_id=None, **common,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    elif architecture == "bert":
        config = BertConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=blocks, num_attention_heads=2, num_labels=3,
            max_position_embeddings=64, initializer_range=0.2, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, pad_token_id=0, **common,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
    else:
        config = T5Config(
            d_model=16, d_ff=32, d_kv=8, num_layers=blocks, num_decoder_layers=blocks, num_heads=2, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
            initializer_factor=1.0, **common,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    # Frozen, as a base is: torch picks another matmul for weights that need gradients (last bit differs).
    return model.to(dtype).requires_grad_(False).eval()


def config_for(architecture: str, gate: Any = "top2-group", **overrides: Any) -> MoLoraConfig:
    """A MoLoraConfig on all linears with three experts, named tasks and the gate of that name, or a GateConfig."""
    if isinstance(gate, GateConfig):
        overrides, gate = {"gate": gate, **overrides}, "top2-group"
    settings: dict[str, Any] = {
        "num_experts": 3, "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "gate": GateConfig(**GATES[gate]),
        "tasks": list(TASKS) if gate in HARD or not gate.startswith("task") else SHARED, "task_type": TASK_TYPES[architecture],
    }  # fmt: skip
    return MoLoraConfig(**{**settings, **overrides})


def molora_model(
    architecture: str,
    gate: Any = "top2-group",
    *,
    seed: int = 0,
    trained: bool = True,
    dtype: torch.dtype = torch.float32,
    blocks: int = 2,
    **overrides: Any,
) -> Any:
    """A wrapped model; `trained` gives B and the gates values, as if training had happened."""
    config = config_for(architecture, gate, **overrides)
    base = base_model(architecture, seed, dtype, blocks)
    torch.manual_seed(seed + 1)
    model = get_peft_model(base, config)
    if trained:
        randomise(model, seed + 2)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Give every expert's B and every gate row a random value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "frozen_B" in name or "molora_gate" in name or ".cores." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)


def batch_for(
    architecture: str, batch: int = 3, seq: int = 7, seed: int = 0, padding: str | None = None
) -> dict[str, Tensor]:
    """Inputs with labels; `padding` "left" or "right" pads each row by its index."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch, seq), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        for row in range(batch):
            pads = slice(0, row) if padding == "left" else slice(seq - row, seq)
            ids[row, pads], mask[row, pads] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if architecture == "bert":
        inputs["labels"] = torch.randint(0, 3, (batch,), generator=generator)
    elif architecture == "t5":
        inputs["labels"] = torch.randint(1, VOCAB, (batch, 5), generator=generator)
    else:
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
    return inputs


def routed(gate: str, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """What a gate needs beside the batch, for these rows of it: task ids, or features; nothing for others."""
    if gate.startswith("task"):
        return {"routing_task_ids": [TASKS[i % 3] for i in rows]}
    if gate.startswith("external"):
        features = torch.randn(16, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return {"routing_features": features[list(rows)].float()}
    return {}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name of every parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


_TABLE = {"scope": "task", "score": "table", "select": "dense"}
MIXTURES: dict[str, dict[str, Any]] = {
    "factors-table": {"combine": "factors", "gate": GateConfig(**_TABLE, transform="sigmoid", share="linear")},
    "factors-splits": {"combine": "factors", "gate": GateConfig(**_TABLE, splits=2)},
    "factors-task": {"combine": "factors", "gate": GateConfig(scope="task")},
    "factors-constant": {
        "combine": "factors", "gate": GateConfig(scope="constant", select="dense", splits=2, share="global"),
    },
    "factors-sequence": {"combine": "factors", "gate": GateConfig(scope="sequence", select="dense")},
    "shared-A-soft": {"share_A": True, "gate": GateConfig(select="dense", share="linear")},
    "shared-A-top2": {"share_A": True, "gate": GateConfig(top_k=2)},
    "shared-A-task": {"share_A": True, "gate": GateConfig(scope="task")},
    "cores-table": {
        "share_A": True, "task_cores": True, "gate": GateConfig(**_TABLE, share="linear"),
    },
    "cores-diagonal": {
        "share_A": True, "task_cores": "diagonal", "gate": GateConfig(**_TABLE, share="linear"),
    },
    "universal-top1": {"always_on": {"expert_2": "rest"}, "gate": GateConfig(top_k=1)},
    "universal-task": {"always_on": {"expert_1": 0.5}, "tasks": ["alpha", "beta"], "gate": GateConfig(scope="task")},
    "by-layer-top2": {"num_experts": [2, 3], "gate": GateConfig(top_k=[1, 2], share="linear")},
    "by-layer-task": {"num_experts": [2, 3], "gate": GateConfig(scope="task")},
    "by-pattern-soft": {
        "num_experts": {".*(q_proj|query|q|c_attn)": 2, ".*": 3}, "gate": GateConfig(select="dense", share="linear"),
    },
    "ffn-top2": {"ffn_targets": FEED_FORWARD, "gate": GateConfig(top_k=2)},
    "ffn-hard": {"ffn_targets": FEED_FORWARD, "gate": GateConfig(select="hard")},
    "ffn-task": {"ffn_targets": FEED_FORWARD, "gate": GateConfig(scope="task")},
    "balanced-top2": {"gate": GateConfig(top_k=2, balance_rate=0.01)},
    "blend-top2": {"gate": GateConfig(top_k=2, blend="sequence")},
    "blend-soft": {"gate": GateConfig(select="dense", score="mlp", blend="sequence", pool="last", share="block")},
    "layernorm-top1": {"gate": GateConfig(score="cosine", norm="layer", absolute=True, top_k=1, share="linear")},
    "identity-external": {
        "gate": GateConfig(scope="external", feature_dim=6, transform="identity", select="dense", share="linear"),
    },
}  # fmt: skip
# As GATES_ON: each of the others has every way to mix.
MIXTURES_ON: dict[str, tuple[str, ...]] = {
    "llama": tuple(MIXTURES),
    "gpt2": ("factors-table", "factors-constant", "shared-A-top2", "cores-table", "universal-top1", "by-layer-top2",
             "ffn-top2", "blend-soft"),
    "bert": ("factors-splits", "factors-sequence", "shared-A-task", "universal-task", "by-layer-task", "ffn-hard",
             "balanced-top2", "blend-top2"),
    "t5": ("factors-task", "factors-sequence", "shared-A-soft", "cores-table", "by-layer-top2", "by-pattern-soft",
           "ffn-task", "blend-soft", "identity-external"),
}  # fmt: skip


def mixture(architecture: str, name: str, **options: Any) -> Any:
    """A model with the mixture of that name."""
    settings = dict(MIXTURES[name])
    gate = settings.pop("gate")
    if "tasks" not in settings and gate.learned:
        settings["tasks"] = SHARED if gate.scope == "task" else list(TASKS)
    if architecture == "bert" and isinstance(settings.get("num_experts"), list):
        settings["exclude_modules"] = ["pooler.dense"]  # lies in no block
    return molora_model(architecture, gate, **{**settings, **options})


def given(name: str, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """What that mixture's gate needs beside the batch."""
    settings = MIXTURES[name]
    scope = settings["gate"].scope
    if scope == "task":
        known = settings.get("tasks", TASKS)
        return {"routing_task_ids": [known[i % len(known)] for i in rows]}
    return routed("external", rows) if scope == "external" else {}


def preset_model(architecture: str, name: str, **overrides: Any) -> Any:
    """A published method on a tiny model, small where its own sizes would not fit."""
    small: dict[str, Any] = {"task_type": TASK_TYPES[architecture]}
    if name == "mocle":
        small["gate"] = {"feature_dim": 6}
    torch.manual_seed(3)
    return get_peft_model(base_model(architecture), preset(name, **{**small, **overrides}))


def preset_inputs(model: Any, name: str) -> dict[str, Any]:
    """What a method needs beside a batch of three."""
    config = model.peft_config["default"]
    if name == "mocle":
        return routed("external")
    return {"routing_task_ids": list(config.task_ids)[:3]} if config.task_ids else {}
