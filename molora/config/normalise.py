"""What a MoLoraConfig does when it is made: check every field, and bring each to one form."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from molora.config.choices import KINDS
from molora.config.gate_config import GateConfig, gate_from_kind
from molora.config.gate_rules import size_problems
from molora.config.loss_rules import aux_problems
from molora.config.losses import AUX_LOSSES
from molora.config.mixture import ExpertSpec, Mixture, SavedMixture
from molora.config.mixture_rules import mixture_problems, pattern_problems, rank_problems
from molora.config.names import check_name
from molora.config.router import router_from
from molora.config.section import Problem
from molora.config.setting import value_problems
from molora.config.suggest import options
from molora.config.types import fits, in_words, shown, type_problems
from molora.errors import ConfigError

Tasks = list[str] | dict[str, list[str] | dict[str, float]] | None
MOST_TASK_IDS = 2**20  # a learned task gate has a row for each id there ever was


def normalise(config: SavedMixture) -> None:
    """Check a config and fill in what follows from it; ConfigError says what cannot be, and what can."""
    for name, message in value_problems(config, Mixture):
        raise ConfigError(f"{name}={getattr(config, name)!r}: {message}")
    if config.bias != "none":
        raise ConfigError(f"bias={config.bias!r} is not supported; only 'none'.")
    if config.layers_pattern and config.layers_to_transform is None and config.base_fingerprint is None:
        # As PEFT has it. Adapters saved before that was checked load as they were: on all layers.
        raise ConfigError(
            f"layers_pattern={config.layers_pattern!r} acts only with layers_to_transform, which is not given.",
            hint="give layers_to_transform=[...], or leave layers_pattern out.",
        )
    if config.init == "rescaled" and not config.use_rslora and config.scaling in (None, "alpha_over_r"):
        warnings.warn(
            "init='rescaled' already shrinks A by 1/sqrt(r); with alpha/r the updates shrink twice as r grows. "
            "Use scaling='alpha' (the article's form) or a plain init with use_rslora=True.",
            stacklevel=4,
        )
    _refuse(pattern_problems(config))
    _refuse(rank_problems(config))
    if config.kind in KINDS and config.scaling is None and not config.use_rslora:
        config.scaling = KINDS[config.kind].scaling
    if isinstance(config.r, dict):
        config.rank_pattern, config.r = dict(config.r), 8
    if not isinstance(config.num_experts, int):  # the largest one, and `experts_by_layer`
        given = config.num_experts
        if not given:
            raise ConfigError("num_experts is an empty map; name a pattern, or give a number.")
        config.experts_by_layer, config.num_experts = given, config.most_experts
    _gate(config)
    config.router = router_from(config.router)
    config.expert_names = [check_name(name, "expert") for name in config.experts]
    _tasks(config)
    _refuse((("aux_losses", *path), message) for path, message in aux_problems(config.aux_losses))
    _refuse(mixture_problems(config, config.gate))
    _kept(config)


def _refuse(problems: Iterable[Problem]) -> None:
    for path, message in problems:
        raise ConfigError(f"{'.'.join(map(str, path))}: {message}")


def _gate(config: SavedMixture) -> None:
    if config.gate is None:
        config.gate = GateConfig(top_k=min(2, config.most_experts))
    elif isinstance(config.gate, str):
        config.gate = gate_from_kind(config.gate)
    elif isinstance(config.gate, dict):
        settings = dict(config.gate)
        kind = settings.pop("kind", None)
        known = [f.name for f in fields(GateConfig)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"gate.{name} is not a setting.{options(name, known, 'Settings')}")
        config.gate = gate_from_kind(kind, **settings) if kind else GateConfig(**settings)
    elif not isinstance(config.gate, GateConfig):
        raise ConfigError(
            f"gate={shown(config.gate)} is no gate.", hint="give a GateConfig, a kind, or a map of settings."
        )
    gate: GateConfig = replace(config.gate)  # the caller's object stays as it is
    config.gate = gate
    for field, message in size_problems(gate, config.most_experts):
        raise ConfigError(f"gate.{field}={getattr(gate, field)!r}: {message}")
    gate.renorm = gate.renorm or gate.default_renorm()
    if gate.select == "threshold" and gate.threshold is None:  # a number: it stays when experts are added
        gate.threshold = 1 / max(2, config.most_experts)


def _tasks(config: SavedMixture) -> None:
    """Tasks as a map, with ids."""
    if not fits(config.tasks, Tasks):
        raise ConfigError(f"tasks: {shown(config.tasks)} is not {in_words(Tasks)}.")
    by_task = [name for name, loss in AUX_LOSSES.items() if loss.by_task]
    own = not config.gate.learned or any(name in by_task for name in config.aux_losses)
    if config.tasks is None:  # where tasks are needed, one for each expert, of the same name
        needed = (own or config.gate.scope == "task") and config.task_ids is None
        config.tasks = [name for name in config.experts if name not in config.always_on] if needed else {}
    if not isinstance(config.tasks, dict):
        config.tasks = _default_tasks(config, list(config.tasks), own)
    # Copies: the verbs that change experts change these too.
    config.tasks = {t: dict(e) if isinstance(e, dict) else list(e) for t, e in config.tasks.items()}
    config.always_on = dict(config.always_on)
    for task in config.tasks:
        check_name(task, "task")
    if config.task_ids is None:
        config.task_ids = {task: i for i, task in enumerate(config.tasks)}
    ids = config.task_ids
    if set(ids) != set(config.tasks) or len(set(ids.values())) != len(ids):
        tasks = list(config.tasks)
        raise ConfigError(f"task_ids {ids} must give each of the tasks {tasks} one id of its own.")
    if any(i < 0 for i in ids.values()):
        raise ConfigError("task_ids must not be negative: -1 means the base model only.")
    for name, value in (
        ("task_ids", max(ids.values(), default=0)),
        ("next_task_id", config.next_task_id or 0),
    ):
        if value > MOST_TASK_IDS:
            raise ConfigError(f"{name}: {value} is above {MOST_TASK_IDS:,}, the largest id of a task.")
    config.next_task_id = max(max(ids.values(), default=-1) + 1, config.next_task_id or 0)


def _spec(name: str, given: Any) -> ExpertSpec:
    known = [f.name for f in fields(ExpertSpec)]
    try:
        spec = ExpertSpec(**given) if isinstance(given, dict) else given
    except TypeError:  # another set of names
        raise ConfigError(
            f"expert_specs.{name}: {shown(given)} has other settings than {', '.join(known)}."
        ) from None
    if not isinstance(spec, ExpertSpec):
        raise ConfigError(
            f"expert_specs.{name}: {shown(given)} is not an ExpertSpec or a map of its settings."
        )
    problems = [*type_problems(spec, ExpertSpec), *value_problems(spec, ExpertSpec)]
    _refuse((("expert_specs", name, field), message) for field, message in problems)
    return spec


def _default_tasks(config: SavedMixture, names: list[str], own: bool) -> dict[str, list[Any]]:
    """Task i -> expert i where each task has its own (hard task gates, losses that go by it); else every expert."""
    experts = [expert for expert in config.experts if expert not in config.always_on]
    if not own:
        return dict.fromkeys(names, config.experts)
    if len(names) > len(experts):
        raise ConfigError(
            f"{len(names)} tasks, but num_experts={config.num_experts}: each task gets an expert of its own.",
            hint="raise num_experts, or map tasks to experts with tasks={task: [expert, ...]}.",
        )
    return {name: [experts[i]] for i, name in enumerate(names)}


def _kept(config: SavedMixture) -> None:
    """What the expert verbs keep, which must speak of the experts there are."""
    names = config.experts
    for what in ("free_rows", "isolated_experts", "expert_specs"):
        for name in getattr(config, what):
            if name not in names:
                text = f"{what} names {name!r}, which is not an expert."
                raise ConfigError(text + options(name, names, "Experts"))
    for task, name in config.added_for.items():
        if task not in config.tasks or name not in names:
            raise ConfigError(f"added_for: {task!r} is no task, or {name!r} no expert.")
    config.expert_specs = {name: _spec(name, given) for name, given in config.expert_specs.items()}
    kind = KINDS[config.kind]
    if (config.share_A or kind.one_A or kind.one_rank) and config.expert_specs:
        what = f"of kind {config.kind}" if kind.one_rank else "with one A"
        raise ConfigError(f"experts {what} have one rank and scaling; expert_specs gives some their own.")
    if config.gate_blocks is None:
        config.gate_blocks = [list(names)]
    if sorted(name for block in config.gate_blocks for name in block) != sorted(names):
        raise ConfigError("gate_blocks must name every expert exactly once.")
    if config.experts_by_layer is not None and config.first_experts is None:
        config.first_experts = list(names)
