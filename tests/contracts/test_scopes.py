"""What gates read beside tokens: sequences, tasks, features, a first pass; and how calls say so."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import molora
from molora import ConfigError, GateConfig, RoutingError
from molora.gates.pooling import pool
from molora.tuner.layer import MoLoraLayer
from tests.zoo import SHARED, base_model, batch_for, molora_model, routed


def gates(model):
    return {
        m.mounts["default"].key: m.molora_gate["default"]
        for m in model.modules()
        if isinstance(m, MoLoraLayer) and "default" in m.molora_gate
    }


def recorded(model):
    """What each gate answered, by its layer's name, filled by the forwards that follow."""
    seen = {}
    for key, gate in gates(model).items():
        gate.register_forward_hook(lambda _m, _i, out, key=key: seen.setdefault(key, []).append(out))
    return seen


@pytest.mark.parametrize("kind", ["mean", "last", "first"])
def test_pooling_equals_the_loop(kind):
    x, mask = (
        torch.randn(3, 5, 4, dtype=torch.float64),
        torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]),
    )
    rows = []
    for row, keep in zip(x, mask.bool(), strict=True):
        kept = row[keep]
        chosen = {"mean": kept.mean(0), "last": kept[-1:].sum(0), "first": kept[:1].sum(0)}[kind]
        rows.append(chosen if len(kept) else torch.zeros(4, dtype=x.dtype))
    assert_close(pool(x, mask.bool(), kind), torch.stack(rows))
    full = {"mean": x.mean(1), "last": x[:, -1], "first": x[:, 0]}[kind]
    assert_close(pool(x, None, kind), full)
    assert pool(x[:, 0].bfloat16(), None, kind).dtype == torch.float32


def test_training_pools_the_tokens_before_the_first_target():
    model, batch = molora_model("llama", "sequence-mean"), batch_for("llama")
    labels = batch["labels"].clone()
    labels[:, :3] = -100
    seen = recorded(model)
    first = model(**{**batch, "labels": labels}).logits
    changed = {**batch, "input_ids": batch["input_ids"].clone(), "labels": labels}
    changed["input_ids"][:, 3:] = 1  # targets: not the gate's to see
    model(**changed)
    for answers in seen.values():
        assert torch.equal(answers[0].weights, answers[1].weights)
    prompt = torch.arange(7).expand(3, -1) < 3
    plain = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert_close(model(**plain, routing_prompt_mask=prompt).logits, first)
    with molora.routing(model, prompt_mask=prompt):
        assert_close(model(**plain).logits, first)


def test_without_a_prompt_the_first_token_stands_for_it():
    model, batch = molora_model("llama", "sequence-mean"), batch_for("llama", padding="left")
    mask = batch["attention_mask"].bool()
    first = mask & (mask.cumsum(1) == 1)
    plain = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with pytest.warns(UserWarning, match="labels begin with the first token, so no token is a prompt"):
        found = model(**batch).logits
    assert_close(found, model(**plain, routing_prompt_mask=first).logits)


def test_a_cache_of_another_call_is_refused():
    for gate, message in (
        ("sequence-mean", "decides on the prompt"),
        ("twopass-global", "own key-value cache"),
    ):
        model, batch = molora_model("llama", gate), batch_for("llama")
        with model.disable_adapter():
            cache = model(input_ids=batch["input_ids"], use_cache=True).past_key_values
        with pytest.raises(RoutingError, match=message):
            model(input_ids=batch["input_ids"][:, :1], past_key_values=cache)


@pytest.mark.parametrize("gate", ["task-table", "task-embedding", "task-group"])
def test_a_sample_of_several_tasks_has_equal_shares(gate):
    model, batch = molora_model("llama", gate, dtype=torch.float64), batch_for("llama")
    both = model(**batch, routing_task_ids=[["alpha", "beta"], "gamma", None]).logits
    singles = [model(**batch, routing_task_ids=task).logits for task in ("alpha", "beta", "gamma")]
    assert_close(both[1], singles[2][1], atol=1e-9, rtol=1e-9)
    assert_close(both[2], base_model("llama", dtype=torch.float64)(**batch).logits[2])
    if gate == "task-group":  # half of each
        with molora.routing(model, experts={"expert_0": 0.5, "expert_1": 0.5}):
            assert_close(both[0], model(**batch).logits[0], atol=1e-9, rtol=1e-9)
    else:
        assert not torch.allclose(both[0], singles[0][0]) and not torch.allclose(both[0], singles[1][0])
        rows = next(iter(gates(model).values()))
        seen = recorded(model)
        model(**batch, routing_task_ids=[["alpha", "beta"], "gamma", None])
        table = rows.tasks.weight.double()
        read = (table[0] + table[1]) / 2
        logits = read if gate == "task-table" else rows.rows.weight @ read + rows.bias.weight
        assert_close(next(iter(seen.values()))[0].logits[0], logits)
    for wrong, message in (
        ([["alpha", None], "beta", "gamma"], "base only"),
        ([[], "beta", "gamma"], "empty list"),
    ):
        with pytest.raises(RoutingError, match=message):
            model(**batch, routing_task_ids=wrong)


def test_a_learned_task_gate_uses_the_tasks_own_experts_only():
    model, batch = molora_model("llama", "task-table"), batch_for("llama")
    with molora.record_routing(model) as record:
        model(**batch, routing_task_ids=["alpha", "beta", "gamma"])
    for task, weights in record.by_task().items():
        assert {expert for expert, weight in weights.items() if weight > 0} == set(SHARED[task])
        assert sum(weights.values()) == pytest.approx(1.0)
    with pytest.raises(RoutingError, match="decides by task id"):
        model(**batch)
    with pytest.raises(RoutingError, match="one per sample"):
        model(**batch, routing_task_ids=torch.zeros(3, 7, dtype=torch.long))


def test_features_come_per_sample_or_per_token():
    model, batch = molora_model("llama", "external-global"), batch_for("llama")
    features = routed("external")["routing_features"]
    per_sample = model(**batch, routing_features=features).logits
    per_token = model(**batch, routing_features=features.unsqueeze(1).expand(-1, 7, -1)).logits
    assert_close(per_token, per_sample, atol=1e-5, rtol=1e-5)
    with molora.routing(model, features=features):
        assert torch.equal(model(**batch).logits, per_sample)
        assert not torch.equal(model(**batch, routing_features=-features).logits, per_sample)
    with pytest.raises(RoutingError, match="none were given"):
        model(**batch)
    with pytest.raises(RoutingError, match="for 2 samples"):
        model(**batch, routing_features=features[:2])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
def test_a_two_pass_gate_reads_the_bases_last_hidden_states(architecture):
    model, batch = molora_model(architecture, "twopass-global"), batch_for(architecture)
    context, seen = model.base_model.context, []
    first = next(m for m in model.modules() if isinstance(m, MoLoraLayer))
    first.register_forward_hook(lambda *_: seen.append(dict(context.call.features)))
    model(**batch)
    out = base_model(architecture)(**batch, output_hidden_states=True)
    if architecture == "t5":
        assert_close(seen[-1]["encoder"], out.encoder_last_hidden_state)
        assert_close(seen[-1]["decoder"], out.decoder_hidden_states[-1])
    else:
        assert_close(seen[-1]["decoder"], out.hidden_states[-1])
    before = len(seen)
    with model.disable_adapter():
        model(**batch)
    assert len(seen) == before + 1, "no first pass where the experts are off"


@pytest.mark.parametrize("num_beams", [1, 3])
def test_two_pass_generation_runs_each_token_once_and_equals_no_cache(num_beams):
    model, batch = molora_model("llama", "twopass-linear"), batch_for("llama", padding="left")
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    lengths = []
    model.base_model.model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": num_beams}
    cached = model.generate(**prompt, use_cache=True, **options)
    assert lengths == [7, 7] + [1, 1] * (len(lengths) // 2 - 1)
    assert torch.equal(cached, model.generate(**prompt, use_cache=False, **options))


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"scope": "external"}, "feature_dim"),
        ({"scope": "sequence", "share": "global"}, "own sequence"),
        ({"scope": "task", "score": "mlp"}, "must be 'none' or 'table' or 'embedding'"),
        ({"scope": "token", "score": "embedding"}, "must be 'linear' or 'mlp' or 'cosine'"),
        ({"norm": "layer"}, "acts only with score: cosine"),
        ({"splits": 2}, "needs score: table"),
        ({"balance_rate": 0.1, "select": "dense"}, "needs select: top_k"),
        ({"transform": "identity", "select": "top_p"}, "needs probabilities"),
        ({"top_k": [1, 0]}, "at least 1 and at most 16,384, everywhere"),
        ({"scope": "token", "feature_dim": 4}, "acts only with scope: external"),
        ({"scope": "task", "score": "table", "noise": "jitter"}, "reads nothing"),
    ],
)
def test_gates_that_make_no_sense_are_refused(gate, message):
    with pytest.raises(ConfigError, match=message):
        GateConfig(**gate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combine": "factors", "gate": {"kind": "soft"}}, "weight matrix per token"),
        ({"combine": "factors", "gate": {"kind": "two_pass"}}, "weight matrix per token"),
        ({"gate": {"kind": "task_table", "splits": 2}}, "only with combine: factors"),
        ({"always_on": {"expert_9": 1.0}}, "unknown expert"),
        ({"always_on": {"expert_0": "all"}}, "not a number or 'rest'"),
        ({"always_on": {f"expert_{i}": 1.0 for i in range(4)}}, "no expert to decide over"),
        ({"ffn_targets": ["up_proj"], "gate": {"kind": "top_k", "top_k": 1}}, "must sum to 1"),
        ({"share_A": True, "init": "svd_segments"}, "an A of its own"),
        ({"num_experts": [4, 0]}, "at least 1"),
        ({"aux_losses": {"l1": 0.1}}, "weights sum to 1"),
        ({"aux_losses": {"load": 0.1}}, "noise: gaussian"),
        (
            {
                "aux_losses": {"localized": 0.1},
                "tasks": {"a": ["expert_0", "expert_1", "expert_2", "expert_3"]},
            },
            "differ",
        ),
        ({"aux_losses": {"mutual_information": 0.1}, "gate": {"kind": "constant"}}, "same weights"),
        ({"aux_losses": {"balance": 0.1}, "gate": {"kind": "soft", "score": "linear"} | {}}, None),
        ({"aux_losses": {"entropy": {"coefficient": 0.1, "index": -1}}}, "at least 0"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused_in_python_and_recipes(settings, message):
    from molora.config import load_recipe
    from tests.config.recipes import small

    complete = {"num_experts": 4, **settings}
    recipe = small(adapter=complete)
    if "tasks" in settings:
        recipe["data"]["tasks"] = {"a": next(iter(recipe["data"]["tasks"].values()))}
    if message is None:
        assert molora.MoLoraConfig(target_modules="all-linear", **complete) and load_recipe(recipe)
        return
    with pytest.raises(ConfigError, match=message):
        molora.MoLoraConfig(target_modules="all-linear", **complete)
    with pytest.raises(ConfigError):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"experts": {}}, "experts is empty"),
        ({"experts": {"expert_0": float("nan")}}, "the weight of expert 'expert_0' is nan"),
        ({"task_ids": {"alpha": 0.7, "beta": 0.3}}, "task_ids is a map"),
    ],
)
def test_requests_that_mean_nothing_are_refused(request_, said):
    model = molora_model("llama", "task-group")
    with pytest.raises(RoutingError, match=said), molora.routing(model, **request_):
        model(**batch_for("llama"))


@pytest.mark.parametrize("gate", ["top2-group", "soft-linear", "task-group"])
def test_a_trace_computes_what_was_traced(gate):
    """TorchScript, which some exporters still use; PEFT's LoRA can be traced as well."""
    model, batch = molora_model("llama", gate).eval(), batch_for("llama")
    wanted = {"routing_task_ids": ["beta"]} if gate.startswith("task") else {}

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(
                input_ids=ids, attention_mask=mask, use_cache=False, return_dict=False, **wanted
            )[0]

    given = batch["input_ids"], batch["attention_mask"]
    traced = torch.jit.trace(Logits(), given, check_trace=False)
    assert_close(traced(*given), Logits()(*given))
