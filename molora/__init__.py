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

_PUBLIC = {
    "MoLoraConfig": "molora.tuner.config",
    "GateConfig": "molora.config.gate_config",
    "RouterConfig": "molora.config.router",
    "MoLoraModel": "molora.tuner.model",
    "MoLoraLayer": "molora.tuner.layer",
    "preset": "molora.tuner.presets",
    "list_presets": "molora.tuner.presets",
    "routing": "molora.tuner.api",
    "record_routing": "molora.tuner.api",
    "dispatch": "molora.forward.dispatch",
    "fit_gate": "molora.tuner.fit_gate",
    "fit_router": "molora.models.task_router",
    "route": "molora.models.task_router",
    "set_feature_source": "molora.tuner.api",
    "register_score": "molora.gates.scores",
    "register_loss": "molora.forward.auxiliary",
    "register_strategy": "molora.continual.registry",
    "expert_allocation": "molora.tuner.allocation",
    "compose": "molora.store.compose",
    "aux_losses": "molora.tuner.api",
    "aux_loss": "molora.tuner.api",
    "aux_in_loss": "molora.tuner.api",
    "init_std_report": "molora.tuner.parts",
    "save": "molora.store.adapter",
    "load": "molora.store.adapter",
    "import_lora": "molora.store.lora_import",
    "export_lora": "molora.store.lora_export",
    "load_run": "molora.store.runs",
    "train": "molora.training.train",
    "train_sequence": "molora.continual.sequence",
    "load_router": "molora.continual.inference",
    "evaluate": "molora.training.evaluate",
    "MoLoraError": "molora.errors",
    "ConfigError": "molora.errors",
    "DataError": "molora.errors",
    "AdapterError": "molora.errors",
    "RoutingError": "molora.errors",
    "DivergedError": "molora.errors",
}

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
