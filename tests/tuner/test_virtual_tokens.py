"""Virtual tokens of experts: PEFT's prompt tuning where one expert has them, and what a mixture makes of several."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM

import molora
from molora import ConfigError, GateConfig, RoutingError
from molora.config.adapter import AdapterConfig
from molora.config.load import load_section
from tests.zoo import TASKS, VOCAB, base_model, batch_for, config_for, molora_model

TOKENS = 3
SEQUENCE = GateConfig(scope="sequence", select="dense")


def mixed(architecture: str = "llama", gate: Any = "task-group", **settings: Any) -> Any:
    """A mixture with virtual tokens, trained or (trained=False) with B = 0."""
    return molora_model(architecture, gate, **{"num_virtual_tokens": TOKENS, **settings})


def vectors(model: nn.Module) -> nn.Module:
    return next(m for name, m in model.named_modules() if name.endswith("molora_prompt.default.tokens"))


def tuned_by_peft(architecture: str, rows: Tensor) -> Any:
    """PEFT's prompt tuning with these vectors (tokens, d)."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prompt_tuning_init="RANDOM")
    model = get_peft_model(base_model(architecture, dtype=rows.dtype), config)
    embedding = model.prompt_encoder["default"].embedding
    embedding.weight = nn.Parameter(rows.detach().clone())
    return model.eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", [None, "right"])
def test_one_expert_is_pefts_prompt_tuning(architecture: str, padding: str | None) -> None:
    """Logits of the real tokens, loss and gradients of the vectors; B is 0."""
    model = mixed(architecture, trained=False, dtype=torch.float64, tasks=["alpha"], num_experts=1)
    ours = vectors(model)
    theirs = tuned_by_peft(architecture, ours.rows[0])
    batch = batch_for(architecture, padding=padding)
    found, wanted = model(**batch, routing_task_ids="alpha"), theirs(**batch)
    kept = batch["attention_mask"].bool()
    assert found.logits.shape[1] == batch["input_ids"].shape[1]
    torch.testing.assert_close(found.logits[kept], wanted.logits[:, TOKENS:][kept], atol=1e-10, rtol=0)
    torch.testing.assert_close(found.loss, wanted.loss, atol=1e-10, rtol=0)
    found.loss.backward()
    wanted.loss.backward()
    expected = theirs.prompt_encoder["default"].embedding.weight.grad
    assert expected.any()
    torch.testing.assert_close(ours.blocks[0].grad[0], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no_cache"]
)
def test_it_generates_as_pefts(options: dict[str, Any]) -> None:
    model = mixed(trained=False, tasks=["alpha"], num_experts=1)
    theirs = tuned_by_peft("llama", vectors(model).rows[0])
    ids = batch_for("llama", batch=2)["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, **options}
    found = model.generate(input_ids=ids, routing_task_ids="alpha", **settings)
    assert torch.equal(found, theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings))
    plain = base_model("llama").generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    assert not torch.equal(found, plain)


def bloom() -> nn.Module:
    """A model that has no position ids: it counts attended tokens."""
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.2, pad_token_id=0
    )
    return BloomForCausalLM(config).requires_grad_(False).eval()


def model_of(architecture: str) -> Any:
    if architecture != "bloom":
        return mixed(architecture)
    torch.manual_seed(1)
    return get_peft_model(bloom(), config_for("llama", "task-group", num_virtual_tokens=TOKENS)).eval()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_a_row_alone_is_the_row_in_a_batch(architecture: str, padding: str) -> None:
    """Rows of different tasks, and one for the base alone, which is the base; losses of rows are their own too."""
    model, base = model_of(architecture), bloom() if architecture == "bloom" else base_model(architecture)
    batch = batch_for(architecture, batch=4, padding=padding)
    tasks = ["alpha", None, "beta", "alpha"]
    together = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], routing_task_ids=tasks
    )
    for row, task in enumerate(tasks):
        kept = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row : row + 1, kept]
        alone = model(input_ids=ids, routing_task_ids=[task])
        torch.testing.assert_close(together.logits[row, kept], alone.logits[0], atol=2e-5, rtol=0)
        one = {name: value[row : row + 1] for name, value in batch.items()}
        if task is None:
            assert torch.equal(alone.logits, base(input_ids=ids).logits)
            continue
        loss = model(input_ids=ids, labels=ids, routing_task_ids=[task]).loss
        torch.testing.assert_close(model(**one, routing_task_ids=[task]).loss, loss, atol=2e-5, rtol=0)


def test_the_loss_of_a_mixed_batch_has_no_target_for_what_nothing_precedes() -> None:
    model, batch = mixed(), batch_for("llama", batch=2)
    losses = [
        model(**{k: v[i : i + 1] for k, v in batch.items()}, routing_task_ids=[t]).loss
        for i, t in enumerate(("alpha", None))
    ]
    seq = batch["input_ids"].shape[1]
    wanted = (losses[0] * seq + losses[1] * (seq - 1)) / (
        2 * seq - 1
    )  # the first token too is learned behind virtual ones
    torch.testing.assert_close(model(**batch, routing_task_ids=["alpha", None]).loss, wanted)


@pytest.mark.parametrize(
    ("architecture", "options"), [("gpt2", {}), ("llama", {"num_beams": 3, "num_return_sequences": 2})]
)
def test_a_mixed_batch_generates_as_its_rows_do(architecture: str, options: dict[str, Any]) -> None:
    """GPT-2 has learned positions, which must be each row's own."""
    model, batch = mixed(architecture), batch_for(architecture, padding="left")
    tasks = ["beta", None, "alpha"]
    settings = {"max_new_tokens": 5, "do_sample": False, **options}
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    together = model.generate(**inputs, routing_task_ids=tasks, **settings).unflatten(0, (3, -1))
    without = model.generate(**inputs, routing_task_ids=tasks, use_cache=False, **settings).unflatten(
        0, (3, -1)
    )
    assert torch.equal(together, without)
    for row, task in enumerate(tasks):
        ids = inputs["input_ids"][row : row + 1, row:]
        alone = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), routing_task_ids=[task], **settings
        )
        assert torch.equal(together[row][:, row:], alone)


def test_prompt_lookup_writes_what_greedy_decoding_writes() -> None:
    """Candidates that are turned down are cut off the cache from its end, so virtual tokens stay."""
    model = mixed()
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    settings = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False, "routing_task_ids": "alpha"}
    assert torch.equal(model.generate(**settings, prompt_lookup_num_tokens=3), model.generate(**settings))


def test_a_sample_reads_the_weighted_sum_of_its_experts_vectors() -> None:
    """Task weights; the same as one expert that has the sum, with B = 0."""
    tasks = {"alpha": {"expert_0": 0.25, "expert_2": 0.75}}
    model = mixed(trained=False, tasks=tasks)
    rows = vectors(model).rows
    theirs = tuned_by_peft("llama", 0.25 * rows[0] + 0.75 * rows[2])
    batch = batch_for("llama")
    found, wanted = model(**batch, routing_task_ids="alpha").logits, theirs(**batch).logits[:, TOKENS:]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    several = mixed(trained=False)(**batch, routing_task_ids=[["alpha", "beta"], ["beta"], ["gamma"]])
    assert several.logits.shape == wanted.shape


LEARNED = {
    "sequence": {"gate": SEQUENCE},
    "table": {"gate": "task-table"},
    "embedding": {"gate": "task-embedding"},  # one gate for the whole model
    "external": {"gate": "external-mlp"},
    "constant": {"gate": "constant-global"},
    "factors": {"gate": "task-table", "combine": "factors"},
    "feed_forward": {"gate": "task-table", "ffn_targets": r".*\.mlp\.(gate|up|down)_proj"},
    "cores": {"gate": "task-table", "share_A": True, "task_cores": True},
}
GIVEN = {
    "table": {"routing_task_ids": list(TASKS)},
    "external": {"routing_features": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))},
}
GIVEN |= dict.fromkeys(("embedding", "factors", "feed_forward", "cores"), GIVEN["table"])


@pytest.mark.parametrize("name", LEARNED)
def test_learned_gates_weigh_them_and_learn_from_it(name: str) -> None:
    """A row alone is the row in a batch; vectors, and the gate that is theirs, get gradients; saved and loaded alike."""
    options = LEARNED[name]
    model, batch, given = mixed("llama", **options), batch_for("llama", padding="right"), GIVEN.get(name, {})
    batch["labels"][:, :2] = -100  # the prompt, which alone is pooled
    out = model(**batch, **given)
    out.loss.backward()
    learned = {n: p for n, p in model.named_parameters() if "molora_prompt" in n and p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in learned.values())
    own = name not in ("embedding", "constant")
    assert any(".gate." in n for n in learned) == own
    row = {key: value[1:2] for key, value in batch.items()}
    one = {key: value[1:2] for key, value in given.items()}
    kept = batch["attention_mask"][1].bool()
    alone = model(**row, **one).logits[0, kept]
    torch.testing.assert_close(out.logits[1, kept], alone, atol=2e-5, rtol=0)


def test_a_gate_that_reads_the_prompt_keeps_to_it_while_writing() -> None:
    """The prefix of a generation is that of its prompt, with and without a cache; training sees the same weights."""
    model, ids = mixed("llama", SEQUENCE), batch_for("llama", batch=2)["input_ids"]
    settings = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 4,
        "do_sample": False,
    }
    written = model.generate(**settings)
    assert torch.equal(written, model.generate(**settings, use_cache=False))
    labels = written.clone()
    labels[:, : ids.shape[1]] = -100
    logits = model(input_ids=written, labels=labels).logits
    assert torch.equal(logits[:, ids.shape[1] - 1 : -1].argmax(dim=-1), written[:, ids.shape[1] :])


def test_growing_keeps_old_tasks_bit_for_bit_and_trains_the_new_vectors() -> None:
    model, batch = mixed(), batch_for("llama")
    tokens = vectors(model)
    before = {task: model(**batch, routing_task_ids=task).logits for task in TASKS}
    rows = tokens.rows.detach().clone()
    model.add_expert("legal", tasks=["law"], init="copy:expert_1")
    assert torch.equal(tokens.rows[:3], rows) and torch.equal(tokens.rows[3], rows[1])
    for task, logits in before.items():
        assert torch.equal(model(**batch, routing_task_ids=task).logits, logits)
    model.train()(**batch, routing_task_ids=["law", "law", None]).loss.backward()
    assert tokens.frozen_blocks == (True, False)
    assert tokens.blocks[0].grad is None and tokens.blocks[1].grad.any()
    model.eval().remove_expert("expert_0", drop_tasks=True)
    assert torch.equal(tokens.rows, torch.cat([rows[1:], rows[1:2]]))
    assert torch.equal(model(**batch, routing_task_ids="beta").logits, before["beta"])
    model.unfreeze_experts(model.expert_names)
    assert tokens.frozen_blocks == (False,)
    model.add_expert("mean", tasks=["more"], init="mean")
    torch.testing.assert_close(tokens.rows[3], tokens.rows[:3].mean(dim=0))


@pytest.mark.parametrize("gate", ["task-group", "sequence-mean", "task-embedding"])
def test_saved_and_loaded_bit_for_bit(gate: str, tmp_path: Path) -> None:
    model, batch = mixed("llama", gate), batch_for("llama")
    model.add_expert("late", tasks=["later"])
    given = {"routing_task_ids": ["alpha", "later", "beta"]} if gate.startswith("task") else {}
    molora.save(model, tmp_path / "saved")
    again = molora.load(base_model("llama"), tmp_path / "saved")
    assert torch.equal(again(**batch, **given).logits, model(**batch, **given).logits)
    assert again.peft_config["default"].num_virtual_tokens == TOKENS
    other = deepcopy(model)
    assert torch.equal(other(**batch, **given).logits, model(**batch, **given).logits)
    plain = base_model("llama")
    plain.load_adapter(str(tmp_path / "saved"))
    with molora.routing(plain, given.get("routing_task_ids")) if given else nullcontext():
        assert torch.equal(plain(**batch).logits, model(**batch, **given).logits)


def test_nothing_is_there_where_no_virtual_tokens_are() -> None:
    """No hook of theirs; unloading takes theirs away; switching the adapter off gives the base."""

    def hooks(model: nn.Module) -> int:
        return len(model._forward_pre_hooks) + len(model._forward_hooks)

    batch, base = batch_for("llama"), base_model("llama")
    assert hooks(molora_model("llama", "task-group").get_base_model()) == 2
    model = mixed()
    assert hooks(model.get_base_model()) == 4
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert torch.equal(model(**batch, routing_task_ids=-1).loss, base(**batch).loss)
    bare = model.unload()
    assert hooks(bare) == 0 and torch.equal(bare(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    batch, found = batch_for("llama"), []
    for checkpointing in (False, True):
        model = mixed()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()(**batch, routing_task_ids=["alpha", None, "beta"]).loss.backward()
        found.append(vectors(model).blocks[0].grad)
    assert found[0].any()
    torch.testing.assert_close(found[0], found[1])


def test_what_callers_see_is_their_own_positions() -> None:
    """Hidden states, a tuple, the last logits alone, statistics and losses: of the sample's tokens."""
    model, batch = mixed("llama", SEQUENCE, aux_losses={"balance": 0.1}), batch_for("llama", padding="right")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    out = model(**inputs, output_hidden_states=True)
    shape = batch["input_ids"].shape
    assert all(states.shape[:2] == shape for states in (out.logits, *out.hidden_states))
    assert torch.equal(model(**inputs, return_dict=False)[0], out.logits)
    for keep in (2, torch.tensor([5, 6]), torch.tensor([-2, -1])):
        torch.testing.assert_close(model(**inputs, logits_to_keep=keep).logits, out.logits[:, -2:])
    embedded = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(
        model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits, out.logits
    )
    with molora.record_routing(model) as record:
        model(**inputs)
    assert {sums.tokens for sums in record.sums.values()} == {int(batch["attention_mask"].sum())}
    assert "prompts" in {row["gate"] for row in record.table()}
    model.train()(**batch).loss.backward()
    assert molora.aux_losses(model)["balance"] > 0


def test_a_router_names_the_task_before_anything_precedes_it() -> None:
    """It reads the base alone, without virtual tokens, and the name decides which come."""
    model, batch = mixed(router="gaussian"), batch_for("llama", padding="left")
    router = model.base_model.context.adapters["default"].router
    states = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    ids = model.task_ids
    router.learn({ids["alpha"]: [states[0].double() + 9], ids["beta"]: [states[1].double()]})
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert torch.equal(model(**inputs).logits, model(**inputs, routing_task_ids=["beta"] * 3).logits)
    settings = {**inputs, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**settings), model.generate(**settings, routing_task_ids="beta"))


def test_adapters_with_virtual_tokens_act_one_at_a_time() -> None:
    model, batch = mixed(), batch_for("llama")
    before = model(**batch, routing_task_ids="alpha").logits
    model.add_adapter("other", config_for("llama", "task-group", num_virtual_tokens=2))
    assert torch.equal(model(**batch, routing_task_ids="alpha").logits, before)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(RoutingError, match="adapters default, other have virtual tokens each"):
        model(**batch, routing_task_ids="alpha")


REFUSED = {
    "token gates": (lambda: mixed("llama", "top2-group"), ConfigError, "decides by token"),
    "weights of any sum": (
        lambda: mixed("llama", GateConfig(scope="constant", transform="identity", start=1.0, select="dense")),
        ConfigError,
        "must sum to 1",
    ),
    "numbers by layer": (lambda: mixed(num_experts=[2, 3]), ConfigError, "lie in no layer"),
    "a router behind blocks": (
        lambda: mixed(router={"kind": "gaussian", "passes": 1}),
        ConfigError,
        "router.passes",
    ),
    "classifiers": (lambda: mixed("bert"), ConfigError, "no causal language model"),
    "encoder-decoders": (lambda: mixed("t5"), ConfigError, "no causal language model"),
    "merging": (lambda: mixed().merge_and_unload(task="alpha"), ConfigError, "no part of any weight"),
    "exporting": (
        lambda: molora.export_lora(mixed(), "out", expert="expert_0"),
        ConfigError,
        "no part of any weight",
    ),
    "importing": (
        lambda: molora.import_lora(mixed(), "a_lora", expert="new"),
        ConfigError,
        "no part of any weight",
    ),
    "composing": (
        lambda: load_section(
            AdapterConfig, {"from_loras": {"a": "a_lora"}, "gate": "sequence", "num_virtual_tokens": 2}
        ),
        ConfigError,
        "would be others behind them",
    ),
    "a fixed cache": (
        lambda: mixed().generate(
            input_ids=torch.tensor([[5, 6]]), routing_task_ids="alpha", cache_implementation="static"
        ),
        RoutingError,
        "no room for virtual tokens",
    ),
    "packed rows": (
        lambda: mixed()(
            input_ids=torch.tensor([[5, 6, 7]]),
            position_ids=torch.tensor([[0, 1, 0]]),
            routing_task_ids="alpha",
        ),
        RoutingError,
        "packed",
    ),
    "ids by token": (
        lambda: mixed()(input_ids=torch.tensor([[5, 6]]), routing_task_ids=torch.tensor([[0, 1]])),
        RoutingError,
        "one task id per sample",
    ),
    "features by token": (
        lambda: mixed("llama", "external-mlp")(
            input_ids=torch.tensor([[5, 6]]), routing_features=torch.zeros(1, 2, 6)
        ),
        RoutingError,
        "per sample",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_to_do(name: str) -> None:
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call()


def test_a_foreign_cache_and_a_turn_that_goes_on_are_refused() -> None:
    model, ids = mixed(), torch.tensor([[5, 6, 7]])
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(RoutingError, match="not filled behind"):
        model(input_ids=ids[:, :1], past_key_values=cache, routing_task_ids="alpha")
    turn = model.generate(
        input_ids=ids, routing_task_ids="alpha", max_new_tokens=2, return_dict_in_generate=True
    )
    with pytest.raises(RoutingError, match="start each turn of a conversation"):
        model.generate(
            input_ids=torch.cat([turn.sequences, ids], dim=1),
            past_key_values=turn.past_key_values,
            routing_task_ids="alpha",
        )
