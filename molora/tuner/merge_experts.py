"""Several experts become one, whose update is their weighted mean, and which serves all of their tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

from torch import nn

from molora.calls.context import RoutingContext
from molora.config.mixture import ExpertSpec
from molora.config.roster import merged
from molora.errors import ConfigError
from molora.experts.bank import Expert, ExpertRows
from molora.experts.products import weighed
from molora.forward.mount import Mount
from molora.tuner.config import MoLoraConfig
from molora.tuner.grow import mounts_of, refresh
from molora.tuner.loan import own
from molora.tuner.parts import new_expert, rank_of, scaling_of
from molora.tuner.placement import experts_at, frozen_at
from molora.tuner.prompts import refuse_prompts


def merge_experts(
    model: nn.Module,
    context: RoutingContext,
    adapter: str,
    names: Sequence[str],
    into: str,
    *,
    weights: Mapping[str, float] | None = None,
    rank: int | None = None,
) -> None:
    """Replace experts of a task gate by one, for tasks that turn out to be one skill.

    Its update is, in each layer, the nearest of its rank to the weighted mean of theirs; a layer that one of them lacks counts as
    an update of zero. Their tasks keep names and ids and are served by it, so that it no longer matters which of them a router
    takes a prompt for; all other tasks compute what they did, to the bit. It is frozen where all of them were.

    Args:
        names: two or more experts.
        into: the new expert's name.
        weights: of the mean, {expert: positive number}; default: equal.
        rank: of the new expert; default: the config's, or where experts have ranks of their own the largest of those. With the
            sum of their ranks the mean is exact.

    Raises:
        ConfigError: no such experts or names, a learned gate, or experts whose updates have no mean. Nothing has changed then.
    """
    config = own(model, context, adapter)
    shares = _shares(config, names, weights)
    mounts = [mount for mount in mounts_of(model, adapter) if not mount.plain]
    _refuse(config, names, rank, mounts)
    after = merged(config.roster, names, into, spec=_spec(config, names, rank))
    before = {mount.key: experts_at(config, mount.key) for mount in mounts}
    after.write(config)
    for mount in mounts:
        here, rows = before[mount.key], mount.bank.rows()
        kept = [row for name, row in zip(here, rows, strict=True) if name not in shares]
        mount.bank.assign([*kept, _mean(config, mount, here, shares, into)], frozen_at(config, mount.key))
    refresh(model, context, adapter)


def _shares(
    config: MoLoraConfig, names: Sequence[str], weights: Mapping[str, float] | None
) -> dict[str, float]:
    """Each expert's part of the mean; they sum to 1."""
    for name in names:
        config.roster.index(name)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"name two or more different experts to merge, not {', '.join(names) or 'none'}.")
    found = dict.fromkeys(names, 1.0) if weights is None else dict(weights)
    if found.keys() != set(names) or not all(isfinite(w) and w > 0 for w in found.values()):
        raise ConfigError(f"weights has to give each of {', '.join(names)} a positive number, not {weights}.")
    return {name: found[name] / sum(found.values()) for name in names}


def _refuse(config: MoLoraConfig, names: Sequence[str], rank: int | None, mounts: Sequence[Mount]) -> None:
    if config.gate.learned:
        raise ConfigError(
            "this adapter's gate learned when to use each expert, and cannot know when to use one in place of several.",
            hint="molora fuse makes one LoRA of several experts, molora compose a mixture of LoRAs with a gate to train anew.",
        )
    refuse_prompts(config)
    if always := [name for name in names if name in config.always_on]:
        raise ConfigError(f"{', '.join(always)} is always on, for every task; merge experts that are chosen.")
    kind = mounts[0].bank.kind
    if (reason := kind.imports or kind.averages) is not None:
        raise ConfigError(f"experts of this mixture cannot become one: {reason}.")
    if mounts[0].bank.cores is not None:
        raise ConfigError(
            "each task has a core of its own between A and B here, which fits no other factors than it was trained with."
        )
    if config.share_A and rank is not None:
        raise ConfigError("experts that share A have one rank; leave out `rank`.")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; allowed: 1 and above.")


def _spec(config: MoLoraConfig, names: Sequence[str], rank: int | None) -> ExpertSpec | None:
    """Rank and scaling of the new expert, where they are not the config's."""
    if rank is not None:
        return ExpertSpec(r=rank, lora_alpha=rank)
    specs = [spec for name in names if (spec := config.expert_specs.get(name)) is not None]
    return max(specs, key=lambda spec: spec.r, default=None)


def _mean(
    config: MoLoraConfig, mount: Mount, here: Sequence[str], shares: Mapping[str, float], into: str
) -> Expert | ExpertRows:
    bank, key = mount.bank, mount.key
    present = [(shares[name], bank.expert(i)) for i, name in enumerate(here) if name in shares]
    if not present:  # none of them acts here, nor does what becomes of them
        like = bank.expert(0)
        sizes = like.A.shape[1], like.B.shape[0]
        return new_expert(config, bank.kind, into, key, *sizes, dtype=like.A.dtype, device=like.A.device)
    rank, scaling = rank_of(config, into, key), scaling_of(config, into, key)
    parts, experts = zip(*present, strict=True)
    return weighed(experts, parts, rank, scaling, shares_A=bank.kind.shares_A)
