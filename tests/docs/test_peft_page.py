"""docs/peft.md: its table is what comes out when every capability is tried, its Python runs, what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel

import molora
from eval.peft_page import PAGE, Result, results, table
from molora import AdapterError, MoLoraConfig
from molora.errors import MoLoraError
from tests.zoo import base_model, batch_for, molora_model

TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tried() -> list[Result]:
    return results()


@pytest.mark.slow
def test_A7_the_table_is_what_was_tried(tried: list[Result]) -> None:
    assert f"\n{table(tried)}\n" in TEXT


def test_A7_what_a_mixture_cannot_do_is_refused_and_the_page_says_what_to_use(tried: list[Result]) -> None:
    cannot = {trial: errors["molora"] for trial, errors in tried if errors["molora"] is not None}
    assert cannot
    for trial, error in cannot.items():
        ours = isinstance(error, MoLoraError) or "PeftMixedModel" in str(error)  # that one is PEFT's to say
        assert ours and trial.note, (trial.name, error)


def test_A4_the_ways_to_another_base_work_as_written(tmp_path: Path) -> None:
    molora_model("llama").save_pretrained(tmp_path)
    block = next(
        code for code in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL) if "allow_other" in code
    )
    for part in block.split("\n\n"):
        names = {"molora": molora, "MoLoraConfig": MoLoraConfig, "PeftModel": PeftModel, "folder": tmp_path}
        names["base"] = base_model("llama", seed=1)
        with pytest.raises(AdapterError):
            molora.load(base_model("llama", seed=1), tmp_path)
        exec(compile(part, str(PAGE), "exec"), names)
        model = names["model"]
        assert isinstance(model, PeftModel)
        assert torch.isfinite(model(**batch_for("llama")).logits).all()


def test_A7_a_dictionary_of_a_lora_config_can_be_handed_over() -> None:
    plain = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    config = MoLoraConfig(num_experts=2, **plain)
    assert config.r == 3 and config.peft_type == "MOLORA" and config.target_modules == {"q_proj"}


def test_the_page_is_linked_and_names_what_there_is() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert "[docs/peft.md](docs/peft.md)" in readme
    for name in re.findall(r"`molora\.(\w+)", TEXT):
        assert name in molora.__all__, name
