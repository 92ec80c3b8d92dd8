"""Linears that read one input compute together; whoever reads another one computes alone; decoding keeps copies."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import molora
from molora import GateConfig, MoLoraConfig
from molora.calls.call import CallCache
from molora.tuner.layer import MoLoraLayer
from tests.zoo import GATES, TASKS, batch_for, gradients, molora_model, randomise, routed

EXACT = {"atol": 1e-10, "rtol": 1e-9}


class Attention(nn.Module):
    """Not attention, but named like it: which linear reads what, and in what order, is up to the caller."""

    def __init__(self, calls):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 5) for _ in range(3))
        self.calls = calls

    def forward(self, x):
        inputs = {"same": x, "twice": 2 * x, "copy": x.clone()}
        return sum(getattr(self, name)(inputs[which]) for name, which in self.calls)


CALLS = {
    "shared": [("q_proj", "same"), ("k_proj", "same"), ("v_proj", "same")],
    "other order": [("v_proj", "same"), ("k_proj", "same"), ("q_proj", "same")],
    "one reads another": [("q_proj", "same"), ("k_proj", "twice"), ("v_proj", "same")],
    "equal but not the same": [("q_proj", "same"), ("k_proj", "copy"), ("v_proj", "same")],
    "called twice": [("q_proj", "same"), ("k_proj", "same"), ("k_proj", "twice"), ("k_proj", "same"), ("v_proj", "same")],
    "one is not called": [("q_proj", "same"), ("v_proj", "same")],
}  # fmt: skip
SETTINGS = {
    "group": {},
    "linear": {"gate": GateConfig(share="linear")},
    "task": {"gate": GateConfig(scope="task"), "tasks": list(TASKS)},
    "constant": {"gate": GateConfig(scope="constant", select="dense", share="global")},
    "plain": {"plain_targets": ["k_proj"], "target_modules": ["q_proj", "v_proj"]},
    "ragged": {"rank_pattern": {"k_proj": 4, "v_proj": 1}, "alpha_pattern": {"v_proj": 3}},
}


def adapted(calls, **settings):
    torch.manual_seed(0)
    model = Attention(calls).double().requires_grad_(False)
    given = {"num_experts": 3, "r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], **settings}
    model = get_peft_model(model, MoLoraConfig(**given), autocast_adapter_dtype=False).double()
    randomise(model)
    return model


def alone(model, x, ids):
    """The same model, every linear computing for itself: outside a root forward nothing is shared."""
    attention = model.base_model.model
    with molora.routing(model, task_ids=ids):
        return Attention.forward(attention, x)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_together_is_the_same_as_alone(calls, settings):
    model, x = adapted(calls, **settings), torch.randn(2, 4, 6, dtype=torch.float64)
    ids = ["alpha", "gamma"] if "tasks" in settings else None
    kwargs = {"routing_task_ids": ids} if ids else {}
    expected = alone(model, x, ids)
    expected.square().sum().backward()
    reference = gradients(model)
    model.zero_grad()
    out = model(x, **kwargs)
    assert_close(out, expected, **EXACT)
    out.square().sum().backward()
    found = gradients(model)
    for name, gradient in reference.items():  # a linear that is not called may have a zero gradient, or none
        assert_close(found[name], gradient, **EXACT)
    assert not any(found[name].any() for name in found.keys() - reference.keys())
    with torch.no_grad():
        assert_close(model(x, **kwargs), expected, **EXACT)
        assert_close(model(x[:, :1], **kwargs), alone(model, x[:, :1], ids), **EXACT)


def test_rows_for_the_base_only_stay_exact_within_a_group():
    model, x = adapted(CALLS["shared"], tasks=list(TASKS)), torch.randn(3, 4, 6, dtype=torch.float64)
    with model.disable_adapter():
        base = model(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            mixed = model(x, routing_task_ids=["alpha", None, -1])
        assert torch.equal(mixed[1:], base[1:]) and not torch.equal(mixed[0], base[0])


class CountGemms(TorchDispatchMode):
    """Counts products with matrices (d_in, columns) by their columns; those with few rows are the gates'."""

    def __init__(self, product):
        super().__init__()
        self.product, self.columns = product, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is self.product and args[1].shape[-2] > len(TASKS):
            self.columns[args[1].shape[-1]] += 1
        return function(*args, **(kwargs or {}))


def test_one_product_per_input_and_only_the_expert_in_use():
    model = molora_model("llama", "task-group", r=3)
    batch = {"input_ids": batch_for("llama")["input_ids"]}
    aten, rank = torch.ops.aten, 3
    for ids, product in ((["alpha", "beta", "gamma"], aten.bmm), (["alpha"] * 3, aten.mm)):
        with torch.no_grad(), CountGemms(product.default) as count:
            model(**batch, routing_task_ids=ids)
        # Per block: q, k, v together; gate and up together; o and down alone.
        assert (count.columns[3 * rank], count.columns[2 * rank], count.columns[rank]) == (2, 2, 4), (
            count.columns
        )


def edit_in_place(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "block_" in name:
                parameter.mul_(1.5)


def load_other(model):
    state = {k: v * 0.5 for k, v in model.state_dict().items() if "molora_" in k}
    model.load_state_dict(state, strict=False)


def edit_data_between_modes(model):
    model.train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(2.0)
    model.eval()


CHANGES = {
    "edited in place": edit_in_place,
    "loaded": load_other,
    "data edited after train()": edit_data_between_modes,
    "grown": lambda model: model.add_expert("new", init="copy:expert_1"),
    "shrunk": lambda model: model.remove_expert("expert_2", drop_tasks=True),
    "frozen": lambda model: model.freeze_experts("expert_0"),
    "cast": lambda model: model.to(torch.float64),
    "optimised": lambda model: optimise(model),
}


def optimise(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch_for("llama")).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_decoding_never_uses_stale_copies(change):
    model = molora_model("llama", "top2-group", tasks=[])
    token = torch.tensor([[7], [9]])  # one position: a decoding step, which may use what an earlier one kept
    with torch.no_grad():
        before = model(input_ids=token).logits
        assert torch.equal(model(input_ids=token).logits, before)
    change(model)
    with torch.no_grad():
        after = model(input_ids=token).logits
    fresh = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes; copies carry nothing kept
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=token).logits, after)
    if change is not CHANGES["frozen"]:
        assert not torch.equal(after, before.to(after.dtype))


def test_a_longer_input_always_reads_the_parameters_anew():
    model, batch = molora_model("llama", "soft-group"), {"input_ids": batch_for("llama")["input_ids"]}
    with torch.no_grad():
        before = model(**batch).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        after = model(**batch).logits
        with model.disable_adapter():
            assert torch.equal(after, model(**batch).logits) and not torch.equal(after, before)


def test_copies_and_pickles_keep_nothing():
    model = molora_model("llama", "soft-group")
    with torch.no_grad():
        model(input_ids=torch.tensor([[7]]))
    groups = [m.mounts["default"].inputs for m in model.modules() if isinstance(m, MoLoraLayer)]
    assert all(group.plans for group in groups)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        twins = [m.mounts["default"].inputs for m in other.modules() if isinstance(m, MoLoraLayer)]
        assert not any(group.plans for group in twins)
        assert not {id(g) for g in groups} & {id(g) for g in twins}
    model.train()
    assert not any(group.plans for group in groups)


def test_dropout_draws_one_mask_for_the_group_and_none_for_the_gate():
    model = adapted(CALLS["shared"], lora_dropout=0.5).train()
    seen = []
    for module in model.modules():
        if isinstance(module, MoLoraLayer) and "default" in module.molora_gate:
            module.molora_gate["default"].register_forward_hook(lambda _m, _a, out: seen.append(out.logits))
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    outs = [model(x) for _ in range(2)]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(outs[0], outs[1])
    mean = torch.stack([model(x).detach() for _ in range(1500)]).mean(0)
    assert_close(mean, model.eval()(x), atol=0.25, rtol=0.05)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["top2-group", "soft-linear", "task-group"])
def test_a_forward_is_bit_equal_with_gradients_and_without(gate, dtype, autocast):
    model = molora_model("llama", gate, dtype=dtype, lora_alpha=7)  # a scaling that bfloat16 has to round
    batch = {"input_ids": batch_for("llama")["input_ids"], **routed(gate)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(**batch).logits
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("gate", GATES)
def test_nothing_of_a_forward_outlives_it(gate):
    model = molora_model("llama", gate).train()
    features = {key: value for key, value in routed(gate).items() if key == "routing_features"}
    with molora.routing(model, task_ids=list(TASKS)):
        model(**batch_for("llama"), **features)
        context = next(m for m in model.modules() if isinstance(m, MoLoraLayer)).context
        assert context.here.call is None and context.call.cache == CallCache()
    with pytest.raises(RuntimeError, match="stop"), molora.routing(model, task_ids=list(TASKS)):
        handle = model.base_model.model.model.layers[1].mlp.register_forward_pre_hook(stop)
        model(**batch_for("llama"), **features)
    handle.remove()
    assert context.here.call is None and context.call.cache == CallCache()


def stop(*_):
    raise RuntimeError("stop")
