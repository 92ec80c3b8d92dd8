"""I9: adapters loaded in a new process are bit-equal by every loader; either import order registers molora."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from peft import get_peft_model

from tests.contracts.fresh_loads import LOADERS
from tests.zoo import ARCHITECTURES, base_model, batch_for, config_for, randomise, routed

# A gate of each kind; ranks, scalings, task maps and frozen experts must all come back.
SAVED = {
    "top2-group": {"rank_pattern": {"o_proj|c_proj|dense|wo": 6}, "frozen_experts": ["expert_1"]},
    "task-group": {"tasks": {"alpha": ["expert_2"], "beta": {"expert_0": 0.7, "expert_1": 0.3}, "gamma": ["expert_1"]}},
    "constant-global": {"use_rslora": True},
}  # fmt: skip
CASES = [(a, gate) for a in ARCHITECTURES for gate in (SAVED if a in ("llama", "bert") else ("top2-group",))]
FAST = (("llama", "top2-group"), ("llama", "task-group"), ("bert", "constant-global"))


def run_python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """Every case saved here, and loaded in one new process: the fast ones, or the others."""
    return cache(lambda fast: loaded_anew([c for c in CASES if (c in FAST) == fast], tmp_path_factory))


def loaded_anew(cases, tmp_path_factory):
    """{case: expected logits}, {case + loader: (logits, trainable)} of these cases."""
    root, expected = tmp_path_factory.mktemp("fresh"), {}
    for architecture, gate in cases:
        base = base_model(architecture)
        base.save_pretrained(root / "bases" / architecture)
        base.name_or_path = str(root / "bases" / architecture)
        model = get_peft_model(base, config_for(architecture, gate, **SAVED[gate])).eval()
        randomise(model, 2)
        if architecture == "bert":
            torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
        with torch.no_grad():
            expected[architecture, gate] = model(**batch_for(architecture), **routed(gate)).logits
        model.save_pretrained(root / "adapters" / f"{architecture}+{gate}")
    done = run_python("-m", "tests.contracts.fresh_loads", str(root))
    assert done.returncode == 0, done.stderr
    return expected, torch.load(root / "loaded.pt")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("architecture", "gate"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_I9_loading_in_a_new_process_is_bit_equal(loads, architecture, gate, loader):
    expected, loaded = loads((architecture, gate) in FAST)
    logits, trainable = loaded[architecture, gate, loader]
    assert torch.equal(logits, expected[architecture, gate])
    if loader == "PeftModel trainable":
        assert any("lora_A" in name for name in trainable)
        assert not any("frozen" in name for name in trainable)
    elif loader.startswith("PeftModel"):
        assert not trainable


def test_molora_registers_the_method_where_peft_is_there_already(loads):
    """The other order: test_presets."""
    assert loads(True)[1]["peft, then molora"] == "MoLoraConfig"


def test_importing_molora_loads_neither_torch_nor_peft():
    heavy = "('torch', 'peft', 'transformers', 'lightning')"
    done = run_python("-c", f"import sys, molora; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
