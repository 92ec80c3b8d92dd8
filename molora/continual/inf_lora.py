"""InfLoRA: the new expert reads only directions that old tasks do not use, so it is silent on their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from molora.continual.strategy import Batches, KeepsBases, Note, Turn, expert_layers, watch
from molora.continual.subspace import grown_basis, leading, residual
from molora.forward.rows import NOBODYS, rows_of
from molora.tuner.layer import MoLoraLayer

# Share of a task's energy below which a direction is only rounding: it may be one of an old task.
_NOTHING = 1e-9


class InfLoRA(KeepsBases):
    """A of the new expert is designed and frozen, only B learns; experts add up.

    Before a task, A becomes the first r principal directions / √3 of each layer's inputs on its data, without the
    directions of old tasks; zero where none is left. After it, the old directions grow until they hold a share of the
    new inputs' energy that rises over the sequence from `energy` to `energy_end`. Reference: InfLoRA, CVPR 2024, whose
    code takes the left singular vectors of P H where this takes those of P H P, for the covariance H.
    """

    @torch.no_grad()
    def before_task(self, model: nn.Module, turn: Turn) -> None:
        seen = covariances(model, turn.batches)
        for key, _, bank in expert_layers(model):
            (new,), A = bank.trainable, bank.stacks["A"]
            assert A.trainable is not None
            left, floor = residual(self.bases.get(key), seen[key]), _NOTHING * float(seen[key].trace())
            rows = leading(left, bank.ranks[new], floor) / 3**0.5
            A.trainable.zero_()
            A.trainable[0, : len(rows)].copy_(rows)
            A.hold()

    def after_task(self, model: nn.Module, turn: Turn) -> None:
        for key, covariance in covariances(model, turn.batches).items():
            self.bases[key] = grown_basis(self.bases.get(key), covariance, self.share(turn)).float().cpu()


def covariances(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """`Σ x xᵀ` (d_in, d_in), float64, of every adapted linear's inputs over a pass, padding left out."""
    found: dict[str, Tensor] = {}

    def note(key: str, layer: MoLoraLayer) -> Note:
        mount = layer.mounts[layer.active_adapters[0]]

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x, call = args[0].detach(), layer.context.call
            rows = rows_of(mount, call, x)
            x = x if rows is None else rows.by_sample(x)
            kept = None if rows is NOBODYS else call.mask(mount.stream, x.shape[:-1])
            x = x.reshape(-1, x.shape[-1])
            x = (x if kept is None else x[kept]).double()
            found[key] = found.get(key, 0) + x.t() @ x

        return hook

    watch(model, batches, [(layer, note(key, layer)) for key, layer, _ in expert_layers(model)])
    return found
