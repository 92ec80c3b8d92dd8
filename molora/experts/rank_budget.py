"""RankBudget: how many singular values all experts of an adapter may have, and which ones, as training goes on.

A triplet is one singular value with its two vectors. Its importance is that of the value plus the means of those of the
vectors' numbers, and a number's is sensitivity times uncertainty: running means of |w ∂w|, and of how far that is from its
own mean. The budget falls from all triplets to `target_r` for each expert and layer, as a cubic; every `deltaT` steps the values
beyond it become zero, and from `tfinal` steps before the end on they stay so.

Reference: AdaLoRA, arXiv:2303.10512; as PEFT has it. Ours, for mixtures: an expert without a gradient in a step, to which no
token went, keeps its importance; and each keeps its `min_rank` best triplets, so that none starves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molora.errors import ConfigError

Means = dict[str, tuple[Tensor, Tensor]]  # by stack: sensitivity and uncertainty, like its rows


@dataclass
class Triplets:
    """The learning experts of one layer: P (expert, rank, d_out), Λ (expert, rank), Q (expert, rank, d_in)."""

    parameters: Mapping[str, Tensor]
    ranks: Sequence[int]  # of each; what lies beyond is padding

    @property
    def valid(self) -> Tensor:
        """(expert, rank): what is no padding."""
        values = self.parameters["E"]
        columns = torch.arange(values.shape[1], device=values.device)
        return columns < torch.tensor(self.ranks, device=values.device).unsqueeze(1)


@dataclass
class RankBudget:
    """Settings as of the kind `adalora`."""

    target_r: int
    tinit: int
    tfinal: int
    deltaT: int
    beta1: float
    beta2: float
    min_rank: int
    total_step: int
    step: int = 0
    means: dict[str, Means] = field(default_factory=dict)  # by layer
    kept: dict[str, Tensor] = field(
        default_factory=dict
    )  # by layer: (expert, rank), after the last allocation

    def budget(self, step: int, total: int, start: int, target: int) -> int:
        """How many triplets there may be after so many steps of `total`, of `start` at first and `target` at last."""
        if step <= self.tinit:
            return start
        left = max(0.0, 1 - (step - self.tinit) / (total - self.tfinal - self.tinit))
        return int((start - target) * left**3 + target)

    @torch.no_grad()
    def after_step(self, layers: Mapping[str, Triplets], step: int | None, total: int | None) -> None:
        """Look at weights and gradients after an optimiser's step, and take away values beyond the budget.

        Args:
            layers: by layer.
            step: the number of this step, from 1; None: one more than the last.
            total: how many there will be, where `total_step` does not say.

        Raises:
            ConfigError: nobody said how many steps there are, or too few for `tinit` and `tfinal`.
        """
        self.step = self.step + 1 if step is None else step
        if self.step == 1:  # a training that begins knows nothing of an earlier one
            self.means, self.kept = {}, {}
        total = self.checked(self.total_step or total or 0)
        last = total - self.tfinal
        if self.step > last:
            for key, triplets in layers.items():
                if key in self.kept and self.kept[key].shape == triplets.parameters["E"].shape:
                    triplets.parameters["E"].masked_fill_(~self.kept[key].to(triplets.valid.device), 0.0)
            return
        if self.step < last:
            for key, triplets in layers.items():
                self._look_at(key, triplets)
        if self.step == last or (self.step > self.tinit and self.step % self.deltaT == 0):
            self._allocate(layers, total)

    def checked(self, total: int) -> int:
        """The same number of steps; raises ConfigError where it is too small for `tinit` and `tfinal`."""
        if total <= self.tinit + self.tfinal:
            text = (
                "nobody said how many steps training takes" if not total else f"training takes {total} steps"
            )
            raise ConfigError(
                f"kind adalora: {text}, and its budget needs more than tinit + tfinal = {self.tinit + self.tfinal}.",
                hint="give after_step its total_steps, or set kind_settings: {total_step: ...}; or lower tinit and tfinal.",
            )
        return total

    def _look_at(self, key: str, triplets: Triplets) -> None:
        found = triplets.parameters
        if any(parameter.grad is None for parameter in found.values()):
            return
        now = {name: (p * p.grad).abs() for name, p in found.items()}  # type: ignore[operator]
        means = self.means.get(key, {})
        if any(name not in means or means[name][0].shape != value.shape for name, value in now.items()):
            means = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in now.items()}
        used = torch.stack([p.grad.flatten(1).any(dim=1) for p in found.values()]).any(dim=0)  # type: ignore[union-attr]
        for name, value in now.items():
            sensitivity, uncertainty = (mean.to(value.device) for mean in means[name])
            here = used.view(-1, *[1] * (value.dim() - 1))
            newer = self.beta1 * sensitivity + (1 - self.beta1) * value
            spread = self.beta2 * uncertainty + (1 - self.beta2) * (value - newer).abs()
            means[name] = torch.where(here, newer, sensitivity), torch.where(here, spread, uncertainty)
        self.means[key] = means

    def _allocate(self, layers: Mapping[str, Triplets], total: int) -> None:
        layers = {key: triplets for key, triplets in layers.items() if key in self.means}
        if not layers:
            return
        scores = {key: self._scores(key, triplets) for key, triplets in layers.items()}
        every = torch.cat([scores[key][triplets.valid] for key, triplets in layers.items()])
        experts = sum(len(triplets.ranks) for triplets in layers.values())
        left = self.budget(self.step, total, len(every), min(self.target_r * experts, len(every)))
        kept, start = torch.zeros_like(every, dtype=torch.bool), 0
        kept[every.topk(left).indices] = True
        for key, triplets in layers.items():
            valid = triplets.valid
            mask = valid.clone()
            mask[valid] = kept[start : start + int(valid.sum())]
            start += int(valid.sum())
            triplets.parameters["E"].masked_fill_(valid & ~mask, 0.0)
            self.kept[key] = mask

    def _scores(self, key: str, triplets: Triplets) -> Tensor:
        """Importance of each triplet, (expert, rank); without end for those that every expert keeps."""
        means = {name: (sensitivity * spread) for name, (sensitivity, spread) in self.means[key].items()}
        scores = means["E"] + means["A"].mean(dim=-1) + means["B"].mean(dim=-1)
        scores = scores.masked_fill(~triplets.valid, -torch.inf)
        best = scores.topk(min(self.min_rank, scores.shape[1]), dim=-1).indices
        held = torch.zeros_like(triplets.valid).scatter(1, best, True)
        return scores.masked_fill(held & triplets.valid, torch.inf)

    def state(self) -> dict[str, Any]:
        """Plain data that a checkpoint keeps."""
        return {"step": self.step, "means": self.means, "kept": self.kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.step, self.means, self.kept = state["step"], dict(state["means"]), dict(state["kept"])
