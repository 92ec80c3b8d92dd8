"""Scaled: the part of a layer whose experts multiply the base's output too, whichever way computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from molora.calls.call import Part
from molora.errors import ConfigError
from molora.experts.bank import ExpertBank
from molora.experts.output_scale import rescaled
from molora.forward.mount import Mount


def refuse_scaled_beside_others(mounts: Sequence[Mount]) -> None:
    """Raise ConfigError where one of several adapters at a layer scales the base's output."""
    if len(mounts) > 1 and any(mount.bank.kind.scales_output for mount in mounts):
        kinds = sorted({mount.config.kind for mount in mounts if mount.bank.kind.scales_output})
        text = f"experts of kind {', '.join(kinds)} scale the base's output, so they do not add to another adapter's"
        raise ConfigError(f"{text}; activate, or merge, one of them.")


@dataclass
class Scaled:
    """A part, and what comes before it: `y + deviation ∘ (y - bias)`."""

    part: Part
    deviation: Tensor  # (row, d_out): rows are tokens, samples, or one for all
    bias: Tensor | None
    weights: Tensor | None

    @classmethod
    def of(cls, part: Part, bank: ExpertBank, deviation: Tensor) -> Scaled:
        """The part of a layer with this bank."""
        assert bank.kind.base is not None
        return cls(part, deviation, bank.kind.base.bias, part.weights)

    def add(self, y: Tensor) -> Tensor:
        """Add the mixture to the base's output."""
        return self.part.add(rescaled(y, self.deviation, self.bias))
