"""What MoLoraConfig does when it is made: check every field, and bring each to one form."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from molora.config.choices import KINDS
from molora.config.gate_rules import is_hard_task, mixture_problems, numbers_of
from molora.config.loss_rules import BY_TASK, aux_problems, fit_problems, mixture_fit_problems
from molora.config.mixture_rules import combination_problems, kind_problems
from molora.config.names import check_name
from molora.config.section import Problem
from molora.config.suggest import did_you_mean
from molora.errors import ConfigError
from molora.experts.init import INIT_KINDS
from molora.tuner.gate_config import GateConfig, gate_from_kind

if TYPE_CHECKING:
    from molora.tuner.config import MoLoraConfig

SCALINGS = ("alpha_over_r", "alpha_over_sqrt_r", "alpha")


def normalise(config: MoLoraConfig) -> None:
    """Check a config and fill in what follows from it; ConfigError says what cannot be, and what can."""
    _numbers(config)
    _counts(config)
    _gate(config)
    _kind(config)
    _ranks(config)
    _names(config)
    _tasks(config)
    settings = {
        name: getattr(config, name)
        for name in ("combine", "always_on", "share_A", "task_cores", "ffn_targets", "init")
    }
    gate = asdict(config.gate)
    _refuse(combination_problems(settings, gate, config.expert_names or []))
    _refuse(((("aux_losses", *path), message) for path, message in aux_problems(config.aux_losses)))
    fits = [*fit_problems(config.aux_losses, gate, config.tasks, config.num_experts)]
    fits += mixture_fit_problems(config.aux_losses, settings)
    _refuse(((("aux_losses", *path), message) for path, message in fits))


def _refuse(problems: Iterable[Problem]) -> None:
    for path, message in problems:
        raise ConfigError(f"{'.'.join(map(str, path))}: {message}")


def _numbers(config: MoLoraConfig) -> None:
    if not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"lora_dropout={config.lora_dropout} must be in [0, 1).")
    for name in ("lora_alpha", "init_std", "init_gain"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ConfigError(f"{name}={getattr(config, name)} must be a positive number.")
    if config.init not in INIT_KINDS:
        raise ConfigError(
            f"init={config.init!r} is not one of {', '.join(INIT_KINDS)}.{did_you_mean(config.init, INIT_KINDS)}"
        )
    if isinstance(config.scaling, str) and config.scaling not in SCALINGS:
        raise ConfigError(f"scaling={config.scaling!r} is not a number or one of {', '.join(SCALINGS)}.")
    if config.scaling is not None and config.use_rslora:
        raise ConfigError(
            "use_rslora=True and scaling are both given.",
            hint="use_rslora means scaling='alpha_over_sqrt_r'.",
        )
    if config.init == "rescaled" and not config.use_rslora and config.scaling in (None, "alpha_over_r"):
        warnings.warn(
            "init='rescaled' already shrinks A by 1/sqrt(r); with alpha/r the updates shrink twice as r grows. "
            "Use scaling='alpha' (the article's form) or a plain init with use_rslora=True.",
            stacklevel=5,
        )
    if config.bias != "none":
        raise ConfigError(f"bias={config.bias!r} is not supported; only 'none'.")


def _counts(config: MoLoraConfig) -> None:
    """A number of experts that differs by layer becomes the largest one, and `experts_by_layer`."""
    given = config.num_experts
    values = numbers_of(given)
    if not values or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in values):
        raise ConfigError(f"num_experts={given!r}: every number must be at least 1.")
    if given is not values[0]:
        config.experts_by_layer = given if isinstance(given, dict) else list(given)
        config.num_experts = max(values)


def _gate(config: MoLoraConfig) -> None:
    if config.gate is None:
        config.gate = GateConfig(top_k=min(2, config.num_experts))
    elif isinstance(config.gate, dict):
        settings = dict(config.gate)
        kind = settings.pop("kind", None)
        known = [f.name for f in fields(GateConfig)]
        for name in settings:
            if name not in known:
                raise ConfigError(
                    f"gate.{name} is not a setting.{did_you_mean(name, known)} Settings: {', '.join(known)}."
                )
        config.gate = gate_from_kind(kind, **settings) if kind else GateConfig(**settings)
    gate: GateConfig = replace(config.gate)  # the caller's object stays as it is
    config.gate = gate
    for field_name, message in mixture_problems(asdict(gate), config.num_experts):
        raise ConfigError(f"gate.{field_name}={getattr(gate, field_name)!r}: {message}")
    gate.renorm = gate.renorm or gate.default_renorm()
    if gate.select == "threshold" and gate.threshold is None:  # a number: it stays when experts are added
        gate.threshold = 1 / max(2, config.num_experts)


def _kind(config: MoLoraConfig) -> None:
    mixture = {name: getattr(config, name) for name in ("share_A", "task_cores", "init", "aux_losses")}
    _refuse(kind_problems(config.kind, config.kind_settings, mixture))
    scaling = KINDS[config.kind].scaling
    if scaling is not None and config.scaling is None and not config.use_rslora:
        config.scaling = scaling


def _ranks(config: MoLoraConfig) -> None:
    from molora.tuner.config import ExpertSpec

    if isinstance(config.r, dict):
        if config.rank_pattern:
            raise ConfigError("r is a pattern map and rank_pattern is given too; use one of them.")
        config.rank_pattern, config.r = dict(config.r), 8
    ranks = [*(config.r if isinstance(config.r, list) else [config.r]), *config.rank_pattern.values()]
    if any(not isinstance(rank, int) or rank < 1 for rank in ranks):
        raise ConfigError(
            f"r={config.r!r}, rank_pattern={config.rank_pattern!r}: every rank must be an integer of at least 1."
        )
    if isinstance(config.r, list) and config.rank_pattern:
        raise ConfigError("r is a list and rank_pattern is given too; use one of them.")
    config.expert_specs = {
        name: ExpertSpec(**spec) if isinstance(spec, dict) else spec
        for name, spec in config.expert_specs.items()
    }
    if (config.share_A or KINDS[config.kind].one_A) and config.expert_specs:
        raise ConfigError("experts with one A have one rank and scaling; expert_specs gives some their own.")


def _names(config: MoLoraConfig) -> None:
    if config.expert_names is None:
        config.expert_names = [f"expert_{i}" for i in range(config.num_experts)]
    config.expert_names = [check_name(name, "expert") for name in config.expert_names]
    if len(config.expert_names) != config.num_experts:
        raise ConfigError(
            f"expert_names lists {len(config.expert_names)} names, but num_experts={config.num_experts}."
        )
    if (
        len({name.casefold() for name in config.expert_names}) != config.num_experts
    ):  # folders may ignore case
        raise ConfigError(
            f"expert_names has duplicates (upper and lower case count as one): {config.expert_names}."
        )
    for what in ("frozen_experts", "free_rows", "isolated_experts", "expert_specs"):
        for name in getattr(config, what):
            _require_expert(config, name, what)
    if config.gate_blocks is None:
        config.gate_blocks = [list(config.expert_names)]
    if sorted(name for block in config.gate_blocks for name in block) != sorted(config.expert_names):
        raise ConfigError("gate_blocks must name every expert exactly once.")
    if config.experts_by_layer is not None and config.first_experts is None:
        config.first_experts = list(config.expert_names)


def _require_expert(config: MoLoraConfig, name: str, where: str) -> None:
    names = config.expert_names or []
    if name not in names:
        raise ConfigError(
            f"{where} names {name!r}, which is not an expert.{did_you_mean(name, names)} Experts: {', '.join(names)}."
        )


def _tasks(config: MoLoraConfig) -> None:
    names = config.expert_names or []
    hard = is_hard_task(asdict(config.gate))
    own = hard or any(name in config.aux_losses for name in BY_TASK)
    if config.tasks is None:  # where tasks are needed, one for each expert, of the same name
        needed = (own or config.gate.scope == "task") and config.task_ids is None
        config.tasks = [name for name in names if name not in config.always_on] if needed else {}
    if not isinstance(config.tasks, dict):
        config.tasks = _default_tasks(config, config.tasks, own)
    # Copies: the verbs that change experts change these too.
    config.tasks = {t: dict(e) if isinstance(e, dict) else list(e) for t, e in config.tasks.items()}
    config.always_on = dict(config.always_on)
    for task, experts in config.tasks.items():
        check_name(task, "task")
        if not experts:
            raise ConfigError(f"tasks[{task!r}] names no expert.")
        for name in experts:
            _require_expert(config, name, f"tasks[{task!r}]")
        if len(set(experts)) < len(experts):
            raise ConfigError(
                f"tasks[{task!r}] names an expert twice: {', '.join(experts)}.",
                hint="give experts different weights with {expert: weight}.",
            )
    if config.task_ids is None:
        config.task_ids = {task: i for i, task in enumerate(config.tasks)}
    ids = config.task_ids
    if set(ids) != set(config.tasks) or len(set(ids.values())) != len(ids):
        raise ConfigError(
            f"task_ids {ids} must give each of the tasks {list(config.tasks)} one id of its own."
        )
    if any(i < 0 for i in ids.values()):
        raise ConfigError("task_ids must not be negative: -1 means the base model only.")
    config.next_task_id = max(max(ids.values(), default=-1) + 1, config.next_task_id or 0)


def _default_tasks(config: MoLoraConfig, names: Iterable[str], own: bool) -> dict[str, list[Any]]:
    """Task i -> expert i where each task has its own (hard task gates, losses that go by it); else every expert."""
    names, experts = list(names), [e for e in config.expert_names or [] if e not in config.always_on]
    if not own:
        return {name: list(config.expert_names or []) for name in names}
    if len(names) > len(experts):
        raise ConfigError(
            f"{len(names)} tasks, but num_experts={config.num_experts}: each task gets an expert of its own.",
            hint="raise num_experts, or map tasks to experts with tasks={task: [expert, ...]}.",
        )
    return {name: [experts[i]] for i, name in enumerate(names)}
