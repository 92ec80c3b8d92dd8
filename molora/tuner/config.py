"""MoLoraConfig: everything needed to rebuild an adapter, checked when constructed."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig

from molora.config.gate_rules import mixture_problems
from molora.config.kinds import AUX_LOSSES
from molora.config.names import check_name
from molora.config.suggest import did_you_mean
from molora.errors import ConfigError
from molora.experts.init import INIT_KINDS
from molora.store.describe import complete_folder
from molora.store.manifest import MANIFEST, verify_folder
from molora.task_map import TaskMap
from molora.tuner.gate_config import GateConfig, gate_from_kind

SCALINGS = ("alpha_over_r", "alpha_over_sqrt_r", "alpha")


class MoLoraPeftType(str, enum.Enum):  # noqa: UP042  (transformers formats it as PEFT's own str enum)
    """Our entry in PEFT's tables; equal to, and hashed as, the plain string "MOLORA"."""

    MOLORA = "MOLORA"


@dataclass
class ExpertSpec:
    """Rank and scaling of one expert that differs from the config's own, in PEFT's LoraConfig terms."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    scaling: str | float | None = None


@dataclass
class MoLoraConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts; PEFT's spelling where PEFT has one.

    Args:
        num_experts: experts per target layer.
        r: rank per expert: a number, a list (one per transformer block), or `{pattern: rank}`.
        lora_alpha: scaling numerator.
        lora_dropout: dropout on the experts' input.
        use_rslora: scale by alpha/√r instead of alpha/r.
        scaling: the rule by name (`alpha_over_r`, `alpha_over_sqrt_r`, `alpha`) or a number.
        rank_pattern: `{pattern: rank}` exceptions from r, as in PEFT.
        alpha_pattern: `{pattern: alpha}` exceptions from lora_alpha, as in PEFT.
        target_modules: list of suffixes, a regex, or "all-linear".
        exclude_modules: suffixes or a regex never to touch.
        layers_to_transform: block indices to adapt, as in PEFT.
        layers_pattern: name of the block list, as in PEFT.
        plain_targets: suffixes or a regex that get one ordinary LoRA instead of experts.
        modules_to_save: modules trained and saved whole (heads).
        gate: GateConfig, or a dict of its fields (with `kind` for the shorthand).
        aux_losses: `{name: coefficient}`, or `{name: {"coefficient": c, ...settings}}`.
        add_aux_to_loss: add the weighted auxiliary losses to `out.loss` in training.
        expert_names: names, default `expert_0`...
        tasks: `{task: [experts]}` or `{task: {expert: weight}}`, or a list of task names.
        init: how A starts: kaiming, gaussian, rescaled or orthogonal.
        init_std: σ of gaussian and rescaled.
        init_gain: factor on A's initial standard deviation.
        The rest is kept by the expert verbs: task_ids, frozen_experts, frozen_extras (plain LoRAs and
        heads), expert_specs, gate_blocks, isolated_experts, next_task_id; base_fingerprint and weights_sha256 by saving.

    Raises:
        ConfigError: a value that cannot mean anything, with what is allowed.
    """

    num_experts: int = 8
    r: int | list[int] | dict[str, int] = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    scaling: str | float | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    plain_targets: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    gate: Any = None
    aux_losses: dict[str, Any] = field(default_factory=dict)
    add_aux_to_loss: bool = True
    expert_names: list[str] | None = None
    tasks: Any = None
    task_ids: dict[str, int] | None = None
    next_task_id: int | None = None
    frozen_experts: list[str] = field(default_factory=list)
    frozen_extras: bool = False
    isolated_experts: list[str] = field(default_factory=list)
    expert_specs: dict[str, Any] = field(default_factory=dict)
    gate_blocks: list[list[str]] | None = None
    init: str = "kaiming"
    init_std: float = 0.02
    init_gain: float = 1.0
    base_fingerprint: dict[str, Any] | None = None
    weights_sha256: str | None = None  # of the file this config was read from; used up by loading it
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MoLoraPeftType.MOLORA
        self._check_numbers()
        self._normalise_gate()
        self._normalise_ranks()
        self._normalise_names()
        self._normalise_tasks()
        self._check_aux_losses()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT keeps it
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; sets as sorted lists, so that equal configs are equal files."""
        plain = super().to_dict()
        plain["gate"] = asdict(self.gate)
        plain["expert_specs"] = {name: asdict(spec) for name, spec in self.expert_specs.items()}
        plain["peft_type"] = MoLoraPeftType.MOLORA.value
        return {key: sorted(value) if isinstance(value, set) else value for key, value in plain.items()}

    # -- disk ------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, completed by molora.json and a manifest."""
        super().save_pretrained(save_directory, **kwargs)
        complete_folder(self, Path(save_directory), getattr(self, "taken_sha256", None))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """PEFT's, after checking a local folder against its manifest; AdapterError where it is damaged."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if (folder / MANIFEST).is_file():
            verify_folder(folder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    # -- normalisation ---------------------------------------------------------------------------------

    def _normalise_gate(self) -> None:
        if self.gate is None:
            self.gate = GateConfig(top_k=min(2, max(self.num_experts, 1)))
        elif isinstance(self.gate, dict):
            settings = dict(self.gate)
            kind = settings.pop("kind", None)
            known = [f.name for f in fields(GateConfig)]
            for name in settings:
                if name not in known:
                    raise ConfigError(
                        f"gate.{name} is not a setting.{did_you_mean(name, known)} Settings: {', '.join(known)}."
                    )
            self.gate = gate_from_kind(kind, **settings) if kind else GateConfig(**settings)
        gate: GateConfig = replace(self.gate)  # the caller's object stays as it is
        self.gate = gate
        for field_name, message in mixture_problems(asdict(gate), self.num_experts):
            raise ConfigError(f"gate.{field_name}={getattr(gate, field_name)!r}: {message}")
        gate.renorm = gate.renorm or gate.default_renorm()
        if gate.select == "threshold" and gate.threshold is None:  # a number: it stays when experts are added
            gate.threshold = 1 / self.num_experts

    def _check_numbers(self) -> None:
        if self.num_experts < 1:
            raise ConfigError(f"num_experts={self.num_experts} must be at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout} must be in [0, 1).")
        for name in ("lora_alpha", "init_std", "init_gain"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} must be a positive number.")
        if self.init not in INIT_KINDS:
            raise ConfigError(
                f"init={self.init!r} is not one of {', '.join(INIT_KINDS)}.{did_you_mean(self.init, INIT_KINDS)}"
            )
        if isinstance(self.scaling, str) and self.scaling not in SCALINGS:
            raise ConfigError(f"scaling={self.scaling!r} is not a number or one of {', '.join(SCALINGS)}.")
        if self.scaling is not None and self.use_rslora:
            raise ConfigError(
                "use_rslora=True and scaling are both given.",
                hint="use_rslora means scaling='alpha_over_sqrt_r'.",
            )
        if self.init == "rescaled" and not self.use_rslora and self.scaling in (None, "alpha_over_r"):
            warnings.warn(
                "init='rescaled' already shrinks A by 1/sqrt(r); with alpha/r the updates shrink twice as r grows. "
                "Use scaling='alpha' (the article's form) or a plain init with use_rslora=True.",
                stacklevel=3,
            )
        if self.bias != "none":
            raise ConfigError(f"bias={self.bias!r} is not supported; only 'none'.")

    def _normalise_ranks(self) -> None:
        if isinstance(self.r, dict):
            if self.rank_pattern:
                raise ConfigError("r is a pattern map and rank_pattern is given too; use one of them.")
            self.rank_pattern, self.r = dict(self.r), 8
        ranks = [*(self.r if isinstance(self.r, list) else [self.r]), *self.rank_pattern.values()]
        if any(not isinstance(rank, int) or rank < 1 for rank in ranks):
            raise ConfigError(
                f"r={self.r!r}, rank_pattern={self.rank_pattern!r}: every rank must be an integer of at least 1."
            )
        if isinstance(self.r, list) and self.rank_pattern:
            raise ConfigError("r is a list and rank_pattern is given too; use one of them.")
        self.expert_specs = {
            name: ExpertSpec(**spec) if isinstance(spec, dict) else spec
            for name, spec in self.expert_specs.items()
        }

    def _normalise_names(self) -> None:
        if self.expert_names is None:
            self.expert_names = [f"expert_{i}" for i in range(self.num_experts)]
        self.expert_names = [check_name(name, "expert") for name in self.expert_names]
        if len(self.expert_names) != self.num_experts:
            raise ConfigError(
                f"expert_names lists {len(self.expert_names)} names, but num_experts={self.num_experts}."
            )
        if (
            len({name.casefold() for name in self.expert_names}) != self.num_experts
        ):  # folders may ignore case
            raise ConfigError(
                f"expert_names has duplicates (upper and lower case count as one): {self.expert_names}."
            )
        for what in ("frozen_experts", "isolated_experts", "expert_specs"):
            for name in getattr(self, what):
                self._require_expert(name, what)
        if self.gate_blocks is None:
            self.gate_blocks = [list(self.expert_names)]
        if sorted(name for block in self.gate_blocks for name in block) != sorted(self.expert_names):
            raise ConfigError("gate_blocks must name every expert exactly once.")

    def _require_expert(self, name: str, where: str) -> None:
        assert self.expert_names is not None
        if name not in self.expert_names:
            raise ConfigError(
                f"{where} names {name!r}, which is not an expert.{did_you_mean(name, self.expert_names)} "
                f"Experts: {', '.join(self.expert_names)}."
            )

    def _normalise_tasks(self) -> None:
        assert self.expert_names is not None
        if self.tasks is None:
            self.tasks = (
                list(self.expert_names) if self.gate.scope == "task" and self.task_ids is None else []
            )
            if self.gate.scope == "task" and self.tasks:
                self.tasks = {name: [name] for name in self.expert_names}
        if not isinstance(self.tasks, dict):
            self.tasks = self._default_tasks(self.tasks)
        for task, experts in self.tasks.items():
            check_name(task, "task")
            if not experts:
                raise ConfigError(f"tasks[{task!r}] names no expert.")
            for name in experts:
                self._require_expert(name, f"tasks[{task!r}]")
        if self.task_ids is None:
            self.task_ids = {task: i for i, task in enumerate(self.tasks)}
        if set(self.task_ids) != set(self.tasks) or len(set(self.task_ids.values())) != len(self.task_ids):
            raise ConfigError(
                f"task_ids {self.task_ids} must give each of the tasks {list(self.tasks)} one id of its own."
            )
        if any(i < 0 for i in self.task_ids.values()):
            raise ConfigError("task_ids must not be negative: -1 means the base model only.")
        used = max(self.task_ids.values(), default=-1) + 1
        self.next_task_id = max(used, self.next_task_id or 0)

    def _default_tasks(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Task i -> expert i under a task gate; every expert under a learned one."""
        assert self.expert_names is not None
        names = list(names)
        if self.gate.scope != "task":
            return {name: list(self.expert_names) for name in names}
        if len(names) > self.num_experts:
            raise ConfigError(
                f"{len(names)} tasks, but num_experts={self.num_experts}: a task gate gives each task its own expert.",
                hint="raise num_experts, or map tasks to experts with tasks={task: [expert, ...]}.",
            )
        return {name: [self.expert_names[i]] for i, name in enumerate(names)}

    def _check_aux_losses(self) -> None:
        for name, value in self.aux_losses.items():
            if name not in AUX_LOSSES:
                raise ConfigError(
                    f"aux_losses.{name} is not a loss.{did_you_mean(name, AUX_LOSSES)} Losses: {', '.join(AUX_LOSSES)}."
                )
            settings = dict(value) if isinstance(value, dict) else {"coefficient": value}
            if not isinstance(settings.pop("coefficient", None), (int, float)):
                raise ConfigError(
                    f"aux_losses.{name} needs a coefficient: a number, or a map with `coefficient`."
                )
            for key, choice in settings.items():
                allowed = AUX_LOSSES[name].get(key)
                if allowed is None or choice not in allowed:
                    raise ConfigError(
                        f"aux_losses.{name}.{key}={choice!r} is not allowed; settings: {AUX_LOSSES[name]}."
                    )
            if name in ("balance", "z") and not self.gate.learned:
                raise ConfigError(
                    f"aux_losses.{name} needs a gate that learns; gate.scope='task' has no parameters."
                )
            if name == "z" and self.gate.scope == "constant":
                raise ConfigError(
                    "aux_losses.z is meaningless on a constant gate: softmax ignores a common shift of its logits."
                )

    # -- reading ---------------------------------------------------------------------------------------

    def aux_coefficient(self, name: str) -> float:
        """The weight of one auxiliary loss in the training loss."""
        value = self.aux_losses[name]
        return float(value["coefficient"] if isinstance(value, dict) else value)

    def aux_settings(self, name: str) -> dict[str, str]:
        """Its settings with defaults filled in."""
        value = self.aux_losses[name]
        given = value if isinstance(value, dict) else {}
        return {key: given.get(key, allowed[0]) for key, allowed in AUX_LOSSES[name].items()}

    def task_map(self) -> TaskMap:
        """The routing view of `tasks`: equal weights where only names are given."""
        assert self.expert_names is not None and self.task_ids is not None
        weights = {
            task: dict(experts) if isinstance(experts, dict) else {name: 1 / len(experts) for name in experts}
            for task, experts in self.tasks.items()
        }
        return TaskMap(
            tuple(self.expert_names), dict(self.task_ids), weights, frozenset(self.isolated_experts)
        )

    def frozen_flags(self) -> list[bool]:
        """Per expert, whether it is frozen."""
        assert self.expert_names is not None
        return [name in self.frozen_experts for name in self.expert_names]

    def block_indices(self) -> list[list[int]]:
        """gate_blocks as expert indices."""
        assert self.expert_names is not None and self.gate_blocks is not None
        return [[self.expert_names.index(name) for name in block] for block in self.gate_blocks]


def as_sequence(value: str | Sequence[str]) -> list[str]:
    """One name or several, as a list."""
    return [value] if isinstance(value, str) else list(value)
