"""A config object in use: PEFT expects a model to hold the caller's own one, and callers put one on several bases."""

from __future__ import annotations

import weakref
from copy import copy, deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from molora.calls.context import RoutingContext
from molora.forward.mount import MountPoint
from molora.tuner.config import MoLoraConfig


@dataclass
class Loan:
    """Who holds a config object, and what fitting it to that base changed. A copy of the object knows no holder.

    The model that was built last holds the caller's object. An earlier one gets a copy, as it is then, and what its
    base put into the object is taken back. Verbs that change experts change a copy of their own.
    """

    adapter: str
    model: weakref.ref[nn.Module] | None = None
    context: weakref.ref[RoutingContext] | None = None
    lent: bool = False  # the object is the caller's
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # by field: as given, as fitted

    def __getstate__(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter,
            "changes": self.changes,
            "model": None,
            "context": None,
            "lent": False,
        }

    def note(self, config: MoLoraConfig, name: str, value: Any) -> None:
        """Set a field to what follows from the base."""
        given = self.changes[name][0] if name in self.changes else getattr(config, name)
        self.changes[name] = given, value
        setattr(config, name, value)


def borrow(config: MoLoraConfig) -> tuple[MoLoraConfig, dict[str, Any]]:
    """The object for a model about to be built, free of any other base, and its fields as they are now.

    That is the same object, except where it belongs to a copied model, which cannot be asked to let it go.
    """
    loan = _loan(config)
    if loan is not None and loan.model is None:
        config = deepcopy(config)
    elif loan is not None:
        _let_go(config, loan)
    _free(config)
    if config.modules_to_save:  # PEFT's task models append their heads each time
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    return config, {f.name: deepcopy(getattr(config, f.name)) for f in fields(config)}


def lend(
    config: MoLoraConfig, given: dict[str, Any], model: nn.Module, context: RoutingContext, adapter: str
) -> None:
    """Note that a model holds the object, and what differs from the fields it was given with."""
    changes = {
        name: (before, deepcopy(after))
        for name, before in given.items()
        if before != (after := getattr(config, name))
    }
    _hold(config, Loan(adapter, weakref.ref(model), weakref.ref(context), lent=True, changes=changes))


def give_back(config: MoLoraConfig, given: dict[str, Any]) -> None:
    """Set the fields to what they were, after a model could not be built."""
    for name, value in given.items():
        setattr(config, name, value)


def own(model: nn.Module, context: RoutingContext, adapter: str) -> MoLoraConfig:
    """An adapter's config, to be changed: its model's own object from now on, if it was the caller's."""
    config = context.adapters[adapter].config
    assert isinstance(config, MoLoraConfig)
    loan = _loan(config)
    if loan is None or not loan.lent:
        return config
    mine = _replace(config, model, context, adapter)
    _free(config)
    return mine


def holder_of(config: MoLoraConfig) -> nn.Module | None:
    """The model that a config belongs to, where it is known."""
    loan = _loan(config)
    return loan.model() if loan is not None and loan.model is not None else None


def note_base(config: MoLoraConfig, fingerprint: dict[str, Any]) -> None:
    """Note whose weights an adapter fits; on another base the object forgets it."""
    loan = _loan(config)
    if loan is None:
        config.base_fingerprint = fingerprint
    else:
        loan.note(config, "base_fingerprint", fingerprint)


def _loan(config: MoLoraConfig) -> Loan | None:
    return config.__dict__.get("_loan")


def _hold(config: MoLoraConfig, loan: Loan) -> None:
    config.__dict__["_loan"] = loan


def _free(config: MoLoraConfig) -> None:
    """Take back what a base put into the object, which no model holds any more."""
    loan = _loan(config)
    if loan is None:
        return
    for name, (given, made) in loan.changes.items():
        if getattr(config, name) == made:  # else the caller has set it since
            setattr(config, name, deepcopy(given))
    del config.__dict__["_loan"]


def _let_go(config: MoLoraConfig, loan: Loan) -> None:
    """Give a copy to the model that holds the object, if it still does."""
    model = loan.model() if loan.model is not None else None
    context = loan.context() if loan.context is not None else None
    if model is None or context is None or loan.adapter not in context.adapters:
        return
    if context.adapters[loan.adapter].config is config:
        _replace(config, model, context, loan.adapter)


def _replace(config: MoLoraConfig, model: nn.Module, context: RoutingContext, adapter: str) -> MoLoraConfig:
    mine = copy(config)  # it keeps the very objects, such as settings that gates hold
    for f in fields(config):
        setattr(config, f.name, deepcopy(getattr(config, f.name)))
    loan = _loan(config)
    assert loan is not None
    _hold(mine, Loan(adapter, weakref.ref(model), weakref.ref(context), changes=deepcopy(loan.changes)))
    context.adapters[adapter].config = mine
    configs: Any = model.peft_config
    configs[adapter] = mine
    for point in model.modules():
        if isinstance(point, MountPoint) and adapter in point.mounts:
            point.mounts[adapter].refresh()
    return mine
