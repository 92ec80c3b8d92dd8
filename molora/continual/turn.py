"""One task's turn: its expert joins the model, a strategy trains it, and the caller does what comes after.

Sequences and staged runs play one turn after another, `add_expert` a single one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig, load_recipe
from molora.config.grow import NewExpert
from molora.continual.strategy import Strategy, Turn, hold_sum
from molora.data.prompts import Example, encode
from molora.data.tasks import Task, TaskSet
from molora.errors import ConfigError
from molora.evaluation.score import inputs_of
from molora.models.build import ready_to_train
from molora.models.label_match import compete
from molora.models.task_router import learn_prompts, named_prompts, names_tasks
from molora.progress import say
from molora.store.adapter import save
from molora.store.runs import Run
from molora.training.environment import prepare_process
from molora.training.train import Conclude, fit
from molora.tuner.api import find_context
from molora.tuner.router import give_router

SHARED = "shared"  # the expert's name where one serves all tasks
PASS_RECORDS = 2000  # of a task's training data that strategies look at before and after training


def turn_recipe(
    config: RunConfig, known_ids: Mapping[str, int], turn: int = 0
) -> tuple[RunConfig, dict[str, int]]:
    """The recipe after the task number `turn` has come, and the ids of the tasks the adapter knows by then.

    Where one expert (or mixture) serves all tasks, it knows all of them from the start; else the tasks so far, each
    with an expert of its name.
    """
    assert config.continual is not None
    names = list(config.data.tasks)
    plain = config.model_dump(mode="json")
    adapter = plain["adapter"]
    adapter["router"] = adapter["router"] or plain["continual"]["router"]
    if config.continual.strategy.spec.one_expert:
        several = adapter["expert_names"] is not None or config.adapter.most_experts > 1
        adapter["expert_names"] = config.adapter.experts if several else [SHARED]
        adapter["tasks"] = dict.fromkeys(names, adapter["expert_names"])
    else:
        names = names[: turn + 1]
        # Where the task id decides, each task has its own expert; a learned gate may use the older ones too.
        alone = config.adapter.gate.score == "none"
        adapter["num_experts"], adapter["expert_names"] = len(names), names
        adapter["tasks"] = {name: [name] if alone else names[: i + 1] for i, name in enumerate(names)}
    plain["continual"] = None
    plain["data"]["tasks"] = {name: plain["data"]["tasks"][name] for name in names}
    return load_recipe(plain), {name: known_ids[name] for name in names}


def play_turn(
    config: RunConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    turn: Turn,
    strategy: Strategy,
    conclude: Conclude,
    *,
    known_ids: Mapping[str, int],
    expert: NewExpert | None = None,
    softmax: str | None = None,
    run: Run | None = None,
) -> Run:
    """Train on the tasks of a turn in the way of a strategy.

    Args:
        config: the recipe of this turn alone.
        model: as earlier tasks left it.
        conclude: called with the run and the trained model, in eval mode, once the strategy is done with the task.
        expert: the expert that joins; None where the task trains one that is there.
        softmax: whose labels compete in a classifier's loss; None: the strategy says.
        run: the run to go on with, or the folder to begin in; None makes a new one.
    """
    prepare_process(config.seed)  # a new expert starts alike, however much was drawn before
    if expert is not None:
        isolate = _isolates(model) if expert.isolate is None else expert.isolate
        name, served = expert.name or turn.task.name, [task.name for task in turn.own]
        model.add_expert(name, tasks=served, init=expert.init, isolate=isolate)
    ready_to_train(model.get_base_model(), config.train)
    hold_sum(model)
    compete(model, turn.competing(softmax or strategy.softmax))
    strategy.before_task(model, turn)

    def after(done: Run, trained: PeftModel) -> None:
        strategy.after_task(trained, turn)
        if strategy.changes_weights:
            save(trained, done.adapter)
        conclude(done, trained)

    tasks = TaskSet(tuple(strategy.training_tasks(turn)), known_ids)
    return fit(config, model, tokenizer, tasks, run, after, strategy)


def teach_old_tasks(
    config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
) -> None:
    """Give an adapter that has none the recipe's router, if it names one, taught the tasks that it has learned by now."""
    adapter, router = str(model.active_adapter), config.adapter.router
    if router is None or model.active_peft_config.router is not None:
        return
    give_router(model.get_base_model(), find_context(model), adapter, router.model_dump())
    prompts = {
        task.name: [example.prompt for example in drawn(config, tokenizer, task, router.records)]
        for task in tasks
    }
    learn_prompts(model, tokenizer, prompts, adapter, config.eval.batch_size)


def started(
    config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task, expert: NewExpert
) -> tuple[NewExpert, dict[str, str]]:
    """The expert with its start worked out, and what to say of it: `nearest` copies the expert that serves most of the task.

    Raises:
        ConfigError: the adapter has no router that could say whose prompts the new ones are like.
    """
    if expert.init != "nearest":
        return expert, {}
    router = config.adapter.router
    if router is None or not names_tasks(model):
        text = "expert.init: nearest asks the adapter's router, and it has none."
        raise ConfigError(text, hint="leave `router` at its default, or name the expert: copy:<expert>.")
    prompts = [list(example.prompt) for example in drawn(config, tokenizer, task, router.records)]
    found = named_prompts(model, tokenizer, prompts, batch_size=config.eval.batch_size)
    like, share = Counter(max(row.posteriors, key=row.posteriors.__getitem__) for row in found).most_common(
        1
    )[0]
    weights = model.tasks[like]
    source = max(weights, key=weights.__getitem__)
    said = f"as {source}: {share} of {len(found)} of its prompts are most like those of {like}"
    say(f"the new expert starts {said}")
    return expert.model_copy(update={"init": f"copy:{source}"}), {"the new expert started": said}


def _isolates(model: PeftModel) -> bool:
    """Whether a new expert is best hidden from older tasks: a gate that reads its input would send them there.

    A softmax row that is trained on the new task alone has never seen the others. Their prompts are known by the router.
    """
    gate = model.active_peft_config.gate
    return gate.learned and gate.scope not in ("task", "constant") and names_tasks(model)


def passes(
    config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> Iterator[dict[str, Tensor]]:
    """A pass over (a part of) a task's training data, with its id where the gate wants one."""
    examples = drawn(config, tokenizer, task, PASS_RECORDS)
    for start in range(0, len(examples), config.train.batch_size):
        part = examples[start : start + config.train.batch_size]
        batch = inputs_of(part, model, tokenizer)
        if model.active_peft_config.gate.scope == "task":
            batch["routing_task_ids"] = torch.full((len(part),), task.id)
        yield batch


def drawn(config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: Task, count: int) -> list[Example]:
    """So many of a task's training records, drawn at random: files are often sorted by label."""
    everything = range(len(task.train))
    chosen = sorted(random.Random(config.seed).sample(everything, min(count, len(everything))))
    return [encode(task, task.train[i], tokenizer, config.data.max_length) for i in chosen]
