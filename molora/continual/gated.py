"""Gated experts: each has a gate that is silent on the inputs of earlier tasks (after GainLoRA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from molora.continual.strategy import Batches, KeepsBases, Note, Turn, watch
from molora.continual.subspace import grown_basis, without
from molora.gates.gate import Gate

# Share of a mean's length below which what is left of it is only rounding of the bases, which are float32.
_NOTHING = 1e-5


class Gated(KeepsBases):
    """`y = W x + Σ_e |2σ(4 cos(k_e, z)) - 1| s B_e A_e x`, z the mean of the layer's inputs over the sample.

    The key k of a new expert starts as the mean z of its task and is kept orthogonal to the directions that hold
    `energy` of the old tasks' z, so the new expert stays silent there; old keys are frozen. No task id is needed.
    A task whose mean has nothing of its own (the first decoder layer of an encoder-decoder reads the same start token
    for all tasks) gets the key zero there, and an expert that is silent for everybody.

    Reference: GainLoRA, arXiv:2505.15424 (liangyanshuo/gainlora at a47edf4). It differs in four points. One MLP of token
    embeddings there is a key and a gate for each group of linears here. There a key starts as the first singular vector of
    what its task leaves, at a drawn length; here as the mean of it, whose sign and length do not matter to the gate
    either, and which needs no second decomposition. There `energy` rises to 1 over the tasks; here it does where
    `energy_end: 1` asks for that, and is constant otherwise. The released experts are InfLoRA's, of a designed and
    frozen A; here they are ordinary ones, whose A learns: the silent gate already keeps old outputs.
    """

    @torch.no_grad()
    def before_task(self, model: nn.Module, turn: Turn) -> None:
        means = {key: total / count for key, (total, count, _) in read_by(model, turn.batches).items()}
        for key, gate in gates(model):
            assert gate.rows is not None
            row = without(means[key].unsqueeze(0), self.bases.get(key))
            something = row.norm() > _NOTHING * means[key].norm()
            gate.rows.blocks[-1].copy_(row * something)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        for key, gate in gates(model):
            if key in self.bases:
                assert gate.rows is not None
                newest = gate.rows.blocks[-1]
                newest.copy_(without(newest, self.bases[key].to(newest)))

    def after_task(self, model: nn.Module, turn: Turn) -> None:
        for key, (_, _, covariance) in read_by(model, turn.batches).items():
            grown = grown_basis(self.bases.get(key), covariance, self.share(turn))
            self.bases[key] = grown.float().cpu()


def gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Every gate with its name in the model."""
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            yield name, module


def read_by(model: nn.Module, batches: Batches) -> dict[str, tuple[Tensor, int, Tensor]]:
    """What each gate reads over a pass: sum (d,), count and `Σ z zᵀ` (d, d), float64."""
    found: dict[str, tuple[Tensor, int, Tensor]] = {}

    def note(key: str) -> Note:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            z = args[0].detach().double()
            total, count, covariance = found.get(key, (0, 0, 0))
            found[key] = total + z.sum(dim=0), count + len(z), covariance + z.t() @ z

        return hook

    watch(model, batches, [(gate, note(key)) for key, gate in gates(model)])
    return found
