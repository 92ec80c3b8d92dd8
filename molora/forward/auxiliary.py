"""From the records of one forward to the auxiliary losses of one adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from molora import losses
from molora.config.choices import AUX_LOSSES
from molora.config.loss_rules import WITHOUT_GATE
from molora.config.names import check_name
from molora.errors import ConfigError
from molora.experts.bank import ExpertBank
from molora.forward.gate_view import GateView
from molora.forward.group_routing import GateRecord
from molora.gates.gate import Gate
from molora.tuner.config import MoLoraConfig
from molora.tuner.layer import MoLoraLayer
from molora.tuner.placement import frozen_rows_at

GateLoss = Callable[[GateView, Mapping[str, Any]], Tensor]

GATE_LOSSES: dict[str, GateLoss] = {
    "balance": lambda v, o: losses.balance(v.probs, v.selected, v.mask),
    "importance": lambda v, o: losses.importance(v.probs, v.mask),
    "load": lambda v, o: losses.load(v.clean, v.logits, v.top_k, v.noise_std, v.mask),
    "localized": lambda v, o: losses.localized(v.weights, v.own, o["alpha"], v.samples, v.batch, v.mask),
    "z": lambda v, o: losses.z(v.logits, v.mask),
    "entropy": lambda v, o: losses.entropy(v.probs, v.mask, o["index"], v.choices),
    "mutual_information": lambda v, o: losses.mutual_information(v.probs, v.mask, o["free_bits"]),
    "task_label": lambda v, o: losses.task_label(v.logits, v.own, v.mask),
    "similarity": lambda v, o: losses.similarity(v.mean_probs, v.mean_inputs),
    "l1": lambda v, o: losses.l1(v.weights, v.mask),
}


def register_loss(name: str, function: GateLoss, **settings: float) -> None:
    """Make `aux_losses={name: coefficient}` mean a loss of your own on every gate, in Python and in recipes.

    Args:
        name: a new name.
        function: (view, settings) -> scalar: a `GateView` of one gate's answer in one forward, and the settings of the
            loss. It should not grow with the number of tokens, and ignore what `view.mask` leaves out.
        settings: numbers a config may set beside the coefficient, with their defaults.

    Raises:
        ConfigError: the name is taken, or is no name.
    """
    check_name(name, "loss")
    if name in AUX_LOSSES:
        raise ConfigError(f"there is an auxiliary loss {name!r} already.")
    AUX_LOSSES[name] = {"mask": ("padding", "response"), **settings}
    GATE_LOSSES[name] = function


def aux_losses_of(
    config: MoLoraConfig, adapter: str, layers: Sequence[MoLoraLayer], records: Sequence[GateRecord]
) -> dict[str, Tensor]:
    """Unweighted value of every configured loss: per gate (or layer), then the mean over them."""
    device = layers[0].weight.device
    found: dict[str, Tensor] = {}
    for name in config.aux_losses:
        settings = config.aux_settings(name)
        with torch.autocast(device.type, enabled=False):
            if name == "contrastive":
                values = _contrastive(adapter, layers, settings)
            elif name in WITHOUT_GATE:
                values = _of_experts(name, adapter, layers, settings)
            else:
                views = [GateView(record, config, settings["mask"]) for record in records]
                values = [GATE_LOSSES[name](view, settings) for view in views if view.learned]
        found[name] = torch.stack(values).mean() if values else torch.zeros((), device=device)
    for layer in layers:
        layer.samples.pop(adapter, None)
    return found


def _of_experts(
    name: str, adapter: str, layers: Sequence[MoLoraLayer], settings: Mapping[str, Any]
) -> list[Tensor]:
    banks = [
        layer.molora_experts[adapter]
        for layer in layers
        if adapter in layer.molora_experts and not layer.sites[adapter].plain
    ]
    if name == "orthogonal":
        return [_overlap(bank, settings["norm"]) for bank in banks]
    return [_alike(bank, settings["factor"]) for bank in banks]


def _overlap(bank: ExpertBank, norm: str) -> Tensor:
    stack = bank.stacks["A"]
    if stack.frozen is None or stack.trainable is None:
        return stack.blocks[0].new_zeros((), dtype=torch.float32)
    return losses.orthogonal(stack.trainable.flatten(0, 1).float(), stack.frozen.flatten(0, 1).float(), norm)


def _alike(bank: ExpertBank, factor: str) -> Tensor:
    stacks = [bank.stacks[name].whole for name in (("A", "B") if factor == "both" else factor)]
    values = [losses.expert_similarity(stack.flatten(1).float()) for stack in stacks if len(stack) > 1]
    return torch.stack(values).mean() if values else stacks[0].new_zeros((), dtype=torch.float32)


def _contrastive(adapter: str, layers: Sequence[MoLoraLayer], settings: Mapping[str, Any]) -> list[Tensor]:
    """Outputs of the experts that some tokens of each layer went to, told apart by expert."""
    values = []
    for layer in layers:
        sample = layer.samples.get(adapter)
        if sample is None:
            continue
        bank: ExpertBank = layer.molora_experts[adapter]
        x, chosen = sample
        outputs = []
        for e, expert in enumerate(bank.experts()):
            rows = x[chosen == e].to(torch.promote_types(x.dtype, torch.float32))
            outputs.append(rows @ expert.A.to(rows.dtype).t() @ expert.B.to(rows.dtype).t())
        order = torch.cat([torch.full((len(o),), e, device=x.device) for e, o in enumerate(outputs)])
        values.append(losses.contrastive(torch.cat(outputs), order, settings["temperature"]))
    return values


@torch.no_grad()
def balance_experts(
    config: MoLoraConfig,
    adapter: str,
    layers: Sequence[MoLoraLayer],
    records: Sequence[tuple[str, GateRecord]],
) -> None:
    """Move the balance of every gate by what it just did; processes of a group move theirs alike.

    Experts with frozen gate rows keep theirs: who serves old tasks must not change.
    """
    gates = {
        layer.sites[adapter].key: layer.molora_gate[adapter]
        for layer in layers
        if adapter in layer.molora_gate
    }
    counted = [
        (gates[key], _missing(record, gates[key], frozen_rows_at(config, key))) for key, record in records
    ]
    if counted and distributed.is_available() and distributed.is_initialized():
        together = torch.cat([missing for _, missing in counted])
        distributed.all_reduce(together)
        together /= distributed.get_world_size()
        sizes = [len(missing) for _, missing in counted]
        counted = [(g, part) for (g, _), part in zip(counted, together.split(sizes), strict=True)]
    for gate, missing in counted:
        gate.move_balance(missing)


def _missing(record: GateRecord, gate: Gate, frozen: Sequence[bool]) -> Tensor:
    """What each of all experts (expert,) lacks of an even share; 0 for frozen ones and those the batch could not use."""
    selected = record.routing.selected.float()
    mask = record.mask if record.mask is not None and len(record.mask) == len(selected) else None
    share = losses.masked_mean(selected, mask)
    assert gate.balance is not None
    missing = share.new_zeros(len(gate.balance))
    missing[list(record.columns)] = 1 / len(share) - share
    if any(frozen):
        missing[torch.tensor(frozen, device=missing.device)] = 0
    return missing


def weighted_sum(config: MoLoraConfig, values: dict[str, Tensor]) -> Tensor | None:
    """Σ coefficient · value, or None where there is no loss."""
    terms = [config.aux_coefficient(name) * value for name, value in values.items()]
    return torch.stack(terms).sum() if terms else None
