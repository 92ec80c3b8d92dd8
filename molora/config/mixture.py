"""Mixture: the settings of a mixture of experts, declared once, for recipes and for MoLoraConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from molora.config.losses import AUX_LOSSES
from molora.config.section import ExpertCount, ExpertName, Fraction, Positive, Width
from molora.config.setting import numbers_of, setting


@dataclass
class ExpertSpec:
    """Rank and scaling of one expert that differs from the config's own, in PEFT's LoraConfig terms."""

    r: Width
    lora_alpha: Positive
    use_rslora: bool = False
    rank_pattern: dict[str, Width] = setting(dict)
    alpha_pattern: dict[str, Positive] = setting(dict)
    scaling: Literal["alpha_over_r", "alpha_over_sqrt_r", "alpha"] | Positive | None = None


@dataclass
class Mixture:
    """How many experts of which rank sit on which layers, and how they are mixed; PEFT's spelling where PEFT has one."""

    num_experts: ExpertCount | list[ExpertCount] | dict[str, ExpertCount] = setting(
        8,
        "experts per target layer: a number, a list (one per transformer block), or `{pattern: number}` (layers without a "
        "pattern have the largest number).",
    )
    r: Width | list[Width] | dict[str, Width] = setting(
        8, "rank per expert: a number, a list (one per transformer block), or `{pattern: rank}`."
    )
    lora_alpha: Positive = setting(16.0, "scaling numerator.")
    lora_dropout: Fraction = setting(0.0, "dropout on the experts' input.")
    use_rslora: bool = setting(False, "scale by alpha/√r instead of alpha/r.")
    scaling: Literal["alpha_over_r", "alpha_over_sqrt_r", "alpha"] | Positive | None = setting(
        None, "the rule by name (`alpha_over_r`, `alpha_over_sqrt_r`, `alpha`) or a number."
    )
    init: Literal["kaiming", "gaussian", "rescaled", "orthogonal", "svd_segments"] = setting(
        "kaiming",
        "how A starts: `kaiming`, `gaussian`, `rescaled`, `orthogonal`, or `svd_segments` (GOAT: A and B from equal segments "
        "of the base weight's singular vectors).",
    )
    init_std: Positive = setting(0.02, "σ of gaussian and rescaled.")
    init_gain: Positive = setting(1.0, "factor on A's initial standard deviation.")
    kind: str = setting("lora", "what an expert's own parameters are: a registered kind.")
    kind_settings: dict[str, int | float | str] = setting(dict, "settings of the kind.")
    rank_pattern: dict[str, Width] = setting(dict, "`{pattern: rank}` exceptions from r, as in PEFT.")
    alpha_pattern: dict[str, Positive] = setting(
        dict, "`{pattern: alpha}` exceptions from lora_alpha, as in PEFT."
    )
    target_modules: str | list[str] | None = setting(
        None, 'list of suffixes, a regex, or "all-linear", which a recipe has by default.'
    )
    exclude_modules: str | list[str] | None = setting(None, "suffixes or a regex never to touch.")
    layers_to_transform: int | list[int] | None = setting(None, "block indices to adapt, as in PEFT.")
    layers_pattern: str | list[str] | None = setting(None, "name of the block list, as in PEFT.")
    plain_targets: str | list[str] | None = setting(
        None, "suffixes or a regex that get one ordinary LoRA instead of experts."
    )
    modules_to_save: list[str] | None = setting(None, "modules trained and saved whole (heads).")
    expert_names: list[ExpertName] | None = setting(None, "the experts' names; by default `expert_0`...")
    tasks: Any = setting(
        None, "`{task: [experts]}` or `{task: {expert: weight}}`; in Python a list of task names as well."
    )
    gate: Any = setting(None, "GateConfig, or a map of its fields (with `kind` for the shorthand).")
    router: Any = setting(
        None,
        "RouterConfig, or a map of its fields, or its kind: names the task of prompts that come without an id.",
    )
    num_virtual_tokens: Width | None = setting(
        None,
        "trained vectors of each expert that stand before a sample's own tokens, weighed as the expert is: prompt tuning beside "
        "the LoRAs. Of causal models, for gates whose weights are one per sample.",
    )
    combine: Literal["outputs", "factors"] = setting(
        "outputs",
        "`outputs` (a sum of the experts' outputs), or `factors`: each sample has one LoRA whose A and B are the experts' "
        "mixed; only for gates whose weights are the same for all tokens of a sample.",
    )
    frozen_experts: list[ExpertName] = setting(list, "experts that do not train.")
    always_on: dict[ExpertName, float | Literal["rest"]] = setting(
        dict,
        "`{expert: weight}` of experts that the gate does not decide over; `rest` means 1 minus the largest weight it gave.",
    )
    share_A: bool = setting(False, "all experts of a layer have one A (HydraLoRA).")
    task_cores: bool | Literal["diagonal"] = setting(
        False,
        "each task has a matrix (rank, rank) of its own between the shared A and the experts (MTL-LoRA); `diagonal`: a number "
        "for each dimension of the rank.",
    )
    ffn_targets: str | list[str] | None = setting(
        None,
        "suffixes or a regex of the linears of a whole feed-forward block: experts are mixed after the block's last linear, "
        "over whole non-linear feed-forwards (MixLoRA). Targets all the same. The weights are divided by their sum, those of "
        "tasks too.",
    )
    aux_losses: dict[str, float | dict[str, Any]] = setting(
        dict, '`{name: coefficient}`, or `{name: {"coefficient": c, ...settings}}`.'
    )

    @property
    def experts(self) -> list[str]:
        """The experts' names: as given, or expert_0, expert_1, ..."""
        return self.expert_names or [f"expert_{i}" for i in range(self.most_experts)]

    @property
    def most_experts(self) -> int:
        """How many experts the layers with the most have."""
        return int(max(numbers_of(self.num_experts)))

    def aux_coefficient(self, name: str) -> float:
        """The weight of one auxiliary loss in the training loss."""
        value = self.aux_losses[name]
        return float(value["coefficient"] if isinstance(value, dict) else value)

    def aux_settings(self, name: str) -> dict[str, Any]:
        """Its settings with defaults filled in."""
        value = self.aux_losses[name]
        given = value if isinstance(value, dict) else {}
        return {key: given.get(key, default) for key, default in AUX_LOSSES[name].defaults().items()}


@dataclass
class SavedMixture(Mixture):
    """A mixture with what an adapter's file keeps beside the settings: what the expert verbs did to it, and its base."""

    add_aux_to_loss: bool = setting(True, "add the weighted auxiliary losses to `out.loss` in training.")
    task_ids: dict[str, int] | None = setting(
        None, "a task's id; kept by the expert verbs, as all that follows."
    )
    next_task_id: int | None = setting(None, "the id of the next task; ids are not used again.")
    frozen_extras: bool = setting(False, "plain LoRAs and heads are frozen too.")
    free_rows: list[str] = setting(list, "frozen experts whose gate rows learn.")
    isolated_experts: list[str] = setting(list, "experts hidden from older tasks.")
    added_for: dict[str, str] = setting(dict, "`{task: expert}` of experts added for a new task.")
    expert_specs: dict[str, Any] = setting(dict, "rank and scaling of experts that have their own.")
    gate_blocks: list[list[str]] | None = setting(None, "experts whose gate rows are one Parameter.")
    experts_by_layer: list[int] | dict[str, int] | None = setting(
        None, "a num_experts that differs by layer."
    )
    first_experts: list[str] | None = setting(None, "the experts that `experts_by_layer` counts.")
    depth: int = setting(0, "the base's blocks; set by wrapping.")
    base_fingerprint: dict[str, Any] | None = setting(None, "what the base was; set by saving.")
    weights_sha256: str | None = setting(
        None, "of the file this config was read from; set by saving, used up by loading."
    )
    bias: str = setting("none", "PEFT's; only `none`.")
