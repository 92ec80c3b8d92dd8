"""I12: the three ways to compute a mixture agree, in values and gradients; and each is taken where it should be."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

import molora
from molora import ConfigError, GateConfig, MoLoraConfig, RoutingError
from molora.config.choices import KINDS
from molora.forward.dispatch import WAYS, ways_in_use
from molora.forward.sparse_parts import Ready
from molora.tuner.layer import MoLoraLayer
from tests.zoo import (
    ARCHITECTURES,
    FEED_FORWARD,
    GATES,
    MIXTURES,
    TASKS,
    batch_for,
    given,
    gradients,
    mixture,
    molora_model,
    randomise,
    routed,
)

SPARSE = [way for way in WAYS if way != "dense"]
EXACT = {"atol": 1e-10, "rtol": 1e-10}
OUTPUTS = tuple(name for name in MIXTURES if not name.startswith("factors"))  # the others have no sparse way
# Every gate and mixture on one architecture: the ways meet a gate's weights, not the model around them.
# T5 has as many linears as the others together, so that it is seen with two gates and one mixture.
WITH_ENCODER = ("sequence-last", "task-global", "by-layer-top2")
GATES_ON, MIXTURES_ON = (
    [
        (name, "t5" if name in WITH_ENCODER else "llama" if name.startswith("ffn") else ARCHITECTURES[i % 3])
        for i, name in enumerate(names)
    ]
    for names in (GATES, OUTPUTS)
)
ONE_BLOCK = r".*layers\.0\..*_proj"


def step(model, way, batch, **options):
    """Logits in training and evaluation, and gradients, all in one way (None: the one chosen)."""
    model.train().zero_grad()
    torch.manual_seed(0)
    before = copy.deepcopy(model.state_dict())  # a step may move a gate's balance
    with molora.dispatch(way) if way else nullcontext():
        trained = model(**batch, **options)
        trained.loss.backward()
        found = gradients(model)
        with torch.no_grad():
            evaluated = model.eval()(**batch, **options).logits
    model.load_state_dict(before)
    return trained.logits.detach(), evaluated, found


def agree(model, batch, tolerance=EXACT, ways=SPARSE, **options):
    expected = step(model, "dense", batch, **options)
    for way in (*ways, None):
        found = step(model, way, batch, **options)
        assert_close(found[:2], expected[:2], **tolerance)
        assert found[2].keys() == expected[2].keys()
        for name, gradient in expected[2].items():
            assert_close(found[2][name], gradient, **tolerance, msg=lambda m, w=way, n=name: f"{w} {n}: {m}")


@pytest.mark.parametrize(("gate", "architecture"), GATES_ON)
def test_all_ways_agree_for_every_gate(gate, architecture):
    model = molora_model(architecture, gate, dtype=torch.float64)
    agree(model, batch_for(architecture), **routed(gate))


@pytest.mark.parametrize(("name", "architecture"), MIXTURES_ON)
def test_all_ways_agree_for_every_mixture(name, architecture):
    agree(mixture(architecture, name, dtype=torch.float64), batch_for(architecture), **given(name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", ["task-group", "top2-group"])
def test_all_ways_agree_for_every_kind_with_frozen_and_learning_experts(kind, gate):
    settings = {"kind": kind, "lora_dropout": 0.2, "target_modules": ONE_BLOCK}
    model = molora_model("llama", gate, dtype=torch.float64, **settings)
    model.freeze_experts(["expert_1"])
    agree(model, batch_for("llama"), **routed(gate))


@pytest.mark.parametrize(
    ("gate", "ids"),
    [
        ("task-group", ["alpha", None, "gamma"]),
        ("task-group", torch.tensor([0, -1, 2])),
        ("task-group", [["alpha", "beta"], "beta", None]),
        ("task-group", torch.tensor([[0, 1, 2, -1, 0, 1, 2]] * 3)),
        ("task-group", "beta"),
        ("task-group", [None, None, None]),
        ("top2-group", ["alpha", None, "gamma"]),
        ("top1-linear", torch.tensor([[0, 1, 2, -1, 0, 1, 2]] * 3)),
        ("constant-global", ["alpha", None, "gamma"]),
    ],
)
@pytest.mark.parametrize("by", [None, "task"])
def test_all_ways_agree_whatever_the_task_ids(gate, ids, by):
    ranks = {"target_modules": ONE_BLOCK, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    model = molora_model("llama", gate, dtype=torch.float64, **ranks)
    with molora.routing(model, by=by) if by else nullcontext():
        agree(model, batch_for("llama"), routing_task_ids=ids)


def test_all_ways_agree_where_experts_have_ranks_and_scalings_of_their_own(tmp_path):
    model = molora_model("llama", "task-group", dtype=torch.float64)
    wider = LoraConfig(r=7, lora_alpha=5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    lora = get_peft_model(molora_model("llama").unload(), wider)
    lora.save_pretrained(tmp_path)
    molora.import_lora(model, tmp_path, expert="expert_1")
    randomise(model)
    agree(model, batch_for("llama"), routing_task_ids=list(TASKS))


def test_all_ways_agree_with_an_ordinary_lora_beside_the_experts_and_with_others_by_layer():
    plain = molora_model(
        "llama",
        "top2-group",
        dtype=torch.float64,
        target_modules=["q_proj", "v_proj"],
        plain_targets=["k_proj"],
    )
    agree(plain, batch_for("llama"))
    agree(plain, batch_for("llama"), routing_task_ids=["alpha", None, "gamma"])


@pytest.mark.parametrize("gate", ["task-group", "sequence-top2", "top2-group"])
def test_all_ways_agree_in_float32_and_nearly_in_bfloat16(gate):
    if gate not in GATES:
        gate = next(name for name in GATES if name.startswith("sequence"))
    agree(molora_model("llama", gate), batch_for("llama"), {"atol": 2e-6, "rtol": 1e-5}, **routed(gate))
    low = molora_model("llama", gate, dtype=torch.bfloat16)
    agree(low, batch_for("llama"), {"atol": 0.1, "rtol": 0.1}, **routed(gate))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gate", ["task-group", "top2-group"])
def test_checkpointing_changes_nothing_in_any_way(gate, way):
    model, batch = molora_model("llama", gate, dtype=torch.float64), batch_for("llama")
    expected = step(model, way, batch, **routed(gate))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = step(model, way, batch, **routed(gate))
    assert_close(found[0], expected[0], **EXACT)
    assert_close(found[2], expected[2], **EXACT)


# -- which way is taken, and what it promises --------------------------------------------------------------


def ways_taken(model, **options):
    """The names of the parts' classes in one forward."""
    taken = set()

    def note(layer, args, output):
        taken.update(kinds)
        kinds.clear()

    kinds = set()
    from molora.forward import input_group

    original = input_group.parts_of

    def noted(reading):
        parts = original(reading)
        kinds.update(type(part).__name__ for part in parts.values())
        return parts

    input_group.parts_of = noted
    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, MoLoraLayer)]
    try:
        with torch.no_grad():
            model(**options)
    finally:
        input_group.parts_of = original
        for handle in handles:
            handle.remove()
    return taken


def many(gate, experts=24, **options):
    """Many experts, in one block of two."""
    options = {"target_modules": ONE_BLOCK, **options}
    return molora_model(
        "llama",
        gate,
        num_experts=experts,
        tasks={f"t{i}": [f"expert_{i}"] for i in range(experts)},
        **options,
    )


def test_the_rule_takes_the_way_that_costs_least():
    long = batch_for("llama", batch=2, seq=40)
    by_task = many(GateConfig(scope="task"))
    assert ways_taken(by_task, **long, routing_task_ids=["t0", "t3"]) == {"BySample"}
    assert ways_taken(by_task, **long, routing_task_ids=["t3", "t3"]) == {"DensePart"}
    few = many(GateConfig(scope="task"), experts=3)
    assert ways_taken(few, **long, routing_task_ids=["t0", "t2"]) == {
        "BySample"
    }  # never by how many there are
    assert ways_taken(many(GateConfig(scope="sequence", top_k=2)), **long) == {"BySample"}
    assert ways_taken(many(GateConfig(scope="sequence", top_k=2), experts=2), **long) == {"DensePart"}
    assert ways_taken(many(GateConfig(top_k=1)), **long) == {"ByToken"}
    assert ways_taken(many(GateConfig(top_k=1)), **batch_for("llama", batch=1, seq=1)) == {"BySample"}
    assert ways_taken(many(GateConfig(top_k=1), experts=128), **long) == {
        "ByToken"
    }  # not each token a sample
    assert ways_taken(many(GateConfig(top_k=2), experts=4), **long) == {"DensePart"}
    assert ways_taken(many(GateConfig(select="dense")), **long) == {"DensePart"}
    narrow, wide = GateConfig(select="top_p", top_p=0.01), GateConfig(select="top_p", top_p=0.99)
    assert ways_taken(many(narrow), **long) == {"ByToken"}  # only the weights tell
    assert ways_taken(many(wide), **long) == {"DensePart"}
    for way, part in zip(WAYS, ("DensePart", "BySample", "ByToken"), strict=True):
        with molora.dispatch(way):
            assert ways_taken(many(GateConfig(top_k=2), experts=4), **long) == {part}


@pytest.mark.parametrize(
    ("gate", "batch", "step"),
    [
        (GateConfig(scope="external", feature_dim=6, top_k=2), "by_sample", "dense"),
        (GateConfig(scope="external", feature_dim=6, select="dense"), "dense", "dense"),
        (GateConfig(scope="token", top_k=1), "by_token", "by_token"),
    ],
)
def test_what_inspect_says_of_a_gate_is_what_a_batch_of_that_size_does(gate, batch, step):
    model = many(gate, target_modules=["q_proj", "v_proj"])
    layers = sum(isinstance(m, MoLoraLayer) for m in model.modules())
    told = ways_in_use(model, samples=4, seq=40)
    assert told == {"4 x 40 tokens": {batch: layers}, "a step of decoding": {step: layers}}
    parts = dict(zip(WAYS, ("DensePart", "BySample", "ByToken"), strict=True))
    features = {"routing_features": torch.randn(4, 6)} if gate.scope == "external" else {}
    for seq, way in ((40, batch), (1, step)):
        assert ways_taken(model, **batch_for("llama", batch=4, seq=seq), **features) == {parts[way]}


@pytest.mark.parametrize("top_p", [0.01, 0.99])
def test_what_only_the_weights_tell_changes_nothing(top_p):
    agree(many(GateConfig(select="top_p", top_p=top_p), dtype=torch.float64).double(), batch_for("llama"))


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_gates_that_choose_different_numbers_of_experts_agree(scope):
    top_k = {".*q_proj": 1, ".*": 2}
    model = many(GateConfig(scope=scope, top_k=top_k, share="linear"), dtype=torch.float64)
    agree(model, batch_for("llama"))


def test_tasks_by_token_restrict_a_constant_gate_by_token():
    gate = GateConfig(scope="constant", select="top_k", top_k=1, share="linear")
    model = many(gate, dtype=torch.float64)
    with molora.routing(model, by="task"):
        agree(model, batch_for("llama"), routing_task_ids=torch.tensor([[0, 1, 2, 1, 0, 1, 2]] * 3))


def one_layer(**settings):
    config = MoLoraConfig(**{"num_experts": 24, "r": 4, "target_modules": ["0"], **settings})
    return randomised(get_peft_model(nn.Sequential(nn.Linear(16, 16)), config))


def randomised(model):
    randomise(model)
    return model


@pytest.mark.parametrize("shape", [(0, 16), (0, 5, 16), (3, 0, 16), (16,)])
@pytest.mark.parametrize(
    "gate", [{"top_k": 2}, {"select": "top_p"}, {"select": "threshold", "threshold": 0.1}]
)
def test_inputs_without_tokens_or_axes_pass(gate, shape):
    model, x = one_layer(gate=GateConfig(**gate)), torch.zeros(shape)
    for training in (True, False):
        assert model.train(training)(x).shape == x.shape


def test_a_gate_of_a_sequence_refuses_what_is_none():
    model = one_layer(gate=GateConfig(scope="sequence", top_k=1))
    with pytest.raises(RoutingError, match="6 samples, but the batch has 3"):
        model(torch.randn(3, 2, 2, 16))


def test_noise_and_dropout_are_the_same_when_a_checkpoint_is_run_again():
    found = []
    for checkpointing in (False, True):
        gate = GateConfig(select="hard", noise="gaussian", noise_std=1.0)
        model = many(gate, lora_dropout=0.3, dtype=torch.float64)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model.train()
        torch.manual_seed(0)
        model(**batch_for("llama")).loss.backward()
        found.append(gradients(model))
    assert_close(found[0], found[1], **EXACT)


def lora_of_rank(rank, folder):
    config = LoraConfig(r=rank, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = get_peft_model(molora_model("llama").unload(), config)
    randomise(lora)
    lora.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ffn_targets", [None, FEED_FORWARD])
def test_a_larger_expert_of_another_task_changes_no_bit(tmp_path, ffn_targets):
    options = {"target_modules": "all-linear", "ffn_targets": ffn_targets}
    model, ids = many(GateConfig(scope="task"), experts=6, **options), ["t1", None, "t5"]
    batch, step = batch_for("llama"), {"input_ids": torch.ones(3, 1, dtype=torch.long)}
    with torch.no_grad():
        before = [model(**inputs, routing_task_ids=ids).logits for inputs in (batch, step)]
        molora.import_lora(model, lora_of_rank(33, tmp_path), expert="expert_3")
        after = [model(**inputs, routing_task_ids=ids).logits for inputs in (batch, step)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    agree(model.double(), batch, routing_task_ids=["t1", "t3", "t5"])


def test_samples_that_share_many_experts_are_computed_over_those_and_no_others():
    tasks = {"all": [f"expert_{i}" for i in range(12)]} | {f"t{i}": [f"expert_{i}"] for i in range(12)}
    model = molora_model("llama", GateConfig(scope="task"), num_experts=24, tasks=tasks, dtype=torch.float64)
    batch, ids = batch_for("llama", batch=8, seq=5), ["all", "t1"] * 4
    assert ways_taken(model, **batch, routing_task_ids=ids) == {"DensePart"}
    agree(model, batch, routing_task_ids=ids)
    agree(model, batch, routing_task_ids=[["t0", "t1"], ["all", "t3"], None, "t5"] * 2)
    with torch.no_grad():
        before = model(**batch, routing_task_ids=ids).logits
        model.add_expert("new", tasks=["later"])
        assert torch.equal(model(**batch, routing_task_ids=ids).logits, before)


def test_samples_of_two_tasks_each_gather_two_experts():
    model = many(GateConfig(scope="task"), dtype=torch.float64)
    ids = [["t0", "t1"], "t2", ["t3", "t4"]]
    assert ways_taken(model, **batch_for("llama", seq=40), routing_task_ids=ids) == {"BySample"}
    layer = next(m for m in model.modules() if isinstance(m, MoLoraLayer))
    (tasks,) = layer.context.resolve(molora.calls.request.RoutingRequest(task_ids=ids, given=True)).values()
    assert tasks.most == 2


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match="dense, by_sample, by_token"), molora.dispatch("sparse"):
        pass


@pytest.mark.parametrize("way", SPARSE)
def test_task_ids_that_do_not_fit_are_refused_in_every_way(way):
    model = molora_model("llama", "task-group")
    with molora.dispatch(way), pytest.raises(RoutingError, match="2 samples, but the batch has 3"):
        model(**batch_for("llama"), routing_task_ids=["alpha", "beta"])


def test_growing_changes_no_bit_of_a_mixed_batch():
    model, batch = molora_model("llama", "task-group"), batch_for("llama")
    with torch.no_grad():
        before = model(**batch, routing_task_ids=list(TASKS)).logits
        for i in range(5):
            model.add_expert(f"new_{i}", tasks=[f"later_{i}"])
        assert torch.equal(model(**batch, routing_task_ids=list(TASKS)).logits, before)


def test_only_the_experts_in_use_get_a_gradient_and_samples_without_a_task_nothing():
    model = many(GateConfig(scope="task"), experts=6)
    model.train()(**batch_for("llama"), routing_task_ids=["t1", None, "t4"]).loss.backward()
    for name, gradient in gradients(model).items():
        used = gradient.flatten(1).any(dim=1)
        assert used.nonzero().flatten().tolist() == [1, 4], name


def test_a_batch_keeps_what_one_lora_keeps_for_its_gradients():
    base = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).requires_grad_(False)
    x = torch.randn(8, 64, 64, requires_grad=True)

    def kept(model, **options):
        sizes = {}
        parameters = {p.data_ptr() for p in model.parameters()}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in parameters:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x, **options).sum()
        return sum(sizes.values())

    one = kept(get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=["0", "1"])))
    for experts in (8, 64):
        config = MoLoraConfig(
            num_experts=experts,
            r=8,
            target_modules=["0", "1"],
            gate=GateConfig(scope="task"),
            tasks={f"t{i}": [f"expert_{i}"] for i in range(experts)},
        )
        ids = [f"t{i}" for i in range(8)]
        assert kept(get_peft_model(copy.deepcopy(base), config), routing_task_ids=ids) <= 1.02 * one


# -- decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("gate", ["task-group", "sequence"])
def test_generation_for_mixed_tasks_is_that_of_the_dense_way(gate, beams):
    if gate == "sequence":
        model, ids = many(GateConfig(scope="sequence", top_k=1), experts=6, dtype=torch.float64), {}
    else:
        model = molora_model("llama", gate, dtype=torch.float64)
        ids = {"routing_task_ids": ["alpha", None, "gamma"]}
    batch = {k: v for k, v in batch_for("llama", padding="left").items() if k != "labels"}
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, **ids}
    with molora.dispatch("dense"):
        expected = model.generate(**batch, **options)
    with molora.dispatch("by_sample"):
        assert torch.equal(model.generate(**batch, **options), expected)


def test_decoding_steps_keep_their_factors_until_tasks_or_parameters_change():
    model = molora_model("llama", "task-group", dtype=torch.float64)
    layer = next(m for m in model.modules() if isinstance(m, MoLoraLayer))
    (mount,) = layer.mounts.values()
    one = {"input_ids": torch.ones(3, 1, dtype=torch.long)}

    def kept(*ids):
        with torch.no_grad():
            logits = model(**one, routing_task_ids=list(ids)).logits
            with molora.dispatch("dense"):
                assert_close(logits, model(**one, routing_task_ids=list(ids)).logits, **EXACT)
            model(**one, routing_task_ids=list(ids))
        return mount.inputs.plan(mount, alone=False).kept

    assert ways_taken(model, **one, routing_task_ids=list(TASKS)) == {Ready.__name__}
    first = kept(*TASKS)
    with torch.no_grad():
        model(**one, routing_task_ids=list(TASKS))
    assert mount.inputs.plan(mount, alone=False).kept is first
    assert kept("beta", "beta", "alpha") is not first
    kept(*TASKS)
    with torch.no_grad():
        mount.bank.stacks["B"].trainable.mul_(2)
    kept(*TASKS)


def _written(stack):
    stack.trainable.mul_(-2)


def _replaced(stack):
    stack.lora_B = torch.nn.Parameter(stack.trainable * -2)


def _put_in_place(stack):  # as accelerate does it: past every setter
    stack._parameters["lora_B"] = torch.nn.Parameter(stack.trainable * -2)


@pytest.mark.parametrize("change", [_written, _replaced, _put_in_place])
@pytest.mark.parametrize("gate", ["task-group", "top2-group"])
def test_factors_that_are_kept_follow_their_parameters(gate, change):
    model = molora_model("llama", gate, dtype=torch.float64)
    step, ids = batch_for("llama", seq=1), routed(gate)
    with torch.no_grad():
        before = model(**step, **ids).logits
        for module in model.modules():
            if isinstance(module, MoLoraLayer):
                for mount in module.mounts.values():
                    change(mount.bank.stacks["B"])
        after = model(**step, **ids).logits
        with molora.dispatch("by_token"):
            assert_close(after, model(**step, **ids).logits, **EXACT)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gate", ["task-group", "top2-group"])
def test_a_prompt_read_in_any_way_ends_the_keeping_of_factors(gate, way):
    model = molora_model("llama", gate, dtype=torch.float64)
    layer = next(m for m in model.modules() if isinstance(m, MoLoraLayer))
    (mount,) = layer.mounts.values()
    ids = routed(gate)
    step, prompt = batch_for("llama", seq=1), batch_for("llama")
    plan = mount.inputs.plan(mount, alone=False)
    with torch.no_grad():
        model(**step, **ids)
        first = plan.kept
        assert first is not None
        with molora.dispatch("by_token"):  # a step by token neither uses what is kept nor spoils it
            forced = model(**step, **ids).logits
        assert plan.kept is first
        assert_close(forced, model(**step, **ids).logits, **EXACT)
        for m in model.modules():
            if isinstance(m, MoLoraLayer):  # a writing that no stamp shows
                m.mounts[mount.adapter].bank.stacks["B"].trainable.data.mul_(-2)
        with molora.dispatch(way):
            model(**prompt, **ids)
        assert plan.kept is None
        changed = model(**step, **ids).logits
        assert plan.kept is not None and not torch.allclose(changed, forced)
        with molora.dispatch("by_token"):
            assert_close(changed, model(**step, **ids).logits, **EXACT)


class Quantised(nn.Linear):
    """Returns what such layers do: a view that autograd lets nobody write to."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x).flatten(0, 1).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("way", WAYS)
def test_a_base_whose_output_nobody_may_write_to_is_left_alone(way):
    model = nn.Sequential(Quantised(8, 6)).requires_grad_(False).double()
    config = MoLoraConfig(
        num_experts=3, r=2, target_modules=["0"], gate=GateConfig(scope="task"), tasks=list(TASKS)
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    randomise(model)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    with molora.dispatch(way):
        for training in (True, False):
            out = model.train(training)(x, routing_task_ids=list(TASKS))
            out.sum().backward()
    with torch.no_grad():
        assert_close(out, model(x, routing_task_ids=list(TASKS)), **EXACT)
