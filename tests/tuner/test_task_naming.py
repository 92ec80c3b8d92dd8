"""An adapter's task router: it names prompts in every forward, and lives, grows and travels with the adapter."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import MistralConfig, MistralForCausalLM

import molora
from molora import AdapterError, ConfigError, DataError, RouterConfig, RoutingError
from molora.config import BaseConfig
from molora.forward import task_naming
from molora.forward.root_hooks import mounts_of
from molora.forward.task_naming import modules_until
from molora.models.base import load_base
from molora.models.task_router import features, router_of
from molora.tuner.api import find_context
from tests.zoo import ARCHITECTURES, TASKS, VOCAB, base_model, beyond, config_for, molora_model, randomise

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
GENERATIVE = ("llama", "gpt2", "t5")
two_architectures = pytest.mark.parametrize("architecture", beyond(ARCHITECTURES, "llama", "bert"))


class Tokens:
    """A tokenizer of texts that are token ids already: "5 6 7"."""

    pad_token_id, eos_token_id, bos_token_id, cls_token_id = 0, None, None, None

    def __call__(self, text, **options):
        ids = [int(word) for word in text.split()]
        return {"input_ids": ids[: options["max_length"]] if options.get("truncation") else ids}


TOKENS = Tokens()


def texts(task, count=30, seed=0):
    """Prompts of a task, of 4 to 9 out of three tokens that are its own."""
    generator, start = torch.Generator().manual_seed(seed), 1 + 15 * TASKS.index(task)
    lengths = torch.randint(4, 10, (count,), generator=generator).tolist()
    rows = [torch.randint(start, start + 3, (n,), generator=generator).tolist() for n in lengths]
    return [" ".join(map(str, row)) for row in rows]


def fitted(architecture, gate="task-group", tasks=TASKS, **settings):
    settings = {"router": RouterConfig(), **settings}
    model = molora_model(architecture, gate, **settings)
    molora.fit_router(model, TOKENS, {task: texts(task) for task in tasks})
    return model


def batch(asked=TASKS, padding="right", seed=1):
    """One prompt that was not learned of each task asked for, padded."""
    rows = [TOKENS(texts(task, 1, seed + i)[0])["input_ids"] for i, task in enumerate(asked)]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, slice(0, len(row)) if padding == "right" else slice(width - len(row), width)] = torch.tensor(
            row
        )
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def decoding(architecture, inputs):
    extra = {"decoder_input_ids": torch.tensor([[0, 3]] * len(inputs["input_ids"]))}
    return {**inputs, **extra} if architecture == "t5" else inputs


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


def buffers(model):
    return {k: v for k, v in get_peft_model_state_dict(model).items() if "molora_router" in k}


# -- the model's own forward ---------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_forward_without_ids_is_the_one_with_them(architecture, padding):
    model, asked = fitted(architecture), ("gamma", "alpha", "gamma", "beta")
    inputs = decoding(architecture, batch(asked, padding))
    named = logits(model, inputs)
    assert torch.equal(named, logits(model, inputs, routing_task_ids=list(asked)))
    assert not torch.allclose(named, logits(model, inputs, routing_task_ids=list(asked[::-1])), atol=1e-3)
    alone = decoding(architecture, batch(("beta",), padding))
    assert torch.equal(logits(model, alone), logits(model, alone, routing_task_ids="beta"))


MODES = {
    "greedy": {},
    "no-cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "static-cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("architecture", beyond(GENERATIVE, "llama"))
@pytest.mark.parametrize("mode", MODES)
def test_a_generation_without_ids_is_the_one_with_them(architecture, mode):
    model, inputs = fitted(architecture), batch(("gamma", "alpha", "beta"), padding="left")

    def answer(asked, **ids):
        torch.manual_seed(0)
        return asked.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **MODES[mode], **ids)

    given = answer(model, routing_task_ids=["gamma", "alpha", "beta"])
    assert torch.equal(answer(model), given)
    assert torch.equal(answer(model.base_model.model), given)


def sliding_model(**settings):
    """A Mistral all of whose blocks look back four tokens only."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = dict.fromkeys(("eos_token_id", "bos_token_id"), None)
    config = MistralConfig(
        **shape,
        num_key_value_heads=2,
        sliding_window=4,
        initializer_range=0.2,
        vocab_size=VOCAB,
        pad_token_id=0,
        **ends,
    )
    model = get_peft_model(MistralForCausalLM(config).eval(), config_for("llama", "task-group", **settings))
    molora.fit_router(model.eval(), TOKENS, {task: texts(task) for task in TASKS})
    return model


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_never_is_a_part_of_the_prompt_nor_is_its_start_left_out(
    passes, embedded, cache, monkeypatch
):
    model, inputs = sliding_model(router={"passes": passes, "depth": 0.5}), batch(padding="left")
    prompts = [row[row != 0].tolist() for row in inputs["input_ids"]]
    expected, read, ids = features(model, TOKENS, prompts, "default", 8), [], task_naming._ids
    monkeypatch.setattr(task_naming, "_ids", lambda found, rows: ids(found, read.append(rows) or rows))
    if embedded:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    model.generate(**inputs, max_new_tokens=2, cache_implementation=cache)
    assert len(read) == 1
    assert_close(read[0], expected, atol=1e-6, rtol=1e-6)


def test_the_prompt_alone_decides_where_answers_are_scored():
    model, inputs = fitted("llama"), batch(("alpha", "gamma"))
    other = TOKENS(texts("beta", 1)[0])["input_ids"]
    answers = torch.tensor([other, other])
    scored = torch.cat([inputs["input_ids"][:, :4], answers, answers, answers], dim=1)
    labels = torch.cat([torch.full((2, 4), -100), answers, answers, answers], dim=1)
    named = logits(model, {"input_ids": scored, "labels": labels})
    given = logits(model, {"input_ids": scored, "labels": labels}, routing_task_ids=["alpha", "gamma"])
    assert torch.equal(named, given)
    whole = logits(model, {"input_ids": scored})  # nothing says where the prompt ends: all of it is one
    assert torch.equal(whole, logits(model, {"input_ids": scored}, routing_task_ids="beta"))


def test_ids_that_are_given_win_and_the_base_reads_nothing(monkeypatch):
    model, inputs = fitted("llama"), batch()
    expected = logits(model, inputs, routing_task_ids=["beta", None, "alpha"])
    monkeypatch.setattr("molora.forward.task_naming.name_tasks", None)
    assert torch.equal(logits(model, inputs, routing_task_ids=["beta", None, "alpha"]), expected)
    with molora.routing(model, task_ids=["beta", None, "alpha"]):
        assert torch.equal(logits(model, inputs), expected)
    with molora.routing(model, experts=["expert_1"]):
        logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(base_model("llama"), inputs))


def test_a_prompt_is_read_once_up_to_the_block(monkeypatch):
    model, inputs = fitted("llama"), batch(("beta", "beta"))
    runs = [0, 0]
    for i, block in enumerate(model.base_model.model.model.layers):
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert runs == [1 + 4, 4]


# -- one pass --------------------------------------------------------------------------------------------


ALONG = {"depth": 0.5, "passes": 1}  # of two blocks the first is read, the second has experts


@architectures
@pytest.mark.parametrize("padding", ["left", "right"])
def test_in_one_pass_experts_sit_behind_what_is_read(architecture, padding, monkeypatch):
    model = fitted(architecture, router=ALONG)
    early = modules_until(model.base_model.model, find_context(model).adapters["default"].read)
    keys = [mount.key for mount in mounts_of(find_context(model), model.base_model.model, "default")]
    everywhere = mounts_of(find_context(two := fitted(architecture)), two.base_model.model, "default")
    assert keys == [mount.key for mount in everywhere if mount.key not in early] and keys
    assert len(keys) < len(everywhere)
    asked = ("gamma", "alpha", "gamma", "beta")
    inputs = decoding(architecture, batch(asked, padding))
    if architecture == "gpt2":  # as generate() counts: its positions are absolute
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given = logits(model, inputs, routing_task_ids=list(asked))
    assert not torch.allclose(given, logits(model, inputs, routing_task_ids=list(asked[::-1])), atol=1e-3)
    monkeypatch.setattr("molora.forward.task_naming.read_base", None)  # nothing is read apart
    assert torch.equal(logits(model, inputs), given)


@pytest.mark.parametrize("architecture", beyond(GENERATIVE, "llama"))
@pytest.mark.parametrize("mode", MODES)
def test_in_one_pass_a_generation_without_ids_is_the_one_with_them(architecture, mode, monkeypatch):
    model, inputs = fitted(architecture, router=ALONG), batch(("gamma", "alpha", "beta"), padding="left")
    monkeypatch.setattr("molora.forward.task_naming.read_base", None)

    def answer(**ids):
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **MODES[mode], **ids)

    assert torch.equal(answer(), answer(routing_task_ids=["gamma", "alpha", "beta"]))


def test_one_pass_reads_every_block_once():
    model, inputs = fitted("llama", router=ALONG), batch(("beta", "beta"))
    runs = [0, 0]
    for i, block in enumerate(model.base_model.model.model.layers):
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert runs == [4, 4]


@pytest.mark.parametrize("late", [False, True])
def test_labels_that_are_the_whole_text_leave_names_as_they_are(late):
    """As a perplexity gives them, or transformers' collator of language models."""
    model = fitted("llama", **({"target_modules": r".*layers\.1\..*_proj"} if late else {}))
    inputs = batch(("gamma", "alpha", "beta"), padding="left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    # Rows that begin alike: by their first token they would all be one task.
    ids = inputs["input_ids"].scatter(1, inputs["attention_mask"].argmax(1, keepdim=True), 49)
    expected = logits(model, {**inputs, "input_ids": ids}, routing_task_ids=["gamma", "alpha", "beta"])
    assert torch.equal(logits(model, {**inputs, "input_ids": ids, "labels": labels}), expected)
    answers = labels.clone()
    answers[:, :-1] = -100  # what is before an answer is the prompt, as ever
    assert torch.equal(logits(model, {**inputs, "input_ids": ids, "labels": answers}), expected)


def test_one_pass_is_taken_by_itself_where_it_can_be_and_two_on_wish():
    def passes(**settings):
        return 1 if find_context(fitted("llama", **settings)).adapters["default"].along else 2

    late = {"target_modules": r".*layers\.1\..*_proj"}
    assert passes() == 2 and passes(**late) == 1
    assert passes(router={"passes": 2}, **late) == 2
    given = molora_model("llama", "task-group", **late)
    molora.fit_router(given, TOKENS, {"beta": texts("beta")}, router={"passes": 1})
    assert find_context(given).adapters["default"].along
    everywhere = molora_model("llama", "task-group")
    with pytest.raises(ConfigError, match=r"router\.passes cannot be 1"):
        molora.fit_router(everywhere, TOKENS, {"beta": texts("beta")}, router={"passes": 1})
    assert everywhere.peft_config["default"].router is None
    with pytest.raises(ConfigError, match=r"reads the last block, so router\.passes=1 leaves none"):
        fitted("llama", router={"passes": 1, "depth": 1.0})


def test_beside_another_adapter_the_base_alone_is_read_all_the_same(monkeypatch):
    model, inputs = fitted("llama", router=ALONG), batch(("gamma", "alpha", "beta"))
    model.add_adapter("early", config_for("llama", "soft-group"))
    randomise(model.base_model.model, seed=5, std=2.0)
    read, ids = [], task_naming._ids
    monkeypatch.setattr(task_naming, "_ids", lambda found, rows: ids(found, read.append(rows) or rows))
    logits(model, inputs)
    model.base_model.set_adapter(["default", "early"])
    logits(model, inputs)
    assert_close(read[1], read[0], atol=1e-6, rtol=1e-6)


def test_one_pass_survives_saving_and_training(tmp_path):
    model = fitted("llama", router=ALONG)
    molora.save(model, tmp_path / "a")
    loaded = molora.load(base_model("llama"), tmp_path / "a")
    assert find_context(loaded).adapters["default"].along
    assert torch.equal(logits(loaded, batch()), logits(model, batch(), routing_task_ids=list(TASKS)))
    with pytest.raises(RoutingError, match="no task ids were given"):
        model.train()(**batch())


def test_the_prompt_alone_decides_in_one_pass_too():
    for architecture in ("llama", "t5"):
        model = fitted(architecture, router=ALONG)
        inputs, wrong = batch(("alpha", "gamma")), TOKENS(texts("beta", 1)[0])["input_ids"]
        answers = torch.tensor([wrong + wrong] * 2)
        ids, labels = inputs["input_ids"][:, :4], answers
        if architecture == "llama":
            labels = torch.cat([torch.full((2, 4), -100), answers], dim=1)
            ids = torch.cat([ids, answers], dim=1)
        named = logits(model, {"input_ids": ids, "labels": labels})
        assert torch.equal(
            named, logits(model, {"input_ids": ids, "labels": labels}, routing_task_ids=["alpha", "gamma"])
        )


def test_two_passes_over_an_encoder_leave_the_answer_out():
    model, inputs = fitted("t5"), batch(("alpha", "gamma"))
    labelled = {**inputs, "labels": torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11, 12]] * 2)}
    assert torch.equal(logits(model, labelled), logits(model, labelled, routing_task_ids=["alpha", "gamma"]))


# -- by likelihood ---------------------------------------------------------------------------------------


def test_soft_names_weigh_every_tasks_experts():
    model = fitted("llama", router={"soft": True, "shrinkage": 1.0})
    between = {"input_ids": torch.tensor([[3, 16, 17, 18], [31, 32, 33, 31]])}
    found = molora.route(model, TOKENS, ["3 16 17 18", "31 32 33 31"])
    assert 0.1 < found[0].posteriors["alpha"] < 0.9
    named = logits(model, between)
    rows = [[row.posteriors[task] for task in TASKS] for row in found]
    mixed = []
    for i, row in enumerate(rows):  # each task has its own expert at weight 1: forced, weighed alike
        with molora.routing(model, experts=dict(zip(model.expert_names, row, strict=True))):
            mixed.append(logits(model, {"input_ids": between["input_ids"][i : i + 1]}))
    assert_close(named, torch.cat(mixed), atol=1e-5, rtol=1e-5)
    hard = fitted("llama", router={"shrinkage": 1.0})
    assert not torch.allclose(named[:1], logits(hard, between)[:1], atol=1e-3)


def test_soft_names_and_prompts_of_no_known_task():
    model = fitted("llama", router={"soft": True, "unknown": "base", "quantile": 0.0})
    stranger = {"input_ids": torch.full((1, 8), 48)}
    assert torch.equal(logits(model, stranger), logits(base_model("llama"), stranger))


def test_soft_names_need_a_gate_that_decides_by_task():
    with pytest.raises(
        ConfigError, match=r"router\.soft: acts only under a gate that decides by task id, not of scope token"
    ):
        molora_model("llama", "soft-group", router={"soft": True})


# -- experts hidden from a task --------------------------------------------------------------------------


def test_a_learned_gate_that_grew_in_isolation_is_named_for():
    model = fitted("llama", "soft-group", tasks=TASKS)
    before = logits(model, batch())
    model.add_expert("late", tasks=["delta"], isolate=True)
    randomise_new(model)
    unnamed = logits(model, batch(), routing_task_ids=list(TASKS))
    assert torch.equal(logits(model, batch()), unnamed)
    assert_close(unnamed, before, atol=1e-6, rtol=1e-6)
    molora.fit_router(model, TOKENS, {"delta": texts("gamma", seed=3)})
    one = batch(("alpha",))
    assert torch.equal(logits(model, one), logits(model, one, routing_task_ids="alpha"))
    fresh = molora_model("llama", "soft-group", router=RouterConfig())
    fresh.add_expert("late", tasks=["delta"], isolate=True)
    open_gate = logits(fresh, batch())  # a router that has nothing to tell apart names nothing
    molora.fit_router(fresh, TOKENS, {"delta": texts("gamma")})
    assert torch.equal(logits(fresh, batch()), open_gate)


def randomise_new(model):
    for name, p in model.named_parameters():
        if p.requires_grad and name.endswith(("lora_B", "block_1")):
            p.data = torch.randn_like(p)


def test_a_learned_gate_is_named_for_only_where_it_is_limited_to_tasks():
    model, inputs = fitted("llama", "soft-group", tasks=TASKS), batch(("beta", "gamma", "gamma"))
    free = logits(model, inputs)
    assert torch.equal(free, logits(molora_model("llama", "soft-group"), inputs))
    model.base_model.context.adapters["default"].config.tasks["beta"] = ["expert_1"]
    model.add_expert("late", tasks=["delta"], freeze_others=False)
    with molora.routing(model, by="task"):
        named = logits(model, inputs)
    with molora.routing(model, by="task", task_ids=["beta", "gamma", "gamma"]):
        assert torch.equal(named, logits(model, inputs))
    assert not torch.equal(named, free)


def test_threads_name_their_own_prompts():
    model = fitted("llama")
    expected = {task: logits(model, batch((task,)), routing_task_ids=task) for task in TASKS}

    def same(task):
        return all(torch.equal(logits(model, batch((task,))), expected[task]) for _ in range(8))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(same, TASKS)) == [True] * 3


def test_training_never_names():
    model = fitted("llama").train()
    with pytest.raises(RoutingError, match="no task ids were given"):
        model(**batch(), labels=batch()["input_ids"])


@pytest.mark.slow
def test_naming_breaks_a_compiled_graph_and_changes_nothing():
    model, inputs = fitted("llama"), batch(("gamma", "alpha"))
    try:
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(logits(compiled, inputs), logits(model, inputs))
        torch._dynamo.reset()
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match="one graph cannot name tasks: give routing_task"
        ):
            logits(whole, inputs)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["gaussian", "ridge", "prototypes"])
def test_prompts_of_no_known_task(kind):
    stranger = {"input_ids": torch.full((2, 8), 48)}
    stranger["input_ids"][0] = torch.tensor(TOKENS(texts("beta", 40)[39])["input_ids"][:4] * 2)
    settings = {"kind": kind, "unknown": "base", "quantile": 0.0}
    settings |= {"clusters": 3} if kind == "prototypes" else {}
    model = fitted("llama", router=settings)
    named = logits(model, stranger)
    assert torch.equal(named, logits(model, stranger, routing_task_ids=["beta", None]))
    asked = molora.route(model, TOKENS, [" ".join(map(str, row)) for row in stranger["input_ids"].tolist()])
    assert [found.task for found in asked] == ["beta", None]
    model = fitted("llama", router={**settings, "unknown": "error"})
    with pytest.raises(RoutingError, match="prompt 1 of the batch belongs to no task this adapter knows"):
        logits(model, stranger)


# -- fit_router and route ------------------------------------------------------------------------------


@architectures
def test_route_says_what_the_forward_does(architecture):
    model = fitted(architecture, router={"shrinkage": 0.1})  # less of it makes more of float32's rounding
    asked = [text for task in TASKS for text in texts(task, 20, seed=5)]
    found = molora.route(model, TOKENS, asked)
    assert [row.task for row in found] == [task for task in TASKS for _ in range(20)]
    for row in found:
        assert list(row.posteriors) == list(TASKS) and row.task == max(row.posteriors, key=row.posteriors.get)
        assert sum(row.posteriors.values()) == pytest.approx(1)
    router, read = (
        router_of(model, "default"),
        features(model, TOKENS, [TOKENS(text)["input_ids"] for text in asked], "default", 7),
    )
    assert [row.log_density for row in found] == pytest.approx(router.guess(read).log_densities.tolist())
    assert molora.route(model, TOKENS, []) == []


@architectures
def test_features_are_means_of_early_hidden_states(architecture):
    model = fitted(architecture)
    prompts = [TOKENS(text)["input_ids"] for text in texts("beta", 5)]
    base = base_model(architecture)
    base = base.get_encoder() if architecture == "t5" else base
    with torch.no_grad():
        states = [base(torch.tensor([row]), output_hidden_states=True).hidden_states[1] for row in prompts]
    expected = torch.stack([state.double().mean(dim=(0, 1)) for state in states])
    assert_close(features(model, TOKENS, prompts, "default", 3), expected, atol=1e-5, rtol=1e-5)


def test_prompts_may_come_in_any_order_and_parts():
    whole, parts = fitted("llama"), molora_model("llama", "task-group", router="gaussian")
    for task in ("gamma", "alpha", "beta"):
        molora.fit_router(parts, TOKENS, {task: texts(task)[20:]})
        molora.fit_router(parts, TOKENS, {task: texts(task)[:20]}, batch_size=3)
    for name in ("counts", "means", "scatter", "spread"):
        one, other = (getattr(router_of(model, "default"), name) for model in (whole, parts))
        assert_close(one, other, atol=1e-4, rtol=1e-5)  # batches round differently in the base's float32


def test_the_depth_is_a_share_of_the_blocks():
    deep = fitted("llama", router={"depth": 1.0})
    assert deep.base_model.context.adapters["default"].read is deep.base_model.model.model.layers[1]
    shallow = fitted("llama", router={"depth": 0.01})
    assert shallow.base_model.context.adapters["default"].read is shallow.base_model.model.model.layers[0]


@pytest.mark.parametrize("late", [False, True])
def test_an_export_without_ids_is_refused_and_leaves_the_model_as_it_was(late):
    model = fitted("llama", **({"target_modules": r".*layers\.1\..*_proj"} if late else {}))
    expected = logits(model, batch())
    with pytest.raises(RoutingError, match="a graph that is exported cannot name tasks"):
        torch.export.export(model, (), {**batch(), "use_cache": False}, strict=False)
    assert torch.equal(logits(model, batch()), expected)


def test_an_adapter_without_a_router_can_be_given_one(tmp_path):
    model = molora_model("llama", "task-group")
    before = logits(model, batch(), routing_task_ids="beta")
    molora.fit_router(model, TOKENS, {task: texts(task) for task in TASKS}, router="gaussian")
    assert torch.equal(logits(model, batch(("beta",) * 3)), logits(fitted("llama"), batch(("beta",) * 3)))
    assert torch.equal(logits(model, batch(), routing_task_ids="beta"), before)
    molora.save(model, tmp_path / "a")
    loaded = molora.load(base_model("llama"), tmp_path / "a")
    assert torch.equal(logits(loaded, batch()), logits(model, batch()))
    with pytest.raises(ConfigError, match="has a router already"):
        molora.fit_router(model, TOKENS, {}, router="ridge")


def test_what_cannot_be_is_said():
    model = molora_model("llama", "task-group", router="gaussian")
    with pytest.raises(RoutingError, match="router has learned no task yet"):
        logits(model, batch())
    with pytest.raises(ConfigError, match="has learned no task yet"):
        molora.route(model, TOKENS, ["1 2"])
    with pytest.raises(
        ConfigError, match=r"has no task 'gama'. Did you mean 'gamma'\? Its tasks: alpha, beta"
    ):
        molora.fit_router(model, TOKENS, {"gama": ["1 2"]})
    with pytest.raises(DataError, match="task 'beta' has no prompts"):
        molora.fit_router(model, TOKENS, {"beta": []})
    with pytest.raises(DataError, match="the prompts of task 'beta' are one text, '1 2'"):
        molora.fit_router(model, TOKENS, {"beta": "1 2"})
    with pytest.raises(DataError, match="the prompts are one text"):
        molora.route(fitted("llama"), TOKENS, "1 2")
    with pytest.raises(DataError, match="a prompt has no tokens: ''"):
        molora.route(fitted("llama"), TOKENS, [""])
    with pytest.raises(ConfigError, match="has no task router"):
        molora.route(molora_model("llama", "task-group"), TOKENS, ["1 2"])
    with pytest.raises(ConfigError, match=r"router.kind='gausian': 'gausian' is not one of gaussian, ridge"):
        RouterConfig(kind="gausian")
    with pytest.raises(ConfigError, match=r"router.depht is not a setting. Did you mean 'depth'"):
        molora_model("llama", "task-group", router={"depht": 1})
    with pytest.raises(ConfigError, match=r"router.quantile=0.2: acts only with unknown: base or error"):
        RouterConfig(quantile=0.2)
    with pytest.raises(ConfigError, match=r"router.depth=0: must be above 0 and at most 1"):
        RouterConfig(depth=0)
    with pytest.raises(ConfigError, match=r"router.unknown='bases': 'bases' is not one of"):
        RouterConfig(unknown="bases")


@pytest.mark.parametrize("late", [False, True])
def test_fitting_that_was_refused_leaves_no_router_behind(late):
    options = {"target_modules": r".*layers\.1\..*_proj"} if late else {}
    model = molora_model("llama", "task-group", **options)
    state = set(model.state_dict())
    for wrong, error in (
        ({"typo": texts("alpha")}, "has no task 'typo'"),
        ({"alpha": ["1 2", ""]}, "a prompt has no tokens"),
    ):
        with pytest.raises((ConfigError, DataError), match=error):
            molora.fit_router(model, TOKENS, wrong, router="gaussian")
        assert model.peft_config["default"].router is None and set(model.state_dict()) == state
        with pytest.raises(RoutingError, match="task"):
            logits(model, batch())
    molora.fit_router(model, TOKENS, {task: texts(task) for task in TASKS}, router="gaussian")
    assert torch.equal(logits(model, batch()), logits(fitted("llama", **options), batch()))


@pytest.mark.parametrize("kind", ["gaussian", "ridge", "prototypes"])
@pytest.mark.parametrize("late", [False, True])
def test_a_base_that_overflows_is_said_and_nothing_is_learned(kind, late):
    options = {"target_modules": r".*layers\.1\..*_proj"} if late else {}
    model = fitted("llama", router=kind, **options)
    before = buffers(model)
    model.get_base_model().get_input_embeddings().weight.data[49] = torch.inf
    for call in (
        lambda: molora.fit_router(model, TOKENS, {"alpha": ["1 2 49"]}),
        lambda: molora.route(model, TOKENS, ["1 2", "49 1"]),
        lambda: logits(model, {"input_ids": torch.tensor([[1, 49]])}),
    ):
        with pytest.raises(DataError, match="hidden states of some prompts are not finite"):
            call()
    assert all(torch.equal(value, buffers(model)[name]) for name, value in before.items())
    assert [named.task for named in molora.route(model, TOKENS, texts("beta", 2, seed=9))] == ["beta"] * 2


def test_routers_that_earlier_versions_wrote_are_read():
    """Their files hold every setting, also the 20 clusters that were the default and do not act."""
    assert RouterConfig(kind="gaussian", shrinkage=0.1, clusters=20).clusters == 20
    with pytest.raises(ConfigError, match=r"router.clusters=7: acts only with kind: prototypes"):
        RouterConfig(clusters=7)


# -- with the adapter ----------------------------------------------------------------------------------


@architectures
def test_it_is_saved_and_loaded_with_the_adapter(architecture, tmp_path):
    model, inputs = fitted(architecture, router={"unknown": "base"}), decoding(architecture, batch())
    model.save_pretrained(str(tmp_path / "peft"))
    molora.save(model, tmp_path / "ours")
    expected = logits(model, inputs)
    for loaded in (
        PeftModel.from_pretrained(base_model(architecture), str(tmp_path / "peft")),
        molora.load(base_model(architecture), tmp_path / "ours"),
        copy.deepcopy(model),
    ):
        assert torch.equal(logits(loaded, inputs), expected)
        assert {k: v.dtype for k, v in buffers(loaded).items()} == dict.fromkeys(
            buffers(model), torch.float64
        )
        assert all(torch.equal(v, buffers(model)[k]) for k, v in buffers(loaded).items())
        assert loaded.peft_config["default"].router == RouterConfig(unknown="base")
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {k for k in stored if "molora_router" in k} == set(buffers(model)) and len(buffers(model)) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_it_too(dtype, tmp_path):
    model = fitted("llama")
    model.save_pretrained(str(tmp_path))
    plain, asked = base_model("llama", dtype=dtype), ("gamma", "beta", "beta")
    plain.load_adapter(str(tmp_path))
    plain.eval()
    found = {k.replace(".default", ""): v for k, v in plain.state_dict().items() if "molora_router" in k}
    for name, value in buffers(model).items():
        assert torch.equal(found[name.removeprefix("base_model.model.")], value)
    assert torch.equal(logits(plain, batch(asked)), logits(plain, batch(asked), routing_task_ids=list(asked)))


def test_an_adapter_without_one_is_written_as_before(tmp_path):
    molora.save(molora_model("llama", "task-group"), tmp_path / "a")
    assert "router" not in json.loads((tmp_path / "a" / "adapter_config.json").read_text())


def test_damage_is_found(tmp_path):
    from safetensors.torch import save_file

    molora.save(fitted("llama"), tmp_path / "a")
    weights, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    (tmp_path / "a" / "MANIFEST.json").unlink()
    stored = load_file(weights)
    key = next(k for k in stored if k.endswith("molora_router.means"))
    for change in ({key: stored[key][:2].clone()}, {key: stored[key] + 1}):
        save_file({**stored, **change}, weights)
        with pytest.raises(AdapterError, match=r"shape|not the ones that were saved"):
            molora.load(base_model("llama"), tmp_path / "a")
    save_file({k: v for k, v in stored.items() if k != key}, weights)
    plain = json.loads(config.read_text())
    config.write_text(json.dumps({**plain, "weights_sha256": None}))
    with pytest.raises(AdapterError, match="means: missing"):
        molora.load(base_model("llama"), tmp_path / "a")


def test_it_stays_float64_on_a_16_bit_base(tmp_path):
    model = fitted("llama")
    before = {k: v.clone() for k, v in buffers(model).items()}
    model = model.to(torch.bfloat16)
    assert all(v.dtype == torch.float64 and torch.equal(v, before[k]) for k, v in buffers(model).items())
    molora.save(model, tmp_path / "a")
    loaded = molora.load(base_model("llama", dtype=torch.bfloat16), tmp_path / "a")
    assert all(torch.equal(v, before[k]) for k, v in buffers(loaded).items())
    inputs = batch(("gamma", "beta", "beta"))
    given = logits(loaded, inputs, routing_task_ids=["gamma", "beta", "beta"])
    assert torch.equal(logits(loaded, inputs), given)


def test_it_grows_and_shrinks_with_the_tasks(tmp_path):
    model = fitted("llama", tasks=("alpha", "beta"))
    router = router_of(model, "default")
    old = router.means[:2].clone()
    expected = logits(model, batch(("alpha", "beta")), routing_task_ids=["alpha", "beta"])
    model.add_expert("late", tasks=["delta"])
    assert router.counts.tolist() == [30, 30, 0, 0]
    molora.fit_router(model, TOKENS, {"delta": texts("gamma")})
    assert torch.equal(router.means[:2], old)
    assert torch.equal(logits(model, batch(("alpha", "beta"))), expected)
    assert [row.task for row in molora.route(model, TOKENS, texts("gamma", 5, 9))] == ["delta"] * 5
    molora.save(model, tmp_path / "a")
    loaded = molora.load(base_model("llama"), tmp_path / "a")
    assert torch.equal(logits(loaded, batch()), logits(model, batch()))
    model.remove_expert("expert_0", drop_tasks=True)
    assert list(model.task_ids) == ["beta", "gamma", "delta"] and router.counts.tolist() == [30, 0, 30]
    assert torch.equal(router.means[0], old[1]) and router.spread == 90
    assert {row.task for row in molora.route(model, TOKENS, texts("alpha"))} <= {"beta", "delta"}


def test_prototypes_are_centres_and_the_nearest_names(tmp_path):
    model = fitted("llama", router={"kind": "prototypes", "clusters": 4}, tasks=("alpha", "beta"))
    router = router_of(model, "default")
    assert router.seen == {0: 30, 1: 30, 2: 0} and router.learned == [0, 1]
    read = features(model, TOKENS, [TOKENS(t)["input_ids"] for t in texts("alpha")], "default", 8)
    read = read / read.norm(dim=1, keepdim=True)
    nearest = torch.cdist(read, router.means[:4]).argmin(dim=1)
    assert torch.bincount(nearest, minlength=4).tolist() == router.counts[:4].long().tolist()
    for centre in range(4):  # k-means has come to rest: each centre is the mean of what is nearest to it
        assert_close(router.means[centre], read[nearest == centre].mean(dim=0), atol=1e-7, rtol=1e-6)
    old = router.means[:4].clone()
    molora.fit_router(model, TOKENS, {"gamma": texts("gamma")})
    assert torch.equal(router.means[:4], old)
    asked = [text for task in TASKS for text in texts(task, 5, 9)]
    assert [row.task for row in molora.route(model, TOKENS, asked)] == [t for t in TASKS for _ in range(5)]
    molora.fit_router(model, TOKENS, {"alpha": texts("alpha", 10, 7)})  # more of a task goes to its centres
    assert router.seen[0] == 40
    molora.save(model, tmp_path / "a")
    loaded = molora.load(base_model("llama"), tmp_path / "a")
    assert torch.equal(logits(loaded, batch()), logits(model, batch(), routing_task_ids=list(TASKS)))


def test_fewer_prompts_than_centres_are_enough():
    model = molora_model("llama", "task-group", router={"kind": "prototypes", "clusters": 20})
    molora.fit_router(model, TOKENS, {"alpha": texts("alpha", 1), "beta": texts("beta", 3)})
    assert [row.task for row in molora.route(model, TOKENS, texts("beta", 2, 5))] == ["beta", "beta"]


def test_adapters_have_routers_of_their_own():
    model = fitted("llama")
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    assert router_of(model, "second").learned == [] and len(router_of(model, "default").learned) == 3
    model.set_adapter("second")
    molora.fit_router(model, TOKENS, {"beta": texts("beta")})
    assert torch.equal(logits(model, batch()), logits(model, batch(), routing_task_ids="beta"))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model, batch()), logits(model, batch(), routing_task_ids=list(TASKS)))


def test_nothing_of_it_stays_on_the_plain_base():
    base = fitted("llama").unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert set(base.state_dict()) == set(base_model("llama").state_dict())


def test_a_generation_goes_on_under_the_name_of_its_prompt():
    model = fitted("llama")
    prompt, more = batch(("alpha",)), torch.tensor([TOKENS(texts("gamma", 1)[0])["input_ids"][:4]])
    with torch.no_grad():
        begun = model(**prompt, use_cache=True).past_key_values
        named = model(input_ids=more, past_key_values=begun).logits
        begun = model(**prompt, use_cache=True, routing_task_ids="alpha").past_key_values
        given = model(input_ids=more, past_key_values=begun, routing_task_ids="alpha").logits
        begun = model(**prompt, use_cache=True, routing_task_ids="alpha").past_key_values
        with pytest.raises(RoutingError, match="no task ids were given"):
            model(input_ids=more, past_key_values=begun)  # its prompt was never named
    assert torch.equal(named, given)


def test_a_mixture_of_loras_can_have_one(tmp_path):
    molora.export_lora(molora_model("llama"), tmp_path / "one", expert="expert_0")
    base = base_model("llama")
    model = molora.compose(
        base, {"one": tmp_path / "one"}, gate={"kind": "task"}, tasks={"alpha": ["one"]}, router="ridge"
    )
    molora.fit_router(model, TOKENS, {"alpha": texts("alpha")})
    assert molora.route(model, TOKENS, texts("alpha", 1))[0].task == "alpha"


def tiny(dtype):
    """The embedded base with ten tasks, an expert each, and a router."""
    base, tokenizer = load_base(BaseConfig(model="molora/tiny"))
    config = molora.MoLoraConfig(
        num_experts=10, r=1, target_modules=["v_proj"], gate={"kind": "task"}, router="gaussian",
        expert_names=list(GENERATORS), tasks={name: [name] for name in GENERATORS}, task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(base, config).to(dtype), tokenizer


GENERATORS = ("pig", "mirror", "zigzag", "back", "mask", "spell", "shout", "pairs", "even", "boxed")
WORDS = (
    "abc",
    "hello",
    "tree",
    "rainbow",
    "blue",
    "houses",
    "word",
    "stone",
    "x",
    "quietly",
    "jam",
    "violin",
)


def orders(dtype, count):
    """The router's state after random orders of arrival, in random parts and batches, padded on either side; its names."""
    states, prompts = [], {name: [f"{name}({word})=" for word in WORDS] for name in GENERATORS}
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        model, tokenizer = tiny(dtype)
        tokenizer.padding_side = ("left", "right")[seed % 2]
        for i in torch.randperm(10, generator=generator).tolist():
            name, cut = GENERATORS[i], int(torch.randint(1, len(WORDS), (), generator=generator))
            rows = [prompts[name][j] for j in torch.randperm(len(WORDS), generator=generator)]
            for part in (rows[:cut], rows[cut:]):
                molora.fit_router(model, tokenizer, {name: part}, batch_size=1 + seed)
        states.append({k: v.clone() for k, v in buffers(model).items() if "floors" not in k})
        asked = [f"{name}(never)=" for name in GENERATORS]
        assert [row.task for row in molora.route(model, tokenizer, asked)] == list(GENERATORS)
    first = states[0]
    return max(float((s[k] - v).norm() / v.norm()) for s in states[1:] for k, v in first.items())


@pytest.mark.parametrize(
    ("dtype", "count", "most"),
    [
        (torch.float64, 3, 1e-10),
        pytest.param(torch.float64, 10, 1e-10, marks=pytest.mark.slow),
        pytest.param(torch.float32, 3, 1e-5, marks=pytest.mark.slow),
        (torch.bfloat16, 2, 2e-2),
    ],
)
def test_ten_tasks_in_any_order_end_in_one_router(dtype, count, most):
    """Sums do not depend on the order; what is left is the base's own rounding, which depends on the batch."""
    assert orders(dtype, count) < most
