"""The `adapter` section: the mixture of experts, its gate and its auxiliary losses."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from molora.config.choices import GATE_KIND_KEYS, GATE_KINDS
from molora.config.gate_rules import gate_problems, mixture_problems, numbers_of
from molora.config.loss_rules import aux_problems, fit_problems, mixture_fit_problems
from molora.config.mixture_rules import combination_problems, kind_problems
from molora.config.presets import PRESETS, preset_settings
from molora.config.section import (
    ExpertName,
    Fraction,
    NonNegative,
    Positive,
    PositiveInt,
    Problem,
    Section,
    TaskName,
    expand_shorthand,
    refuse,
    without_default,
)
from molora.config.suggest import did_you_mean


class GateSection(Section):
    """Who decides the experts' weights. `kind:` is shorthand for the long fields kept here."""

    scope: Literal["token", "sequence", "task", "external", "two_pass", "constant"] = "token"
    pool: Literal["mean", "last", "first"] = "mean"
    blend: Literal["none", "sequence"] = "none"
    blend_spread: NonNegative = 2.0
    feature_dim: PositiveInt | None = None
    share: str = "group"
    score: str = "linear"  # one of GATE_CHOICES, or a registered one
    bias: bool = False
    hidden: PositiveInt = 32
    norm: Literal["unit", "layer"] = "unit"
    absolute: bool = False
    embedding_dim: PositiveInt = 64
    splits: PositiveInt = 1
    transform: Literal["softmax", "sigmoid", "identity", "gain"] = "softmax"
    select: Literal["dense", "top_k", "top_p", "threshold", "entropy", "hard"] = "top_k"
    top_k: PositiveInt | list[PositiveInt] | dict[str, PositiveInt] = 2
    top_p: Positive = 0.8
    min_k: PositiveInt = 1
    threshold: NonNegative | None = None
    threshold_learned: bool = False
    entropy_threshold: Positive = 0.9
    entropy_index: Positive = 1.1
    renorm: Literal["none", "sum", "softmax"] | None = None
    balance_rate: NonNegative = 0.0
    temperature: Positive = 1.0
    noise: Literal["gaussian", "jitter", "gumbel", "logistic"] | None = None
    noise_std: NonNegative = 1.0
    init_std: NonNegative = 0.02
    start: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _expand_kind(cls, data: Any) -> Any:
        data = expand_shorthand(data, "kind")
        if not isinstance(data, dict):
            return data
        if "kind" not in data:
            return data
        given = {key: value for key, value in data.items() if key != "kind"}
        kind = data["kind"]
        if kind not in GATE_KINDS:
            allowed = ", ".join(GATE_KINDS)
            refuse(
                [
                    (
                        ("kind",),
                        f"{kind!r} is not a kind of gate.{did_you_mean(kind, GATE_KINDS)} Allowed: {allowed}.",
                    )
                ]
            )
        legal = GATE_KIND_KEYS[kind]
        settings = ", ".join(("kind", *legal))
        foreign: list[Problem] = [
            (
                (key,),
                f"not a setting of gate kind {kind!r}.{did_you_mean(key, legal)} Its settings: {settings}.",
            )
            for key in given
            if key not in legal
        ]
        refuse(foreign)
        return GATE_KINDS[kind] | given

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse([((field,), message) for field, message in gate_problems(self.model_dump())])
        return self


class AdapterConfig(Section):
    """The mixture: how many experts of which rank sit on which layers, and how they are mixed."""

    num_experts: PositiveInt | list[PositiveInt] | dict[str, PositiveInt] = 8
    r: PositiveInt | list[PositiveInt] | dict[str, PositiveInt] = 8
    lora_alpha: Positive = 16.0
    lora_dropout: Fraction = 0.0
    use_rslora: bool = False
    scaling: Literal["alpha_over_r", "alpha_over_sqrt_r", "alpha"] | Positive | None = None
    init: Literal["kaiming", "gaussian", "rescaled", "orthogonal", "svd_segments"] = "kaiming"
    init_std: Positive = 0.02
    init_gain: Positive = 1.0
    kind: str = "lora"  # one of KINDS
    kind_settings: dict[str, int | float] = Field(default_factory=dict)
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    plain_targets: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    from_loras: dict[ExpertName, str] | None = None
    expert_names: list[ExpertName] | None = None
    tasks: dict[TaskName, list[ExpertName] | dict[ExpertName, Positive]] | None = None
    gate: GateSection = Field(default_factory=GateSection)
    combine: Literal["outputs", "factors"] = "outputs"
    frozen_experts: list[ExpertName] = Field(default_factory=list)
    always_on: dict[ExpertName, float | Literal["rest"]] = Field(default_factory=dict)
    share_A: bool = False
    task_cores: bool = False
    ffn_targets: str | list[str] | None = None
    aux_losses: dict[str, float | dict[str, Any]] = Field(default_factory=dict)

    @property
    def experts(self) -> list[str]:
        """The experts' names: as given, or expert_0, expert_1, ..."""
        return self.expert_names or [f"expert_{i}" for i in range(self.most_experts)]

    @property
    def most_experts(self) -> int:
        """How many experts the layers with the most have."""
        return int(max(numbers_of(self.num_experts)))

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        """`preset: name` stands for a method's settings. One expert alone has a default gate that picks one."""
        if isinstance(data, dict) and isinstance(data.get("from_loras"), dict):
            data = _of_loras(data)
        if isinstance(data, dict) and "preset" in data:
            name = str(data["preset"]).replace("-", "_")
            if name not in PRESETS:
                hint = did_you_mean(name, PRESETS)
                refuse([(("preset",), f"no preset {name!r}.{hint} Presets: {', '.join(PRESETS)}.")])
            given = {key: value for key, value in data.items() if key != "preset"}
            if isinstance(given.get("gate"), str):
                given["gate"] = {"kind": given["gate"]}
            data = preset_settings(name, given)
        if isinstance(data, dict) and data.get("num_experts") == 1:
            return without_default(data, "gate", {"top_k": 1})
        return data

    @field_validator("aux_losses", mode="before")
    @classmethod
    def _check_losses(cls, data: Any) -> Any:
        refuse([*aux_problems(data)] if isinstance(data, dict) else [])
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.from_loras is not None and not self.from_loras:
            refuse([(("from_loras",), "names no LoRA; give {name: folder}, or leave it out.")])
        refuse([*self._gate_problems(), *self._expert_problems(), *self._layer_problems()])
        return self

    def _gate_problems(self) -> list[Problem]:
        gate = self.gate.model_dump()
        settings = self.model_dump(
            include={"combine", "always_on", "share_A", "task_cores", "ffn_targets", "init"}
        )
        problems: list[Problem] = [
            (("gate", field), message) for field, message in mixture_problems(gate, self.most_experts)
        ]
        problems += combination_problems(settings, gate, self.experts)
        problems += kind_problems(self.kind, self.kind_settings, {**settings, "aux_losses": self.aux_losses})
        # Tasks that the recipe does not map to experts have all of them.
        tasks: dict[str, Any] = dict(self.tasks or {})
        fits = [*fit_problems(self.aux_losses, gate, tasks, self.most_experts)]
        fits += mixture_fit_problems(self.aux_losses, settings)
        return problems + [(("aux_losses", *path), message) for path, message in fits]

    def _expert_problems(self) -> list[Problem]:
        problems: list[Problem] = []
        names = self.expert_names
        if names is not None and len(names) != self.most_experts:
            problems.append(
                (("expert_names",), f"names {len(names)} experts, but num_experts = {self.most_experts}.")
            )
        for i, name in enumerate(names or []):
            if name.casefold() in [other.casefold() for other in (names or [])[:i]]:
                problems.append(
                    (("expert_names", i), f"{name!r} is there twice (upper and lower case count as one).")
                )
        for task, chosen in (self.tasks or {}).items():
            if not chosen:
                problems.append((("tasks", task), "names no expert; a task needs at least one."))
            for i, name in enumerate(chosen):
                key = i if isinstance(chosen, list) else name
                if name not in self.experts:
                    problems.append(
                        (
                            ("tasks", task, key),
                            f"unknown expert {name!r}.{did_you_mean(name, self.experts)} Allowed: {', '.join(self.experts)}.",
                        )
                    )
                elif isinstance(chosen, list) and name in chosen[:i]:
                    problems.append((("tasks", task, key), f"{name!r} is there twice."))
        return problems

    def _layer_problems(self) -> list[Problem]:
        problems: list[Problem] = []
        if not isinstance(self.r, int) and self.rank_pattern:
            problems.append(
                (("rank_pattern",), "r already gives ranks by layer or pattern; write only one of the two.")
            )
        if not self.r:
            problems.append((("r",), "is empty; give a rank, such as 8."))
        if not self.num_experts:
            problems.append((("num_experts",), "is empty; give a number, such as 8."))
        for key in ("target_modules", "plain_targets", "ffn_targets", "modules_to_save", "exclude_modules"):
            value = getattr(self, key)
            if value is not None and (not value or ("" in value and isinstance(value, list))):
                problems.append(
                    (
                        (key,),
                        "is empty; name modules, such as [q_proj, v_proj]"
                        + (", or all-linear." if key == "target_modules" else ", or leave it out."),
                    )
                )
        if self.use_rslora and self.scaling is not None:
            problems.append(
                (("scaling",), "use_rslora: true already means alpha_over_sqrt_r; write only one of the two.")
            )
        return problems


_LORAS_DECIDE = (
    "r",
    "rank_pattern",
    "target_modules",
    "lora_alpha",
    "use_rslora",
    "scaling",
    "kind",
    "share_A",
    "init",
)


def _of_loras(data: dict[str, Any]) -> dict[str, Any]:
    """Experts read from LoRA folders: their number and names follow; refuses what the LoRAs decide."""
    names = list(data["from_loras"])
    follow = {"num_experts": len(names), "expert_names": names}
    decided = [key for key, value in follow.items() if data.get(key, value) != value]
    if "expert_names" not in data:  # as written, not a resolved recipe, which has every field
        decided += [key for key in _LORAS_DECIDE if key in data]
    refuse([((key,), "is decided by the LoRAs in from_loras; leave it out.") for key in decided])
    return {**data, **follow}
