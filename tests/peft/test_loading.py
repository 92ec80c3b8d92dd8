"""What stock loaders are told, and what they may not do without a word: old settings, changed weights, a missing import."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import molora
from molora import AdapterError, ConfigError, MoLoraConfig
from tests.zoo import base_model, batch_for, config_for, molora_model, randomise


def test_A6_layers_pattern_alone_is_refused_as_in_peft():
    settings = {"target_modules": ["q_proj"], "layers_pattern": "layers"}
    with pytest.raises(ValueError, match="layers_to_transform"):
        LoraConfig(**settings)
    with pytest.raises(ConfigError, match="layers_pattern='layers' acts only with layers_to_transform"):
        MoLoraConfig(**settings)
    model = get_peft_model(base_model("llama"), MoLoraConfig(**settings, layers_to_transform=[1]))
    assert model.targeted_module_names == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("load", [molora.load, PeftModel.from_pretrained])
def test_A6_adapters_that_were_saved_with_layers_pattern_alone_still_load(load, tmp_path):
    model = molora_model("llama", target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layers_pattern": "layers"}))
    (tmp_path / "MANIFEST.json").unlink()
    again = load(base_model("llama"), tmp_path)
    assert torch.equal(again(**batch_for("llama")).logits, model(**batch_for("llama")).logits)


@pytest.fixture
def saved(tmp_path):
    """A base and an adapter on disk, and the logits of both."""
    base_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config_for("llama"))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model.eval()(**batch_for("llama")).logits


def change(folder):
    """Another value, as a damaged copy or another training would have it."""
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first] + 1}, file, metadata={"format": "pt"})


def by_auto_class(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder / "adapter", **options)


def by_load_adapter(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder / "base", **options)
    model.load_adapter(str(folder / "adapter"))
    return model


@pytest.mark.parametrize("load", [by_auto_class, by_load_adapter])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_A6_transformers_own_loaders_refuse_changed_weights(load, dtype, saved):
    folder, expected = saved
    model = load(folder, dtype=dtype)
    if dtype == torch.float32:
        assert torch.equal(model(**batch_for("llama")).logits, expected)
    change(folder)
    if dtype == torch.bfloat16:  # rounded by the loader, they cannot be compared
        load(folder, dtype=dtype)
        return
    with pytest.raises(AdapterError, match="not the ones that were saved"):
        load(folder, dtype=dtype)


def test_A6_weights_saved_in_half_precision_are_known_again(tmp_path):
    base_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16),
        config_for("llama"),
        autocast_adapter_dtype=False,
    )
    model.save_pretrained(tmp_path / "adapter")
    for dtype in (torch.bfloat16, torch.float32):
        assert by_load_adapter(tmp_path, dtype=dtype)(**batch_for("llama")).logits.isfinite().all()


@pytest.mark.slow
def test_A6_what_is_saved_by_peft_transformers_and_us_says_what_to_import(saved):
    folder, _ = saved
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.add_adapter(config_for("llama", task_type=None))
    model.save_pretrained(folder / "by_transformers")
    molora.save(PeftModel.from_pretrained(base_model("llama"), folder / "adapter"), folder / "by_us")
    for name in ("adapter", "by_transformers", "by_us"):
        card = (folder / name / "README.md").read_text()
        assert card.count("import molora\n") == 1 and "KeyError: 'MOLORA'" in card
    said = re.search(r"`(KeyError: 'MOLORA')`", card)[1]
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(folder / 'adapter')!r})"
    for text, wanted in ((code, said), (f"import molora; {code}", "")):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert wanted in done.stderr and (done.returncode == 0) == (not wanted)
