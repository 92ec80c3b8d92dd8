"""molora: mixtures of LoRA experts, as a PEFT method.

Importing this package is cheap: torch and peft are loaded when a name that needs them is first used. The
PEFT method "MOLORA" is registered at once where peft is already imported, else as soon as it is.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from typing import Any

from molora.version import __version__ as __version__

_HOMES = {
    "config.gate_config": ("GateConfig",),
    "config.router": ("RouterConfig",),
    "continual.inference": ("load_router",),
    "continual.registry": ("register_strategy",),
    "continual.sequence": ("train_sequence",),
    "continual.stages": ("train_stages",),
    "errors": ("AdapterError", "ConfigError", "DataError", "DivergedError", "MoLoraError", "RoutingError"),
    "federated.simulate": ("federate",),
    "forward.auxiliary": ("register_loss",),
    "forward.dispatch": ("dispatch",),
    "fusion.fuse": ("fuse",),
    "fusion.methods": ("register_fusion",),
    "fusion.search": ("find_weights",),
    "gates.scores": ("register_score",),
    "models.load": ("load",),
    "models.task_router": ("fit_router", "route"),
    "store.adapter": ("save",),
    "store.compose": ("compose",),
    "store.hotswap": ("hotswap",),
    "store.lora_export": ("export_lora",),
    "store.lora_import": ("import_lora",),
    "store.runs": ("load_run",),
    "training.evaluate": ("evaluate",),
    "training.train": ("train",),
    "tuner.allocation": ("expert_allocation",),
    "tuner.api": ("aux_in_loss", "aux_loss", "aux_losses", "record_routing", "routing", "set_feature_source"),
    "tuner.config": ("MoLoraConfig",),
    "tuner.fit_gate": ("fit_gate",),
    "tuner.layer": ("MoLoraLayer",),
    "tuner.model": ("MoLoraModel",),
    "tuner.parts": ("init_std_report",),
    "tuner.after_step": ("after_step",),
    "tuner.scale": ("rescale_adapter_scale",),
    "tuner.presets": ("list_presets", "preset"),
}
_PUBLIC = {name: f"molora.{module}" for module, names in _HOMES.items() for name in names}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name == "hf":  # molora.hf.MoLoraTrainerMixin, without an import of its own
        return importlib.import_module("molora.hf")
    raise AttributeError(f"module 'molora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]


class _RegisterAfterPeft(importlib.abc.MetaPathFinder):
    """Lets peft load as usual, then registers our method. Others may look for peft first without loading it."""

    _looking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "peft" or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from molora.tuner.register import register

    register()


if "peft" in sys.modules:
    _register()
else:
    import importlib.util

    sys.meta_path.insert(0, _RegisterAfterPeft())
