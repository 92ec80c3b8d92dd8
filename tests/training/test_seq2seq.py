"""An encoder-decoder model trains from a recipe, with its own masks, and is scored by generating."""

from __future__ import annotations

import json

import torch
from transformers import T5Config, T5ForConditionalGeneration

import molora
from molora.models.build import load_trained
from tests.training.runs import write_tokenizer


def write_t5(folder):
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_ff=64, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=len(tokenizer),
        feed_forward_proj="gated-gelu", decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def recipe(base, output, gate, **train):
    tasks = {
        name: {"source": "synthetic", "generator": name, "train_size": 24, "eval_size": 4}
        for name in ("copy", "upper")
    }
    return {
        "name": "t5",
        "base": {"model": str(base), "task_type": "SEQ_2_SEQ_LM"},
        "adapter": {
            "num_experts": 2,
            "r": 4,
            "gate": gate,
            "aux_losses": {} if gate == "task" else {"balance": 0.01},
        },
        "data": {"max_length": 32, "tasks": tasks},
        "train": {"max_steps": 12, "batch_size": 8, "log_every": 2, "lr": 0.02, **train},
        "eval": {"batch_size": 4, "max_new_tokens": 4, "modes": ["task", "base"]},
        "output": str(output),
    }


def losses(run):
    rows = (run.path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("loss")
    return [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]


def test_seq2seq_trains_scores_and_reloads(tmp_path):
    base = write_t5(tmp_path / "base")
    run = molora.train(recipe(base, tmp_path / "out", {"kind": "top_k", "top_k": 1}))
    values = losses(run)
    assert values[-1] < values[0]
    report = json.loads((run.path / "report.json").read_text())
    assert {(row["task"], row["mode"]) for row in report["scores"]} == {
        (task, mode) for task in ("copy", "upper") for mode in ("task", "base")
    }
    gates = {row["gate"].split(".")[0] for row in report["routing"]["gates"]}
    assert gates == {"encoder", "decoder"}
    model, _, _ = load_trained(run.path)
    assert model.expert_names == ["expert_0", "expert_1"]


def test_a_task_gate_routes_encoder_and_decoder_by_id(tmp_path):
    run = molora.train(recipe(write_t5(tmp_path / "base"), tmp_path / "out", "task", max_steps=2))
    shares = json.loads((run.path / "report.json").read_text())["routing"]["by_task"]
    assert shares == {"copy": {"expert_0": 1.0, "expert_1": 0.0}, "upper": {"expert_0": 0.0, "expert_1": 1.0}}
