"""From the records of one forward to the auxiliary losses of one adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from molora import losses
from molora.calls.call import Place
from molora.calls.record import GateRecord
from molora.config.losses import AUX_LOSSES, MASK, LossSpec
from molora.experts.bank import ExpertBank
from molora.forward.gate_view import GateView
from molora.forward.mount import Mount

Sample = tuple[Tensor, Tensor]  # (n, d_in) tokens of a layer, and the expert (n,) each went to
GateLoss = Callable[[GateView, Mapping[str, Any]], Tensor]


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
    AUX_LOSSES.add(name, LossSpec(function, {**MASK, **settings}), source=function.__module__)


def aux_losses_of(
    config: Any, mounts: Sequence[Mount], records: Sequence[GateRecord], samples: Mapping[Place, Sample]
) -> dict[str, Tensor]:
    """Unweighted value of every configured loss: per gate (or layer), then the mean over them."""
    device = mounts[0].bank.B.device
    found: dict[str, Tensor] = {}
    for name in config.aux_losses:
        settings = config.aux_settings(name)
        with torch.autocast(device.type, enabled=False):
            if name == "contrastive":
                taken = [(mount.bank, samples[mount.place]) for mount in mounts if mount.place in samples]
                values = [_contrastive(bank, *sample, settings["temperature"]) for bank, sample in taken]
            elif not AUX_LOSSES[name].of_gate:
                values = _of_experts(name, [mount.bank for mount in mounts if not mount.plain], settings)
            else:
                loss = AUX_LOSSES[name].load()
                views = [GateView(record, config, settings["mask"]) for record in records]
                values = [loss(view, settings) for view in views if view.learned]
        found[name] = torch.stack(values).mean() if values else torch.zeros((), device=device)
    return found


def _of_experts(name: str, banks: Sequence[ExpertBank], settings: Mapping[str, Any]) -> list[Tensor]:
    if name == "orthonormal":
        return [_orthonormal(bank) for bank in banks if bank.trainable]
    if name == "orthogonal":
        return [_overlap(bank, settings["norm"]) for bank in banks]
    return [_alike(bank, settings["factor"]) for bank in banks]


def _overlap(bank: ExpertBank, norm: str) -> Tensor:
    stack = bank.stacks["A"]
    if stack.frozen is None or stack.trainable is None:
        return stack.blocks[0].new_zeros((), dtype=torch.float32)
    return losses.orthogonal(stack.trainable.flatten(0, 1).float(), stack.frozen.flatten(0, 1).float(), norm)


def _orthonormal(bank: ExpertBank) -> Tensor:
    """Mean over the vectors of all learning experts."""
    rows = [bank.row(e).rows for e in bank.trainable]
    sets = [row[name] for row in rows for name in "AB"]
    exact = [v.to(torch.promote_types(v.dtype, torch.float32)) for v in sets]
    return torch.stack([losses.orthonormal(vectors) for vectors in exact]).mean()


def _alike(bank: ExpertBank, factor: str) -> Tensor:
    stacks = [bank.stacks[name].whole for name in (("A", "B") if factor == "both" else factor)]
    values = [losses.expert_similarity(stack.flatten(1).float()) for stack in stacks if len(stack) > 1]
    return torch.stack(values).mean() if values else stacks[0].new_zeros((), dtype=torch.float32)


def _contrastive(bank: ExpertBank, x: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """Outputs of the experts that some tokens x (n, d_in) of a layer went to, told apart by expert (n,)."""
    outputs = []
    for e, expert in enumerate(bank.experts()):
        rows = x[chosen == e].to(torch.promote_types(x.dtype, torch.float32))
        outputs.append(rows @ expert.A.to(rows.dtype).t() @ expert.B.to(rows.dtype).t())
    order = torch.cat([torch.full((len(o),), e, device=x.device) for e, o in enumerate(outputs)])
    return losses.contrastive(torch.cat(outputs), order, temperature)


@torch.no_grad()
def balance_experts(mounts: Sequence[Mount], records: Sequence[tuple[str, GateRecord]]) -> None:
    """Move the balance of every gate by what it just did; processes of a group move theirs alike.

    Experts with frozen gate rows keep theirs: who serves old tasks must not change.
    """
    owners = {mount.key: mount for mount in mounts if mount.gate is not None}
    counted = [(owners[key].gate, _shortfall(record, owners[key])) for key, record in records]
    if counted and distributed.is_available() and distributed.is_initialized():
        together = torch.cat([shortfall for _, shortfall in counted])
        distributed.all_reduce(together)
        together /= distributed.get_world_size()
        sizes = [len(shortfall) for _, shortfall in counted]
        counted = [(g, part) for (g, _), part in zip(counted, together.split(sizes), strict=True)]
    for gate, shortfall in counted:
        assert gate is not None
        gate.move_balance(shortfall)


def _shortfall(record: GateRecord, mount: Mount) -> Tensor:
    """Shortfall of each expert (expert,) from an even share; 0 for frozen ones and those the batch could not use."""
    selected = record.routing.selected.float()
    mask = record.mask if record.mask is not None and len(record.mask) == len(selected) else None
    share = losses.masked_mean(selected, mask)
    assert mount.gate is not None and mount.gate.balance is not None
    shortfall = share.new_zeros(len(mount.gate.balance))
    shortfall[list(record.columns)] = 1 / len(share) - share
    if any(mount.frozen_rows):
        shortfall[torch.tensor(mount.frozen_rows, device=shortfall.device)] = 0
    return shortfall


def weighted_sum(config: Any, values: dict[str, Tensor]) -> Tensor | None:
    """Σ coefficient · value, or None where there is no loss."""
    terms = [config.aux_coefficient(name) * value for name, value in values.items()]
    return torch.stack(terms).sum() if terms else None
