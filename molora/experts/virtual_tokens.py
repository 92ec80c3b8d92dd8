"""VirtualTokens: trained vectors of each expert that stand before a sample's own tokens, mixed like the experts' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from molora.experts.stack import Stack


class VirtualTokens(Stack):
    """`P_e (tokens, d_model)` of each expert e; a sample whose experts weigh g_e is preceded by `Σ_e g_e P_e`.

    Rows are experts, those that are frozen apart from those that learn. With one expert it is prompt tuning (Lester et al.,
    arXiv:2104.08691), as PEFT's `PromptEmbedding`; a mixture of prompts by sample is that of ATTEMPT (arXiv:2205.11961),
    whose weights attend to the input, while here the mixture's own gate gives them.

    Args:
        rows: (expert, tokens, d_model), in expert order.
        frozen: for each expert, whether it learns no more.
    """

    def __init__(self, rows: Tensor, frozen: Sequence[bool]) -> None:
        super().__init__(rows, *_blocks(frozen), role="prompts")

    def replace(self, rows: Tensor, frozen: Sequence[bool]) -> None:
        """Other rows, for the experts there are now; optimisers have to be built anew."""
        self.assign(rows, *_blocks(frozen))

    @property
    def count(self) -> int:
        """Virtual tokens of each expert."""
        return int(self.blocks[0].shape[1])

    def mixed(self, weights: Tensor, experts: Sequence[int] | None = None) -> Tensor:
        """(sample, tokens, d_model) for weights (sample, expert), whose columns are `experts`; None: all of them.

        In float32 or better whatever the autocast dtype. Experts of weight 0 change nothing, bit for bit.
        """
        rows = self.rows if experts is None else self.rows[list(experts)]
        exact = torch.promote_types(weights.dtype, rows.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            return einsum(
                weights.to(rows.device, exact),
                rows.to(exact),
                "sample expert, expert token d -> sample token d",
            )


def _blocks(frozen: Sequence[bool]) -> tuple[Any, Sequence[bool]]:
    """What learns apart from what does not."""
    blocks = [[i for i, is_frozen in enumerate(frozen) if is_frozen == state] for state in (True, False)]
    return [block for block in blocks if block], frozen
