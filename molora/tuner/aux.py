"""From the records of one forward to the auxiliary losses of one adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molora import losses
from molora.experts.bank import ExpertBank
from molora.tuner.config import MoLoraConfig
from molora.tuner.inputs import GateRecord
from molora.tuner.layer import MoLoraLayer


def aux_losses_of(
    config: MoLoraConfig, adapter: str, layers: Sequence[MoLoraLayer], records: Sequence[GateRecord]
) -> dict[str, Tensor]:
    """Unweighted value of every configured loss: per gate (or layer), then the mean over them."""
    values: dict[str, list[Tensor]] = {name: [] for name in config.aux_losses}
    for record in records:
        routing = record.routing
        if routing.logits is None:
            continue
        mask = record.mask if record.mask is not None and len(record.mask) == len(routing.logits) else None
        with torch.autocast(routing.logits.device.type, enabled=False):
            if "balance" in values:
                values["balance"].append(losses.balance(routing.probs, routing.selected, mask))
            if "z" in values:
                values["z"].append(losses.z(routing.logits, mask))
    if "orthogonal" in values:
        norm = config.aux_settings("orthogonal")["norm"]
        banks = [layer.molora_experts[adapter] for layer in layers if adapter in layer.molora_experts]
        values["orthogonal"] = [_overlap(bank, norm) for bank in banks if isinstance(bank, ExpertBank)]
    device = layers[0].weight.device
    return {
        name: torch.stack(v).mean() if v else torch.zeros((), device=device) for name, v in values.items()
    }


def _overlap(bank: ExpertBank, norm: str) -> Tensor:
    if bank.frozen_A is None or bank.lora_A is None:
        present = bank.lora_A if bank.lora_A is not None else bank.frozen_A
        assert present is not None
        return present.new_zeros((), dtype=torch.float32)
    with torch.autocast(bank.lora_A.device.type, enabled=False):
        return losses.orthogonal(bank.lora_A.flatten(0, 1).float(), bank.frozen_A.flatten(0, 1).float(), norm)


def weighted_sum(config: MoLoraConfig, values: dict[str, Tensor]) -> Tensor | None:
    """Σ coefficient · value, or None where there is no loss."""
    terms = [config.aux_coefficient(name) * value for name, value in values.items()]
    return torch.stack(terms).sum() if terms else None
