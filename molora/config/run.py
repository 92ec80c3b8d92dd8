"""RunConfig: a whole recipe, and the checks that concern more than one section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from molora.assets import FIRST, NEWEST, TINY, TINY_VERSIONS
from molora.config.adapter import AdapterConfig, RouterSection
from molora.config.choices import KINDS
from molora.config.continual import STRATEGIES, ContinualConfig, strategy_kind
from molora.config.data import KIND_OF_TASK_TYPE, DataConfig
from molora.config.evaluation import EvalConfig
from molora.config.federated import FederatedConfig, federated_problems
from molora.config.gate_rules import UNNORMALISED
from molora.config.growth_rules import growth_problems
from molora.config.section import (
    Problem,
    RunName,
    Section,
    Width,
    expand_shorthand,
    refuse,
)
from molora.config.stages import ExpertStage, filled_stages, one_by_one_problems, stage_problems
from molora.config.suggest import options
from molora.config.train import TrainConfig


class BaseConfig(Section):
    """The frozen model the experts are added to. `base: name` is short for `base: {model: name}`."""

    model: str = Field(min_length=1)
    """A name on the hub, a local folder, or `molora/tiny`, which comes with the package."""
    task_type: Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"] = "CAUSAL_LM"
    """What its head does: write on, classify, or read and write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of its frozen weights."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Load the frozen weights in 8 or 4 bits (extra `quant`)."""
    revision: str | None = None
    """A branch, tag or commit of a hub model. Of `molora/tiny`: v2, or v1, which null means too (in runs of old)."""
    head: Literal["own", "match"] = "own"
    """Of a classifier: a trained layer of its own, or the nearest label text."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        data = expand_shorthand(data, "model")
        if isinstance(data, Mapping) and data.get("model") == TINY:
            revision = data.get("revision", NEWEST)
            return {**data, "revision": FIRST if revision is None else revision}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model == TINY and self.revision not in TINY_VERSIONS:
            known = options(self.revision, TINY_VERSIONS)
            refuse([(("revision",), f"{TINY} has no version {self.revision!r}.{known}")])
        if self.head == "match" and self.task_type != "SEQ_CLS":
            refuse([(("head",), "'match' (the nearest label text) goes with task_type: SEQ_CLS.")])
        return self


class FeaturesConfig(Section):
    """Where a gate of external scope gets its features from: the cluster of each prompt, one-hot."""

    kind: Literal["clusters"] = "clusters"
    """The cluster of each prompt, one-hot."""
    encoder: str = Field(min_length=1)
    """The sentence encoder whose vectors are clustered."""
    revision: str | None = None
    """A branch, tag or commit of it."""
    num_clusters: Width = 64
    """How many."""


class RunConfig(Section):
    """A recipe of `molora train`, `molora continual` or `molora federate`.

    A run's `config.yaml` keeps it with every default filled in.
    """

    name: RunName
    """Names the run's folder: `<output>/<name>/<time>`."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of data order, starts and dropout."""
    base: BaseConfig
    """The frozen model."""
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    """The mixture."""
    features: FeaturesConfig | None = None
    """Where a gate of external scope gets its features from."""
    data: DataConfig
    """The tasks."""
    train: TrainConfig
    """How it is trained."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """How it is scored."""
    continual: ContinualConfig | None = None
    """Train the tasks one after another (`molora continual`)."""
    federated: FederatedConfig | None = None
    """Train in rounds of clients that keep their records (`molora federate`)."""
    stages: list[ExpertStage] | None = Field(default=None, min_length=1)
    """Build the model expert by expert, each with its own tasks, objective and training."""
    output: str = Field(default="runs", min_length=1)
    """The folder of runs."""

    @model_validator(mode="before")
    @classmethod
    def _adapter_of_the_strategy(cls, data: Any) -> Any:
        """Tasks one after another start with one expert, under the strategy's own gate unless the recipe has one."""
        if not isinstance(data, dict) or data.get("continual") is None:
            return data
        adapter = data.get("adapter") or {}
        if not isinstance(adapter, dict) or "preset" in adapter or adapter.get("from_loras"):
            return data
        # A strategy that nobody knows is reported by its own check.
        spec = STRATEGIES.get(strategy_kind(data["continual"]) or "", STRATEGIES["sequential"])
        gate, experts = spec.gate, adapter.get("num_experts") or 1
        return data | {"adapter": {"gate": gate, **adapter, "num_experts": experts}}

    @model_validator(mode="before")
    @classmethod
    def _what_follows_from_stages(cls, data: Any) -> Any:
        return filled_stages(data)

    @model_validator(mode="before")
    @classmethod
    def _tasks_in_their_order(cls, data: Any) -> Any:
        """Tasks stand in the order they are learned in, so that ids and labels are given in it."""
        try:
            order, tasks = data["continual"]["order"], data["data"]["tasks"]
            ordered = {name: tasks[name] for name in order}
            whole = sorted(order) == sorted(tasks)
        except (KeyError, TypeError):  # absent or of a wrong type: the fields' own checks report it
            return data
        return data | {"data": data["data"] | {"tasks": ordered}} if whole else data

    @model_validator(mode="before")
    @classmethod
    def _kinds_follow_the_base(cls, data: Any) -> Any:
        """A task without `kind` has the kind that fits base.task_type."""
        try:
            kind, named = KIND_OF_TASK_TYPE[data["base"]["task_type"]], data["data"]["tasks"].items()
            tasks = {name: {"kind": kind} | task if isinstance(task, dict) else task for name, task in named}
        except (KeyError, TypeError, AttributeError):  # the same
            return data
        return data | {"data": data["data"] | {"tasks": tasks}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        of_sequence = () if self.continual is None else self._sequence_problems(self.continual)
        of_rounds = () if self.federated is None else self._round_problems(self.federated)
        of_stages = () if self.stages is None else stage_problems(self, self.stages)
        of_rest = (
            self._task_problems(), self._kind_problems(), self._feature_problems(), self._eval_problems(),
        )  # fmt: skip
        alone = self.continual is None and self.federated is None and self.stages is None
        growth = growth_problems(self.train.rank_growth, self.adapter, alone=alone)
        refuse(chain(of_sequence, of_rounds, of_stages, *of_rest, self._start_problems(), growth))
        return self

    def _round_problems(self, federated: FederatedConfig) -> Iterator[Problem]:
        others = {"continual": self.continual is not None, "features": self.features is not None}
        return federated_problems(federated, self.adapter, self.train, **others)

    def _sequence_problems(self, continual: ContinualConfig) -> Iterator[Problem]:
        if self.adapter.from_loras is not None:
            text = "does not go with tasks one after another, which start from a new expert; to add experts to LoRAs, "
            yield ("adapter", "from_loras"), text + "use molora train, then molora add-expert."
            return
        order, known = continual.order, list(self.data.tasks)
        if order is not None and sorted(order) != sorted(known):
            yield ("continual", "order"), f"must name every task of data.tasks once: {', '.join(known)}."
        kind, spec = continual.strategy.kind, continual.strategy.spec
        if not spec.one_expert and self.adapter.num_experts != 1:
            text = f"strategy {kind} starts with one expert and adds one for each task; leave it out."
            yield ("adapter", "num_experts"), text
        for key in ("tasks", "frozen_experts", *(() if spec.one_expert else ("expert_names",))):
            if getattr(self.adapter, key) not in (None, []):
                yield ("adapter", key), "is the strategy's to say; leave it out."
        yield from one_by_one_problems(self)
        yield from self._strategy_problems(continual)
        if spec.task_by_task:
            yield from self._mix_problems(kind)

    def _mix_problems(self, kind: str) -> Iterator[Problem]:
        """Settings of a mix, where each task is trained on alone."""
        text = f"does nothing: strategy {kind} trains on one task at a time."
        for name, task in self.data.tasks.items():
            if task.weight != 1:
                yield ("data", "tasks", name, "weight"), text
        for key in ("mixing", "mixing_temperature"):
            if getattr(self.data, key) != DataConfig.model_fields[key].default:
                yield ("data", key), text

    def _strategy_problems(self, continual: ContinualConfig) -> Iterator[Problem]:
        """What the rest of the recipe must be for a strategy to keep its promise."""
        strategy, softmax = continual.strategy, continual.softmax
        kind, gate, needs = strategy.kind, self.adapter.gate, strategy.spec.needs
        wrong = [f"{key} {value}" for key, value in needs.items() if getattr(gate, key) != value]
        if wrong:
            text = f"strategy {kind} needs a gate of {', '.join(wrong)}; leave the gate out to get it."
            yield ("adapter", "gate"), text
        if self.adapter.share_A and (kind == "inf_lora" or (kind == "o_lora" and strategy.factor != "B")):
            text = f"does not go with strategy {kind}, which gives each expert an A of its own."
            yield ("adapter", "share_A"), text
        if self.adapter.kind != "lora" and kind in ("inf_lora", "o_lora", "slao"):
            text = f"strategy {kind} writes or compares the factors of experts, which only kind: lora trains freely."
            yield ("adapter", "kind"), text
        if kind in ("ella", "n_lora") and KINDS[self.adapter.kind].scales_output:
            text = (
                f"strategy {kind} weighs what factors add, which is not all of a {self.adapter.kind} expert."
            )
            yield ("adapter", "kind"), text
        if strategy.spec.one_expert and self.train.objective.kind == "dpo":
            text = f"measures from the model as it was before, which strategy {kind} trains on; use one with an expert per task."
            yield ("train", "objective"), f"dpo {text}"
        own = strategy.spec.router and RouterSection(kind=strategy.spec.router)
        if self.adapter.router is not None and continual.router not in (None, own):
            yield ("continual", "router"), "adapter.router is given too; write only one."
        if softmax is not None and self.base.head != "match":
            yield ("continual", "softmax"), "acts only with base.head: match."
        elif softmax == "own" and not strategy.spec.task_by_task:
            text = f"'own' leaves out the labels of other tasks, which {kind} trains on; leave it out."
            yield ("continual", "softmax"), text

    def _feature_problems(self) -> Iterator[Problem]:
        gate, features = self.adapter.gate, self.features
        if (gate.scope == "external") != (features is not None):
            what = "says where the features come from" if features is None else "acts only"
            yield ("features",), f"{what} with a gate of scope external: give both, or neither."
        elif features is not None and gate.feature_dim != features.num_clusters:
            text = f"must be features.num_clusters = {features.num_clusters}: a cluster is a one-hot feature."
            yield ("adapter", "gate", "feature_dim"), text
        elif features is not None and self.base.task_type == "SEQ_2_SEQ_LM":
            yield ("features",), "reads prompts of decoder-only models and encoders, not of SEQ_2_SEQ_LM."

    def _eval_problems(self) -> Iterator[Problem]:
        judged = any(task.metric == "pass_at_k" for task in self.data.tasks.values())
        if self.eval.sampling is not None and not judged:
            yield ("eval", "sampling"), "acts only with a task of metric: pass_at_k; leave it out."
        adapter = self.adapter
        by_id = adapter.gate.scope == "task" and adapter.router is None and self.continual is None
        if by_id and self.eval.modes == ["gate"]:
            text = "'gate' alone scores answers without a task id, and this gate gives none: add task or base, or give the "
            yield ("eval", "modes"), f"{text}adapter a router, which names the task."

    def _start_problems(self) -> Iterator[Problem]:
        adapter, gate = self.adapter, self.adapter.gate
        fresh = adapter.from_loras is None and adapter.init != "svd_segments" and not adapter.share_A
        if fresh and gate.scope == "constant" and gate.transform in UNNORMALISED and not gate.start:
            text = "0 over new experts, whose B is 0 as well, is a point that training cannot leave; "
            yield ("adapter", "gate", "start"), text + "use start: 1, or experts in from_loras."

    def _task_problems(self) -> Iterator[Problem]:
        known, mapped, experts = list(self.data.tasks), self.adapter.tasks, self.adapter.most_experts
        grows = self.continual is not None or self.stages is not None
        hard = self.adapter.gate.score == "none" and not grows
        if mapped is None:
            if hard and len(known) > experts:
                text = f"{len(known)} tasks but {experts} experts: a task gate gives each task its own. "
                text += "Raise num_experts, or map tasks to experts in adapter.tasks."
                yield ("adapter", "num_experts"), text
            return
        for task in mapped:
            if task not in known:
                yield ("adapter", "tasks", task), f"no such task in data.tasks.{options(task, known)}"
        for task in known:
            if task not in mapped:
                yield ("adapter", "tasks"), f"says nothing about task {task!r}; give it its experts."

    def _kind_problems(self) -> Iterator[Problem]:
        # A language model classifies by writing the label's name.
        fitting = dict.fromkeys([KIND_OF_TASK_TYPE[self.base.task_type], "classification"])
        text = f"does not fit base.task_type {self.base.task_type}. Allowed: {', '.join(fitting)}."
        for name, task in self.data.tasks.items():
            if task.kind not in fitting:
                yield ("data", "tasks", name, "kind"), f"{task.kind!r} {text}"
