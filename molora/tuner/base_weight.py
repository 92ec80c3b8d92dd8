"""The weight of a layer's base: plain, of GPT-2's Conv1D or dequantised, for kinds of experts that need it; kept while merged."""

from __future__ import annotations

from typing import Any, cast

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.errors import ConfigError


class BaseWeight:
    """A frozen linear layer, read anew each time: it may move, and is never copied.

    Raises:
        ConfigError: a weight that cannot be read in floating point.
    """

    def __init__(self, base: nn.Module, key: str, kind: str) -> None:
        self.base = base
        if self.is_meta:
            return
        found = self._read()
        if found is None or found.dim() != 2 or not found.is_floating_point() or found.itemsize < 2:
            name = type(base).__name__
            raise ConfigError(
                f"kind: {kind} needs the base's weight, and that of {key} ({name}) cannot be read in floating point.",
                hint="load the base unquantised, or with bitsandbytes; or use another kind of expert.",
            )

    def _read(self) -> Tensor | None:
        held = getattr(self.base, "weight", None)
        if type(held) is nn.Parameter and held.is_floating_point():
            return held
        if held is None:
            return dequantize_module_weight(self.base) if hasattr(self.base, "W_q") else None
        found: Tensor = dequantize_module_weight(self.base)
        # On a CPU, PEFT leaves a copy in its place, whose scales bitsandbytes loses once its first forward has taken them.
        self.base.weight = held
        return found

    @property
    def is_meta(self) -> bool:
        """Whether its values are not here yet."""
        return any(parameter.is_meta for parameter in self.base.parameters())

    def weight(self) -> Tensor:
        """(d_out, d_in)."""
        found = self._read()
        assert found is not None
        return found.t() if isinstance(self.base, Conv1D) else found

    @property
    def bias(self) -> Tensor | None:
        """(d_out,)."""
        found: Tensor | None = getattr(self.base, "bias", None)
        return found

    def stamp(self) -> Any:
        """Changes where the weight is replaced, moved or written to, except through `.data` in place."""
        held: Any = getattr(self.base, "weight", None)
        held = self.base.W_q if held is None else held
        return held.data_ptr(), 0 if held.is_inference() else held._version, held.dtype, held.device


def kept_weight(layer: Any) -> Tensor:
    """A layer's base weight as `put_back` restores it bit for bit after merges.

    In 4 bits that is the packed one: quantising again what it stands for does not give it back where its scales are
    quantised too.
    """
    held = layer.get_base_layer().weight
    if getattr(held, "quant_state", None) is not None:
        return held
    kept: Tensor = layer.get_base_weight().clone()
    return kept


def put_back(layer: Any, kept: Tensor) -> None:
    """Undo what was merged since `kept_weight`."""
    state = getattr(kept, "quant_state", None)
    if state is None:
        layer.set_base_weight(kept)
        return
    packed, base = cast(Any, kept), layer.get_base_layer()
    packed.bnb_quantized = True  # PEFT takes the mark off when it replaces a weight
    base.weight, base.quant_state = packed, state
