"""ExpertBank: one layer's experts, stacked, frozen and trainable ones in separate Parameters.

Axis vocabulary, everywhere in molora: batch seq tokens d_in d_out expert rank task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from molora.experts.kernel import expand, shrink


class Expert(NamedTuple):
    """One expert's factors, without padding: `A` (rank, d_in), `B` (d_out, rank), and its scaling."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """Its weight update `scaling · B A`, (d_out, d_in)."""
        return self.scaling * (self.B @ self.A)


class ExpertBank(nn.Module):
    """Experts of one layer: given x and weights over experts, adds their outputs to the base's.

    Two stacks, `lora_A (expert, rank, d_in)` and `lora_B (expert, rank, d_out)`, each once for the
    trainable and once for the frozen experts: freezing is real (no gradient, no optimiser state, no
    weight decay). `lora_B` is kept transposed so that flattening it for the kernel is a view. Ranks may
    differ: shorter experts are padded with zeros, which never get a gradient. With `share_A` (HydraLoRA) there
    is one A, a stack of one, frozen as soon as an expert is: a frozen expert's output must not change.

    On disk there is one stack per factor, in expert order: `A (expert, rank, d_in)` and
    `B (expert, d_out, rank)`; which experts are frozen is the config's to know.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        frozen: Sequence[bool],
        dropout: float = 0.0,
        *,
        share_A: bool = False,
        cores: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._replaced = 0
        self.share_A = share_A
        self.cores: Any = cores  # TaskCores between A and B, where tasks have them
        self.dropout_p = dropout
        self.dropout = nn.Dropout(dropout)
        self.assign(experts, frozen)

    def assign(self, experts: Sequence[Expert], frozen: Sequence[bool]) -> None:
        """Replace all experts; keeps the Parameters where neither shape nor freezing changes."""
        self.ranks = tuple(expert.rank for expert in experts)
        self.scalings = tuple(expert.scaling for expert in experts)
        self.frozen = tuple(i for i, is_frozen in enumerate(frozen) if is_frozen)
        self.trainable = tuple(i for i, is_frozen in enumerate(frozen) if not is_frozen)
        rank = max(self.ranks)

        def stack(
            indices: Sequence[int], factor: Callable[[Expert], Tensor], requires_grad: bool
        ) -> nn.Parameter | None:
            if not indices:
                return None
            rows = [F.pad(factor(experts[i]), (0, 0, 0, rank - self.ranks[i])) for i in indices]
            return nn.Parameter(torch.stack(rows).detach(), requires_grad=requires_grad)

        if self.share_A:
            self.lora_A = None if self.frozen else stack((0,), lambda e: e.A, True)
            self.frozen_A = stack((0,), lambda e: e.A, False) if self.frozen else None
        else:
            self.lora_A = stack(self.trainable, lambda e: e.A, True)
            self.frozen_A = stack(self.frozen, lambda e: e.A, False)
        self.lora_B = stack(self.trainable, lambda e: e.B.t(), True)
        self.frozen_B = stack(self.frozen, lambda e: e.B.t(), False)
        self._prepare()

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    def expert(self, index: int) -> Expert:
        """One expert's factors, as views without the padding."""
        frozen = index in self.frozen
        position = (self.frozen if frozen else self.trainable).index(index)
        A, B = (self.frozen_A, self.frozen_B) if frozen else (self.lora_A, self.lora_B)
        rank = self.ranks[index]
        if self.share_A:
            assert B is not None
            return Expert(self.A[0], B[position].t(), self.scalings[index])
        assert A is not None and B is not None
        return Expert(A[position, :rank], B[position, :rank].t(), self.scalings[index])

    def experts(self) -> list[Expert]:
        """Every expert's factors, in expert order."""
        return [self.expert(i) for i in range(self.num_experts)]

    def at_task(self, shares: Tensor | None) -> list[Expert]:
        """`experts` with the core of one sample's tasks (1, task) multiplied into A."""
        if self.cores is None or shares is None:
            return self.experts()
        core = self.cores.matrices(shares)[0]
        return [e._replace(A=core.to(e.A.dtype) @ e.A) for e in self.experts()]

    def apply_freeze(self) -> None:
        """Frozen stacks stay frozen, whatever marked the adapter as trainable."""
        for parameter in (self.frozen_A, self.frozen_B):
            if parameter is not None:
                parameter.requires_grad_(False)
        if self.cores is not None:
            self.cores.apply_freeze()

    def delta(self, weights: Sequence[float] | Tensor, shares: Tensor | None = None) -> Tensor:
        """Weight update (d_out, d_in) of a static mixture, at a task (1, task) where it has cores; float32 or better."""
        total = None
        for weight, expert in zip(weights, self.at_task(shares), strict=True):
            compute = torch.promote_types(expert.A.dtype, torch.float32)
            part = weight * expert._replace(A=expert.A.to(compute), B=expert.B.to(compute)).delta()
            total = part if total is None else total + part
        assert total is not None
        return total

    def forward(
        self, x: Tensor, y: Tensor, weights: Tensor, experts: tuple[int, ...] | None = None
    ) -> Tensor:
        """Add `Σ_e weights_e · scaling_e · B_e A_e drop(x)` to y.

        Args:
            x: (..., d_in) the layer's input.
            y: (..., d_out) the base layer's output; may be overwritten.
            weights: (tokens, expert) or (1, expert).
            experts: indices the columns of `weights` stand for; None = all of them. Only these are
                computed, so other experts cannot change the result.
        """
        h, _ = shrink(self.dropout(x), self.stacks("A", experts))
        if self.share_A:
            h = h.repeat(1, self.copies(experts))
        return expand(y, h, weights, self.expansion(experts, x), self.stacks("B", experts))

    def stacks(self, factor: str, experts: tuple[int, ...] | None = None) -> list[Tensor]:
        """`A` (rank, d_in) or `B` (rank, d_out) of the experts in use, as views, in the kernel's order."""
        if factor == "A" and self.share_A:
            return [self.A[0]]
        if experts is None:
            parts = (getattr(self, f"frozen_{factor}"), getattr(self, f"lora_{factor}"))
            return [part.flatten(0, 1) for part in parts if part is not None]
        chosen = [self.expert(i) for i in experts]
        return [e.A if factor == "A" else e.B.t() for e in chosen]

    def copies(self, experts: tuple[int, ...] | None = None) -> int:
        """How often the product of x and the stacks of A stands in h: once, or for each expert that shares A."""
        if not self.share_A:
            return 1
        return self.num_experts if experts is None else len(experts)

    def stamp(self) -> list[Any]:
        """Changes whenever a Parameter is replaced, moved or written to, except through `.data`."""
        parameters = [p for p in self._parameters.values() if p is not None]
        return [self._replaced, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)]

    def expansion(self, experts: tuple[int, ...] | None, x: Tensor) -> Tensor:
        """`P (expert, rank)` of `kernel.expand`: row = column of the weights, columns as in the stacks.

        Built here, not a buffer: a buffer would be rounded by `model.to(bfloat16)` and lost on meta.
        """
        key = (experts, x.device, x.dtype == torch.float64)
        if key in self._expansions:
            return self._expansions[key]
        order = self.frozen + self.trainable if experts is None else experts
        rows = experts if experts is not None else tuple(range(self.num_experts))
        widths = [self.ranks[i] if experts is not None else max(self.ranks) for i in order]
        dtype = torch.float64 if key[-1] else torch.float32
        expansion = torch.zeros(len(rows), sum(widths), dtype=dtype, device=x.device)
        for index, width, end in zip(order, widths, accumulate(widths), strict=True):
            start = end - width
            expansion[rows.index(index), start : start + self.ranks[index]] = self.scalings[index]
        if not torch.compiler.is_compiling():  # tensors made while a graph is traced are symbols
            self._expansions[key] = expansion
        return expansion

    def _prepare(self) -> None:
        """Make the usual expansions now: made in a compiled graph, they would be made at every step."""
        self._expansions: dict[Any, Tensor] = {}
        like = self.lora_A if self.lora_A is not None else self.frozen_A
        if like is not None and not like.is_meta:
            for experts in (None, *((i,) for i in range(self.num_experts))):
                self.expansion(experts, like.detach())

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self._prepare()
        return self

    # -- state dict: one stack per factor, in expert order, whatever is frozen --------------------------

    @property
    def A(self) -> Tensor:
        """All experts' `A` in expert order, (expert, rank, d_in)."""
        return self._joined(self.frozen_A, self.lora_A)

    @property
    def B(self) -> Tensor:
        """All experts' `B` in expert order, (expert, d_out, rank)."""
        stack = self._joined(self.frozen_B, self.lora_B)
        return rearrange(stack, "expert rank d_out -> expert d_out rank").contiguous()

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' loader does not call load_state_dict: it assigns each tensor under its name on disk.
        if name in ("A", "B"):
            self._load_factor(name, value, replace=False)
            return
        if isinstance(value, nn.Parameter):
            self._replaced += 1  # a new Parameter may lie where a freed one lay
        super().__setattr__(name, value)

    def _joined(self, frozen: Tensor | None, trainable: Tensor | None) -> Tensor:
        parts = [p for p in (frozen, trainable) if p is not None]
        if len(parts) == 1:  # all of one kind, or the one A that is shared
            return parts[0]
        order = torch.tensor(self.frozen + self.trainable, device=parts[0].device).argsort()
        return torch.cat(parts)[order]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in ("A", "B"):
            stack = getattr(self, name)
            destination[prefix + name] = stack if keep_vars else stack.detach()

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
        for name in ("A", "B"):
            key = prefix + name
            if key not in state_dict:
                missing_keys.append(key)
                continue
            found, wanted = tuple(state_dict[key].shape), tuple(getattr(self, name).shape)
            if found != wanted:
                error_msgs.append(f"size mismatch for {key}: {found} in the file, {wanted} in the model.")
                continue
            replace = local_metadata.get("assign_to_params_buffers", False)
            self._load_factor(name, state_dict[key], replace=replace)

    def _load_factor(self, name: str, stack: Tensor, *, replace: bool) -> None:
        """Fill the frozen and the trainable Parameter of a factor from its stack in expert order."""
        if name == "B":
            stack = rearrange(stack, "expert d_out rank -> expert rank d_out")
        for attribute, indices in ((f"frozen_{name}", self.frozen), (f"lora_{name}", self.trainable)):
            parameter = getattr(self, attribute)
            if parameter is None:
                continue
            shared = name == "A" and self.share_A
            value = (stack if shared else stack[list(indices)]).detach()
            if replace or parameter.is_meta:
                setattr(self, attribute, nn.Parameter(value.clone(), requires_grad=parameter.requires_grad))
            else:
                with torch.no_grad():
                    parameter.copy_(value)
        self._prepare()

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, ranks={self.ranks}, frozen={self.frozen}"


def mean_delta(experts: Sequence[Expert]) -> Tensor:
    """Mean weight update (d_out, d_in) of several experts, in float32."""
    stacked = torch.stack([e._replace(A=e.A.float(), B=e.B.float()).delta() for e in experts])
    return reduce(stacked, "expert d_out d_in -> d_out d_in", "mean")
