"""MoLoraLayer: a frozen linear layer with a bank of experts and, where it leads its group, a gate."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.calls.call import RoutingContext
from molora.calls.task_map import BASE_ONLY
from molora.errors import ConfigError
from molora.experts.bank import ExpertBank
from molora.experts.factor_mix import add_mixed, mixed_delta
from molora.experts.kernel import expand
from molora.forward.group_routing import GateRecord, experts_of, sample_routing
from molora.forward.input_group import InputGroup, project
from molora.gates.gate import Gate

_SAMPLED = 64  # tokens per layer whose expert outputs the contrastive loss compares


@dataclass
class Site:
    """Where one adapter's experts sit in the model; plain data, not part of any state dict."""

    key: str  # module name in the base model
    stream: str  # whose padding mask fits: "encoder" | "decoder"
    plain: bool = False  # one ordinary LoRA, no gate
    names: tuple[str, ...] | None = None  # the experts this layer has, where that is not all of them
    reads_input: bool = True  # whether the gate's answer depends on x
    pools: bool = False  # it reads the sequence, pooled
    factors: bool = False  # experts are mixed by their factors, one LoRA per sample
    feed_forward: str | None = None  # the name of the feed-forward whose outputs are mixed as a whole
    leaves: bool = False  # the last linear of that feed-forward
    group: list[MoLoraLayer] = field(default_factory=list)  # share one gate; the first, the leader, owns it
    spreads: bool = False  # the group goes beyond one input: all follow what the gate read at the leader
    inputs: InputGroup = field(default_factory=InputGroup)  # the linears that read the same x


class MoLoraLayer(BaseTunerLayer):
    """Base of the adapted layers: holds each adapter's bank and gate, adds their output to the base's."""

    adapter_layer_names = ("molora_experts", "molora_gate")
    other_param_names = ("sites", "records", "samples", "static_weights", "static_shares")

    def __init__(self, base_layer: nn.Module, context: RoutingContext) -> None:
        self.base_layer = base_layer
        self.context = context
        self.molora_experts: Any = nn.ModuleDict({})  # adapter -> ExpertBank
        self.molora_gate: Any = nn.ModuleDict({})  # adapter -> Gate, where this layer leads its group
        self.sites: dict[str, Site] = {}
        self.records: dict[str, GateRecord] = {}
        self.samples: dict[str, tuple[Tensor, Tensor]] = {}  # (n, d_in) tokens and (n,) their experts
        self.static_weights: dict[str, Tensor] = {}  # (splits, expert), set by the model just before merging
        self.static_shares: dict[str, Tensor | None] = {}  # (1, task), the same
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: list[Tensor] = []

    def update_layer(
        self, adapter: str, site: Site, bank: ExpertBank, gate: Gate | None, *, active: bool
    ) -> None:
        """Attach one adapter's experts, and its gate where this layer leads the group."""
        self.sites[adapter] = site
        self.molora_experts[adapter] = bank
        if gate is not None:
            self.molora_gate[adapter] = gate
        self._move_adapter_to_device_of_base_layer(adapter)
        if active:
            self.set_adapter(self.active_adapters)

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        # PEFT calls this after every path that marks an adapter as trainable.
        for adapter, bank in self.molora_experts.items():
            bank.apply_freeze()
            if adapter in self.molora_gate:
                self.molora_gate[adapter].apply_freeze()

    def gate_of(self, adapter: str) -> Gate | None:
        """The gate this layer's weights come from: its own, or that of the layer leading its group."""
        group = self.sites[adapter].group
        return group[0].molora_gate[adapter] if group and adapter in group[0].molora_gate else None

    # -- forward ---------------------------------------------------------------------------------------

    def add_experts(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Add one adapter's mixture to the base layer's output y (may overwrite it)."""
        state = self.context.state
        tasks = state.tasks.get(adapter)
        if state.first_pass or (tasks is not None and tasks.single == BASE_ONLY):
            return y
        site = self.sites[adapter]
        if site.names is not None and experts_of(self, adapter) == ():  # a task none of whose experts is here
            return y
        if site.feed_forward is not None:
            return self._feed_forward(adapter, x, y)
        if site.factors:
            experts = experts_of(self, adapter)
            routing = sample_routing(self, adapter, x, experts)
            bank = self.molora_experts[adapter]
            return add_mixed(bank, x, y, routing.weights, experts, routing.splits)
        key, shared = site.key, state.shared.get(adapter)
        if shared is None or shared.x is not x or key not in shared.h:
            # Computed already, but of another x: it does not read what the first one of its group reads.
            differs = shared is not None and key in shared.h
            shared = project(self, adapter, x, alone=differs or state.owner is None)
            if len(shared.h) > 1:
                state.shared[adapter] = shared
        elif len(shared.h) == 1:  # nobody else waits for it
            del state.shared[adapter]
        operands, weights = shared.operands, shared.weights
        if (
            state.recording
            and weights is not None
            and not site.plain
            and "contrastive" in self._losses(adapter)
        ):
            self._sample(adapter, x, weights[key])
        return expand(
            y,
            shared.h.pop(key),
            None if weights is None else weights[key],
            operands.expansions[key],
            operands.B[key],
        )

    def _feed_forward(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        from molora.forward.feed_forward import mix

        if len([a for a in self.active_adapters if a in self.sites]) > 1:
            raise ConfigError(
                "a mixture over whole feed-forwards cannot be added to another adapter's; activate one of them."
            )
        return mix(self, adapter, x, y)

    def _losses(self, adapter: str) -> Any:
        return self.context.adapters[adapter].aux_losses

    @torch.no_grad()
    def _sample(self, adapter: str, x: Tensor, weights: Tensor) -> None:
        """Keep some tokens, evenly spread over those that count, and the expert each went to most."""
        site, lead, state = self.sites[adapter], x.shape[:-1], self.context.state
        routing = self.context.adapters[adapter]
        of_response = routing.config.aux_settings("contrastive")["mask"] == "response"
        mask = (state.response if of_response else state.mask)(site.stream, lead)
        rows = torch.arange(math.prod(lead), device=x.device) if mask is None else mask.nonzero().squeeze(-1)
        rows = rows[:: max(1, len(rows) // _SAMPLED)][:_SAMPLED]
        task_map, experts = routing.map_at(site.names), experts_of(self, adapter)
        columns = range(len(task_map.experts)) if experts is None else experts
        gated = [c for c, i in enumerate(columns) if task_map.gated is None or i in task_map.gated]
        if not gated:
            return
        best = weights[:, gated].argmax(dim=-1).expand(math.prod(lead))[rows]
        chosen = torch.tensor([columns[c] for c in gated], device=x.device)[best]
        self.samples[adapter] = x.detach().reshape(-1, x.shape[-1])[rows], chosen

    def _forget_copies(self) -> None:
        for site in self.sites.values():
            site.inputs.plans.clear()

    # -- merging ---------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add static mixtures to the base weight; the original is kept so that unmerge is exact."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.molora_experts:
                continue
            if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
                raise ConfigError(
                    f"cannot merge into {self.quantization_backend.backend_name} weights; load the base unquantised."
                )
            weight = self.get_base_weight()
            bank, weights = self.molora_experts[adapter], self.static_weights[adapter]
            mixes = self.sites[adapter].factors
            shares = self.static_shares.get(adapter)
            delta = mixed_delta(bank, weights) if mixes else bank.delta(weights[0].tolist(), shares)
            delta = (delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta).to(weight.device)
            merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ConfigError(
                    f"merging {adapter!r} gives weights that are not finite in {self.sites[adapter].key}."
                )
            self._unmerged.append(weight.clone())
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Restore the base weight as it was before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.set_base_weight(self._unmerged[0])
        self._unmerged.clear()
        self.merged_adapters.clear()


class Linear(nn.Module, MoLoraLayer):
    """An adapted linear-like layer: nn.Linear, Conv1D, or a quantised one; its weight is never read here."""

    def __init__(self, base_layer: nn.Module, context: RoutingContext) -> None:
        super().__init__()
        MoLoraLayer.__init__(self, base_layer, context)

    def train(self, mode: bool = True) -> Linear:
        self._forget_copies()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_copies()
        return super()._apply(*args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the mixture of every active adapter; x (..., d_in) -> (..., d_out)."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return y
        for adapter in self.active_adapters:
            if adapter in self.sites:
                y = self.add_experts(adapter, x, y)
        return y

    def __repr__(self) -> str:
        return "molora." + super().__repr__()
