"""Preferences: pairs in a batch, the losses by hand, a reference that is the model before, and what training does."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from molora.config import load_recipe
from molora.config.objective import ObjectiveConfig
from molora.continual.grow import UNCHANGED, add_expert
from molora.data.collate import collate_pairs
from molora.data.prompts import encode
from molora.data.tasks import Task
from molora.errors import ConfigError
from molora.training.preferences import Preferences, as_before, log_probs, pair_loss
from molora.training.train import train
from tests.training.runs import recipe_for, write_base, write_tokenizer
from tests.zoo import batch_for, molora_model

PAIR = {"prompt": "say it: ", "chosen": "yes please", "rejected": "no"}


def pairs_for(architecture: str = "llama", rows: int = 4) -> dict[str, Tensor]:
    """A batch of pairs: the second half has the prompts of the first and other answers."""
    batch = batch_for(architecture, batch=rows, padding="right")
    labels = batch["labels"].clone()
    if architecture == "llama":
        labels[:, :3] = -100
        labels[batch["attention_mask"] == 0] = -100
        batch["input_ids"][rows // 2 :, :3] = batch["input_ids"][: rows // 2, :3]
    return {**batch, "labels": labels}


# -- data ---------------------------------------------------------------------------------------------


def test_a_pair_has_one_prompt_and_two_answers(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    task = Task("a", 3, train=[PAIR], target="{chosen}", rejected="{rejected}")
    for most in (100, 12, 9):  # the longer answer decides what is cut of the prompt
        example = encode(task, PAIR, tokenizer, most).compact()
        other = example.rejected
        assert other is not None and [*example.prompt] == [*other.prompt]
        assert tokenizer.decode(other.labels[other.prompt_length :]) == "no<eos>"
        answer = tokenizer.decode(example.labels[example.prompt_length :])
        assert answer == ("yes please<eos>" if most > 10 else "yes plea")
        assert len(example.input_ids) <= most and example.task_id == other.task_id == 3
    batch = collate_pairs([example, example], pad_id=0)
    assert batch["input_ids"].shape[0] == 4 and batch["routing_task_ids"].tolist() == [3] * 4
    assert torch.equal(batch["labels"][0], batch["labels"][1]) and (batch["labels"][2] != -100).sum() == 3


def test_conversations_have_pairs_too(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    record = {
        **PAIR,
        "turns": [{"role": "user", "content": "say it: "}, {"role": "assistant", "content": "yes please"}],
    }
    for how in ({"target": "{chosen}", "chat_template": True}, {"messages": "turns"}):
        example = encode(Task("a", 0, train=[record], rejected="{rejected}", **how), record, tokenizer, 100)
        assert example.rejected is not None
        assert tokenizer.decode(example.input_ids) == "<user>say it: <assistant>yes please<eos>"
        assert tokenizer.decode(example.rejected.input_ids) == "<user>say it: <assistant>no<eos>"


# -- the losses ---------------------------------------------------------------------------------------


def nats(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log(1 + math.exp(-x))


# From the difference of the sums d and of the means m, beta b and smoothing s.
BY_HAND = {
    "sigmoid": lambda d, m, b, s: (1 - s) * nats(b * d) + s * nats(-b * d),
    "sigmoid_norm": lambda d, m, b, s: nats(b * m),
    "ipo": lambda d, m, b, s: (m - 1 / (2 * b)) ** 2,
    "hinge": lambda d, m, b, s: max(0.0, 1 - b * d),
    "robust": lambda d, m, b, s: ((1 - s) * nats(b * d) - s * nats(-b * d)) / (1 - 2 * s),
}


@pytest.mark.parametrize("loss", list(BY_HAND))
@pytest.mark.parametrize("smooth", [0.0, 0.2])
def test_the_losses_by_hand(loss: str, smooth: float) -> None:
    if smooth and loss not in ("sigmoid", "robust"):
        with pytest.raises(ValueError, match="label_smoothing"):
            ObjectiveConfig(kind="dpo", loss=loss, label_smoothing=smooth)  # type: ignore[arg-type]
        return
    settings = ObjectiveConfig(kind="dpo", loss=loss, label_smoothing=smooth, beta=0.3)  # type: ignore[arg-type]
    chosen, rejected = torch.tensor([1.5, -2.0]).double(), torch.tensor([-0.5, 3.0]).double()
    lengths = torch.tensor([3, 2, 5, 1])
    want = [
        BY_HAND[loss](c - r, c / n - r / m, 0.3, smooth)
        for c, r, n, m in zip(chosen.tolist(), rejected.tolist(), (3, 2), (5, 1), strict=True)
    ]
    assert_close(pair_loss(chosen, rejected, lengths, settings), torch.tensor(want).double())


# -- the reference ------------------------------------------------------------------------------------


def before_and_grown(gate: str, **settings: Any) -> tuple[Any, Any]:
    """A model, and the same with one more expert that has learned something."""
    model = molora_model("llama", gate, **settings)
    before = deepcopy(model)
    model.add_expert("late", tasks=[])
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return before, model.train()


@pytest.mark.parametrize(
    "gate", ["soft-group", "top2-group", "sequence-mean", "constant-global", "twopass-global"]
)
def test_the_reference_is_the_model_before_and_not_the_base(gate: str) -> None:
    before, model = before_and_grown(gate)
    batch = pairs_for()
    with torch.no_grad(), as_before(model, batch) as given:
        found = log_probs(model, given)
    assert model.training
    with torch.no_grad():
        want, base = (
            log_probs(before, batch),
            log_probs(before, {**batch, "routing_task_ids": torch.full((4,), -1)}),
        )
        now = log_probs(model.eval(), batch)
    assert_close(found, want, rtol=0, atol=2e-5)
    assert (want - base).abs().max() > 1e-2 and (now - want).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_without_earlier_experts_it_is_the_base(architecture: str) -> None:
    model, batch = molora_model(architecture).train(), pairs_for(architecture)
    with torch.no_grad(), as_before(model, batch) as given:
        found = log_probs(model, given)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(found, log_probs(model.eval(), batch))


def test_the_log_probability_is_the_sum_of_the_answers_tokens() -> None:
    model, batch = molora_model("llama"), pairs_for()
    with torch.no_grad():
        logs = model(**batch).logits.double().log_softmax(-1)
        found = log_probs(model, batch)
    for row in range(4):
        places = [i for i in range(1, 7) if batch["labels"][row, i] != -100]
        want = sum(logs[row, i - 1, batch["labels"][row, i]] for i in places)
        assert_close(found[row].double(), want, rtol=0, atol=1e-4)


def test_a_reference_that_would_move_is_refused() -> None:
    model = molora_model("llama", "soft-group")
    model.add_expert("late")
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"which would move with .*gate"):
        Preferences().loss(model.train(), pairs_for())


def test_at_the_start_nothing_is_preferred_and_only_the_new_expert_learns() -> None:
    before, model = before_and_grown("soft-group")
    del before
    fresh = molora_model("llama", trained=False).train()
    loss, metrics = Preferences().loss(fresh, pairs_for())
    assert_close(loss, torch.tensor(math.log(2)))
    assert metrics["rewards/margins"] == 0 and metrics["loss"] == loss
    loss, _ = Preferences().loss(model, pairs_for())
    loss.backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {name for name, p in model.named_parameters() if p.requires_grad} != set()


def test_auxiliary_losses_are_added_once_and_are_those_of_the_model_as_it_is() -> None:
    model = molora_model("llama", aux_losses={"balance": 0.5}).train()
    plain = molora_model("llama").train()
    loss, metrics = Preferences().loss(model, pairs_for())
    other, _ = Preferences().loss(plain, pairs_for())
    assert_close(loss, other + 0.5 * metrics["aux/balance"])


# -- training -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two tasks under a hard gate, and preferences in a file: answers in capitals."""
    folder = tmp_path_factory.mktemp("preferences")
    write_base(folder / "base")
    rows = [
        {"prompt": f"say {w}: ", "chosen": w.upper(), "rejected": w} for w in ("ab", "cd", "ef", "gh") * 6
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_for(folder / "base", folder / "runs", max_steps=2)
    recipe["adapter"] = {"num_experts": 2, "r": 2, "gate": "task"}
    recipe["eval"]["modes"] = ["task"]
    return folder, recipe, train(recipe)


def grow(folder: Path, **train_settings: Any) -> dict[str, Any]:
    pairs = str(folder / "pairs.jsonl")
    return {
        "task": {"name": "manners", "source": "jsonl", "train": pairs, "eval": pairs, "rejected": "{rejected}", "metric": "loss"},
        "train": {"objective": "dpo", "max_steps": 30, "lr": 0.02, "log_every": 10, "val_every": 30, **train_settings},
    }  # fmt: skip


def test_a_short_run_raises_the_margin_and_leaves_old_tasks_bit_equal(trained: Any) -> None:
    folder, _, run = trained
    done = add_expert(run, grow(folder))
    assert (
        done.config.train.objective.kind == "dpo" and done.config.data.tasks["manners"].target == "{chosen}"
    )
    rows = _metrics(done.path)
    margins = [float(row["rewards/margins"]) for row in rows if row.get("rewards/margins")]
    assert len(margins) == 3 and margins[-1] > max(0.5, margins[0])
    losses = [float(row["loss"]) for row in rows if row.get("loss")]
    assert losses[-1] < losses[0] < math.log(2) + 0.05
    held_out = [float(row["val_loss"]) for row in rows if row.get("val_loss")]
    assert held_out and held_out[-1] < math.log(2)
    assert done.report["facts"][UNCHANGED] is True


def _metrics(folder: Path) -> list[dict[str, str]]:
    import csv

    with (folder / "metrics.csv").open() as stream:
        return [*csv.DictReader(stream)]


def test_a_task_without_rejected_answers_is_refused_before_anything_is_written(trained: Any) -> None:
    folder, recipe, _ = trained
    before = sorted((folder / "runs" / "small").iterdir())
    with pytest.raises(ConfigError, match=r"data.tasks.copy: has no rejected answers"):
        train({**recipe, "train": {**recipe["train"], "objective": "dpo"}})
    assert sorted((folder / "runs" / "small").iterdir()) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"objective": "dpoo"}}, "Did you mean 'dpo'"),
        ({"train": {"objective": {"beta": 0.2}}}, "acts only with kind: dpo"),
        ({"train": {"objective": {"kind": "dpo", "loss": "ippo"}}}, "ipo"),
        (
            {"train": {"objective": {"kind": "dpo", "loss": "ipo", "label_smoothing": 0.1}}},
            "acts with loss: sigmoid or robust",
        ),
        (
            {"train": {"objective": "dpo"}, "continual": {"strategy": "sequential"}},
            "measures from the model as it was before",
        ),
    ],
    ids=str,
)
def test_what_a_recipe_may_not_say(trained: Any, change: dict[str, Any], words: str) -> None:
    _, recipe, _ = trained
    given = {**recipe, **change, "train": {**recipe["train"], **change["train"]}}
    if "continual" in change:
        given["adapter"] = {"r": 2}
    with pytest.raises(ConfigError, match=words):
        load_recipe(given)


def test_an_expert_added_later_does_not_inherit_the_objective(trained: Any) -> None:
    from molora.config.grow import load_grow

    _, recipe, _ = trained
    run = load_recipe({**recipe, "train": {**recipe["train"], "objective": "dpo", "lr": 0.5}})
    task = {"name": "more", "source": "synthetic", "generator": "upper"}
    later = load_grow({"task": task}, run=run)
    assert later.train.objective.kind == "supervised" and later.train.lr == 0.5
