"""Stack: one tensor with a row for each expert (or task), held as blocks of frozen and of learning Parameters.

    on disk, and for whoever asks:   0  1  2  3        one tensor, in expert order
    in memory, with 0 and 2 frozen:  [0  2] [1  3]     two Parameters, each multiplied as it is

So freezing is real: no gradient, no optimiser state, no weight decay. A Stack alone knows how its rows are frozen, grown,
saved, loaded and assigned; whoever multiplies by them sees blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn


class Stacked(nn.Module):
    """A module whose Stacks are saved, loaded, read and assigned whole, each under its name."""

    def named_stacks(self) -> Mapping[str, Stack]:
        """Name on disk -> Stack."""
        raise NotImplementedError

    def _filled(self) -> None:
        """Called when rows were loaded."""

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' loader does not call load_state_dict: it assigns each tensor under its name on disk.
        stack = self.named_stacks().get(name)
        if stack is None:
            super().__setattr__(name, value)
        else:
            stack.fill(value)
            self.__dict__["assigned"] = True
            self._filled()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            stack = self.named_stacks().get(name)
            if stack is None:
                raise
            return stack.whole

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, stack in self.named_stacks().items():
            destination[prefix + name] = stack.whole if keep_vars else stack.whole.detach()

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
        for name, stack in self.named_stacks().items():
            key = prefix + name
            if key not in state_dict:
                missing_keys.append(key)
                continue
            found, wanted = tuple(state_dict[key].shape), tuple(stack.whole.shape)
            if found != wanted:
                error_msgs.append(f"size mismatch for {key}: {found} in the file, {wanted} in the model.")
                continue
            stack.fill(state_dict[key], replace=local_metadata.get("assign_to_params_buffers", False))
        self._filled()


class Stack(Stacked):
    """Rows in blocks. By itself it is saved as `weight`; a bank saves its Stacks under their own names.

    Args:
        rows: (expert, ...), in expert order; (1, ...) for a row that all share.
        blocks: which rows each Parameter holds, in the order in which they are multiplied; a block may be empty.
        frozen: for each row, whether it learns no more. A block is frozen where all of its rows are.
        names: the names of two blocks, frozen rows and others; any number of them are `block_0`, ...
        axes: of a row on disk and in memory, where the two differ, as einops writes them.
        role: "A" or "B": whose learning rate an expert's rows have.
    """

    def __init__(
        self,
        rows: Tensor,
        blocks: Sequence[Sequence[int]],
        frozen: Sequence[bool],
        *,
        names: Sequence[str] | None = None,
        axes: tuple[str, str] | None = None,
        role: str = "A",
    ) -> None:
        super().__init__()
        self.names, self.axes, self.role = names, axes, role
        self._replaced = 0
        self.assign(rows, blocks, frozen)

    def assign(self, rows: Tensor, blocks: Sequence[Sequence[int]], frozen: Sequence[bool]) -> None:
        """Replace all rows, and end any `hold`; optimisers have to be built anew. Arguments as of the class."""
        names = self.names or [f"block_{i}" for i in range(len(blocks))]
        self.order = tuple(tuple(block) for block in blocks)
        self.frozen_blocks = tuple(all(frozen[i] for i in block) for block in self.order)
        self.held = False
        flat = [i for block in self.order for i in block]
        self.num_experts, self._sorted = len(flat), flat == sorted(flat)
        for name in list(self._parameters):
            delattr(self, name)
        for name, block, is_frozen in zip(names, self.order, self.frozen_blocks, strict=True):
            made = self._block(rows[list(block)].detach(), learns=not is_frozen) if block else None
            self.register_parameter(name, made)
        self._replaced += 1

    def _block(self, rows: Tensor, *, learns: bool) -> nn.Parameter:
        return nn.Parameter(rows, requires_grad=learns)

    def named_stacks(self) -> Mapping[str, Stack]:
        return {} if "names" not in self.__dict__ or self.names else {"weight": self}

    @property
    def weight(self) -> Tensor:
        """The rows under the name they are saved by."""
        return self.whole

    @property
    def frozen(self) -> nn.Parameter | None:
        """The first of two named blocks, which holds frozen rows; None where blocks have no names."""
        return self._parameters[self.names[0]] if self.names is not None else None

    @property
    def trainable(self) -> nn.Parameter | None:
        """The second of two named blocks; None as above. (A trace reads every property.)"""
        return self._parameters[self.names[1]] if self.names is not None else None

    @property
    def blocks(self) -> list[nn.Parameter]:
        """The Parameters, in the order in which they are multiplied."""
        return [block for block in self._parameters.values() if block is not None]

    @property
    def is_meta(self) -> bool:
        """Whether its values are not here: they were offloaded, or never loaded."""
        for block in self._parameters.values():
            if block is not None:
                return block.is_meta
        return False

    @property
    def rows(self) -> Tensor:
        """All rows in expert order, laid out as in memory, (expert, ...)."""
        blocks = self.blocks
        return blocks[0] if len(blocks) == 1 and self._sorted else self.in_order(torch.cat([*blocks]), dim=0)

    def in_order(self, values: Tensor, dim: int = -1) -> Tensor:
        """Values of the blocks side by side along `dim`, in expert order."""
        return values if self._sorted else values.index_select(dim, self._places(values.device))

    def places(self, rows: Tensor) -> Tensor:
        """Where rows (...) int64, counted in expert order, stand in the blocks laid end to end."""
        return rows if self._sorted else self._places(rows.device)[rows]

    def _places(self, device: torch.device) -> Tensor:
        return torch.tensor([i for block in self.order for i in block], device=device).argsort()

    # -- freezing ----------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Keep the present rows from learning until rows are assigned anew."""
        self.held = True
        self.apply_freeze()

    def apply_freeze(self) -> None:
        """What is frozen stays frozen, whatever marked the adapter as trainable."""
        for name, is_frozen in zip(self._parameters, self.frozen_blocks, strict=True):
            block = self._parameters[name]
            if block is not None and (is_frozen or self.held):
                block.requires_grad_(False)

    def stamp(self) -> list[int]:
        """Changes whenever a Parameter is replaced, moved or written to, except through `.data`."""
        marks = [self._replaced]
        for block in self._parameters.values():
            if block is not None:
                marks += (block.data_ptr(), 0 if block.is_inference() else block._version)
        return marks

    # -- on disk -----------------------------------------------------------------------------------------

    @property
    def whole(self) -> Tensor:
        """What is saved: all rows in expert order, laid out as on disk."""
        if self.axes is None:
            return self.rows
        disk, memory = self.axes
        return rearrange(self.rows, f"expert {memory} -> expert {disk}").contiguous()

    def fill(self, value: Tensor, *, replace: bool = False) -> None:
        """Write all rows, given as `whole` gives them: in place, or into new Parameters of the given dtype."""
        if self.axes is not None:
            disk, memory = self.axes
            value = rearrange(value, f"expert {disk} -> expert {memory}")
        for (name, block), order in zip([*self._parameters.items()], self.order, strict=True):
            if block is None:
                continue
            rows = value[list(order)].detach()
            if replace or block.is_meta:
                setattr(self, name, self._block(rows.clone(), learns=block.requires_grad))
            else:
                with torch.no_grad():
                    block.copy_(rows)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            self._replaced += 1  # a new Parameter may lie where a freed one lay
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"rows={self.num_experts}, blocks={self.order}, frozen={self.frozen_blocks}"


def blocks_of(stacks: Sequence[Stack]) -> list[nn.Parameter]:
    """The Parameters of all of these, without a call for each: every decoding step asks."""
    return [block for stack in stacks for block in stack._parameters.values() if block is not None]
