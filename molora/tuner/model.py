"""MoLoraModel: the PEFT tuner that puts banks and gates into a stock model and saves, loads, merges them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.calls.context import RoutingContext
from molora.calls.prompt import generation_start
from molora.calls.request import RoutingRequest
from molora.config.losses import AUX_LOSSES
from molora.disk.base_check import check_base
from molora.disk.fingerprint import base_fingerprint
from molora.disk.tensors import check_finite, check_state_dict, digest
from molora.errors import ConfigError, RoutingError
from molora.forward import root_hooks
from molora.forward.feed_forward import check_feed_forwards
from molora.tuner import grow
from molora.tuner.adapter_name import check_adapter_name
from molora.tuner.beyond_linears import leave_out_unseen, not_a_linear, say_fused
from molora.tuner.config import MoLoraConfig
from molora.tuner.layer import Linear, MoLoraLayer
from molora.tuner.left_out import late_ones, left_out, streams_of
from molora.tuner.loan import borrow, give_back, lend, note_base
from molora.tuner.merge import ExpertWeights
from molora.tuner.mounting import Mounting
from molora.tuner.placement import fit_to_base
from molora.tuner.prompts import give_prompts
from molora.tuner.replication import replicate, replicated
from molora.tuner.router import make_known, modules_before_experts
from molora.tuner.targets import check_targets, is_target
from molora.tuner.verbs import ExpertVerbs
from molora.tuner.vocabulary import (
    brought_along,
    embeddings_to_save,
    note_loaded,
    note_tokens,
    without_doubles,
)


class MoLoraModel(ExpertVerbs, BaseTuner):
    """A mixture of LoRA experts on the linears of a frozen model, as `peft.get_peft_model(base, MoLoraConfig(...))` makes it.

    All that PEFT does with a method (save, load, several adapters, disable, delete, merge) works; the verbs change experts.
    """

    prefix = "molora_"
    tuner_layer_cls = MoLoraLayer
    _check_target_module_exists: Any = staticmethod(is_target)
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Replace the target layers; adding an adapter to a model that has one keeps its context."""
        check_adapter_name(adapter_name)
        # The caller's own object, which PEFT's task models edit once this is done.
        config, given = borrow(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        try:
            self._inject(model, adapter_name, config, *args, **kwargs)
        except BaseException:
            give_back(config, given)
            raise
        lend(config, given, model, self.context, adapter_name)
        note_tokens(config, model)

    def _inject(
        self, model: nn.Module, adapter_name: str, config: MoLoraConfig, *args: Any, **kwargs: Any
    ) -> None:
        check_targets(config, model)
        if config.base_fingerprint is not None:  # a saved adapter: no loader may put it on another base
            self._same_base(config, model)
        if config.layer_replication is not None:
            replicate(config, model)
        fit_to_base(config, model)
        say_fused(config, model)
        unseen = leave_out_unseen(config, model)
        existing = (m.context for m in model.modules() if isinstance(m, MoLoraLayer))
        self.context = next(existing, None) or RoutingContext()
        make_known(model, self.context, adapter_name, config)
        give_prompts(model, self.context, adapter_name, config)
        base = self.get_model_config(model)
        streams = streams_of(model, encoder_decoder=bool(base.get("is_encoder_decoder", False)))
        self._mounting = Mounting(
            adapter_name, config, self.context, streams, late_ones(config, model), base.get("model_type")
        )
        for name in config.aux_losses:
            AUX_LOSSES[name].prepare()
        beside = left_out(config, model)
        without = modules_before_experts(model, config) | unseen | beside
        self._check_target_module_exists = partial(is_target, without=without)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if (unseen or beside) and not isinstance(config.target_modules, str):  # "all-linear" is a list now
            config.target_modules = {*(config.target_modules or ())} - unseen - beside  # type: ignore[assignment]
        del self._mounting
        self.context.forget_modules()
        check_feed_forwards(root_hooks.mounts_of(self.context, model, adapter_name))
        root_hooks.install(model, self.context)
        self._keep_heads_frozen()

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, MoLoraLayer) else self._new_layer(target, current_key)
        mount = self._mounting.mount(current_key, layer.get_base_layer())
        layer.mount(mount, active=adapter_name in self.active_adapters)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    # Which modules of tied embeddings are trained, and which follow them: nothing in it is particular to LoRA.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(config.layer_replication for config in self.peft_config.values()):
            text = "blocks of layer_replication share their weights, so a merged one would hold the experts of all of them."
            raise ConfigError(text, hint="keep the adapter unmerged.")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)  # a head put back whole; PEFT expects it to be one linear
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _new_layer(self, target: nn.Module, key: str) -> Linear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        backend = resolve_quantization_backend(base, **get_quantization_kwargs(self.model))
        if not isinstance(base, (nn.Linear, Conv1D)) and (backend is None or backend.layer_type != "linear"):
            raise not_a_linear(key, base)
        layer = Linear(target, self.context)
        layer.quantization_backend = backend
        return layer

    # -- PEFT's other entry points -----------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._keep_heads_frozen()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._keep_heads_frozen()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._keep_heads_frozen()

    def _keep_heads_frozen(self) -> None:
        # Banks and gates re-freeze themselves; the wrappers of heads are PEFT's and know nothing of it.
        for name, config in self.peft_config.items():
            if getattr(config, "frozen_extras", False):  # other methods' adapters have no such thing
                grow.freeze_heads(self.model, name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.context.adapters.pop(adapter_name, None)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT strips the name only from the last two components; a gate nests deeper.
        if f".{cls.prefix}" not in key:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return re.sub(rf"(\.{cls.prefix}[^.]+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        # PEFT saves what this returns, then the config: the place to note whose tensors they are.
        check_adapter_name(adapter_name)  # PEFT joins it to the folder it saves in
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        embeddings = embeddings_to_save(model, config, state_dict)
        note_base(
            config, replicated(config) or base_fingerprint(model, without=brought_along(model, embeddings))
        )
        config.taken_sha256 = digest(check_finite(selected), adapter_name)
        return {**selected, **embeddings}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        # Every PEFT loader comes through here; PEFT itself would only warn of missing keys.
        if config.layer_replication is None:  # else it was compared before its blocks were copied
            cls._same_base(config, model)
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, *args, **kwargs)
        loaded = without_doubles(model, loaded)
        check_state_dict(model, config, adapter_name, loaded)
        note_loaded(model, config, loaded)
        config.weights_sha256 = None  # another file may be loaded into this adapter next
        if config.frozen_extras:  # PEFT's classifiers mark their head as trainable once they are built
            grow.freeze_heads(model, adapter_name)
        return loaded

    @staticmethod
    def _same_base(config: MoLoraConfig, model: nn.Module) -> None:
        if not check_base(config.base_fingerprint, model):
            config.weights_sha256 = None  # it covers the names, which were mapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            text = "adapter_names is not supported: the tasks of one adapter are mixed in a batch instead."
            raise RoutingError(text, hint="pass routing_task_ids=[...], one per sample.")
        yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate; `routing_task_ids=` (or `task_ids=`) and `routing_features=`, one per sample.

        `routing_prompt_mask`, (batch, seq): the tokens of the prompt that gates of sequence scope pool.
        """
        ids = kwargs.pop("routing_task_ids", kwargs.pop("task_ids", None))
        asked = {name: kwargs.pop(f"routing_{name}", None) for name in ("features", "prompt_mask")}
        length = generation_start(self.model, args, kwargs)
        request = RoutingRequest(task_ids=ids, given=ids is not None, prompt_length=length, **asked)
        root_hooks.points_of(self.context, self.model)
        with self.context.use_request(request):
            return self.model.generate(*args, **kwargs)

    # -- merging ---------------------------------------------------------------------------------------

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        task: str | None = None,
        expert_weights: ExpertWeights | None = None,
    ) -> nn.Module:
        """Merge a static mixture into the base and return the plain model.

        Args:
            progressbar: as in PEFT, like `safe_merge` and `adapter_names`.
            task: merge the experts of this task of a task gate.
            expert_weights: merge these weights, by name or in expert order, whatever the gate.

        Raises:
            ConfigError: the gate's weights depend on the input, so no single weight matrix exists.
        """
        with self._static(adapter_names, task, expert_weights):
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        task: str | None = None,
        expert_weights: ExpertWeights | None = None,
    ) -> None:
        """Merge in place, reversibly (`unmerge_adapter` restores the exact base); see merge_and_unload."""
        with self._static(adapter_names, task, expert_weights):
            super().merge_adapter(adapter_names, safe_merge)

    @contextmanager
    def _static(
        self, adapter_names: list[str] | None, task: str | None, expert_weights: ExpertWeights | None
    ) -> Any:
        """Decide every layer's static weights first, so that a refusal leaves the model untouched."""
        layers = [m for m in self.model.modules() if isinstance(m, MoLoraLayer)]
        try:
            for layer in layers:
                for adapter in layer.mounts.keys() & set(adapter_names or self.active_adapters):
                    layer.decide(adapter, task, expert_weights)
            yield
        finally:
            for layer in layers:
                layer.static_weights, layer.static_shares = {}, {}

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        root_hooks.uninstall(self.model)
        return model
