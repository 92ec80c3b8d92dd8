"""What each strategy promises, held on small models against closed forms."""

from __future__ import annotations

import datetime
import json
import math

import pytest
import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from molora import MoLoraConfig
from molora.config.continual import BY_TASK, GATED, STRATEGIES, SUM, StrategyConfig
from molora.continual.gated import gates, read_by
from molora.continual.inf_lora import covariances
from molora.continual.penalties import sparsity
from molora.continual.registry import build_strategy
from molora.continual.router import PrototypeRouter
from molora.continual.slao import merged, orthonormal
from molora.continual.strategy import Strategy, Turn, expert_layers, hold_sum
from molora.continual.subspace import grown_basis, leading, overlap, residual, without
from molora.data.tasks import Task
from tests.zoo import base_model, batch_for, gradients, randomise

TASKS = tuple(
    Task(name, i, [{"prompt": f"{name}{n}", "target": "x"} for n in range(40)])
    for i, name in enumerate("abc")
)


def strategy(kind, **settings):
    return build_strategy(StrategyConfig(kind=kind, **settings))


def model_of(gate, dtype=torch.float64):
    torch.manual_seed(0)
    config = MoLoraConfig(
        num_experts=1, r=3, lora_alpha=6, target_modules="all-linear", gate=dict(gate), task_type="CAUSAL_LM",
        expert_names=["a"], tasks={"a": ["a"]},
    )  # fmt: skip
    return get_peft_model(base_model("llama", dtype=dtype), config).to(dtype)


def grown(gate, dtype=torch.float64, experts=("b",)):
    model = model_of(gate, dtype)
    randomise(model)
    for name in experts:
        model.add_expert(name, tasks=[name])
    return model


def stage(index, batches=lambda: iter(()), seed=0):
    return Turn(index, TASKS, batches, seed)


def data(seed, rows=None):
    """Batches over a part of the vocabulary, so that tasks differ in what layers read."""
    ids = batch_for("llama", batch=8, seq=6, seed=seed)["input_ids"]
    if rows is not None:
        ids = rows[ids % len(rows)]
    return lambda: iter([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])


@pytest.mark.parametrize("kind", STRATEGIES)
def test_every_kind_has_a_class_and_what_is_said_of_it_is_so(kind):
    spec = STRATEGIES[kind]
    assert issubclass(spec.load(), Strategy)
    assert spec.task_by_task == (spec.load().training_tasks is Strategy.training_tasks)


# -- experts that add up -----------------------------------------------------------------------------------


def test_a_sum_of_experts_is_the_sum_of_their_updates_and_grows_by_ones():
    model = model_of(SUM)
    for name in ("b", "c"):
        model.add_expert(name, tasks=[name])
    randomise_factors(model)
    batch = batch_for("llama")
    expected = model(**batch).logits
    base = base_model("llama", dtype=torch.float64)
    linears = dict(base.named_modules())
    for key, _, bank in expert_layers(model):
        linears[key].weight.data += sum(expert.delta() for expert in bank.experts())
    assert_close(base(**batch).logits, expected, atol=1e-9, rtol=1e-9)


def randomise_factors(model):
    generator = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if name.endswith(("lora_B", "frozen_B")):
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * 0.3


def test_an_untrained_new_expert_changes_nothing_and_alone_gets_gradients():
    model, batch = model_of(SUM), batch_for("llama")
    randomise_factors(model)
    before = model(**batch).logits
    model.add_expert("b", tasks=["b"])
    assert_close(model(**batch).logits, before, atol=1e-12, rtol=1e-12)
    model(**batch).loss.backward()
    names = [name for name in gradients(model) if ".block_" not in name]
    assert names and all(name.endswith(("lora_A", "lora_B")) for name in names)


# -- penalties ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l1", "squared"])
@pytest.mark.parametrize("factor", ["A", "B", "both"])
def test_o_lora_is_the_double_loop(norm, factor):
    model, own = (
        grown(SUM, experts=("b", "c")),
        strategy("o_lora", coefficient=0.7, norm=norm, factor=factor, l2=0.3),
    )
    randomise_factors(model)
    expected, sizes = 0.0, 0.0
    for _, _, bank in expert_layers(model):
        *old, new = bank.experts()
        for side in ("A", "B") if factor == "both" else (factor,):
            rows = [e.A if side == "A" else e.B.t() for e in (*old, new)]
            for other in rows[:-1]:
                for u in other:
                    for v in rows[-1]:
                        expected += abs(u @ v) if norm == "l1" else (u @ v) ** 2
        sizes += new.A.norm() + new.B.norm()
    found = own.loss(model)
    assert_close(found["orthogonal"].double(), 0.7 * expected, rtol=1e-5, atol=1e-6)
    assert_close(found["l2"].double(), 0.3 * sizes, rtol=1e-5, atol=1e-6)


def test_o_lora_is_zero_in_the_complement_and_leaves_old_experts_alone():
    model, own = grown(SUM), strategy("o_lora")
    for _, _, bank in expert_layers(model):
        old = bank.stacks["A"].frozen[0]
        basis = torch.linalg.qr(old.t()).Q
        free = without(torch.randn(3, old.shape[1], dtype=torch.float64), basis)
        bank.stacks["A"].trainable.data[0] = free
    assert own.loss(model)["orthogonal"] < 1e-4
    for _, _, bank in expert_layers(model):
        bank.stacks["A"].trainable.data += 0.1
    own.loss(model)["orthogonal"].backward()
    for _, _, bank in expert_layers(model):
        assert bank.stacks["A"].frozen.grad is None and bank.stacks["A"].trainable.grad.abs().sum() > 0
        span = torch.linalg.qr(
            bank.stacks["A"].frozen[0].t()
        ).Q  # the gradient lies in the span of the old rows
        assert (
            without(bank.stacks["A"].trainable.grad[0], span).norm()
            < 1e-4 * bank.stacks["A"].trainable.grad[0].norm()
        )


def test_o_lora_is_divided_by_the_old_experts_under_a_learned_gate():
    few, many = (grown({"kind": "soft"}, experts=e) for e in (("b",), ("b", "c")))
    for model in (few, many):
        for _, _, bank in expert_layers(model):
            for stack in (bank.stacks["A"].frozen, bank.stacks["A"].trainable):
                stack.data[:] = 0.1
    own = strategy("o_lora")
    assert_close(own.loss(few)["orthogonal"], own.loss(many)["orthogonal"])
    assert not strategy("o_lora").loss(model_of(SUM))  # the first task has nothing to be orthogonal to


def test_n_lora_is_the_scaled_mean_entry_of_every_new_update():
    model, own = grown(SUM), strategy("n_lora", coefficient=2.0)
    randomise_factors(model)
    expected = 0.0
    for _, _, bank in expert_layers(model):
        A, B = (factor.double() for factor in (bank.expert(1).A, bank.expert(1).B))
        r, d_in = A.shape
        expected += r**2 * (d_in / r) ** 0.5 * (B @ A).abs().mean()
    assert_close(own.loss(model)["sparse"].double(), 2 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("d", "r"), [(64, 8), (1024, 8), (1024, 16)])
def test_n_lora_is_as_large_as_the_released_sum_of_a_square_layer(d, r):
    """`‖A B‖₁` of the r·r product, over 40 draws of the factors; at d = 1024 the mean alone would be 11 times smaller."""
    generator = torch.Generator().manual_seed(d)
    ours = released = torch.zeros((), dtype=torch.float64)
    for _ in range(40):
        A = torch.randn(r, d, generator=generator, dtype=torch.float64) * 0.02
        B = torch.randn(d, r, generator=generator, dtype=torch.float64) * 0.3
        ours, released = ours + sparsity(A, B), released + (A @ B).abs().sum()
    assert_close(ours, released, rtol=0.05, atol=0)


def test_ella_is_the_squared_overlap_with_all_past_updates():
    model, own = grown(SUM, experts=("b", "c")), strategy("ella", coefficient=3.0)
    randomise_factors(model)
    own.before_task(model, stage(2))
    expected = 0.0
    for _, _, bank in expert_layers(model):
        *old, new = (expert.delta() for expert in bank.experts())
        expected += ((sum(old) * new) ** 2).sum()
    assert_close(own.loss(model)["ella"].double(), 3 * expected, rtol=1e-5, atol=1e-6)


# -- subspaces ---------------------------------------------------------------------------------------------


def covariance(*rows):
    x = torch.tensor(rows, dtype=torch.float64)
    return x.t() @ x


def test_a_basis_is_orthonormal_grows_and_holds_the_energy():
    torch.manual_seed(0)
    basis = None
    for energy in (0.5, 0.9, 0.99, 1.0):
        x = torch.randn(50, 12, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
        seen = x.t() @ x
        old, basis = basis, grown_basis(basis, seen, energy)
        assert_close(basis.t() @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-9, rtol=0)
        assert (basis * (seen @ basis)).sum() >= energy * seen.trace() * (1 - 1e-9)
        if old is not None:
            assert torch.equal(basis[:, : old.shape[1]], old)
    assert basis.shape[1] <= 12


def test_a_basis_is_the_smallest_one():
    seen = covariance([2.0, 0, 0], [0, 1.0, 0], [0, 0, 0.1])
    assert grown_basis(None, seen, 0.7).shape[1] == 1
    assert grown_basis(None, seen, 0.9).shape[1] == 2
    axis = torch.tensor([[1.0, 0, 0]], dtype=torch.float64).t()
    assert grown_basis(axis, seen, 0.7).shape[1] == 1
    assert_close(residual(axis, seen), covariance([0, 1.0, 0], [0, 0, 0.1]))
    assert_close(leading(seen, 1).abs(), torch.tensor([[1.0, 0, 0]], dtype=torch.float64))


def test_no_direction_is_taken_from_where_there_is_no_energy():
    seen = covariance([2.0, 0, 0], [0, 1.0, 0])
    taken = residual(torch.tensor([[1.0], [0], [0]], dtype=torch.float64), seen)
    rows = leading(taken, 3, 1e-9 * float(seen.trace()))
    assert_close(rows.abs(), torch.tensor([[0, 1.0, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.float64))


def test_overlap_of_row_spaces():
    one = torch.eye(4)
    assert overlap(one[:2], one[2:]) == pytest.approx(0)
    assert overlap(one[:2], torch.tensor([[1.0, 1, 0, 0], [1, -1, 0, 0]])) == pytest.approx(1)
    assert overlap(one[:1], torch.tensor([[1.0, 1, 0, 0]])) == pytest.approx(0.5)


def test_a_zero_row_is_no_direction():
    one, nothing = torch.eye(4), torch.zeros(1, 4)
    assert overlap(nothing, nothing) == 0 == overlap(one[:2], nothing)
    assert overlap(torch.cat([one[:1], nothing]), torch.cat([one[1:2], nothing])) == pytest.approx(0)
    assert overlap(torch.cat([one[:1], nothing]), one[:2]) == pytest.approx(1)


def test_bases_that_were_kept_on_the_cpu_work_with_a_model_on_a_gpu():
    with FakeTensorMode():
        kept, seen = torch.eye(6)[:, :2], torch.eye(6, device="cuda", dtype=torch.float64)
        assert residual(kept, seen).device == seen.device
        assert without(torch.ones(2, 6, device="cuda"), kept).device == seen.device


def test_ranks_above_the_width_of_a_layer():
    assert_close(orthonormal(torch.eye(3)[[0, 1, 2, 0, 1]])[3:], torch.zeros(2, 3))
    own, model = strategy("inf_lora"), grown(SUM, experts=())
    for _, _, bank in expert_layers(model):
        width = bank.stacks["A"].trainable.shape[-1]
        bank.stacks["A"].lora_A = torch.nn.Parameter(torch.randn(1, width + 2, width, dtype=torch.float64))
        bank.stacks["B"].lora_B = torch.nn.Parameter(
            torch.zeros(1, bank.stacks["B"].trainable.shape[1], width + 2, dtype=torch.float64)
        )
        bank.ranks = [width + 2]
        break
    found = {
        key: torch.eye(b.stacks["A"].trainable.shape[-1], dtype=torch.float64)
        for key, _, b in expert_layers(model)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("molora.continual.inf_lora.covariances", lambda *_: found)
        own.before_task(model, stage(0))
    assert not bank.stacks["A"].trainable[0, width:].any() and bank.stacks["A"].trainable[0, :width].any()


def test_covariances_leave_padding_out():
    model = model_of(SUM)
    batch = batch_for("llama", padding="right")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    found = covariances(model, lambda: iter([inputs]))
    rows = [
        {
            key: value[row : row + 1, : int(batch["attention_mask"][row].sum())]
            for key, value in inputs.items()
        }
        for row in range(3)
    ]
    alone = covariances(model, lambda: iter(rows))
    for key in found:
        assert_close(found[key], alone[key], atol=1e-8, rtol=1e-8)


# -- InfLoRA -----------------------------------------------------------------------------------------------


def test_a_designed_A_and_a_sum_stay_held_whatever_marks_the_adapter_as_trainable():
    model = model_of(SUM)
    strategy("inf_lora").before_task(model, stage(0, data(1, torch.arange(1, 6))))
    hold_sum(model)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns and all(name.endswith("lora_B") for name in learns)
    model.set_adapter("default")
    model.set_requires_grad("default", True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learns
    model.add_expert("b", tasks=["b"])  # rows assigned anew learn again
    assert any(name.endswith("lora_A") for name, p in model.named_parameters() if p.requires_grad)


def test_inf_lora_reads_only_what_old_tasks_do_not():
    low, high = torch.arange(1, 6), torch.arange(30, 36)
    old_data, new_data = data(1, low), data(2, high)
    model, own = model_of(SUM), strategy("inf_lora", energy=1.0)
    own.before_task(model, stage(0, old_data))
    for _, _, bank in expert_layers(model):
        A = bank.stacks["A"].trainable[0]
        assert not bank.stacks["A"].trainable.requires_grad and bank.stacks["B"].trainable.requires_grad
        assert_close(A @ A.t() * 3, torch.eye(3, dtype=torch.float64), atol=1e-8, rtol=0)
    own.after_task(model, stage(0, old_data))
    model.add_expert("b", tasks=["b"])
    own.before_task(model, stage(1, new_data))
    before = {key: bank.stacks["A"].trainable.detach().clone() for key, _, bank in expert_layers(model)}
    model.train()(**batch_for("llama")).loss.backward()
    old, new = covariances(model, old_data), covariances(model, new_data)
    room = 0
    for key, _, bank in expert_layers(model):
        assert bank.stacks["A"].trainable.grad is None and torch.equal(
            bank.stacks["A"].trainable, before[key]
        )
        A = bank.stacks["A"].trainable[0]
        if own.bases[key].shape[1] > A.shape[1] - 3:
            continue  # old inputs fill the layer: nothing is left to read
        room += 1
        response = lambda seen, A=A: float((A @ seen @ A.t()).trace().clamp(min=0).sqrt())  # noqa: E731
        assert response(old[key]) <= 1e-5 * max(1.0, math.sqrt(float(old[key].trace())))
        assert response(new[key]) > 1e-3
    assert room >= 3


def test_inf_lora_remembers_its_bases():
    model, own = model_of(SUM), strategy("inf_lora")
    own.before_task(model, stage(0, data(1)))
    own.after_task(model, stage(0, data(1)))
    again = strategy("inf_lora")
    again.restore(own.tensors(), own.plain())
    assert again.bases.keys() == own.bases.keys()
    assert all(torch.equal(again.bases[key], own.bases[key]) for key in own.bases)


# -- SLAO --------------------------------------------------------------------------------------------------


def test_slao_keeps_one_lora_and_averages_B():
    model, own = model_of(SUM), strategy("slao")
    randomise_factors(model)
    own.before_task(model, stage(0))
    trained = {key: bank.stacks["B"].trainable.detach().clone() + 1 for key, _, bank in expert_layers(model)}
    for _, _, bank in expert_layers(model):
        bank.stacks["B"].trainable.data += 1
    own.after_task(model, stage(0))
    assert all(
        torch.equal(bank.stacks["B"].trainable, trained[key]) for key, _, bank in expert_layers(model)
    )  # the first is kept
    rows = {key: bank.stacks["A"].trainable[0].detach().clone() for key, _, bank in expert_layers(model)}
    own.before_task(model, stage(1))
    start = {key: bank.stacks["B"].trainable.detach().clone() for key, _, bank in expert_layers(model)}
    for key, _, bank in expert_layers(model):
        A = bank.stacks["A"].trainable[0].float()
        assert_close(A @ A.t(), torch.eye(3), atol=1e-5, rtol=0)
        assert (rows[key].float() @ A.t()).diagonal().min() >= 0  # no row turned round
        bank.stacks["B"].trainable.data += 2
    own.after_task(model, stage(1))
    for key, _, bank in expert_layers(model):
        assert_close(bank.stacks["B"].trainable, start[key] + 2 / math.sqrt(2))
    assert_close(merged(torch.zeros(1), torch.ones(1), 4), torch.full((1,), 0.5))


# -- gates that are silent on old inputs -------------------------------------------------------------------


def test_a_gated_expert_is_silent_on_old_inputs_and_stays_so():
    old_data, new_data = data(1, torch.arange(1, 4)), data(2, torch.arange(30, 40))
    model, own = model_of(GATED), strategy("gated", energy=1.0)
    own.before_task(model, stage(0, old_data))
    own.after_task(model, stage(0, old_data))
    (batch,) = old_data()
    before = model(**batch).logits
    model.add_expert("b", tasks=["b"])
    own.before_task(model, stage(1, new_data))
    rows = {name: p for name, p in model.named_parameters() if p.requires_grad and ".rows." in name}
    assert rows
    for p in rows.values():
        p.data += torch.randn_like(p)
    for _, _, bank in expert_layers(model):
        bank.stacks["B"].trainable.data.normal_()
    assert (model(**batch).logits - before).abs().max() > 1e-3  # without the step's projection it speaks
    own.after_step(model)
    full = [key for key, basis in own.bases.items() if basis.shape[0] == basis.shape[1]]
    assert not full
    assert_close(model(**batch).logits, before, atol=1e-5, rtol=1e-5)
    (other,) = new_data()
    silent = model(**other).logits
    with model.disable_adapter():
        assert (model(**other).logits - silent).abs().max() > 1e-3


def test_a_gated_share_of_energy_rises_over_the_tasks_where_its_end_is_given():
    """GainLoRA: `θ + (1 - θ) t / T` after task t; without an end it stays."""
    batches = data(1)
    for index, (given, energy) in enumerate(
        [({}, 0.6), ({"energy_end": 1.0}, 0.6 + 0.4 / 3), ({"energy_end": 0.6}, 0.6)]
    ):
        model, own = model_of(GATED), strategy("gated", energy=0.6, **given)
        own.after_task(model, stage(1, batches))
        means = read_by(model, batches)
        assert means.keys() == own.bases.keys()
        for key, (_, _, covariance) in means.items():
            assert own.bases[key].shape == grown_basis(None, covariance, energy).shape, index


def test_gates_that_read_prompts_stay_silent_on_old_prompts_alone():
    """A pass knows where each prompt ends, as training and generation do: answers are not what the gates read."""

    def answered(prompts, answer):
        ids = torch.cat([prompts, torch.full((len(prompts), 3), answer)], dim=1)
        labels = ids.clone()
        labels[:, : prompts.shape[1]] = -100
        return lambda: iter([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}])

    old, new = (
        rows[batch_for("llama", batch=8, seq=6, seed=i)["input_ids"] % len(rows)]
        for i, rows in enumerate((torch.arange(1, 4), torch.arange(30, 40)))
    )
    model, own = model_of(GATED), strategy("gated", energy=1.0)
    own.before_task(model, stage(0, answered(old, 41)))
    own.after_task(model, stage(0, answered(old, 41)))
    before = model(input_ids=old).logits
    model.add_expert("b", tasks=["b"])
    own.before_task(model, stage(1, answered(new, 42)))
    for _, _, bank in expert_layers(model):
        bank.stacks["B"].trainable.data.normal_()
    assert_close(model(input_ids=old).logits, before, atol=1e-4, rtol=1e-4)


def test_a_key_of_which_nothing_is_left_is_zero():
    """Tasks that look alike to a gate: what is left of the mean is rounding, and its direction must not count."""
    same = data(1, torch.arange(1, 4))
    model, own = model_of(GATED), strategy("gated", energy=1.0)
    own.before_task(model, stage(0, same))
    own.after_task(model, stage(0, same))
    model.add_expert("b", tasks=["b"])
    own.before_task(model, stage(1, same))
    keys = [gate.rows.blocks[-1] for _, gate in gates(model)]
    assert keys and all(torch.equal(key, torch.zeros_like(key)) for key in keys)


# -- replay and prototypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "count"), [({"ratio": 0.25}, 10), ({"count": 7}, 7), ({"count": 99}, 40)]
)
def test_replay_keeps_a_part_and_trains_on_it_again(settings, count):
    own = strategy("replay", **settings)
    assert [task.name for task in own.training_tasks(stage(0))] == ["a"]
    own.after_task(torch.nn.Identity(), stage(0, seed=3))
    again = strategy("replay", **settings)
    again.restore({}, own.plain())
    new, old = again.training_tasks(stage(1))
    assert (new.name, old.name, len(old.train), old.id) == ("b", "a", count, 0)
    assert all(record in TASKS[0].train for record in old.train)


def test_replay_keeps_only_what_the_task_reads():
    records = [{"prompt": "a", "target": "b", "when": datetime.date(2026, 1, 2), "picture": b"x"}]
    own = strategy("replay", count=1)
    own.after_task(torch.nn.Identity(), Turn(0, [Task("a", 0, records)], lambda: iter(()), 0))
    assert json.loads(json.dumps(own.plain())) == {"kept": {"a": [{"prompt": "a", "target": "b"}]}}


@pytest.mark.parametrize("metric", ["covariance", "euclidean"])
def test_prototypes_name_separable_tasks_and_do_not_depend_on_order(metric):
    torch.manual_seed(0)
    blobs = {name: torch.randn(60, 8) * 0.1 + 3 * torch.eye(8)[i] for i, name in enumerate("abc")}
    router, shuffled = PrototypeRouter(4, metric), PrototypeRouter(4, metric)
    for name, rows in blobs.items():
        router.fit(name, rows)
        shuffled.fit(name, rows[torch.randperm(60)])
        assert torch.equal(router.centres[name], shuffled.centres[name])
    for name, rows in blobs.items():
        assert router.predict(rows) == [name] * 60


def test_the_covariance_metric_ignores_directions_in_which_tasks_vary_by_themselves():
    torch.manual_seed(0)
    noise = torch.tensor([3.0, 0.05])
    rows = {name: torch.randn(300, 2) * noise + torch.tensor([0.0, float(i)]) for i, name in enumerate("ab")}
    right = {}
    for metric in ("covariance", "euclidean"):
        router = PrototypeRouter(2, metric)
        for name, values in rows.items():
            router.fit(name, values)
        right[metric] = sum(name == "a" for name in router.predict(rows["a"])) / 300
    assert right["covariance"] > 0.99 > right["euclidean"]


def test_a_new_task_never_changes_answers_nearer_to_an_old_one():
    torch.manual_seed(0)
    router, points = PrototypeRouter(2, "euclidean"), torch.randn(200, 4)
    router.fit("a", torch.randn(40, 4))
    router.fit("b", torch.randn(40, 4) + 1)
    before = router.predict(points)
    router.fit("c", torch.randn(40, 4) - 1)
    after = router.predict(points)
    assert all(new == old or new == "c" for old, new in zip(before, after, strict=True))
    again = PrototypeRouter(2, "euclidean")
    again.restore(router.tensors(), ["a", "b", "c"])
    assert again.predict(points) == after


def test_task_routing_is_bit_equal_after_growing():
    model = model_of(BY_TASK, torch.float32)
    randomise(model)
    batch = batch_for("llama")
    before = model(**batch, routing_task_ids=["a"] * 3).logits
    model.add_expert("b", tasks=["b"])
    assert torch.equal(model(**batch, routing_task_ids=["a"] * 3).logits, before)
