"""How the adapters of this folder were written: by molora 0.1.0 (commit 489a1ac), on the bases of `tests/fixtures_v1`.

They hold what the format of those got since: kinds of experts, task routers, virtual tokens, trained tokens. What is said
there holds here too: never run again to make a test pass. From the repository's root, with OMP_NUM_THREADS=1:
`python -m tests.fixtures_v2.make`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer

import molora
from molora.config.choices import KINDS, ROUTERS
from tests.fixtures_v1.make import LLAMA, answers, base, method, mixture, without_waste, wrapped

HERE = Path("tests/fixtures_v2")
FEW = ["q_proj", "down_proj"]
TASKS = {
    "greet": ["hello there", "good morning to you", "how do you do", "a warm welcome", "nice to see you"],
    "count": ["1 2 3 4", "12 34 56", "7 + 8 = 15", "100 200 300 400", "3 times 9 is 27"],
    "shout": ["STOP THAT NOW", "GET OUT OF HERE", "NO WAY", "LOOK AT THIS", "RUN FOR IT"],
}


@torch.no_grad()
def as_if_trained(model: nn.Module) -> nn.Module:
    """Every trainable parameter moved at random, so that nothing is zero or uniform."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def of_kind(kind: str) -> Any:
    """Two tasks, an expert each, of one kind of expert."""
    own = {"adalora": {"target_r": 2}}.get(kind, {})
    settings: dict[str, Any] = {"num_experts": 2, "tasks": ["alpha", "beta"], "target_modules": FEW, "r": 4}
    return as_if_trained(mixture({"scope": "task"}, kind=kind, kind_settings=own, **settings))


def with_router(kind: str) -> Any:
    """A router that learned three tasks and lost one, and tells unknown prompts apart. The first block has no experts."""
    router = {"kind": kind, "unknown": "base", "quantile": 0.2} | (
        {"clusters": 2} if kind == "prototypes" else {}
    )
    late = r".*layers\.1\..*(q_proj|down_proj)"
    model = as_if_trained(mixture({"scope": "task"}, tasks=list(TASKS), target_modules=late, router=router))
    molora.fit_router(model, AutoTokenizer.from_pretrained(LLAMA), TASKS)
    model.remove_expert("expert_1", drop_tasks=True)
    return model


def grown_beside_a_router() -> Any:
    """A top-2 gate, whose router keeps the isolated expert of a later task for that task."""
    settings = {"tasks": ["greet", "count"], "target_modules": FEW, "router": "gaussian"}
    model = as_if_trained(mixture({"top_k": 2}, **settings))
    model.add_expert("late", tasks=["shout"], isolate=True)
    molora.fit_router(model, AutoTokenizer.from_pretrained(LLAMA), TASKS)
    return as_if_trained(model)


# name -> (how it is made, tasks to ask it for; None asks without one)
ADAPTERS: dict[str, Any] = {
    **{f"kind_{kind}": (lambda kind=kind: of_kind(kind), ["alpha", "beta"]) for kind in KINDS if kind != "lora"},
    **{f"router_{kind}": (lambda kind=kind: with_router(kind), [None, "greet", "shout"]) for kind in ROUTERS},
    "router_and_gate": (grown_beside_a_router, [None, "greet", "shout"]),
    "virtual_tokens": (
        lambda: as_if_trained(mixture({"scope": "sequence"}, num_virtual_tokens=3, target_modules=FEW)), [None],
    ),
    "trained_tokens": (
        lambda: as_if_trained(mixture({}, trainable_token_indices=[5, 9], target_modules=FEW)), [None],
    ),
    "goat": (lambda: as_if_trained(wrapped(molora.preset("goat", r=1, target_modules=FEW))), [None]),
    "xlora": (lambda: as_if_trained(method("xlora", target_modules=FEW)), [None]),
    "mhr": (lambda: as_if_trained(method("mhr", target_modules=FEW, tasks=["alpha", "beta"])), ["alpha", "beta"]),
    "dynmole": (lambda: as_if_trained(method("dynmole", target_modules=FEW)), [None]),
}  # fmt: skip


def main() -> None:
    (HERE / "expected").mkdir(exist_ok=True)
    trainable, named = {}, {}
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    prompts = [text for texts in TASKS.values() for text in (*texts[:2], texts[0] + " " + texts[1])]
    for name, (build, asked) in ADAPTERS.items():
        model = build()
        trainable[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        molora.save(model, HERE / "adapters" / name)
        found = answers(model.eval(), "llama", asked)
        save_file(found, HERE / "expected" / f"{name}.safetensors")
        if model.peft_config["default"].router is not None:
            named[name] = [answer._asdict() for answer in molora.route(model, tokenizer, prompts)]
        plain = answers(base(), "llama", [None])["logits"]
        print(name, {key: float((t - plain).abs().max()) for key, t in found.items() if "logits" in key})
    without_waste(HERE / "adapters")
    (HERE / "expected" / "trainable.json").write_text(json.dumps(trainable, indent=2) + "\n")
    text = json.dumps({"prompts": prompts, "named": named}, indent=1)
    (HERE / "expected" / "routes.json").write_text(text + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    shutil.rmtree(HERE / "adapters", ignore_errors=True)
    main()
