"""MoLoraConfig: everything needed to rebuild an adapter, checked when constructed."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType

from molora.calls.task_map import TaskMap
from molora.config.mixture import ExpertSpec, SavedMixture
from molora.config.normalise import normalise
from molora.config.roster import Roster
from molora.config.setting import documented, setting, written
from molora.config.types import type_problems
from molora.disk.adapter_files import check_files, check_no_pickle
from molora.disk.card import CONFIG_FILE, complete_folder
from molora.errors import AdapterError, ConfigError
from molora.tuner.lora_fields import refusing

__all__ = ["ExpertSpec", "MoLoraConfig", "MoLoraPeftType", "as_sequence"]


class MoLoraPeftType(str, enum.Enum):  # noqa: UP042  (transformers formats it as PEFT's own str enum)
    """Our entry in PEFT's tables; equal to, and hashed as, the plain string "MOLORA"."""

    MOLORA = "MOLORA"


@documented
@dataclass
class MoLoraConfig(SavedMixture, PeftConfig):
    """Configuration of a mixture of LoRA experts; PEFT's spelling where PEFT has one.

    Raises:
        ConfigError: an invalid value, with what is allowed.
    """

    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(
        None, "tokens whose rows of the embeddings are trained, as in PEFT: ids, or `{module: ids}`."
    )
    ensure_weight_tying: bool = setting(False, "what is trained of tied embeddings stays tied, as in PEFT.")
    layer_replication: list[tuple[int, int]] | None = setting(
        None, "build a deeper model of ranges of blocks that share their weights, as in PEFT."
    )

    def __post_init__(self) -> None:
        for name, message in type_problems(self, type(self)):
            raise ConfigError(f"{name}: {message}")
        if self.task_type is not None and self.task_type not in [*TaskType]:
            raise ConfigError(
                f"task_type={self.task_type!r} is not one of {', '.join(t.value for t in TaskType)}."
            )
        super().__post_init__()
        self.peft_type = MoLoraPeftType.MOLORA
        normalise(self)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))  # as PEFT keeps them

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; sets as sorted lists, so that equal configs are equal files."""
        plain = super().to_dict()
        plain["gate"] = written(self.gate)
        plain["expert_specs"] = {name: asdict(spec) for name, spec in self.expert_specs.items()}
        plain["peft_type"] = MoLoraPeftType.MOLORA.value
        if self.kind == "lora":  # as adapters were written before there were other kinds
            del plain["kind"], plain["kind_settings"]
        for name in (
            "router",
            "num_virtual_tokens",
            "added_for",
            "trainable_token_indices",
            "ensure_weight_tying",
            "layer_replication",
        ):
            if not plain[name]:
                del plain[name]
        if self.modules_to_save:  # PEFT's task models append their heads each time
            plain["modules_to_save"] = list(dict.fromkeys(self.modules_to_save))
        return {key: sorted(value) if isinstance(value, set) else value for key, value in plain.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, completed by molora.json and a manifest. AdapterError where PEFT has just written the tensors as a pickle."""
        check_no_pickle(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)
        complete_folder(self, Path(save_directory), getattr(self, "taken_sha256", None))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """PEFT's, after checking a local folder against its manifest; AdapterError where it is damaged."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        check_files(folder)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except ConfigError as error:
            raise AdapterError(f"{folder / CONFIG_FILE}: {error}") from error

    @property
    def roster(self) -> Roster:
        """Experts and tasks as one table."""
        return Roster.of(self)

    def task_map(self) -> TaskMap:
        """The routing view of `tasks`: equal weights where only names are given."""
        assert self.expert_names is not None and self.task_ids is not None
        weights = {
            task: dict(experts)
            if isinstance(experts, dict)
            else dict.fromkeys(experts, 1 / max(1, len(experts)))
            for task, experts in self.tasks.items()
        }
        names, isolated = tuple(self.expert_names), frozenset(self.isolated_experts)
        return TaskMap(names, dict(self.task_ids), weights, isolated, dict(self.always_on))


# Fields of LoraConfig that ours lacks are explained; a dataclass would only say that it does not know them.
MoLoraConfig.__init__ = refusing(MoLoraConfig.__init__, frozenset(f.name for f in fields(MoLoraConfig)))  # type: ignore[method-assign]


def as_sequence(value: str | Sequence[str]) -> list[str]:
    """One name or several, as a list."""
    return [value] if isinstance(value, str) else list(value)
