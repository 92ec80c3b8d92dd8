"""How many bytes training takes, counted before it: on fake tensors, which have shapes but no values and no memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

# transformers' usual attention, but for its look at the mask: it cannot see in a fake one that it is plain.
_ATTENTION = "molora_sdpa_unmasked"
AttentionInterface.register(_ATTENTION, sdpa_attention_forward)

Loss = Callable[[Any, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Memory:
    """Bytes of training on one device. What backward needs on top while it runs is not among them.

    weights: base and adapter. learning: gradients and AdamW's two moments, of what learns. kept: what one forward pass
    leaves for backward.
    """

    weights: int
    learning: int
    kept: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.learning + self.kept


def estimate(
    model: PeftModel,
    batch: Mapping[str, Tensor],
    loss: Loss,
    *,
    base_dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> Memory:
    """Count for a model without weights (on the meta device), which is of no other use afterwards.

    Args:
        model: as `build_skeleton` returns it.
        batch: of the shapes that training will have; its values do not matter.
        loss: called with the model and the batch, in training mode.
        base_dtype: of what does not learn.
        autocast: what the forward pass runs in, where that is not its own dtype.
    """
    base: Any = model.get_base_model()
    if hasattr(base, "set_attn_implementation"):
        base.set_attn_implementation(_ATTENTION)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in model.modules():
            _make_fake(module, base_dtype)
    own = [*model.parameters(), *model.buffers()]
    learns = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    known = {tensor.untyped_storage()._cdata for tensor in own}
    kept: dict[int, Tensor] = {}  # the tensors too: a freed storage's address may be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in known:
            kept[storage] = tensor
        return tensor

    model.train()
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with mode, _GroupedProducts(), context, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # Ids are looked at one by one, so they stay real.
        fake = {k: v.tolist() if k == "routing_task_ids" else mode.from_tensor(v) for k, v in batch.items()}
        graph = loss(model, fake)
    del graph  # until here it kept the graph
    activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Memory(weights=sum(tensor.nbytes for tensor in own), learning=3 * learns, kept=activations)


class _GroupedProducts(TorchDispatchMode):
    """Grouped products of fake tensors in any dtype: torch (2.13) has only bfloat16's, though it multiplies float32 too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        rows, factors = args[:2]  # (pair, k) and (expert, k, n)
        return rows.new_empty(len(rows), factors.shape[2])


def taken_off(base: PreTrainedModel, quantization: str, dtype: torch.dtype) -> int:
    """Bytes that quantising a base saves, laid out as bitsandbytes does it; what backward keeps stays the same.

    Args:
        base: as `base_skeleton` returns it: which linears are left as they are is read off the bare model.
        quantization: nf4 (a byte for two weights, a float32 for each block of 64, a table of 16) or int8 (a byte for
            each weight, a float32 for each row).
        dtype: of the weights that are not quantised.
    """
    whole, saved = get_keys_to_not_convert(base), 0
    for name, module in base.named_modules():
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, whole):
            weight: Tensor = module.weight
            count = weight.numel()
            rows = weight.shape[0 if isinstance(module, nn.Linear) else 1]
            stored = (
                -(-count // 2) + 4 * (-(-count // 64) + 16) if quantization == "nf4" else count + 4 * rows
            )
            saved += count * dtype.itemsize - stored
    return saved


def _make_fake(module: nn.Module, base_dtype: torch.dtype) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        dtype = (
            parameter.dtype if parameter.requires_grad or not parameter.is_floating_point() else base_dtype
        )
        value = torch.empty(parameter.shape, dtype=dtype)
        module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
