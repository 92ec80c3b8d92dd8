"""Small real runs: a tiny base on disk, a recipe for it, and a process that trains it and may be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parents[2]


def write_base(folder: Path, *, dropout: float = 0.0) -> Path:
    """A Llama of 2 layers and hidden size 32 with a byte-level tokenizer, as a model folder."""
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=128, attention_dropout=dropout, initializer_range=0.2, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_encoder(folder: Path) -> Path:
    """A BERT of 2 layers and hidden size 32 with a byte-level tokenizer, as a model folder."""
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One token per byte, and `<pad>` and `<eos>`."""
    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def recipe_for(base: Path, output: Path, **train: Any) -> dict[str, Any]:
    """Two synthetic tasks of 20 and 13 records: 5 batches an epoch, the last one small."""
    tasks = {
        name: {"source": "synthetic", "generator": name, "train_size": size, "eval_size": 4}
        for name, size in (("copy", 20), ("reverse", 13))
    }
    return {
        "name": "small",
        "base": str(base),
        "adapter": {
            "num_experts": 3, "r": 2, "lora_dropout": 0.1, "gate": {"kind": "top_k", "top_k": 2},
            "aux_losses": {"balance": 0.01},
        },
        "data": {"max_length": 48, "tasks": tasks},
        "train": {"max_steps": 8, "batch_size": 7, "log_every": 2, "lr": 0.01, **train},
        "eval": {"batch_size": 4, "max_new_tokens": 4, "modes": ["gate"]},
        "output": str(output),
    }  # fmt: skip


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter or checkpoint folder."""
    return load_file(folder / "adapter_model.safetensors")


def assert_same_weights(one: Path, two: Path) -> None:
    """Bit for bit."""
    first, second = adapter_weights(one), adapter_weights(two)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def start(recipe: dict[str, Any], resume: bool = False, kill_at: int = 0) -> subprocess.Popen[str]:
    """Train in a new process; with `kill_at` it gets SIGKILL in the middle of its batch of that number."""
    command = [
        sys.executable,
        "-m",
        "tests.training.runs",
        json.dumps(recipe),
        str(int(resume)),
        str(kill_at),
    ]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a process of `start` and return its output; its exit code must be `code`."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def main() -> None:
    """What the processes of `start` run: train, exit with the error's code."""
    from molora.errors import MoLoraError
    from molora.training.module import MoLoraModule
    from molora.training.train import train

    recipe, resume, kill_at = json.loads(sys.argv[1]), bool(int(sys.argv[2])), int(sys.argv[3])
    if kill_at:
        step, batches = MoLoraModule.training_step, 0

        def killed(self: MoLoraModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            nonlocal batches
            batches += 1
            if batches == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, batch, batch_idx)

        MoLoraModule.training_step = killed  # type: ignore[method-assign]
    try:
        run = train(recipe, resume=resume)
    except MoLoraError as error:
        print(error)
        sys.exit(error.exit_code)
    print(run.path)


if __name__ == "__main__":
    main()
