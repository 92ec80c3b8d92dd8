"""GateRows: one row per expert or task, in blocks that stay as they are when more are added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molora.experts.kernel import scores


class GateRows(nn.Module):
    """One row per expert: a vector (d_in,) for a linear score, a scalar (one per split) for a table.

    The same class holds one row per task, for gates that learn from the task id.

    Rows live in blocks, one Parameter each, in the order in which experts were added. A block is
    multiplied on its own, so the logits of earlier experts are bit-equal however many come later, and
    frozen rows are frozen Parameters. On disk there is one `weight` in expert order.
    """

    def __init__(self, weight: Tensor, blocks: Sequence[Sequence[int]], frozen: Sequence[bool]) -> None:
        super().__init__()
        self.assign(weight, blocks, frozen)

    def assign(self, weight: Tensor, blocks: Sequence[Sequence[int]], frozen: Sequence[bool]) -> None:
        """Replace all rows; `weight` (expert, ...) is in expert order, `blocks` partition the experts."""
        self.order = tuple(tuple(block) for block in blocks)
        flat = [i for block in self.order for i in block]
        self.num_experts = len(flat)
        self._sorted = flat == sorted(flat)
        self.frozen_blocks = tuple(all(frozen[i] for i in block) for block in self.order)
        for name in list(self._parameters):
            delattr(self, name)
        for i, (block, is_frozen) in enumerate(zip(self.order, self.frozen_blocks, strict=True)):
            rows = nn.Parameter(weight[list(block)].detach().clone(), requires_grad=not is_frozen)
            self.register_parameter(f"block_{i}", rows)

    @property
    def blocks(self) -> list[nn.Parameter]:
        """The Parameters, in block order."""
        return list(self._parameters.values())  # type: ignore[arg-type]

    def apply_freeze(self) -> None:
        """Frozen rows stay frozen, whatever marked the adapter as trainable."""
        for block, is_frozen in zip(self.blocks, self.frozen_blocks, strict=True):
            if is_frozen:
                block.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """All rows in expert order, (expert, d_in) or (expert,)."""
        return self._in_order(torch.cat([*self.blocks]), dim=0)

    def set_weight(self, weight: Tensor) -> None:
        """Write all rows in place, given in expert order."""
        self._load_rows(weight, replace=False)

    def logits(self, x: Tensor) -> Tensor:
        """Linear scores in float32 (float64 for float64 x): (tokens, d_in) -> (tokens, expert)."""
        return self.in_order(scores(x, self.blocks))

    def in_order(self, logits: Tensor) -> Tensor:
        """Scores (tokens, expert) in expert order from those of the blocks, side by side."""
        return self._in_order(logits, dim=-1)

    def table(self) -> Tensor:
        """Scores that read nothing: (1, expert), or (1, splits * expert), in float32 or better."""
        weight = self.weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return weight.t().reshape(1, -1)

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' loader does not call load_state_dict: it assigns each tensor under its name on disk.
        if name == "weight":
            self._load_rows(value, replace=False)
        else:
            super().__setattr__(name, value)

    def _in_order(self, values: Tensor, dim: int) -> Tensor:
        if self._sorted:
            return values
        flat = [i for block in self.order for i in block]
        return values.index_select(dim, torch.tensor(flat, device=values.device).argsort())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        if key not in state_dict:
            missing_keys.append(key)
            return
        found, wanted = tuple(state_dict[key].shape), tuple(self.weight.shape)
        if found != wanted:
            error_msgs.append(f"size mismatch for {key}: {found} in the file, {wanted} in the model.")
            return
        self._load_rows(state_dict[key], replace=local_metadata.get("assign_to_params_buffers", False))

    def _load_rows(self, weight: Tensor, *, replace: bool) -> None:
        for i, (block, rows) in enumerate(zip(self.blocks, self.order, strict=True)):
            value = weight[list(rows)].detach()
            if replace or block.is_meta:
                setattr(self, f"block_{i}", nn.Parameter(value.clone(), requires_grad=block.requires_grad))
            else:
                with torch.no_grad():
                    block.copy_(value)
