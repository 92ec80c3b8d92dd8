"""RouterSettings: who names the task of a prompt that comes without an id, declared once, for recipes and for Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from molora.config.choices import ROUTERS
from molora.config.section import ExpertCount, Fraction, PositiveInt, Share
from molora.config.setting import documented, idle_problems, setting, value_problems
from molora.config.suggest import did_you_mean
from molora.config.types import type_problems
from molora.errors import ConfigError


@dataclass
class RouterSettings:
    """Who names the task of a prompt that comes without an id, by what the base alone makes of it. Kept in the adapter."""

    kind: str = setting(
        "gaussian",
        "`gaussian` (each task is one Gaussian of the features, all have one covariance and are equally likely), `ridge` (a "
        "linear regression onto the tasks; they are as likely as they were frequent), or `prototypes` (several centres per task, "
        "found by k-means; needs scikit-learn).",
    )
    depth: Share = setting(
        1 / 3,
        "which hidden states it reads: those after this share of the base's blocks (an encoder-decoder's encoder), at least "
        "one; their mean over the prompt.",
    )
    passes: Literal[1, 2] | None = setting(
        None,
        "how often the first blocks read a prompt that must be named. 1: experts sit behind the block that the router reads, "
        "targets before it are left out. 2: the base alone reads it first. Not given: once where no expert sits so early.",
    )
    shrinkage: Share | Literal["auto"] = setting(
        "auto",
        "how far the covariance is shrunk towards its mean variance: `auto` (the fewer prompts there were, the further), or a "
        "share; 1, all the way, makes distances Euclidean. Of ridge: its λ.",
    )
    clusters: ExpertCount = setting(5, "centres per task.", acts_with={"kind": ["prototypes"]}, was=[20])
    records: PositiveInt = setting(2000, "how many prompts of a task are read, drawn at random.")
    soft: bool = setting(
        False,
        "the experts of all tasks are weighed by how likely each task is; only under gates that decide by task id.",
    )
    unknown: Literal["nearest", "base", "error"] = setting(
        "nearest",
        "what becomes of a prompt that is less like its task than nearly all prompts of that were: `nearest` (that task all the "
        "same), `base` (no expert at all), `error`.",
    )
    quantile: Fraction = setting(
        0.01,
        "share of a task's own prompts that are less like it than what counts as known, each measured as if it had not been "
        "learned; set by fitting.",
        acts_with={"unknown": ["base", "error"]},
    )


def router_problems(router: RouterSettings) -> Iterator[tuple[str, str]]:
    """Name and message of what a router cannot be."""
    if wrong := [*type_problems(router, RouterSettings)]:
        yield from wrong
        return
    if router.kind not in ROUTERS:
        yield "kind", ROUTERS.unknown(router.kind)
    yield from value_problems(router, RouterSettings)
    yield from idle_problems(router)


@documented
@dataclass
class RouterConfig(RouterSettings):
    """Who names the task of a prompt that comes without an id. Filled by `molora.fit_router`, kept in the adapter.

    Raises:
        ConfigError: a value that is not allowed, with what is.
    """

    def __post_init__(self) -> None:
        for field, message in router_problems(self):
            raise ConfigError(f"router.{field}={getattr(self, field)!r}: {message}")


def router_from(given: Any) -> RouterConfig | None:
    """A router as a config has it: of a RouterConfig a copy, of a kind's name or of a map of settings a new one."""
    if given is None or isinstance(given, RouterConfig):
        return None if given is None else replace(given)
    settings = {"kind": given} if isinstance(given, str) else given
    if not isinstance(settings, dict):
        raise ConfigError(
            f"router={given!r} is no router.", hint="give a RouterConfig, a kind, or a map of settings."
        )
    known = [f.name for f in fields(RouterConfig)]
    for name in settings:
        if name not in known:
            raise ConfigError(
                f"router.{name} is not a setting.{did_you_mean(name, known)} Settings: {', '.join(known)}."
            )
    return RouterConfig(**settings)
