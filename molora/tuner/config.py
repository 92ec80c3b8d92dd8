"""MoLoraConfig: everything needed to rebuild an adapter, checked when constructed."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from molora.calls.task_map import TaskMap
from molora.config.choices import AUX_LOSSES
from molora.disk.card import complete_folder
from molora.disk.manifest import MANIFEST, verify_folder
from molora.tuner.config_checks import SCALINGS, normalise

__all__ = ["SCALINGS", "ExpertSpec", "MoLoraConfig", "MoLoraPeftType", "as_sequence"]


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
        num_experts: experts per target layer: a number, a list (one per transformer block), or `{pattern: number}`
            (layers without a pattern have the largest number).
        r: rank per expert: a number, a list (one per transformer block), or `{pattern: rank}`.
        kind: what an expert's own parameters are: a registered kind; `lora` by default, A and B.
        kind_settings: settings of the kind.
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
        combine: `outputs` (a sum of the experts' outputs), or `factors`: each sample has one LoRA whose A and B are
            the experts' mixed; only for gates whose weights are the same for all tokens of a sample.
        always_on: `{expert: weight}` of experts that the gate does not decide over; "rest" means 1 minus the
            largest weight it gave.
        share_A: all experts of a layer have one A (HydraLoRA).
        task_cores: each task has a matrix (rank, rank) of its own between the shared A and the experts (MTL-LoRA).
        ffn_targets: suffixes or a regex of the linears of a whole feed-forward block: experts are mixed after the
            block's last linear, over whole non-linear feed-forwards (MixLoRA). Targets all the same. The weights are
            divided by their sum, those of tasks too.
        aux_losses: `{name: coefficient}`, or `{name: {"coefficient": c, ...settings}}`.
        add_aux_to_loss: add the weighted auxiliary losses to `out.loss` in training.
        expert_names: names, default `expert_0`...
        tasks: `{task: [experts]}` or `{task: {expert: weight}}`, or a list of task names.
        init: how A starts: kaiming, gaussian, rescaled, orthogonal, or svd_segments (GOAT: A and B from equal
            segments of the base weight's singular vectors).
        init_std: σ of gaussian and rescaled.
        init_gain: factor on A's initial standard deviation.
        The rest is kept by the expert verbs: task_ids, frozen_experts, frozen_extras (plain LoRAs and heads),
            free_rows (frozen experts whose gate rows learn), expert_specs, gate_blocks, isolated_experts,
            next_task_id, experts_by_layer and first_experts (a num_experts that differs by layer); depth
            (the base's blocks) by wrapping; base_fingerprint
            and weights_sha256 by saving.

    Raises:
        ConfigError: a value that cannot mean anything, with what is allowed.
    """

    num_experts: Any = 8
    r: int | list[int] | dict[str, int] = 8
    kind: str = "lora"
    kind_settings: dict[str, Any] = field(default_factory=dict)
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
    combine: str = "outputs"
    always_on: dict[str, Any] = field(default_factory=dict)
    share_A: bool = False
    task_cores: bool = False
    ffn_targets: list[str] | str | None = None
    aux_losses: dict[str, Any] = field(default_factory=dict)
    add_aux_to_loss: bool = True
    expert_names: list[str] | None = None
    tasks: Any = None
    task_ids: dict[str, int] | None = None
    next_task_id: int | None = None
    frozen_experts: list[str] = field(default_factory=list)
    frozen_extras: bool = False
    free_rows: list[str] = field(default_factory=list)
    isolated_experts: list[str] = field(default_factory=list)
    expert_specs: dict[str, Any] = field(default_factory=dict)
    gate_blocks: list[list[str]] | None = None
    experts_by_layer: list[int] | dict[str, int] | None = None
    first_experts: list[str] | None = None
    depth: int = 0
    init: str = "kaiming"
    init_std: float = 0.02
    init_gain: float = 1.0
    base_fingerprint: dict[str, Any] | None = None
    weights_sha256: str | None = None  # of the file this config was read from; used up by loading it
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MoLoraPeftType.MOLORA
        normalise(self)
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

    # -- reading ---------------------------------------------------------------------------------------

    def aux_coefficient(self, name: str) -> float:
        """The weight of one auxiliary loss in the training loss."""
        value = self.aux_losses[name]
        return float(value["coefficient"] if isinstance(value, dict) else value)

    def aux_settings(self, name: str) -> dict[str, Any]:
        """Its settings with defaults filled in."""
        value = self.aux_losses[name]
        given = value if isinstance(value, dict) else {}
        return {
            key: given.get(key, default[0] if isinstance(default, tuple) else default)
            for key, default in AUX_LOSSES[name].items()
        }

    def task_map(self) -> TaskMap:
        """The routing view of `tasks`: equal weights where only names are given."""
        assert self.expert_names is not None and self.task_ids is not None
        weights = {
            task: dict(experts) if isinstance(experts, dict) else {name: 1 / len(experts) for name in experts}
            for task, experts in self.tasks.items()
        }
        return TaskMap(
            tuple(self.expert_names),
            dict(self.task_ids),
            weights,
            frozenset(self.isolated_experts),
            dict(self.always_on),
        )


def as_sequence(value: str | Sequence[str]) -> list[str]:
    """One name or several, as a list."""
    return [value] if isinstance(value, str) else list(value)
