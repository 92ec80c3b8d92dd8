"""The base fingerprint: the same for every way of loading one base, different for every other base."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from molora.disk.fingerprint import base_fingerprint, compare
from molora.errors import AdapterError
from tests.zoo import ARCHITECTURES, base_model, molora_model


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def test_equal_before_and_after_wrapping(architecture):
    plain = base_fingerprint(base_model(architecture))
    model = molora_model(architecture)
    assert base_fingerprint(model) == base_fingerprint(model.base_model) == plain
    compare(plain, plain)
    assert plain["values"]


def test_equal_under_other_methods_and_trained_copies_of_modules():
    plain = base_fingerprint(base_model("llama"))
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head", "norm"])
    model = get_peft_model(base_model("llama"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert base_fingerprint(model) == plain


def test_other_weights_of_the_same_shape_differ(architecture):
    stored, actual = (base_fingerprint(base_model(architecture, seed)) for seed in (0, 1))
    assert stored["shapes"] == actual["shapes"]
    with pytest.raises(AdapterError, match=r"(?s)expected .* found .*values of .*allow_other_base=True"):
        compare(stored, actual)


def test_a_base_whose_linears_alone_changed_differs():
    stored, other = base_fingerprint(base_model("llama")), base_model("llama")
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(1.01)
    with pytest.raises(AdapterError, match=r"_proj\.weight|lm_head\.weight"):
        compare(stored, base_fingerprint(other))


def test_a_new_classification_head_is_the_same_base():
    stored, other = base_fingerprint(base_model("bert")), base_model("bert")
    nn.init.normal_(other.classifier.weight)
    compare(stored, base_fingerprint(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_of_one_base_matches(architecture, dtype):
    stored, actual = (
        base_fingerprint(base_model(architecture)),
        base_fingerprint(base_model(architecture, dtype=dtype)),
    )
    compare(stored, actual)
    compare(actual, stored)
    with pytest.raises(AdapterError):
        compare(stored, base_fingerprint(base_model(architecture, seed=1, dtype=dtype)))


class Quantised(nn.Linear):
    """What 4-bit layers look like: an nn.Linear whose weight is packed bytes."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)
        self.weight = nn.Parameter(torch.zeros(d_in * d_out // 2, 1, dtype=torch.uint8), requires_grad=False)


def quantise(model):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Quantised(child.in_features, child.out_features))
    return model


def test_a_quantised_load_matches_and_still_tells_bases_apart():
    stored = base_fingerprint(base_model("llama"))
    quantised = base_fingerprint(quantise(base_model("llama")))
    assert quantised["shapes"] == stored["shapes"] and 0 < len(quantised["values"]) < len(stored["values"])
    compare(stored, quantised)
    compare(quantised, stored)
    with pytest.raises(AdapterError, match="embed_tokens"):
        compare(stored, base_fingerprint(quantise(base_model("llama", seed=1))))


def test_other_sizes_and_classes_are_named():
    stored = base_fingerprint(base_model("llama"))
    other = copy.deepcopy(stored)
    other["sizes"]["num_attention_heads"] = 2
    with pytest.raises(AdapterError, match=r"sizes: .*num_attention_heads"):
        compare(stored, other)
    with pytest.raises(
        AdapterError, match="architecture: 'LlamaForCausalLM' expected, 'GPT2LMHeadModel' found"
    ):
        compare(stored, base_fingerprint(base_model("gpt2")))


def test_no_stored_fingerprint_matches_everything_and_meta_weights_have_no_values():
    compare(None, base_fingerprint(base_model("llama")))
    on_meta = base_fingerprint(base_model("llama").to("meta"))
    assert on_meta["values"] == {}
    compare(base_fingerprint(base_model("llama")), on_meta)
