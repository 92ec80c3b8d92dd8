"""What a caller gives is taken as meant, or refused: ids, packed batches, streams, gates of a block, exports, evaluation."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification

import molora
from eval.architectures import TASKS, adapted, logits, tried
from eval.bases import batch_of, model_of
from molora import ConfigError, GateConfig, RoutingError
from molora.data.tasks import Task
from molora.evaluation.generate import generate_answers, greedy
from molora.evaluation.score import HeldOut, Limits
from molora.tuner.targets import stream_of


@pytest.fixture(scope="module")
def llama():
    return adapted(model_of("llama"), task_type="CAUSAL_LM")


def inputs(name="llama", **settings):
    batch = batch_of(name, **{"padded": False, **settings})
    batch.pop("labels")
    return batch


# -- task ids ------------------------------------------------------------------------------------------


def test_B5_two_ids_for_four_samples_are_refused(llama):
    batch = inputs(samples=4)
    for ids in (["alpha", "beta"], torch.tensor([0, 1])):
        with pytest.raises(RoutingError, match="for 2 samples, but the batch has 4"):
            llama(**batch, routing_task_ids=ids)
    with pytest.raises(RoutingError, match="for 2 samples"), molora.routing(llama, ["alpha", "beta"]):
        llama(**batch)
    assert torch.equal(
        llama(**batch, routing_task_ids=["beta"]).logits, llama(**batch, routing_task_ids="beta").logits
    )


def test_B5_features_for_fewer_samples_are_refused():
    model = adapted(
        model_of("llama"), GateConfig(scope="external", feature_dim=3, select="dense"), tasks=None
    )
    with pytest.raises(RoutingError, match="routing features for 2 samples, but the batch has 4"):
        model(**inputs(samples=4), routing_features=torch.randn(2, 3))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
@pytest.mark.parametrize("through", ["tuner", "base"])
def test_B5_a_generation_repeats_its_samples(llama, settings, through):
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 0, **settings}
    generator = llama if through == "tuner" else llama.get_base_model()
    for cache in (True, False):
        with molora.routing(llama, ["alpha", "beta", "gamma"]):
            out = generator.generate(**inputs(), **settings, use_cache=cache)
        assert len(out) == 3 * settings.get("num_return_sequences", 1)


@pytest.mark.parametrize(
    "ids",
    [[0.0, 1.0, 2.0], [True, False, True], torch.tensor([True, False, True]), torch.zeros(3), np.array([0.0, 1.0, 2.0]),
     np.array([True, False, True]), 1.0, True, [torch.tensor(1.0)] * 3],
)  # fmt: skip
def test_B5_ids_that_merely_look_like_numbers_are_refused(llama, ids):
    with pytest.raises(RoutingError, match=r"whole number|must be integers"):
        llama(**inputs(), routing_task_ids=ids)


@pytest.mark.parametrize(
    "ids", [[0, 1, 2], np.array([0, 1, 2]), [np.int64(0), np.int64(1), np.int64(2)], torch.tensor([0, 1, 2])]
)
def test_B5_whole_numbers_of_any_library_are_ids(llama, ids):
    with torch.no_grad():
        assert torch.equal(
            llama(**inputs(), routing_task_ids=ids).logits, llama(**inputs(), routing_task_ids=TASKS).logits
        )


@pytest.mark.parametrize(
    ("removes", "values", "said"),
    [(True, [0, 1], "removes columns"), (False, ["alpha", "beta"], "collator drops")],
)
def test_B5_ids_that_do_not_arrive_in_a_trainer_are_told_of(tmp_path, removes, values, said):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from molora.hf import MoLoraTrainerMixin

    class MyTrainer(MoLoraTrainerMixin, Trainer):
        pass

    rows = {"input_ids": [[6, 7, 8]] * 2, "labels": [[6, 7, 8]] * 2, "routing_task_ids": values}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, remove_unused_columns=removes, report_to=[], use_cpu=True
    )
    model = adapted(model_of("llama"), "token", task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=said):
        MyTrainer(model=model, args=arguments, train_dataset=Dataset.from_dict(rows)).train()


def test_B5_a_batch_without_a_mask_is_told_of_where_a_gate_pools_a_sequence():
    model = adapted(model_of("llama"), GateConfig(scope="sequence", select="dense"), tasks=None)
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 0]])}
    with pytest.warns(UserWarning, match="padding, if there is any, is read as text"):
        model(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**batch, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
        model(input_ids=batch["input_ids"][:1])
        same = torch.tensor([[5, 6, 7], [5, 6, 8]])  # generate() hands on no mask of ones alone
        model.base_model.generate(
            input_ids=same, attention_mask=torch.ones_like(same), max_new_tokens=2, pad_token_id=0
        )
        adapted(model_of("llama"), "token")(**batch)


# -- packed batches ------------------------------------------------------------------------------------


def test_B5_packed_batches_are_refused_where_a_gate_pools_a_sequence():
    model = adapted(model_of("llama"), GateConfig(scope="sequence", select="dense"), tasks=None)
    ids = inputs(samples=1)["input_ids"]
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(RoutingError, match=r"this batch is packed \(position_ids begin anew"):
        model(input_ids=ids, position_ids=packed)
    with pytest.raises(RoutingError, match="cu_seq_lens_q is given"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 4, 8]))
    padded = {
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5]]),
    }
    assert model(input_ids=ids, **padded).logits.shape[1] == 8
    adapted(model_of("llama"), "token")(input_ids=ids, position_ids=packed)


# -- who reads what, and who leads ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "stream"),
    [
        ("encoder.encoder.layer.0.attention.self.query", "encoder"),
        ("decoder.bert.encoder.layer.0.attention.self.query", "decoder"),
        ("decoder.bert.encoder.layer.0.crossattention.self.query", "decoder"),
        ("decoder.bert.encoder.layer.0.crossattention.self.key", "encoder"),
        ("decoder.bert.encoder.layer.0.crossattention.output.dense", "decoder"),
        ("decoder.transformer.h.0.crossattention.c_attn", "encoder"),
        ("decoder.transformer.h.0.crossattention.q_attn", "decoder"),
        ("decoder.block.0.layer.1.EncDecAttention.v", "encoder"),
        ("decoder.block.0.layer.1.EncDecAttention.o", "decoder"),
        ("decoder.block.0.layer.2.mlp.experts.expert_0.wi", "none"),
        ("lm_head", "decoder"),
    ],
)
def test_B5_the_outermost_name_says_whose_tokens_a_layer_reads(key, stream):
    assert stream_of(key, True) == stream


@pytest.mark.parametrize("name", ["phi3", "llama", "gpt2", "bart", "bert"])
def test_B5_the_gate_of_a_block_sits_at_the_first_layer_that_runs(name):
    model = adapted(model_of(name), GateConfig(share="block", top_k=2), tasks=None)
    assert torch.isfinite(model(**batch_of(name)).loss)
    if name == "phi3":
        assert any("layers.0.self_attn.qkv_proj.molora_gate" in n for n, _ in model.named_parameters())
        assert not any("o_proj.molora_gate" in n for n, _ in model.named_parameters())


# -- export --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "qwen3_next"])
def test_B6_what_stock_peft_would_misplace_is_not_exported(name, tmp_path):
    with pytest.raises(ConfigError, match="cannot be exported"):
        molora.export_lora(adapted(model_of(name)), tmp_path / "out", task="beta")
    assert not (tmp_path / "out").exists()
    attention = adapted(model_of(name), target_modules=r".*self_attn\.(o_proj|q_proj)")
    molora.export_lora(attention, tmp_path / "out", task="beta")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "jamba", "mamba", "bert"])
def test_B6_what_stock_peft_loads_as_it_is_is_exported(name):
    assert tried(name, "export") == "yes"


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta"])
def test_B6_an_exported_classifier_loads_with_its_labels_by_stock_means(name, tmp_path):
    base = model_of(name)
    base.config.id2label, base.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = adapted(base, task_type="SEQ_CLS")
    batch = inputs(name)
    molora.export_lora(model, tmp_path / "out", task="beta")
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    assert stored == sorted(set(stored))
    card = (tmp_path / "out" / "README.md").read_text()
    call = re.search(
        r"(AutoPeftModelForSequenceClassification\.from_pretrained\(.*\))\n```", card, re.DOTALL
    )[1]
    loaded = eval(
        call,
        {
            "AutoPeftModelForSequenceClassification": AutoPeftModelForSequenceClassification,
            "folder": tmp_path / "out",
        },
    )
    assert loaded.config.id2label == base.config.id2label
    with torch.no_grad():
        assert torch.allclose(
            logits(loaded.eval()(**batch)), logits(model(**batch, routing_task_ids="beta")), atol=1e-4
        )


# -- evaluation ----------------------------------------------------------------------------------------


class Words:
    """A tokenizer, as far as generating needs one."""

    pad_token_id, eos_token_id = 0, 2

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row.tolist())) for row in rows]


def test_B8_greedy_takes_nothing_from_the_models_own_generation_config(llama):
    prompts = [[6, 7, 8, 9], [10, 11, 12]]
    settings = {"batch_size": 2, "max_new_tokens": 6}
    with molora.routing(llama, "beta"):
        plain = generate_answers(llama, Words(), prompts, **settings)
        own = llama.get_base_model().generation_config
        before = own.to_dict()
        own.repetition_penalty, own.min_length, own.no_repeat_ngram_size = 5.0, 9, 1
        own.suppress_tokens = sorted({int(word) for row in plain for word in row.split()})
        own.do_sample, own.temperature, own.bad_words_ids = True, 3.0, [[int(plain[0].split()[0])]]
        try:
            assert generate_answers(llama, Words(), prompts, **settings) == plain
            assert llama.get_base_model().generation_config is own and own.repetition_penalty == 5.0
        finally:
            for name, value in before.items():
                setattr(own, name, value)
    assert greedy(llama, Words(), max_new_tokens=2).do_sample is False


def test_B8_the_target_as_trained_is_compared(tmp_path):
    from transformers import AutoTokenizer

    from tests.training.runs import write_tokenizer

    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:<think></think>{{ m.content }}<eos>{% else %}U:{{ m.content }};"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    records = [{"prompt": "p", "target": "yes"}]

    def result(answer, **settings):
        task = Task(
            "a", 0, records, records, prompt="{prompt}", target="{target}", chat_template=True, **settings
        )
        return HeldOut(None, tokenizer, task, Limits()).result(0, answer)

    found = result("<think></think>yes", metric="exact_match")
    assert found.prediction == found.target == "<think></think>yes"
    assert result("yes", metric="exact_match").prediction != found.target
