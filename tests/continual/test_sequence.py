"""The sequence runner: what a stage leaves, what a crash loses (nothing), what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import molora
from molora.cli.main import _run
from molora.cli.validate import command as validate
from molora.config import load_recipe
from molora.config.continual import GATED, STRATEGIES
from molora.config.data import KIND_OF_TASK_TYPE
from molora.continual import sequence, turn, turns
from molora.continual.gated import Gated
from molora.continual.grow import add_expert
from molora.continual.strategy import Strategy, expert_layers
from molora.data.prompts import encode, prompt_within
from molora.data.tasks import Task
from molora.errors import AdapterError, ConfigError, DataError
from molora.models.base import load_tokenizer
from molora.models.build import load_trained, tasks_of
from molora.store.adapter import read_config
from molora.store.runs import Run
from molora.training.train import with_labels
from tests.pictures import drawn
from tests.training.runs import write_encoder, write_tokenizer
from tests.training.test_seq2seq import write_t5
from tests.zoo import beyond

NAMES = ("pig", "mirror", "zigzag")
BACK = {"name": "back", "source": "synthetic", "generator": "back", "train_size": 8, "eval_size": 4}


def recipe(output, strategy="color", *, count=3, **changes):
    """A sequence that is learned at once: whatever the word, the answer is the first letter of the task."""
    made = {"source": "synthetic", "train_size": 24, "eval_size": 4}
    tasks = {name: {**made, "generator": name, "target": name[0]} for name in NAMES[:count]}
    whole = {
        "name": "seq", "base": "molora/tiny", "output": str(output), "adapter": {"r": 2, "lora_alpha": 4},
        "data": {"max_length": 48, "tasks": tasks}, "continual": {"strategy": strategy},
        "train": {"max_steps": 6, "batch_size": 8, "lr": 2e-2},
        "eval": {"batch_size": 8, "max_new_tokens": 2},
    }  # fmt: skip
    return {**whole, **changes}


def matrix(run):
    return json.loads((run.path / "matrix.json").read_text())


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole sequence of a strategy, trained once; a test that changes one takes it `to` a folder of its own."""
    runs = {}

    def finish(kind, to=None, **changes):
        key = json.dumps([kind, changes])
        if key not in runs:
            runs[key] = molora.train_sequence(recipe(tmp_path_factory.mktemp("whole"), kind, **changes))
        if to is None:
            return runs[key]
        shutil.copytree(runs[key].path.parents[1], to, symlinks=True, dirs_exist_ok=True)
        return Run.find(to / "seq")

    return finish


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """The section of an encoder-decoder base."""
    return {"model": str(write_t5(tmp_path_factory.mktemp("base") / "t5")), "task_type": "SEQ_2_SEQ_LM"}


class Stop(Exception):
    """A crash at a chosen moment."""


def stopping(hook, calls, count):
    """The hook, with a crash after its `count`-th call."""

    def after_step(self, model):
        hook(self, model)
        calls.append(1)
        if len(calls) == count:
            raise Stop

    return after_step


def crash_at_step(monkeypatch, count):
    calls = []

    for kind in (Strategy, Gated):
        monkeypatch.setattr(kind, "after_step", stopping(kind.after_step, calls, count))


def crash_while_scoring(monkeypatch, count):
    calls, real = [], turns.score_turn

    def score(*arguments):
        calls.append(1)
        if len(calls) == count:
            raise Stop
        return real(*arguments)

    monkeypatch.setattr(turns, "score_turn", score)


CRASHES = {"in the second task": (crash_at_step, 9), "before a row": (crash_while_scoring, 2)}
KINDS = ("color", "slao", "gated", "replay", "inf_lora", "o_lora")


# Each crash once; eval/soak.py kills more of them, at any moment.
FAST = {("slao", "in the second task")}


@pytest.mark.parametrize(
    ("kind", "crash"),
    [
        pytest.param(kind, crash, marks=() if (kind, crash) in FAST else pytest.mark.slow)
        for kind in KINDS
        for crash in CRASHES
    ],
)
def test_a_resumed_sequence_is_the_uninterrupted_one(kind, crash, finished, tmp_path, monkeypatch):
    whole = finished(kind, count=2)
    broken = recipe(tmp_path, kind, count=2)
    broken["train"]["save_every"] = 2
    break_off, count = CRASHES[crash]
    with monkeypatch.context() as patched:
        break_off(patched, count)
        with pytest.raises(Stop):
            molora.train_sequence(broken)
    resumed = molora.train_sequence(broken, resume=True)
    assert matrix(resumed) == matrix(whole)
    assert matrix(whole)["matrices"]["shown"]["rows"][1][1] == 1
    ours, theirs = weights(resumed.adapter), weights(whole.adapter)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (resumed.path / "matrix.csv").read_bytes() == (whole.path / "matrix.csv").read_bytes()


def test_stages_are_runs_and_earlier_adapters_are_never_touched(tmp_path, monkeypatch):
    seen = {}
    real = sequence.SequenceRun._play_turn

    def play(self, index, folder):
        real(self, index, folder)
        for stage in self.stages[: index + 1]:
            content = (stage / "adapter" / "adapter_model.safetensors").read_bytes()
            assert seen.setdefault(stage.name, content) == content

    monkeypatch.setattr(sequence.SequenceRun, "_play_turn", play)
    with drawn():
        run = molora.train_sequence(recipe(tmp_path))
    assert sorted(seen) == ["01-pig", "02-mirror", "03-zigzag"]
    found = matrix(run)
    assert all(found["unchanged"].values()) and set(found["unchanged"]) == set(NAMES)
    shown, hidden = found["matrices"]["shown"], found["matrices"]["hidden"]
    assert shown["base"] == [0, 0, 0] and shown["rows"] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert shown["summary"]["forgetting"] == 0 and shown["summary"]["AA"] == 1
    assert hidden["rows"] == [[1, None, None], [1, 1, None], [1, 1, 1]]
    assert set(found["inferred"]) == set(NAMES)
    for stage in sorted((run.path / "stages").iterdir()):
        assert molora.load_run(stage).config.continual is None
    for name in ("matrix.png", "matrix_hidden.png"):
        assert (run.path / name).stat().st_size > 1000
    assert (run.path / "matrix_hidden.csv").stat().st_size > 0


def test_the_finished_sequence_is_a_run_like_any_other(finished):
    run = finished("color")
    report = molora.evaluate(run, modes=["task"])
    last = matrix(run)["matrices"]["shown"]["rows"][-1]
    assert last == [1, 1, 1]
    assert [report.score(task, "task").value for task in NAMES] == last


KEPT, LOST = [[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("joint", [[1, 1, 1]]),
        pytest.param("sequential", LOST, marks=pytest.mark.slow),
        pytest.param("independent", KEPT, marks=pytest.mark.slow),
        pytest.param("n_lora", LOST, marks=pytest.mark.slow),
        pytest.param("ella", None, marks=pytest.mark.slow),
        ("gated", KEPT),
    ],
)
def test_every_other_strategy_runs(kind, rows, finished):
    """On tasks this easy what is forgotten is forgotten whole: the new letter is the answer to everything."""
    run = finished(kind)
    shown = matrix(run)["matrices"]["shown"]
    assert rows is None or shown["rows"] == rows
    assert len(shown["rows"]) == (1 if kind == "joint" else 3)
    assert ("hidden" in matrix(run)["matrices"]) == (kind != "independent")
    if kind == "joint":
        assert set(shown["summary"]) == {"AA"}


def test_classification_by_the_nearest_label(tmp_path):
    base = str(write_encoder(tmp_path / "base"))
    tasks = {}
    for name, labels in (("first", ["low", "high"]), ("second", ["high", "odd"])):
        file = tmp_path / f"{name}.jsonl"
        rows = [{"text": f"{name} text {i}", "label": labels[i % 2]} for i in range(20)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks[name] = {
            "source": "jsonl",
            "train": str(file),
            "eval": str(file),
            "labels": labels,
            "eval_size": 10,
        }
    whole = recipe(tmp_path / "runs") | {
        "base": {"model": base, "task_type": "SEQ_CLS", "head": "match"}, "data": {"max_length": 16, "tasks": tasks},
    }  # fmt: skip
    run = molora.train_sequence(whole)
    found = matrix(run)
    assert all(found["unchanged"].values())
    assert found["matrices"]["shown"]["summary"]["forgetting"] == 0
    report = molora.evaluate(run, modes=["task"])
    assert [score.value for score in report.scores] == found["matrices"]["shown"]["rows"][-1]


def refused(tmp_path, pattern, **changes):
    with pytest.raises(ConfigError, match=pattern):
        molora.train_sequence(recipe(tmp_path, **changes))
    assert not tmp_path.exists() or not any(tmp_path.iterdir())


def test_what_makes_no_sense_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "runs"
    refused(out, "Did you mean 'o_lora'", strategy="o_lore")
    refused(out, "not a setting of strategy 'color'", strategy={"kind": "color", "coefficient": 1.0})
    refused(out, "must name every task", continual={"strategy": "color", "order": ["pig"]})
    refused(out, "starts with one expert", adapter={"r": 2, "num_experts": 3})
    refused(out, "is no strategy", strategy={"kind": ["color"]})
    refused(out, "needs a gate of scope task", adapter={"r": 2, "gate": "constant"})
    refused(out, "transform gain", strategy="gated", adapter={"r": 2, "gate": "soft"})
    refused(out, "an A of its own", strategy="inf_lora", adapter={"r": 2, "share_A": True})
    refused(out, "frozen_experts", adapter={"r": 2, "frozen_experts": ["expert_0"]})
    refused(out, "acts only with base.head", continual={"strategy": "o_lora", "softmax": "seen"})
    refused(out, "norm unit", strategy="gated", adapter={"r": 2, "gate": {**GATED, "norm": "layer"}})
    refused(out, "which start from a new expert", adapter={"from_loras": {"a": "a"}})
    refused(
        out,
        "which start from a new expert",
        strategy="sequential",
        adapter={"from_loras": {"a": "a", "b": "b"}},
    )
    refused(out, "start with one", strategy="o_lora", adapter={"r": 2, "gate": "top_k"})
    unsound = {"kind": "top_k", "top_k": 1, "renorm": "sum"}
    refused(out, "makes every weight 1", strategy="o_lora", adapter={"r": 2, "gate": unsound})
    refused(out, "expert_names: is the strategy's", adapter={"r": 2, "expert_names": ["first"]})
    tasks = recipe(out)["data"]["tasks"]
    heavy = {**tasks, "pig": {**tasks["pig"], "weight": 2.0}}
    refused(out, "pig.weight: does nothing", data={"max_length": 48, "tasks": heavy})
    refused(out, "mixing: does nothing", data={"max_length": 48, "tasks": tasks, "mixing": "equal"})
    assert load_recipe(recipe(out, "joint", data={"max_length": 48, "tasks": heavy, "mixing": "equal"}))
    refused(out, "nope", adapter={"r": 2, "target_modules": ["nope"]})
    refused(out, "one device", train={"max_steps": 2, "devices": 2})
    refused(out, "ratio is given too", strategy={"kind": "replay", "ratio": 0.1, "count": 3})
    with pytest.raises(ConfigError, match="molora continual"):
        molora.train(recipe(out))
    with pytest.raises(ConfigError, match="no `continual` section"):
        molora.train_sequence({key: value for key, value in recipe(out).items() if key != "continual"})


def test_a_mixture_with_any_gate_may_be_the_one_expert(tmp_path):
    mixture = {"r": 2, "num_experts": 3, "gate": {"kind": "top_k", "top_k": 2}}
    mixture["always_on"] = {"expert_0": 1.0}
    run = molora.train_sequence(recipe(tmp_path, "sequential", adapter=mixture, count=2))
    assert read_config(run.adapter).expert_names == ["expert_0", "expert_1", "expert_2"]


def test_from_loras_is_the_only_problem_of_a_sequence_that_has_them(tmp_path):
    with pytest.raises(ConfigError, match="from_loras") as found:
        load_recipe(recipe(tmp_path, adapter={"from_loras": {"a": "a", "b": "b"}}))
    assert "problems" not in str(found.value) and "num_experts" not in str(found.value)


@pytest.mark.parametrize("kind", KIND_OF_TASK_TYPE)
def test_a_pass_gives_generative_models_their_targets(kind, tmp_path):
    """They say where the prompt ends, which is what gates read when the model is trained and when it answers."""
    whole = recipe(tmp_path)
    tasks = whole["data"]["tasks"]
    if kind == "SEQ_2_SEQ_LM":
        whole["base"] = {"model": str(write_t5(tmp_path / "base")), "task_type": kind}
    if kind == "SEQ_CLS":
        whole["base"] = {"model": str(write_encoder(tmp_path / "base")), "task_type": kind, "head": "match"}
        label = {"text": "{prompt}", "label": "word", "labels": ["a", "b"]}
        rows = [{"prompt": f"text {i}", "word": "ab"[i % 2]} for i in range(8)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = str(tmp_path / "rows.jsonl")
        tasks = {"pig": {"source": "jsonl", "train": file, "eval": file, **label}}
    whole["data"]["tasks"] = tasks
    config = with_labels(load_recipe(whole), tasks_of(load_recipe(whole)))
    found = tasks_of(config)
    running = sequence.SequenceRun(config, found, Run(tmp_path / "run"))
    model, tokenizer = running._model(0)
    batch = next(turn.passes(config, model, tokenizer, next(iter(found))))
    assert ("labels" in batch) == (kind != "SEQ_CLS")
    if kind == "CAUSAL_LM":
        first = encode(found["pig"], found["pig"].train[0], tokenizer, 48)
        assert int((batch["labels"][0] == -100).int().cumprod(0).sum()) >= first.prompt_length


def test_loss_free_balance_leaves_old_experts_alone(tmp_path):
    gate = {"kind": "top_k", "top_k": 1, "balance_rate": 0.1}
    adapter = {"r": 2, "lora_alpha": 4, "gate": gate}
    run = molora.train_sequence(recipe(tmp_path, "inc_lora", adapter=adapter, count=2))
    assert matrix(run)["unchanged"] == dict.fromkeys(NAMES[:2], True)
    moved = [t for name, t in weights(run.adapter).items() if name.endswith("balance")]
    assert any(t[-1] != 0 for t in moved)


def test_later_stages_train_as_the_first(tmp_path, monkeypatch):
    """Without a key-value cache and with the checkpointing that the recipe asks for."""
    seen, real = [], turn.fit

    def fit(config, model, *rest):
        base = model.get_base_model()
        seen.append((base.config.use_cache, base.is_gradient_checkpointing))
        return real(config, model, *rest)

    monkeypatch.setattr(turn, "fit", fit)
    train = {**recipe(tmp_path)["train"], "max_steps": 1, "gradient_checkpointing": True}
    run = molora.train_sequence(recipe(tmp_path, "inc_lora", train=train, count=2))
    add_expert(run, {"task": BACK, "train": {"max_steps": 1}})
    assert seen == [(False, True)] * 3


class Shrinking(Strategy):
    """A strategy of a user's own."""

    def loss(self, model):
        sizes = [bank.stacks["B"].trainable.square().sum() for _, _, bank in expert_layers(model)]
        return {"small": self.number("coefficient") * sum(sizes)}


@pytest.fixture
def own_strategies():
    """What a test registers is forgotten after it."""
    kept = list(STRATEGIES)
    yield
    for name in [name for name in STRATEGIES if name not in kept]:
        STRATEGIES.remove(name)


@pytest.mark.usefixtures("own_strategies")
def test_a_strategy_of_ones_own(tmp_path):
    molora.register_strategy("shrinking", Shrinking, settings={"coefficient": 1e4})
    run = molora.train_sequence(recipe(tmp_path, "shrinking", count=2))
    # Nothing can be learned under so much of it.
    assert matrix(run)["matrices"]["shown"]["summary"]["AA"] == 0
    assert "continual/small" in (run.path / "stages" / "01-pig" / "metrics.csv").read_text()
    weak = molora.train_sequence(recipe(tmp_path, {"kind": "shrinking", "coefficient": 0.0}, count=2))
    assert matrix(weak)["matrices"]["shown"]["summary"]["LA"] == 1
    with pytest.raises(ConfigError, match="there is a strategy 'color' already"):
        molora.register_strategy("color", Shrinking)
    with pytest.raises(ConfigError, match="'strength' is no setting of strategies"):
        molora.register_strategy("mild", Shrinking, settings={"strength": 1})
    for wrong in ({"settings": {"norm": "l3"}}, {"gate": "top_k"}, {"gate": "nobody"}):
        with pytest.raises(ConfigError):
            molora.register_strategy("mild", Shrinking, **wrong)
    with pytest.raises(ConfigError, match="no subclass"):
        molora.register_strategy("mild", int)
    assert "mild" not in STRATEGIES
    with pytest.raises(ConfigError, match="Did you mean 'shrinking'"):
        load_recipe(recipe(tmp_path, "shrinkin"))


class Rehearsal(Strategy):
    """Trains on everything so far."""

    def training_tasks(self, stage):
        return stage.seen


@pytest.mark.usefixtures("own_strategies")
def test_a_strategy_of_ones_own_says_how_it_works(tmp_path):
    molora.register_strategy("rehearsal", Rehearsal, one_expert=True)
    tasks, short = recipe(tmp_path, count=2)["data"]["tasks"], {"max_steps": 1, "batch_size": 8}
    whole = {"max_length": 48, "mixing": "equal", "tasks": tasks}
    run = molora.train_sequence(recipe(tmp_path, "rehearsal", data=whole, train=short))
    assert read_config(run.adapter).expert_names == ["shared"]
    shrinking = {"settings": {"coefficient": 0.1}, "gate": "task", "without_memory": True}
    molora.register_strategy("shrinking", Shrinking, **shrinking)
    run = molora.train_sequence(recipe(tmp_path, "shrinking", train=short, count=2))
    assert read_config(run.adapter).gate.scope == "task"
    done = add_expert(run, {"task": BACK, "train": {"max_steps": 1}, "strategy": "shrinking"})
    assert "continual/small" in (done.path / "metrics.csv").read_text()


@pytest.mark.usefixtures("own_strategies")
@pytest.mark.parametrize("change", [{"mixing": "equal"}, {"mixing_temperature": 9.0}, {"weight": 2.0}])
def test_a_mix_is_refused_under_a_strategy_of_ones_own_that_trains_on_one_task_at_a_time(change, tmp_path):
    molora.register_strategy("shrinking", Shrinking, settings={"coefficient": 0.1})
    data = recipe(tmp_path)["data"]
    if "weight" in change:
        data["tasks"]["pig"] |= change
    else:
        data |= change
    with pytest.raises(ConfigError, match="strategy shrinking trains on one task at a time"):
        load_recipe(recipe(tmp_path, "shrinking", data=data))
    molora.register_strategy("rehearsal", Rehearsal, one_expert=True)
    rehearsed = recipe(tmp_path, {"kind": "rehearsal"}, data=data)
    assert load_recipe(rehearsed).continual.strategy.kind == "rehearsal"


def test_a_sum_of_experts_stays_one(finished):
    run = finished("o_lora", count=2)
    gates = [t for name, t in weights(run.adapter).items() if "molora_gate" in name]
    assert gates and all(torch.equal(t, torch.ones_like(t)) for t in gates)


def test_a_sequence_can_grow_by_hand(finished):
    run = finished("inc_lora", count=2)
    done = add_expert(run, {"task": BACK, "train": {"max_steps": 1}, "strategy": "ella"})
    assert done.config.continual is None
    assert molora.evaluate(done, modes=["task"], tasks=["pig"]).score("pig", "task").count == 4


def test_the_router_is_that_of_a_finished_sequence_and_cuts_prompts(finished, tmp_path):
    run = finished("color", to=tmp_path)
    model, tokenizer, _ = load_trained(run.path)
    namer = molora.load_router(run)
    assert namer.tasks == list(NAMES)
    long = "pig(" + "a" * 400 + ")="
    assert namer(model, tokenizer, [long, "zigzag(abc)="])[1] == "zigzag"
    (run.path / "adapter").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no finished sequence"):
        molora.load_router(run)


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"])
def test_the_router_reads_what_was_scored(kind, tmp_path):
    if kind == "CAUSAL_LM":
        tokenizer = load_tokenizer(load_recipe(recipe(tmp_path)).base)
    else:
        tokenizer = write_tokenizer(tmp_path / "base")
    text = "pig(" + "abc" * 30 + ")="
    record = {"prompt": text, "target": "x", "text": text, "label": 0}
    asked = {"kind": "classification", "labels": ("a", "b")} if kind == "SEQ_CLS" else {}
    example = encode(
        Task("a", 0, [record], task_type=kind, kind=asked.pop("kind", KIND_OF_TASK_TYPE[kind]), **asked),
        record,
        tokenizer,
        24,
    )
    found = prompt_within(tokenizer, text, 24, kind)
    scored = list(example.input_ids[: example.prompt_length])
    assert found[-len(scored) + 1 :] == scored[1:] and (kind == "CAUSAL_LM" or found == scored)


def test_a_damaged_sequence_is_not_published(finished, tmp_path):
    run = finished("color", to=tmp_path)
    shutil.rmtree(run.adapter)  # as if stopped before that was published
    with pytest.raises(AdapterError, match="has no adapter yet") as found:
        molora.evaluate(run)
    assert "molora continual" in found.value.hint
    last = sorted((run.path / "stages").iterdir())[-1]
    row = last / "row.json"
    whole = row.read_text()
    row.write_text("{}")
    with pytest.raises(AdapterError, match="not a row of the matrix"):
        molora.train_sequence(recipe(tmp_path), resume=True)
    row.write_text(whole)
    file = last / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(AdapterError, match="damaged"):
        molora.train_sequence(recipe(tmp_path), resume=True)
    assert not run.adapter.exists()
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    molora.train_sequence(recipe(tmp_path), resume=True)
    assert molora.evaluate(run, modes=["task"]).scores


def test_validate_finds_what_a_sequence_would_refuse(tmp_path, capsys):
    whole = recipe(tmp_path)
    file = tmp_path / "only.jsonl"
    file.write_text('{"prompt": "a", "target": "b"}\n')
    whole["data"]["tasks"]["only"] = {"source": "jsonl", "train": str(file)}
    (tmp_path / "seq.yaml").write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="no held-out records") as found:
        validate(tmp_path / "seq.yaml", [])
    assert found.value.hint == "give it `eval`."


def test_a_faulty_record_of_the_last_task_shows_before_the_first_is_trained(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a"}\n')
    tasks = recipe(tmp_path)["data"]["tasks"] | {
        "bad": {"source": "jsonl", "train": str(file), "eval": str(file)}
    }
    with pytest.raises(DataError, match="target"):
        molora.train_sequence(recipe(tmp_path / "runs", data={"max_length": 48, "tasks": tasks}))
    assert not (tmp_path / "runs").exists()


def test_a_finished_stage_fixes_the_length_of_training(finished, tmp_path):
    finished("color", to=tmp_path)
    with pytest.raises(ConfigError, match=r"eval\.max_new_tokens is 5"):
        molora.train_sequence(recipe(tmp_path, eval={"batch_size": 8, "max_new_tokens": 5}), resume=True)
    longer = recipe(tmp_path, train={**recipe(tmp_path)["train"], "max_steps": 7})
    with pytest.raises(ConfigError, match=r"train\.max_steps is 7"):
        molora.train_sequence(longer, resume=True)


def test_the_gate_follows_the_strategy_unless_the_recipe_has_one(tmp_path):
    gates = {kind: load_recipe(recipe(tmp_path, kind)).adapter.gate for kind in ("o_lora", "color", "gated")}
    assert (gates["o_lora"].scope, gates["o_lora"].transform, gates["o_lora"].start) == (
        "constant",
        "identity",
        1.0,
    )
    assert (gates["color"].scope, gates["gated"].transform) == ("task", "gain")
    own = load_recipe(recipe(tmp_path, "o_lora", adapter={"r": 2, "gate": "soft"}))
    assert (own.adapter.gate.scope, own.adapter.num_experts) == ("token", 1)


@pytest.mark.parametrize("kind", beyond(["color", "inf_lora", "gated"], "color"))
def test_encoder_decoder_models(kind, finished, t5):
    found = matrix(finished(kind, base=t5, count=2))
    assert len(found["matrices"]["hidden"]["rows"]) == 2
    assert all(found["unchanged"].values()) or kind != "color"


def test_add_expert_takes_the_kind_of_the_run(finished, t5):
    run = finished("color", base=t5, count=2)
    done = add_expert(run, {"task": BACK, "train": {"max_steps": 1}})
    assert done.config.data.tasks["back"].kind == "seq2seq"
    small = ["task.train_size=8", "task.eval_size=4", "train.max_steps=1"]
    assert _run(["add-expert", str(run.path), "--task", "low", "--synthetic", "lower", *small]) == 0
