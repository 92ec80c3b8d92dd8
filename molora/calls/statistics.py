"""RoutingRecord: who was routed where. Sums only, so its size does not grow with the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molora.calls.task_ids import spread
from molora.calls.task_map import BASE_ONLY, TaskMap


@dataclass
class GateSums:
    """Sums over tokens of one gate under one task; vectors are (expert,) float64."""

    tokens: float
    weight: Tensor
    share: Tensor  # of the slots
    top1: Tensor
    entropy: float  # of the probabilities
    entropy_after: float  # of the weights, each token's made to sum to 1

    def add(self, other: GateSums) -> None:
        """Add another's sums; a bank that has grown meanwhile pads the older ones."""
        size = max(len(self.weight), len(other.weight))
        for name in ("weight", "share", "top1"):
            setattr(self, name, _pad(getattr(self, name), size) + _pad(getattr(other, name), size))
        self.tokens += other.tokens
        self.entropy += other.entropy
        self.entropy_after += other.entropy_after


@dataclass
class RoutingRecord:
    """Counts per gate and task, filled by `molora.record_routing`."""

    sums: dict[tuple[str, str | None], GateSums] = field(default_factory=dict)  # (gate, task name or None)
    experts: tuple[str, ...] = ()
    by_row: bool = False  # also keep what `take_rows` gives
    _rows: list[tuple[Tensor, Tensor]] = field(
        default_factory=list
    )  # (row, expert) weights and (row,) tokens

    @torch.no_grad()
    def add(self, task_map: TaskMap, records: list[tuple[str, Any]]) -> None:
        """Take in one forward: (gate name, record) pairs with `routing`, `mask` and `task_ids`."""
        if len(task_map.experts) >= len(self.experts):
            self.experts = task_map.experts
        for gate, record in records:
            here = [task_map.experts.index(name) for name in record.task_map.experts]
            parts = full_weights(record.routing, here, len(task_map.experts))
            weights, selected, entropy = (by_token(part, record.lead) for part in parts)
            everything = torch.ones(len(weights), dtype=torch.bool, device=weights.device)
            keep = everything if record.mask is None else record.mask
            if self.by_row:
                kept = keep.to(weights.dtype).unflatten(0, (record.lead[0], -1))
                rows = weights.unflatten(0, (record.lead[0], -1)) * kept.unsqueeze(-1)
                self._rows.append((rows.sum(1).double().cpu(), kept.sum(1).double().cpu()))
            ids = None if record.task_ids is None else record.task_ids.to(weights.device)
            for task_id in [None] if ids is None else ids.unique().tolist():
                if task_id == BASE_ONLY:
                    continue
                rows = keep if ids is None else keep & (ids == task_id)
                name = None if task_id is None else task_map.name(task_id)
                self._count(gate, name, weights[rows], selected[rows], entropy[rows])

    def _count(self, gate: str, task: str | None, weights: Tensor, selected: Tensor, entropy: Tensor) -> None:
        top1 = torch.zeros(weights.shape[1], dtype=torch.float64, device=weights.device)
        if len(weights):
            top1 += torch.bincount(weights.argmax(dim=-1), minlength=weights.shape[1])
        new = GateSums(
            float(len(weights)),
            weights.double().sum(0).cpu(),
            selected.double().sum(0).cpu(),
            top1.cpu(),
            entropy.double().sum().item(),
            _entropy_of(weights.double()),
        )
        if (gate, task) in self.sums:
            self.sums[gate, task].add(new)
        else:
            self.sums[gate, task] = new

    def take_rows(self, size: int) -> list[dict[str, float]]:
        """Each row's mean weight of every expert, over its tokens and all gates since the last call; beams are one row."""
        weight = torch.zeros(size, len(self.experts), dtype=torch.float64)
        tokens = torch.zeros(size, dtype=torch.float64)
        for rows, counts in self._rows:
            if len(rows) % size == 0:
                weight[:, : rows.shape[1]] += rows.unflatten(0, (size, -1)).sum(1)
                tokens += counts.unflatten(0, (size, -1)).sum(1)
        self._rows = []
        means = (weight / tokens.clamp(min=1).unsqueeze(1)).tolist()
        return [dict(zip(self.experts, row, strict=True)) for row in means]

    @property
    def tokens(self) -> int:
        """Tokens counted at the busiest gate."""
        per_gate: dict[str, float] = {}
        for (gate, _), sums in self.sums.items():
            per_gate[gate] = per_gate.get(gate, 0.0) + sums.tokens
        return int(max(per_gate.values(), default=0))

    def table(self) -> list[dict[str, Any]]:
        """One row per gate and expert: layer, share of slots, mean weight, top-1 share; entropy of the gate's
        probabilities, and of the weights it gave (nats)."""
        merged: dict[str, GateSums] = {}
        for (gate, _), sums in self.sums.items():
            if gate not in merged:
                size = len(sums.weight)
                merged[gate] = GateSums(
                    0.0,
                    torch.zeros(size).double(),
                    torch.zeros(size).double(),
                    torch.zeros(size).double(),
                    0.0,
                    0.0,
                )
            merged[gate].add(sums)
        rows = []
        for gate, sums in merged.items():
            tokens = max(sums.tokens, 1.0)
            numbers = [int(part) for part in gate.split(".") if part.isdigit()]
            for i in range(len(sums.weight)):
                rows.append(
                    {
                        "gate": gate,
                        "layer": numbers[0] if numbers else None,
                        "expert": self.experts[i],
                        "share": sums.share[i].item() / tokens,
                        "mean_weight": sums.weight[i].item() / tokens,
                        "top1_share": sums.top1[i].item() / tokens,
                        "entropy": sums.entropy / tokens,
                        "entropy_after": sums.entropy_after / tokens,
                    }
                )
        return rows

    def by_task(self) -> dict[str, dict[str, float]]:
        """Task -> {expert: mean weight over gates and tokens}, for forwards that carried task ids."""
        weight: dict[str, Tensor] = {}
        tokens: dict[str, float] = {}
        for (_, task), sums in self.sums.items():
            if task is not None:
                total = weight.get(task, torch.zeros(0, dtype=torch.float64))
                size = max(len(total), len(sums.weight))
                weight[task] = _pad(total, size) + _pad(sums.weight, size)
                tokens[task] = tokens.get(task, 0.0) + sums.tokens
        return {
            task: {self.experts[i]: total[i].item() / max(tokens[task], 1.0) for i in range(len(total))}
            for task, total in weight.items()
        }


def _entropy_of(weights: Tensor) -> float:
    """Summed over tokens, in nats; weights (tokens, expert) below 0 count as 0."""
    positive = weights.clamp(min=0)
    total = positive.sum(dim=-1, keepdim=True)
    return float(torch.special.entr(positive / total.where(total > 0, 1.0)).sum())


def _pad(values: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, size - len(values)))


def by_token(rows: Tensor, lead: Sequence[int]) -> Tensor:
    """What a gate gave for all tokens, samples or none of them, (tokens, ...): one row for each token."""
    spread_rows = spread(rows, lead)
    return spread_rows.expand(math.prod(lead), *rows.shape[1:]) if len(spread_rows) == 1 else spread_rows


def full_weights(routing: Any, here: Sequence[int], num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and slot shares over all experts, (tokens, expert), and entropy (tokens,).

    Args:
        routing: a gate's answer; with splits, their mean counts.
        here: index of each expert of the gate's layer among all experts.
        num_experts: how many there are in all.
    """
    weights = routing.weights.detach().float()
    selected = routing.selected.float()
    entropy = torch.special.entr(routing.probs.float().clamp(min=0)).sum(-1)
    columns = list(here) if routing.experts is None else [here[i] for i in routing.experts]
    if routing.gated is not None:  # those always on have no slot of their own
        selected = (routing.weights.detach() != 0).float()
        selected = selected / selected.sum(dim=-1, keepdim=True).clamp(min=1)
    if columns != list(range(num_experts)):
        index = torch.tensor(columns, device=weights.device)
        weights, selected = (
            torch.zeros(len(t), num_experts, device=t.device).index_copy(1, index, t)
            for t in (weights, selected)
        )
    if routing.splits > 1:
        weights, selected, entropy = (
            t.unflatten(0, (-1, routing.splits)).mean(dim=1) for t in (weights, selected, entropy)
        )
    return weights, selected, entropy
