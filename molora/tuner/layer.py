"""MoLoraLayer: a frozen linear layer with the experts of each adapter mounted on it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.calls.context import RoutingContext
from molora.errors import ConfigError
from molora.experts.factor_mix import mixed_delta
from molora.forward.feed_forward import refuse_beside_others
from molora.forward.input_group import add_experts
from molora.forward.mount import Mount, MountPoint
from molora.forward.scaled import refuse_scaled_beside_others
from molora.tuner.arrival import check_arrived
from molora.tuner.base_weight import kept_weight, put_back
from molora.tuner.loan import holder_of
from molora.tuner.merge import ExpertWeights, static_shares, static_weights
from molora.tuner.scale import configured_scalings, set_scalings


class MoLoraLayer(BaseTunerLayer, MountPoint):
    """Base of the adapted layers: adds the mounts' mixtures to the base layer's output."""

    adapter_layer_names = ("molora_experts", "molora_gate", "molora_router", "molora_prompt")
    other_param_names = ("mounts", "static_weights", "static_shares")

    def __init__(self, base_layer: nn.Module, context: RoutingContext) -> None:
        self.base_layer = base_layer
        self.context = context
        self.molora_experts: Any = nn.ModuleDict(
            {}
        )  # adapter -> ExpertBank, as PEFT and state dicts find them
        self.molora_gate: Any = nn.ModuleDict({})  # adapter -> Gate, where this layer leads its group
        self.molora_router: Any = nn.ModuleDict({})  # adapter -> TaskRouter, in the adapter's first layer
        self.molora_prompt: Any = nn.ModuleDict({})  # adapter -> Prompts, the same
        self.mounts: dict[str, Mount] = {}
        self.static_weights: dict[str, Tensor] = {}  # (splits, expert), set by the model just before merging
        self.static_shares: dict[str, Tensor | None] = {}  # (1, task), the same
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: list[Tensor] = []

    def mount(self, mount: Mount, *, active: bool) -> None:
        """Attach one adapter's experts, and its gate where this layer leads the group."""
        adapter = mount.adapter
        self.mounts[adapter] = mount
        self.molora_experts[adapter] = mount.bank
        if mount.gate is not None:
            self.molora_gate[adapter] = mount.gate
        if mount.router is not None:
            self.keep_router(adapter, mount.router)
        if mount.prompts is not None:
            self.molora_prompt[adapter] = mount.prompts
        self._move_adapter_to_device_of_base_layer(adapter)
        if active:
            self.set_adapter(self.active_adapters)

    def keep_router(self, adapter: str, router: nn.Module) -> None:
        """Hold the adapter's router, so that state dicts find it here."""
        self.molora_router[adapter] = router
        self._move_adapter_to_device_of_base_layer(adapter)

    def drop_router(self, adapter: str) -> None:
        """Undo `keep_router`, on whichever layer holds it."""
        if adapter in self.molora_router:
            del self.molora_router[adapter]

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        # PEFT calls this after every path that marks an adapter as trainable.
        for mount in self.mounts.values():
            mount.bank.apply_freeze()
            if mount.gate is not None:
                mount.gate.apply_freeze()
            if mount.prompts is not None:
                mount.prompts.apply_freeze()

    @property
    def in_features(self) -> int | None:
        """The base layer's, as PEFT's own layers have it."""
        return _get_in_out_features(self.get_base_layer())[0]

    @property
    def out_features(self) -> int | None:
        """The base layer's."""
        return _get_in_out_features(self.get_base_layer())[1]

    # -- how strongly it acts --------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Give one adapter's experts here their configured scaling times a factor; nothing where it has none here."""
        if adapter in self.mounts:
            mount = self.mounts[adapter]
            set_scalings(mount, [scale * scaling for scaling in configured_scalings(mount)])

    def scale_layer(self, scale: float) -> None:
        """Multiply the present scalings of the active adapters' experts."""
        for mount in self._active_mounts():
            set_scalings(mount, [scale * scaling for scaling in mount.bank.scalings])

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide them again; None: back to what the config says."""
        for mount in self._active_mounts():
            now = mount.bank.scalings
            configured = configured_scalings(mount)
            set_scalings(mount, configured if scale is None else [scaling / scale for scaling in now])

    def _active_mounts(self) -> list[Mount]:
        return [self.mounts[adapter] for adapter in self.active_adapters if adapter in self.mounts]

    # -- merging ---------------------------------------------------------------------------------------

    def decide(self, adapter: str, task: str | None, expert_weights: ExpertWeights | None) -> None:
        """Fix the weights with which a static mixture is merged here, until they are cleared."""
        mount = self.mounts[adapter]
        self.static_weights[adapter] = static_weights(mount, task, expert_weights)
        self.static_shares[adapter] = static_shares(mount, task)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What a static mixture adds to the base weight, laid out as that is; float32 or better.

        Raises:
            ConfigError: its weights depend on the input, or on the task.
        """
        mount = self.mounts[adapter]
        weights, shares = self.static_weights.get(adapter), self.static_shares.get(adapter)
        if weights is None:  # nobody said which task or weights: this layer alone
            weights, shares = static_weights(mount), static_shares(mount, None)
        if mount.factors:
            delta = mixed_delta(mount.bank, weights)
        else:
            delta = mount.bank.delta(weights[0].tolist(), shares)
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can make an ordinary LoRA of what is here: a mixture of fixed weights."""
        mount = self.mounts.get(adapter_name)
        if mount is None or mount.config.plain_targets or mount.config.ffn_targets:
            return False  # PEFT names only target_modules in the LoRA's config; molora.export_lora names all
        try:
            static_weights(mount)
            static_shares(mount, None)
        except ConfigError:
            return False
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add static mixtures to the base weight; the original is kept so that unmerge is exact."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.mounts:
                continue
            refuse_scaled_beside_others([self.mounts[name] for name in (*self.merged_adapters, adapter)])
            if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
                raise ConfigError(
                    f"cannot merge into {self.quantization_backend.backend_name} weights; load the base unquantised."
                )
            weight = self.get_base_weight()
            delta = self.get_delta_weight(adapter).to(weight.device)
            merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                key = self.mounts[adapter].key
                raise ConfigError(f"merging {adapter!r} gives weights that are not finite in {key}.")
            self._unmerged.append(kept_weight(self))
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Restore the base weight as it was before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        put_back(self, self._unmerged[0])
        self._unmerged.clear()
        self.merged_adapters.clear()


class Linear(nn.Module, MoLoraLayer):
    """An adapted linear-like layer: nn.Linear, Conv1D, or a quantised one; its weight is never read here."""

    def __init__(self, base_layer: nn.Module, context: RoutingContext) -> None:
        super().__init__()
        MoLoraLayer.__init__(self, base_layer, context)

    def train(self, mode: bool = True) -> Linear:
        self._forget_operands()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_operands()
        return super()._apply(*args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        # transformers' load_adapter ends with this call: all weights have been assigned by then.
        made = super().requires_grad_(requires_grad)
        for adapter in [*self.mounts]:
            config: Any = self.context.adapters[adapter].config
            model = holder_of(config)
            if model is not None:
                check_arrived(model, config, adapter)
        return made

    def _forget_operands(self) -> None:
        for mount in self.mounts.values():
            mount.inputs.plans.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the mixture of every active adapter; x (..., d_in) -> (..., d_out)."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.merged_adapters:
            return y
        mounts = self._active_mounts()
        if len(mounts) > 1:
            refuse_beside_others(mounts)
            refuse_scaled_beside_others(mounts)
        call = self.context.here.call or self.context.call
        for mount in mounts:
            if mount.bank.is_meta and not x.is_meta:
                raise _offloaded(mount)
            y = add_experts(mount, call, x, y)
        return y

    def __repr__(self) -> str:
        return "molora." + super().__repr__()


def _offloaded(mount: Mount) -> ConfigError:
    """Products with meta tensors would be silently wrong."""
    return ConfigError(
        f"the experts of {mount.adapter!r} at {mount.key} have no values here: they were offloaded, or never loaded.",
        hint="offload the base first (accelerate's cpu_offload, disk_offload, device_map), then put the adapter on it: "
        "experts stay on the device.",
    )
