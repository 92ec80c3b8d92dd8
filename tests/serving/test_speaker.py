"""A mixture that answers: what `generate` gives, for the task, the experts or the base that was chosen, and who it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import molora
from molora import ConfigError, MoLoraConfig, routing
from molora.assets import tiny_path
from molora.config import RunConfig
from molora.serving.speaker import PLAIN, Search, Speaker, how_trained
from tests.config.recipes import small
from tests.training.runs import write_encoder
from tests.zoo import randomise

WORDS = ("abc", "house", "tree", "xyz", "hello", "word", "rain", "blue")
SEARCH = Search(max_new_tokens=6)
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def model(tokenizer) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(tiny_path())
    config = MoLoraConfig(
        num_experts=2, r=2, target_modules="all-linear", gate={"kind": "task"}, tasks=["shout", "spell"], router="gaussian",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config)
    randomise(model)
    molora.fit_router(model, tokenizer, {t: [f"{t}({w})=" for w in WORDS] for t in ("shout", "spell")})
    return model.eval()


def by_hand(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_answer_is_what_generate_gives_and_says_who_gave_it(model, tokenizer, capsys):
    speaker = Speaker(model, tokenizer)
    with torch.no_grad(), routing(model, task_ids="spell"):
        expected = by_hand(model, tokenizer, "spell(tree)=")
    answer = speaker.say(
        "spell(tree)=", SEARCH, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    assert (answer.text, answer.task, answer.by) == (expected, "spell", "router") and answer.certainty > 0.9
    assert answer.experts == {"expert_0": 0.0, "expert_1": 1.0}
    assert capsys.readouterr().out == f"{expected}\n"


def test_what_is_chosen_decides(model, tokenizer):
    speaker = Speaker(model, tokenizer)
    answers = {}
    for name, choice, context in (
        ("task", {"task": "shout"}, routing(model, task_ids="shout")),
        (
            "experts",
            {"experts": ["expert_0", "expert_1"]},
            routing(model, task_ids="shout", experts=["expert_0", "expert_1"]),
        ),
        ("base", {"base": True}, model.disable_adapter()),
    ):
        speaker.choose(**choice)
        with torch.no_grad(), context:
            expected = by_hand(model, tokenizer, "spell(tree)=")
        answers[name] = speaker.say("spell(tree)=", SEARCH)
        assert answers[name].text == expected, name
    assert answers["task"].task == "shout" and answers["experts"].experts == {
        "expert_0": 0.5,
        "expert_1": 0.5,
    }
    assert answers["base"].experts == {} and answers["base"].task is None
    assert [answers[name].by for name in ("task", "experts", "base")] == ["choice", "choice", "base"]
    with pytest.raises(ConfigError, match=r"no task 'shuot'. Did you mean 'shout'\?"):
        speaker.choose(task="shuot")
    with pytest.raises(ConfigError, match="no expert 'e'"):
        speaker.choose(experts=["e"])
    with pytest.raises(ConfigError, match="exclude each other"):
        speaker.choose(task="shout", base=True)


def test_the_gate_decides_where_no_expert_is_hidden(tokenizer):
    base = AutoModelForCausalLM.from_pretrained(tiny_path())
    config = MoLoraConfig(
        num_experts=2,
        r=2,
        target_modules=["q_proj"],
        tasks=["shout", "spell"],
        router="gaussian",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).eval()
    molora.fit_router(model, tokenizer, {t: [f"{t}({w})=" for w in WORDS] for t in ("shout", "spell")})
    answer = Speaker(model, tokenizer).say("spell(tree)=", SEARCH)
    assert (answer.task, answer.by) == ("spell", "gate")


def test_an_answer_never_goes_beyond_the_bases_positions(model, tokenizer):
    positions = model.config.max_position_embeddings
    speaker = Speaker(model, tokenizer, max_length=positions)
    speaker.choose(base=True)
    prompt = "x" * (positions - 4)
    answer = speaker.say(prompt, Search(max_new_tokens=50)).text
    assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) <= 4


def test_many_answers_are_those_of_one_at_a_time_in_their_order(model, tokenizer):
    speaker = Speaker(model, tokenizer)
    prompts = ["spell(a)=", "shout(a longer one)=", "spell(tree)="]
    together = list(speaker.answers(prompts, SEARCH, batch_size=2))
    alone = [speaker.say(prompt, SEARCH) for prompt in prompts]
    assert [(a.text, a.task) for a in together] == [(a.text, a.task) for a in alone]
    assert list(speaker.answers([], SEARCH)) == []


def test_tokens_are_drawn_where_the_temperature_is_above_0(model, tokenizer):
    speaker = Speaker(model, tokenizer)
    speaker.choose(base=True)
    drawn = set()
    for seed in range(4):
        torch.manual_seed(seed)
        drawn.add(speaker.say("shout(a)=", Search(6, temperature=3.0)).text)
    assert len(drawn) > 1
    nearly_greedy = speaker.say("shout(a)=", Search(6, temperature=3.0, top_p=1e-6)).text
    assert nearly_greedy == speaker.say("shout(a)=", SEARCH).text


def test_conversations_and_templates(model, tokenizer):
    with pytest.raises(ConfigError, match="has no chat template"):
        Speaker(model, tokenizer, chat=True)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    told = AutoTokenizer.from_pretrained(tiny_path())
    told.chat_template = CHAT
    speaker = Speaker(model, told, chat=True)
    assert told.decode(speaker.tokens(turns)) == "<user>a<assistant>b<user>c<answer>"
    assert told.decode(speaker.tokens("a")) == "<user>a<answer>"
    assert (
        tokenizer.decode(Speaker(model, tokenizer, template="Q: {prompt}\n").tokens("why")) == "<bos>Q: why\n"
    )
    short = Speaker(model, tokenizer, max_length=4).tokens("abcdefgh")
    assert tokenizer.decode(short) == "<bos>fgh"


def test_prompts_are_written_as_the_run_was_trained():
    def tasks(**all_tasks):
        return RunConfig.model_validate(small(data={"tasks": all_tasks}))

    one = {"source": "jsonl", "train": "a.jsonl", "prompt": "Q: {question}\n", "target": "{answer}"}
    assert how_trained(tasks(a=one)) == (False, "Q: {prompt}\n")
    assert how_trained(tasks(a=one, b=one | {"prompt": "Q: {text}\n"})) == (False, "Q: {prompt}\n")
    assert how_trained(tasks(a=one, b=one | {"prompt": "{question} {more}"})) == (False, PLAIN)
    assert how_trained(tasks(a=one, b=one | {"prompt": "{{x}} {t}"}), "b") == (False, "{{x}} {prompt}")
    assert how_trained(tasks(a=one | {"chat_template": True})) == (True, PLAIN)
    assert how_trained(None) == (False, PLAIN)


def test_a_classifier_writes_no_text(tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    folder = write_encoder(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    classifier = get_peft_model(
        base, MoLoraConfig(num_experts=2, r=2, target_modules=["query"], task_type="SEQ_CLS")
    )
    with pytest.raises(ConfigError, match="it writes no text"):
        Speaker(classifier, AutoTokenizer.from_pretrained(folder))
