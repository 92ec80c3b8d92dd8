"""Prompts: templates reach for nothing but fields, and exactly the answer's tokens are learned."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora.data.preview import preview
from molora.data.prompts import IGNORED, encode
from molora.data.records import Record
from molora.data.render import label_index, render
from molora.data.tasks import Task
from molora.data.templates import fill_template
from molora.errors import ConfigError, DataError
from tests.data.conftest import CHAT_TEMPLATE, build_tokenizer

BOS, EOS = 0, 1
PLAIN = {"prompt": "2+2=", "target": "four"}


def task(**more):
    return Task(**({"name": "t", "id": 3, "train": [PLAIN]} | more))


def text_of(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=False)


# -- templates ------------------------------------------------------------------------------------------


def test_templates_fill_fields_and_keep_braces():
    record = {"question": "{answer}", "the answer": 4, "ok": True, "x": 0.1}
    assert fill_template("Q: {question}\nA: {the answer} {ok} {x}", record) == "Q: {answer}\nA: 4 true 0.1"
    assert fill_template('{{"q": "{question}"}}', record) == '{"q": "{answer}"}'
    assert fill_template("", record) == ""


@pytest.mark.parametrize(
    "template",
    [
        "{a.b}",
        "{a[0]}",
        "{a!r}",
        "{a:>9}",
        "{a:{b}}",
        "{}",
        "{ a}",
        "{a.__class__}",
        "{a",
        "a}",
        "{a!}",
        "{{a}",
    ],
)
def test_templates_that_are_more_than_names_are_refused(template):
    with pytest.raises(ConfigError) as error:
        fill_template(template, {"a": "x", "b": "y"})
    assert repr(template) in str(error.value)


@given(st.text(max_size=30))
def test_any_template_fills_or_is_refused(template):
    try:
        fill_template(template, {"a": "x"})
    except (ConfigError, DataError) as error:
        assert error.hint


def test_a_missing_field_names_the_row_and_the_fields():
    record = Record({"Question": "?", "answer": "!"}, "data/law.jsonl:17")
    with pytest.raises(DataError) as error:
        fill_template("{question}", record)
    assert str(error.value) == (
        "data/law.jsonl:17: has no field 'question'. Did you mean 'Question'?\n  hint: its fields: Question, answer"
    )
    for value in (None, ["a"], {"b": 1}):
        with pytest.raises(DataError, match=r"law.jsonl:17: the field 'q' is"):
            fill_template("{q}", Record({"q": value}, "law.jsonl:17"))


# -- causal models --------------------------------------------------------------------------------------


def test_only_the_target_and_its_end_are_learned(tokenizer):
    example = encode(task(), PLAIN, tokenizer, 64)
    assert text_of(tokenizer, example.input_ids) == "<bos>2+2=four<eos>"
    assert (
        example.prompt_length == 5 and example.task_id == 3 and example.cut_prompt == example.cut_target == 0
    )
    assert example.labels == [IGNORED] * 5 + example.input_ids[5:]
    assert example.labels[-1] == EOS


@given(prompt=st.text("ab =é", min_size=1), target=st.text("ab =é"), max_length=st.integers(1, 40))
def test_masking_is_exact_at_every_length(tokenizer, prompt, target, max_length):
    example = encode(task(), {"prompt": prompt, "target": target}, tokenizer, max_length)
    whole_prompt, whole_target = tokenizer(prompt).input_ids, [*tokenizer(target).input_ids[1:], EOS]
    length = example.prompt_length
    given_ids, learned = list(example.input_ids[:length]), list(example.input_ids[length:])
    assert example.labels == [IGNORED] * length + learned
    assert len(example.input_ids) <= max_length
    assert learned == whole_target[: len(learned)]  # the target only ever loses its end ...
    assert example.cut_target == len(whole_target) - len(learned)
    assert (learned == whole_target) == (
        len(whole_target) <= max(1, max_length - 1)
    )  # ... if it cannot be whole
    assert example.cut_prompt == len(whole_prompt) - length
    if length > 1:  # the prompt loses its beginning, after the start token
        assert given_ids == [BOS, *whole_prompt[len(whole_prompt) - length + 1 :]]
    if max_length > 1:
        assert length >= 1 and example.learns


def test_prompt_tokens_do_not_depend_on_the_target(make_tokenizer):
    """`=` and `f` merge in the joined text, but in generation the model sees the prompt alone."""
    merging = make_tokenizer(merges=[("=", "f")])
    assert "=f" in merging.convert_ids_to_tokens(merging("2+2=four").input_ids)
    example = encode(task(), PLAIN, merging, 64)
    assert list(example.input_ids[: example.prompt_length]) == merging("2+2=").input_ids


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("end_texts", [True, False])
def test_tokenizers_that_end_texts_do_not_end_prompts(make_tokenizer, bos, end_texts):
    example = encode(task(), PLAIN, make_tokenizer(bos=bos, end_texts=end_texts), 64)
    assert list(example.input_ids).count(EOS) == 1 and example.input_ids[-1] == EOS
    assert (example.input_ids[0] == BOS) == bos


def test_a_tokenizer_without_an_end_is_refused(make_tokenizer):
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        encode(task(), PLAIN, make_tokenizer(eos_token=None), 64)


def test_an_empty_answer_is_learned_but_nothing_before_it_is_not(make_tokenizer):
    bare = make_tokenizer(bos=False)
    assert encode(task(), {"prompt": "a", "target": ""}, bare, 8).learns
    assert not encode(task(), {"prompt": "", "target": ""}, bare, 8).learns
    assert not encode(task(), PLAIN, bare, 1).learns


# -- conversations --------------------------------------------------------------------------------------


@pytest.fixture
def chatty():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_chat_templates_mask_everything_before_the_answer(chatty):
    example = encode(task(chat_template=True), PLAIN, chatty, 99)
    given_ids, learned = (
        example.input_ids[: example.prompt_length],
        example.input_ids[example.prompt_length :],
    )
    assert text_of(chatty, given_ids) == "<|user|>2+2=<eos>\n<|assistant|>"
    assert text_of(chatty, learned) == "four<eos>"  # the line end behind <eos> is dropped
    assert list(example.labels[example.prompt_length :]) == list(learned)


def test_conversations_learn_their_last_answer(chatty):
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    record = {"talk": [{"role": role, "content": content} for role, content in turns]}
    talk = task(messages="talk")
    assert render(talk, record) == ("system: Be brief.\nuser: a\nassistant: b\nuser: c", "d")
    example = encode(talk, record, chatty, 200)
    assert text_of(chatty, example.input_ids[example.prompt_length :]) == "d<eos>"
    assert "assistant|>b<eos>" in text_of(chatty, example.input_ids[: example.prompt_length])


def test_a_template_without_an_end_gets_one(chatty):
    chatty.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    chatty.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    example = encode(task(chat_template=True), PLAIN, chatty, 99)
    assert text_of(chatty, example.input_ids) == "[user]2+2=[assistant]four<eos>"


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ("hello", "at least two messages"),
        ([{"role": "assistant", "content": "a"}], "at least two messages"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "of role 'user'"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "b"}], "message 1 of 'talk'"),
        ([{"role": "user", "content": "a"}, "b"], "message 2 of 'talk'"),
    ],
)
def test_broken_conversations_name_their_row(chatty, turns, words):
    with pytest.raises(DataError, match=r"^rows:4: ") as error:
        encode(task(messages="talk"), Record({"talk": turns}, "rows:4"), chatty, 99)
    assert words in str(error.value)


def test_chat_formats_that_cannot_be_used_say_why(chatty, tokenizer):
    with pytest.raises(ConfigError, match="has no chat template"):
        encode(task(chat_template=True), PLAIN, tokenizer, 99)
    chatty.chat_template = "{{ raise_exception('only even turns') }}"
    with pytest.raises(DataError, match="refuses the conversation: only even turns"):
        encode(task(chat_template=True), PLAIN, chatty, 99)
    chatty.chat_template = "{{ messages | length }}{{ messages[-1].content }}"
    with pytest.raises(DataError, match="differently once it is answered"):
        encode(task(chat_template=True), PLAIN, chatty, 99)


# -- classification and seq2seq -------------------------------------------------------------------------

NEWS = {"kind": "classification", "labels": ("World", "Sports", "10")}


@pytest.mark.parametrize(("value", "index"), [("Sports", 1), (2, 2), ("1", 1), ("10", 2), (0, 0)])
def test_labels_are_names_or_indices(value, index):
    assert label_index(task(**NEWS), {"label": value}) == index


@pytest.mark.parametrize("value", ["sport", 3, -1, "7", None, True, 1.0, ["World"], "²"])
def test_a_foreign_label_names_its_row_and_the_labels(value):
    with pytest.raises(
        DataError, match=r"news.jsonl:9: .* is not a label of task 't'.*\n.*World, Sports, 10"
    ):
        label_index(task(**NEWS), Record({"label": value}, "news.jsonl:9"))


def test_a_classification_head_gets_a_class(make_tokenizer):
    ends = make_tokenizer(end_texts=True)
    example = encode(task(**NEWS), {"text": "goal!", "label": "Sports"}, ends, 64)
    assert text_of(ends, example.input_ids) == "<bos>goal!<eos>" and example.labels == 1 and example.learns
    cut = encode(task(**NEWS), {"text": "goal!", "label": "Sports"}, ends, 4)
    assert text_of(ends, cut.input_ids) == "<bos>go<eos>" and cut.cut_prompt == 3


def test_a_language_model_learns_the_name_of_the_class(tokenizer):
    written = task(**NEWS, task_type="CAUSAL_LM", text="{text} -> ")
    example = encode(written, {"text": "goal!", "label": 1}, tokenizer, 64)
    assert text_of(tokenizer, example.input_ids[example.prompt_length :]) == "Sports<eos>"


def test_seq2seq_cuts_each_side_by_itself(make_tokenizer):
    ends = make_tokenizer(bos=False, end_texts=True)
    example = encode(task(kind="seq2seq"), PLAIN, ends, 64)
    assert text_of(ends, example.input_ids) == "2+2=<eos>" and text_of(ends, example.labels) == "four<eos>"
    assert example.prompt_length == len(example.input_ids) and example.learns
    cut = encode(task(kind="seq2seq"), PLAIN, ends, 3)
    assert text_of(ends, cut.input_ids) == "2=<eos>" and text_of(ends, cut.labels) == "fou"
    assert (cut.cut_prompt, cut.cut_target) == (2, 2)


# -- preview --------------------------------------------------------------------------------------------


def test_a_preview_shows_what_is_given_and_what_is_learned(tokenizer):
    rows = [Record({"prompt": f"{i}=", "target": "x" * i}, f"rows:{i + 1}") for i in range(5)]
    shown = preview(task(train=rows), tokenizer, n=3, max_length=4)
    assert [p.where for p in shown] == ["rows:1", "rows:2", "rows:3"]
    assert [(p.prompt, p.target) for p in shown] == [
        ("<bos>0=", "<eos>"),
        ("<bos>=", "x<eos>"),
        ("=", "xx<eos>"),
    ]
    assert [(t.text, t.learned) for t in shown[1].tokens] == [
        ("<bos>", False), ("=", False), ("x", True), ("<eos>", True),
    ]  # fmt: skip
    assert shown[1].cut_prompt == 1
    (head,) = preview(task(**NEWS, train=[{"text": "goal", "label": 1}]), tokenizer)
    assert head.target == "Sports (class 1)" and not any(token.learned for token in head.tokens)
