"""The `federated` section: rounds in which clients train copies of one adapter on records that stay with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from molora.config.mixture import Mixture
from molora.config.section import Positive, PositiveInt, Problem, Section, Share, refuse
from molora.config.suggest import options
from molora.config.train import TrainConfig
from molora.registry import Lazy, Registry


@dataclass(frozen=True)
class AggregatorSpec:
    """All that is known of a way to make one adapter of several. `function`: see `molora.federated.aggregate`."""

    function: Callable[..., Any] | Lazy[Callable[..., Any]]
    paper: str
    needs: Mapping[str, Any] = field(default_factory=dict)  # of the mixture, and what to set
    any_rank: bool = False  # clients may train experts of other ranks and scalings than the server's
    keeps_A: bool = False  # nobody may change the A of an expert

    def load(self) -> Callable[..., Any]:
        """The function."""
        return self.function.load() if isinstance(self.function, Lazy) else self.function


AGGREGATORS: Registry[AggregatorSpec] = Registry("way of aggregating")
# Kinds that decide in one training what the others would have to share.
_ALONE = {
    "adalora": "gives rank away by what one training sees, so that clients end with different ranks",
    "sparse": "draws its masks by what one training sees, so that clients end with different ones",
    **dict.fromkeys(("relora", "cola"), "begins new links by the steps of one training, and a round is one"),
}
_PRODUCTS = {"kind": "lora", "share_A": False, "task_cores": False, "combine": "outputs"}

for _name, _spec in {
    "fedavg": AggregatorSpec(Lazy("federated.aggregate:fedavg"), "FedIT, arXiv:2305.05644"),
    "ffa": AggregatorSpec(
        Lazy("federated.aggregate:ffa"), "FFA-LoRA, arXiv:2403.12313", {"kind": "lora_fa"}, keeps_A=True
    ),
    "flora": AggregatorSpec(
        Lazy("federated.aggregate:flora"), "FLoRA, arXiv:2409.05976", _PRODUCTS, any_rank=True
    ),
}.items():
    AGGREGATORS.add(_name, _spec)


def aggregate_problems(name: str, mixture: Mixture) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong and what to set) of a mixture that cannot be aggregated in this way."""
    if mixture.router is not None:
        text = "learns from prompts, which stay with the clients: leave it out, and teach one afterwards (molora.fit_router)."
        yield "router", text
    if mixture.kind in _ALONE:
        yield "kind", f"{mixture.kind} {_ALONE[mixture.kind]}; use kind: lora."
        return
    for key, value in AGGREGATORS[name].needs.items():
        if getattr(mixture, key) != value:
            yield key, f"aggregate: {name} needs {key}: {str(value).lower()}."


class FederatedConfig(Section):
    """Rounds of federated training, simulated in one process (`molora federate`)."""

    clients: int = Field(default=8, ge=1, le=10**4)
    """Among how many clients the training records are split."""
    rounds: PositiveInt = 10
    """How often the clients' adapters become one."""
    fraction: Share = 1.0
    """Share of the clients that is asked in a round; at least one client is."""
    local_steps: PositiveInt = 20
    """Optimiser steps of a client in a round; the learning rate rises and falls in each."""
    min_clients: PositiveInt = 1
    """With fewer usable updates a round is repeated."""
    max_repeats: int = Field(default=3, ge=0, le=1000)
    """How often a round is repeated before the training ends with an error."""
    aggregate: str = "fedavg"
    """How adapters become one: `fedavg` (mean of every tensor), `ffa` (mean of B, A stays), `flora` (mean of the products)."""
    partition: Literal["iid", "dirichlet"] = "iid"
    """How a task's records are split: evenly, or in shares that are drawn."""
    alpha: Positive | None = None
    """Of `dirichlet`, 0.5 where left out: the smaller, the less alike are the clients."""

    @property
    def asked(self) -> int:
        """How many clients take part in a round."""
        return max(1, int(self.fraction * self.clients + 0.5))

    @model_validator(mode="before")
    @classmethod
    def _default_alpha(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("partition") == "dirichlet" and data.get("alpha") is None:
            return {**data, "alpha": 0.5}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[Problem]:
        if self.aggregate not in AGGREGATORS:
            name = self.aggregate
            yield ("aggregate",), f"{name!r} is no way of aggregating.{options(name, AGGREGATORS)}"
        if self.partition == "iid" and self.alpha is not None:
            yield ("alpha",), "acts only with partition: dirichlet; leave it out."
        if self.min_clients > self.asked:
            text = f"only {self.asked} clients are asked in a round (fraction of clients), so no round could close."
            yield ("min_clients",), f"{text} Allowed: at most {self.asked}."


_EACH_ROUND = "does nothing: a client trains federated.local_steps in every round; leave it out."
_UNUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # of `train`: what it may be, and why
    "max_steps": ((None,), _EACH_ROUND),
    "epochs": ((1, None), _EACH_ROUND),
    "stages": (([],), "are parts of one long training, and a client has short ones; leave them out."),
    "val_every": ((None,), "does nothing: a run of rounds is scored at its end; leave it out."),
    "save_every": ((None,), "does nothing: every round is saved; leave it out."),
    "on_nonfinite": (
        ("stop",),
        "does nothing: a client that diverges sends nothing in its round; leave it out.",
    ),
    "devices": ((1, [0]), "must be 1: clients train one after another on one device."),
    "strategy": (("auto",), "must be auto: clients train one after another on one device."),
}


def federated_problems(
    settings: FederatedConfig, adapter: Mixture, train: TrainConfig, *, continual: bool, features: bool
) -> Iterator[Problem]:
    """What the rest of a recipe must be for rounds; `continual`, `features`: whether it has such a section."""
    if continual:
        text = "does not go with tasks one after another; write only one of continual and federated."
        yield ("federated",), text
    if features:
        yield ("features",), "are clusters of all prompts, which stay with the clients; use another gate."
    if train.objective.kind == "dpo":
        text = "dpo measures from the model as it was before training, which is another one in every round."
        yield ("train", "objective"), text
    if settings.aggregate in AGGREGATORS:
        for key, text in aggregate_problems(settings.aggregate, adapter):
            yield ("adapter", key), text
    yield from _train_problems(train)


def _train_problems(train: TrainConfig) -> Iterator[Problem]:
    for key, (allowed, text) in _UNUSED.items():
        if getattr(train, key) not in allowed:
            yield ("train", key), text
    if train.loggers not in (None, [], ["csv"]):
        yield ("train", "loggers"), "allowed: csv; the clients' losses of a round are one row of metrics.csv."
