"""How the adapters and runs of this folder were written: by molora 0.1.0 (commit 75d4506).

They stand for what users have on their disks, so this script is never run again to make a test pass; it stays to show
what each file holds. A format that gets new parts gets a folder of its own, beside this one. Run from the repository's
root: `python -m tests.fixtures_v1.make adapters` (or `runs`), with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import molora
from tests.fixtures_v1.probe import digest_of_small_products
from tests.training.runs import finish, start, write_tokenizer

HERE = Path("tests/fixtures_v1")
LLAMA, BERT = HERE / "bases" / "llama", HERE / "bases" / "bert"
TASKS = {"alpha": ["expert_0", "expert_1"], "beta": ["expert_1", "expert_2"], "gamma": ["expert_2"]}
COLUMNS = 32  # of the logits that are kept
FEW = ["q_proj", "up_proj", "down_proj"]
ANSWERS = ("pig", "mirror", "zigzag")


def write_bases() -> None:
    """Two models of 2 layers and hidden size 16; the Llama has a byte-level tokenizer."""
    tokenizer = write_tokenizer(LLAMA)
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.2, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(LLAMA)
    bert = BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        num_labels=3, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    BertForSequenceClassification(bert).save_pretrained(BERT)


def base(kind: str = "llama") -> Any:
    """A frozen base, which adapters remember by a name and not by a path."""
    classes: dict[str, Any] = {"llama": LlamaForCausalLM, "bert": BertForSequenceClassification}
    model = classes[kind].from_pretrained(HERE / "bases" / kind).requires_grad_(False).eval()
    model.name_or_path = f"tests/{kind}"
    return model


def wrapped(config: molora.MoLoraConfig, kind: str = "llama") -> Any:
    """An untrained mixture."""
    config.task_type = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}[kind]
    torch.manual_seed(1)
    return get_peft_model(base(kind), config)


@torch.no_grad()
def as_if_trained(model: nn.Module) -> None:
    """Random values for every B, gate, core and head, so that nothing is zero or uniform."""
    generator = torch.Generator().manual_seed(2)
    marks = ("lora_B", "frozen_B", "molora_gate", ".cores.", "modules_to_save")
    named = [*model.named_parameters(), *(b for b in model.named_buffers() if "molora_gate" in b[0])]
    for name, tensor in named:
        if any(mark in name for mark in marks) and tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def mixture(gate: dict[str, Any], **settings: Any) -> Any:
    """A small mixture on the Llama."""
    own: dict[str, Any] = {
        "num_experts": 3, "r": 2, "lora_alpha": 4, "target_modules": FEW, "gate": molora.GateConfig(**gate),
    }  # fmt: skip
    return wrapped(molora.MoLoraConfig(**{**own, **settings}))


def method(name: str, **settings: Any) -> Any:
    """A published method, made small."""
    return wrapped(molora.preset(name, **{"r": 2, "num_experts": 3, **settings}))


def top2() -> Any:
    """Its answers are the same for every task: a learned gate leaves out only isolated experts, of which it has none."""
    losses = {"balance": 0.01, "z": {"coefficient": 0.001}}
    return mixture(
        {"top_k": 2, "share": "group", "balance_rate": 0.01, "noise": "gaussian", "noise_std": 0.1},
        num_experts=4, target_modules="all-linear", lora_dropout=0.1, aux_losses=losses, tasks=TASKS,
    )  # fmt: skip


def task_grown() -> Any:
    """Two tasks with an expert each, an imported LoRA of another rank as the third's, a new expert as the fourth's."""
    model = mixture(
        {"scope": "task"}, num_experts=2, tasks=["alpha", "beta"], target_modules=["q_proj", "v_proj"]
    )
    as_if_trained(model)
    torch.manual_seed(3)
    lora = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(base(), lora).save_pretrained(folder)
        molora.import_lora(model, folder, expert="brought", tasks=["gamma"])
    model.add_expert("late", tasks=["delta"], freeze_others=True)
    return model


def grown_gates() -> Any:
    """A learned gate that grew twice and lost an expert: blocks of rows, frozen experts, an isolated one."""
    model = mixture({"top_k": 2}, tasks=["alpha", "beta"])
    as_if_trained(model)
    model.add_expert("late", tasks=["gamma"], freeze_others=True)
    model.add_expert("later", tasks=["delta"], isolate=True)
    model.remove_expert("expert_1")
    return model


def head() -> Any:
    config = molora.MoLoraConfig(
        num_experts=3, r=2, lora_alpha=4, target_modules=["query", "value"], modules_to_save=["classifier"],
        gate=molora.GateConfig(score="cosine", norm="layer", absolute=True, top_k=2, share="linear"),
    )  # fmt: skip
    return wrapped(config, "bert")


# name -> (how it is made, tasks to ask it for; None asks without one)
ADAPTERS: dict[str, Any] = {
    "top2": (top2, [None, "alpha", "gamma"]),
    "task_grown": (task_grown, ["alpha", "beta", "gamma", "delta"]),
    "grown_gates": (grown_gates, [None, "alpha", "delta"]),
    "hydralora": (lambda: method("hydralora"), [None]),
    "mtl_lora": (lambda: method("mtl_lora", target_modules=FEW, tasks=["alpha", "beta"]), ["alpha", "beta"]),
    "mixlora": (lambda: method("mixlora"), [None]),
    "polytropon": (lambda: method("poly", target_modules=FEW, tasks=["alpha", "beta"]), ["alpha", "beta"]),
    "task_embedding": (
        lambda: method("moelora", target_modules=FEW, tasks=["alpha", "beta"], gate={"embedding_dim": 4}),
        ["alpha", "beta"],
    ),
    "blend": (lambda: method("hmora", target_modules=["q_proj", "k_proj"], gate={"hidden": 4}), [None]),
    "by_layer": (
        lambda: mixture(
            {"top_k": [1, 2], "share": "linear"}, num_experts=[2, 4], rank_pattern={"up_proj": 3},
            alpha_pattern={"up_proj": 5}, expert_names=["a", "b", "c", "d"],
        ),
        [None],
    ),
    "always_on": (lambda: mixture({"top_k": 1, "share": "block"}, always_on={"expert_2": "rest"}), [None]),
    "plain_targets": (
        lambda: mixture({"select": "top_p", "top_p": 0.7, "score": "mlp", "hidden": 4, "bias": True},
                        plain_targets=["o_proj", "v_proj"], frozen_experts=["expert_0"]),
        [None],
    ),
    "cosine": (
        lambda: mixture({"score": "cosine", "temperature": 0.3, "select": "threshold", "threshold_learned": True},
                        scaling="alpha_over_sqrt_r"),
        [None],
    ),
    "constant": (
        lambda: mixture({"scope": "constant", "transform": "identity", "select": "dense", "start": 1.0, "share": "global"}),
        [None],
    ),
    "head": (head, [None]),
}  # fmt: skip


def ids_for(kind: str) -> dict[str, torch.Tensor]:
    """Three rows of 7 tokens, the last two padded on the right."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(2, 50, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(3):
        ids[row, 7 - row :], mask[row, 7 - row :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def answers(model: Any, kind: str, asked: list[str | None]) -> dict[str, torch.Tensor]:
    """Inputs, and the first logits for each task asked for: `logits`, or `logits/TASK`."""
    inputs = ids_for(kind)
    given = {None: {}, **{task: {"routing_task_ids": [task] * 3} for task in asked if task}}
    found = {f"logits/{task}" if task else "logits": model(**inputs, **given[task]).logits for task in asked}
    return {**inputs, **{name: logits[..., :COLUMNS].contiguous() for name, logits in found.items()}}


def make_adapters() -> None:
    write_bases()
    torch.manual_seed(5)
    left, right = torch.randn(12, 16), torch.randn(16, 64)
    probe = {"left": left, "right": right, "product": left @ right, "softmax": (left @ right).softmax(-1)}
    for kind in ("llama", "bert"):
        found = answers(base(kind), kind, [None])
        probe |= {f"{kind}/{name}": tensor for name, tensor in found.items()}
    save_file(probe, HERE / "probe.safetensors")
    digest = digest_of_small_products(base().lm_head.weight.detach())
    (HERE / "small_products.sha256").write_text(digest + "\n")
    (HERE / "expected").mkdir(exist_ok=True)
    trainable = {}
    for name, (build, asked) in ADAPTERS.items():
        model = build()
        as_if_trained(model)
        kind = "bert" if name == "head" else "llama"
        trainable[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        molora.save(model, HERE / "adapters" / name)
        found = answers(model.eval(), kind, asked)
        save_file(found, HERE / "expected" / f"{name}.safetensors")
        plain = answers(base(kind), kind, [None])["logits"]
        print(name, {key: float((t - plain).abs().max()) for key, t in found.items() if "logits" in key})
    without_waste(HERE / "adapters")
    (HERE / "expected" / "trainable.json").write_text(json.dumps(trainable, indent=2) + "\n")


def synthetic(names: Any, train_size: int) -> dict[str, Any]:
    made = {"source": "synthetic", "train_size": train_size, "eval_size": 4}
    return {name: {**made, "generator": name, "target": name[0]} for name in names}


def sequence_recipe(strategy: str, names: Any, **changes: Any) -> dict[str, Any]:
    """Whatever the word, the answer is the first letter of the task."""
    return {
        "name": strategy, "base": str(LLAMA), "output": str(HERE / "sequences"),
        "adapter": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
        "data": {"max_length": 48, "tasks": synthetic(names, 24)},
        "continual": {"strategy": strategy, **changes},
        "train": {"max_steps": 20, "batch_size": 8, "lr": 3e-2, "keep_checkpoints": 1},
        "eval": {"batch_size": 8, "max_new_tokens": 2},
    }  # fmt: skip


def training_recipe(name: str) -> dict[str, Any]:
    """One recipe under two names. Five batches an epoch in windows of two: step 4 is the first of the second epoch."""
    tasks = {
        task: {"source": "synthetic", "generator": task, "train_size": size, "eval_size": 2}
        for task, size in (("pig", 20), ("zigzag", 13))
    }
    return {
        "name": name, "base": "molora/tiny", "output": str(HERE / "training"),
        "adapter": {
            "num_experts": 3, "r": 1, "lora_dropout": 0.1, "target_modules": ["q_proj"], "layers_to_transform": [0, 3],
            "gate": {"kind": "top_k", "top_k": 2, "noise": "gaussian", "noise_std": 0.1}, "aux_losses": {"balance": 0.01},
        },
        "data": {"max_length": 48, "tasks": tasks},
        "train": {
            "max_steps": 7, "accumulate": 2, "batch_size": 7, "log_every": 2, "lr": 0.01, "lora_plus_ratio": 4,
            "save_every": 2, "val_every": 3, "keep_checkpoints": 1,
        },
        "eval": {"batch_size": 4, "max_new_tokens": 2, "modes": ["gate"]},
    }  # fmt: skip


def without_waste(folder: Path) -> None:
    """No pictures, cards and pages, which nothing reads; no locks, and nothing of the machine."""
    for pattern in ("*.png", "*.html", "*.md", ".lock", "env.json"):
        for file in folder.rglob(pattern):
            file.unlink()


def make_runs() -> None:
    for strategy, names, changes in (
        ("color", ANSWERS, {"router": {"clusters": 2}}),
        ("gated", ANSWERS[:2], {}),
    ):
        run = molora.train_sequence(sequence_recipe(strategy, names, **changes))
        tokenizer = AutoTokenizer.from_pretrained(LLAMA)
        for stage in sorted((run.path / "stages").iterdir()):
            model = molora.load(base(), stage / "adapter")
            asked: list[Any] = list(model.tasks) if strategy == "color" else [None]
            found = answers(model, "llama", asked)
            save_file(found, HERE / "expected" / f"{strategy}-{stage.name}.safetensors")
        if strategy == "color":
            prompts = [f"{name} {word}:" for name in ANSWERS for word in ("house", "zebra")]
            named = molora.load_router(run)(model, tokenizer, prompts)
            text = json.dumps({"prompts": prompts, "tasks": named}, indent=2)
            (HERE / "expected" / "router.json").write_text(text + "\n")
        for checkpoints in run.path.rglob("checkpoints"):  # stages that are done need none
            shutil.rmtree(checkpoints)
        without_waste(run.path)
    molora.train(training_recipe("finished"))
    finish(start(training_recipe("interrupted"), kill_at=9), -signal.SIGKILL)
    without_waste(HERE / "training")
    shutil.rmtree(molora.load_run(HERE / "training" / "finished").path / "checkpoints")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "adapters":
        shutil.rmtree(HERE / "adapters", ignore_errors=True)
        make_adapters()
    else:
        make_runs()
