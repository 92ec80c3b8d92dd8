"""The capabilities of docs/peft.md: a function each, which does it with a method and checks what came out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import molora

VOCAB = 50
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IDS = torch.tensor([[1, 5, 9, 13], [2, 6, 10, 14]])


@dataclass(frozen=True)
class Method:
    """How one method is asked for what both can be asked for."""

    name: str
    config: Callable[..., Any]
    fixed: dict[str, Any]  # settings under which the update is one matrix
    hotswap: Callable[[Any, Path], None]
    rescale: Callable[[nn.Module, float], AbstractContextManager[None]]

    def settings(self, **settings: Any) -> Any:
        return self.config(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings})

    def model(self, base: nn.Module | None = None, *, seed: int = 1, **settings: Any) -> Any:
        """A model with an adapter that has values, as if it had been trained."""
        config = self.settings(**{"task_type": "CAUSAL_LM", **settings})
        return trained(get_peft_model(llama() if base is None else base, config), seed)


METHODS = (
    Method(
        "molora",
        lambda **settings: molora.MoLoraConfig(num_experts=2, **settings),
        {"gate": {"scope": "constant", "select": "dense"}},
        lambda model, folder: molora.hotswap(model, folder),
        lambda model, multiplier: molora.rescale_adapter_scale(model, multiplier),
    ),
    Method(
        "LoRA",
        LoraConfig,
        {},
        lambda model, folder: hotswap_adapter(model, str(folder), "default"),
        rescale_adapter_scale,
    ),
)


class Trial(NamedTuple):
    """One line of the table."""

    name: str
    run: Callable[[Method, Path], None]
    note: str = ""


TRIALS: list[Trial] = []


def capability(name: str, note: str = "") -> Callable[[Callable[[Method, Path], None]], None]:
    """Register a line of the table."""
    return lambda run: TRIALS.append(Trial(name, run, note))


def llama(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SMALL, initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=None, **settings
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    )


def bert(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind(BertConfig(**SMALL)).eval()


@torch.no_grad()
def trained(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@torch.no_grad()
def answer(model: Any, **inputs: Any) -> Tensor:
    return model.eval()(input_ids=IDS, **inputs)[0]


def learns(model: Any, **inputs: Any) -> None:
    """Some of every adapter's parameters get gradients."""
    model.train()(**{"input_ids": IDS, **inputs}).loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def differ(one: Tensor, other: Tensor) -> None:
    assert not torch.allclose(one, other, atol=1e-3), "it did nothing"


def refused(call: Callable[[], Any]) -> None:
    try:
        call()
    except (ValueError, RuntimeError):
        return
    raise AssertionError("it passes without a word")


# -- building and training -----------------------------------------------------------------------------


@capability("`get_peft_model`, training, generation, `disable_adapter`")
def _(method: Method, folder: Path) -> None:
    base = answer(llama())
    model = method.model()
    differ(answer(model), base)
    with model.disable_adapter():
        assert torch.equal(answer(model), base)
    assert model.generate(input_ids=IDS, max_new_tokens=2).shape == (2, 6)
    learns(model, labels=IDS)


@capability("task types `SEQ_CLS`, `SEQ_2_SEQ_LM`, `TOKEN_CLS`, `QUESTION_ANS`")
def _(method: Method, folder: Path) -> None:
    encoder = {"target_modules": ["query", "value"]}
    roberta = RobertaForSequenceClassification(RobertaConfig(**SMALL, pad_token_id=1))
    learns(method.model(roberta, task_type="SEQ_CLS", **encoder), labels=torch.tensor([0, 1]))
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )
    learns(method.model(t5, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]), labels=IDS)
    learns(method.model(bert(BertForTokenClassification), task_type="TOKEN_CLS", **encoder), labels=IDS % 2)
    places = {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])}
    learns(method.model(bert(BertForQuestionAnswering), task_type="QUESTION_ANS", **encoder), **places)


@capability(
    '`"all-linear"` for `TOKEN_CLS` and `QUESTION_ANS`', "the head is trained whole, not adapted as well"
)
def _(method: Method, folder: Path) -> None:
    for kind, task in ((BertForTokenClassification, "TOKEN_CLS"), (BertForQuestionAnswering, "QUESTION_ANS")):
        method.model(bert(kind), task_type=task, target_modules="all-linear")


@capability("`model.peft_config[name]` is the caller's object")
def _(method: Method, folder: Path) -> None:
    config = method.settings()
    assert get_peft_model(llama(), config).peft_config["default"] is config


@capability(
    "one config object for bases of different architecture",
    "what one base put into it does not reach the next",
)
def _(method: Method, folder: Path) -> None:
    config = method.settings(target_modules="all-linear")
    first = get_peft_model(llama(), config)
    get_peft_model(gpt2(), config)
    assert any("q_proj" in name for name in first.peft_config["default"].target_modules)


@capability("`inject_adapter_in_model`, transformers' `add_adapter`, `load_adapter`, `set_adapter`")
def _(method: Method, folder: Path) -> None:
    model = llama()
    model.add_adapter(method.settings(), "mine")
    expected = answer(trained(model))
    model.save_pretrained(folder)
    again = llama()
    again.load_adapter(str(folder), adapter_name="again")
    same(answer(again), expected)
    inject_adapter_in_model(method.settings(), llama())


@capability("`copy.deepcopy`, `pickle`")
def _(method: Method, folder: Path) -> None:
    model = method.model()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(answer(twin), answer(model))


@capability("`rank_pattern`, `alpha_pattern`, `use_rslora`, `layers_to_transform`, `exclude_modules`")
def _(method: Method, folder: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True}
    model = method.model(layers_to_transform=[1], exclude_modules=["k_proj"], **patterns)
    assert {name.split(".")[2] for name in model.targeted_module_names} == {"1"}


@capability("gradient checkpointing")
def _(method: Method, folder: Path) -> None:
    model = method.model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    learns(model, labels=IDS)


# -- saving and loading --------------------------------------------------------------------------------


@capability("`save_pretrained`, `PeftModel.from_pretrained`, `low_cpu_mem_usage`, under another name")
def _(method: Method, folder: Path) -> None:
    model = method.model()
    model.save_pretrained(folder)
    for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        same(answer(PeftModel.from_pretrained(llama(), folder, **options)), answer(model))


@capability(
    "a changed weights file is refused",
    "`PeftModel.from_pretrained`, transformers' `load_adapter`, `molora.load`",
)
def _(method: Method, folder: Path) -> None:
    method.model().save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    save_file({**tensors, first: tensors[first] + 1}, file, metadata={"format": "pt"})
    refused(lambda: PeftModel.from_pretrained(llama(), folder))
    refused(lambda: llama().load_adapter(str(folder)))


@capability(
    "another base is refused",
    "ways out: `allow_other_base=True`, `--allow-other-base`, `config.base_fingerprint = None`",
)
def _(method: Method, folder: Path) -> None:
    method.model().save_pretrained(folder)
    refused(lambda: PeftModel.from_pretrained(llama(seed=1), folder))


@capability("a base whose vocabulary was resized meanwhile", "said in a warning")
def _(method: Method, folder: Path) -> None:
    model = method.model()
    model.save_pretrained(folder)
    base = llama()
    base.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    same(answer(PeftModel.from_pretrained(base, folder))[..., :VOCAB], answer(model))


@capability(
    "rows added to an adapted model's vocabulary are saved with it", "LoRA: with `save_embedding_layers=True`"
)
def _(method: Method, folder: Path) -> None:
    model = method.model()
    model.get_base_model().resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    nn.init.normal_(model.get_input_embeddings().weight[VOCAB:])
    nn.init.normal_(model.get_base_model().lm_head.weight[VOCAB:])
    model.save_pretrained(folder)
    base = llama()
    base.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    same(answer(PeftModel.from_pretrained(base, folder)), answer(model))


@capability("embeddings trained whole, saved with `save_embedding_layers=True`")
def _(method: Method, folder: Path) -> None:
    model = method.model(modules_to_save=["embed_tokens", "lm_head"])
    model.save_pretrained(folder, save_embedding_layers=True)
    same(answer(PeftModel.from_pretrained(llama(), folder)), answer(model))


# -- several adapters ----------------------------------------------------------------------------------


@capability("several adapters: `add_adapter`, `set_adapter`, `delete_adapter`")
def _(method: Method, folder: Path) -> None:
    model = method.model()
    first = answer(model)
    model.add_adapter("other", method.settings(task_type="CAUSAL_LM"))
    model.set_adapter("other")
    differ(answer(trained(model, seed=2)), first)
    model.set_adapter("default")
    model.delete_adapter("other")
    same(answer(model), first)


@capability("two adapters at once")
def _(method: Method, folder: Path) -> None:
    model = method.model(task_type=None)
    first = answer(model)
    model.add_adapter("other", method.settings())
    model.set_adapter("other")
    trained(model, seed=2)
    model.base_model.set_adapter(["default", "other"])
    differ(answer(model), first)


@capability(
    "another adapter for each sample: `adapter_names=`",
    "with us: tasks in one adapter, `routing_task_ids=[...]`",
)
def _(method: Method, folder: Path) -> None:
    model = method.model()
    base = answer(model, adapter_names=["__base__", "default"])
    same(base[1], answer(model)[1])


@capability(
    "`add_weighted_adapter`",
    "with us: `molora.fuse` makes one LoRA; `molora.compose`, a gate of scope `constant`, or `merge_and_unload(expert_weights=)`",
)
def _(method: Method, folder: Path) -> None:
    model = method.model()
    model.add_adapter("other", method.settings(task_type="CAUSAL_LM"))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="cat")


@capability(
    "an adapter of another method beside it",
    "in transformers' integration; `PeftModel` itself keeps methods apart",
)
def _(method: Method, folder: Path) -> None:
    other = next(m for m in METHODS if m is not method)
    model = llama()
    model.add_adapter(other.settings(), "other")
    model.add_adapter(method.settings(), "mine")
    trained(model)
    model.set_adapter(["other"])
    alone = answer(trained(model, seed=2))
    model.set_adapter(["other", "mine"])
    differ(answer(model), alone)


@capability("`PeftMixedModel` (`mixed=True`)", "PEFT lists the methods it allows there")
def _(method: Method, folder: Path) -> None:
    get_peft_model(llama(), method.settings(), mixed=True)


@capability("hotswap of an adapter's weights", "`molora.hotswap(model, folder)`")
def _(method: Method, folder: Path) -> None:
    model, other = method.model(), method.model(seed=2, lora_alpha=3)
    other.save_pretrained(folder)
    before = {name: id(p) for name, p in model.named_parameters()}
    method.hotswap(model, folder)
    same(answer(model), answer(other))
    assert before == {name: id(p) for name, p in model.named_parameters()}


@capability(
    "scales: `set_scale`, `scale_layer`, `unscale_layer`, `rescale_adapter_scale`",
    "`molora.rescale_adapter_scale`",
)
def _(method: Method, folder: Path) -> None:
    model = method.model()
    before, base = answer(model), answer(llama())
    with method.rescale(model, 0.0):
        same(answer(model), base)
    layers = [m for m in model.modules() if hasattr(m, "scale_layer")]
    for layer in layers:
        layer.scale_layer(0.5)
    differ(answer(model), before)
    for layer in layers:
        layer.set_scale("default", 3.0)
        layer.unscale_layer()
    assert layers
    same(answer(model), before)


# -- merging and leaving -------------------------------------------------------------------------------


@capability(
    "`merge_and_unload`, `merge_adapter`, `unload`, `get_delta_weight`",
    "with us where weights do not depend on the input",
)
def _(method: Method, folder: Path) -> None:
    model, base = method.model(**method.fixed), answer(llama())
    expected = answer(model)
    layer = next(m for m in model.modules() if hasattr(m, "get_delta_weight"))
    assert layer.get_delta_weight("default").any()
    model.merge_adapter()
    same(answer(model), expected)
    model.unmerge_adapter()
    same(answer(copy.deepcopy(model).merge_and_unload()), expected)
    same(answer(model.unload()), base)


@capability(
    "merging under a gate that reads the input",
    "no single matrix equals such a mixture; name weights or a task",
)
def _(method: Method, folder: Path) -> None:
    model = method.model()
    expected = answer(model)
    same(answer(model.merge_and_unload()), expected)


@capability("merging beside a head of several layers")
def _(method: Method, folder: Path) -> None:
    base = RobertaForSequenceClassification(RobertaConfig(**SMALL, pad_token_id=1))
    model = method.model(base, target_modules=["query", "value"], task_type="SEQ_CLS", **method.fixed)
    expected = answer(model)
    same(answer(model.merge_and_unload()), expected)


@capability(
    "`convert_to_lora`",
    "where weights do not depend on the input; `molora.export_lora` is exact and needs no new rank",
)
def _(method: Method, folder: Path) -> None:
    model = method.model(**method.fixed)
    config, state = convert_to_lora(model, rank=4)
    lora = get_peft_model(llama(), config)
    set_peft_model_state_dict(lora, state)
    same(answer(lora), answer(model))


# -- what is adapted -----------------------------------------------------------------------------------


@capability("`modules_to_save`")
def _(method: Method, folder: Path) -> None:
    model = method.model(modules_to_save=["lm_head"])
    model.save_pretrained(folder)
    same(answer(PeftModel.from_pretrained(llama(), folder)), answer(model))


@capability("`trainable_token_indices`")
def _(method: Method, folder: Path) -> None:
    model = method.model(trainable_token_indices=[1, 2])
    model.save_pretrained(folder)
    same(answer(PeftModel.from_pretrained(llama(), folder)), answer(model))


@capability("`ensure_weight_tying`")
def _(method: Method, folder: Path) -> None:
    model = method.model(
        llama(tie_word_embeddings=True), modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    base = model.get_base_model()
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight


@capability("`layer_replication`", "not merged: the copies share their weights")
def _(method: Method, folder: Path) -> None:
    model = method.model(layer_replication=[(0, 2), (0, 2)])
    model.save_pretrained(folder)
    same(answer(PeftModel.from_pretrained(llama(), folder)), answer(model))


@capability("targets `nn.Linear`, `Conv1D`, `all-linear`")
def _(method: Method, folder: Path) -> None:
    learns(method.model(gpt2(), target_modules=["c_attn"]), labels=IDS)
    learns(method.model(target_modules="all-linear"), labels=IDS)


@capability("target `nn.Embedding`", "with us: `trainable_token_indices`, or `modules_to_save`")
def _(method: Method, folder: Path) -> None:
    method.model(target_modules=["embed_tokens"])


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attention = nn.Conv2d(3, 4, 3), nn.MultiheadAttention(8, 2)


@capability("target `nn.Conv2d`", "with us: the linears around it, or `modules_to_save`")
def _(method: Method, folder: Path) -> None:
    method.model(Convolves(), target_modules=["conv"], task_type=None)


@capability(
    "target `nn.MultiheadAttention`",
    "its linears are used without a forward; `all-linear` leaves them out and says so",
)
def _(method: Method, folder: Path) -> None:
    method.model(Convolves(), target_modules=["attention"], task_type=None)


@capability(
    "`target_parameters`: fused experts of Mixtral, Qwen3-MoE, GPT-OSS",
    '`"all-linear"` says which weights it leaves',
)
def _(method: Method, folder: Path) -> None:
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2))
    method.model(base, target_parameters=["experts.gate_up_proj"], target_modules=["q_proj"])


@capability(
    '`use_dora`, `lora_bias`, `init_lora_weights="pissa"`',
    "with us: other kinds of experts and starts; refused by name",
)
def _(method: Method, folder: Path) -> None:
    method.model(use_dora=True)
    method.model(init_lora_weights="pissa")
    method.model(lora_bias=True)
