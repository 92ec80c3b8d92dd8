"""Mounting: makes an adapter's mounts, layer by layer, and finds out which of them compute and decide together."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn

from molora.calls.context import RoutingContext
from molora.errors import ConfigError
from molora.forward.mount import InputGroup, Mount
from molora.forward.prompts import Prompts
from molora.forward.rows import is_time_first
from molora.forward.task_router import TaskRouter
from molora.tuner import parts
from molora.tuner.config import MoLoraConfig
from molora.tuner.placement import place
from molora.tuner.room import check_room
from molora.tuner.targets import group_key, matches


class Mounting:
    """One adapter on its way into a model; asked for a mount at each target, in the model's own order.

    Args:
        adapter: its name.
        config: its configuration.
        context: the model's.
        streams: by module name, whose tokens it reads.
        late: layers that are defined before one of their group that runs earlier.
        model_type: the base's, if its config names one.
    """

    def __init__(
        self,
        adapter: str,
        config: MoLoraConfig,
        context: RoutingContext,
        streams: Mapping[str, str],
        late: Collection[str],
        model_type: str | None,
    ) -> None:
        self.adapter, self.config, self.context = adapter, config, context
        self.streams, self.late, self.model_type = streams, late, model_type
        self._waiting: dict[
            str, list[Mount]
        ] = {}  # by group: late ones that were asked for before its leader
        self.kind = parts.kind_of(config)
        self._router: TaskRouter | None = context.adapters[adapter].router
        self._prompts: Prompts | None = context.adapters[adapter].prompts
        self._leaders: dict[str, Mount] = {}  # by group that shares a gate
        self._readers: dict[str, InputGroup] = {}  # by input

    def mount(self, key: str, base: nn.Module) -> Mount:
        """The adapter's experts, and its gate, for the linear layer `base` at the module named `key`.

        Raises:
            ConfigError: layers with different experts would share a gate.
        """
        config = self.config
        stream, plain = self.streams[key], matches(config.plain_targets, key)
        d_in, d_out = _get_in_out_features(base)
        assert d_in is not None and d_out is not None  # only linear layers come here
        check_room(config, key, base, d_in, d_out)
        bank = parts.new_bank(config, self.kind, key, base, plain=plain)
        mount = Mount(self.adapter, key, stream, d_in, self.context, bank, plain=plain)
        mount.time_first = is_time_first(self.model_type, key)
        place(mount, config)
        mount.router, self._router = self._router, None  # the first layer keeps both
        mount.prompts, self._prompts = self._prompts, None
        self._among_readers(mount)
        if not plain:
            self._into_group(mount)
            if mount.group and mount.leader is mount and config.gate.learned:
                mount.gate = parts.new_gate(config, key, d_in)
        return mount

    def _among_readers(self, mount: Mount) -> None:
        """Compute together with the layers that read the same input."""
        name = f"{group_key(mount.key, 'group', mount.stream)} {mount.names}"
        readers = self._readers.setdefault(name, mount.inputs)
        if not readers.members or readers.members[0].d_in == mount.d_in:
            mount.inputs = readers
        mount.inputs.members.append(mount)

    def _into_group(self, mount: Mount) -> None:
        """Join the layers that share one gate, or lead a new group of them."""
        gate, key, feed_forward = self.config.gate, mount.key, matches(self.config.ffn_targets, mount.key)
        share = "block" if feed_forward else gate.share
        mount.reads_input = gate.scope in ("token", "sequence")
        mount.pools = gate.scope == "sequence"
        mount.factors = self.config.combine == "factors"
        mount.spreads = mount.reads_input and share not in ("linear", "group")
        name = f"{group_key(key, share, mount.stream)} {feed_forward}"
        if feed_forward:
            mount.feed_forward = name
        if mount.spreads and not feed_forward and key in self.late and name not in self._leaders:
            self._waiting.setdefault(name, []).append(mount)
            return
        leader = self._leaders.setdefault(name, mount)
        if mount.reads_input and not mount.spreads and leader.d_in != mount.d_in:
            leader = mount
        for member in (mount, *self._waiting.pop(name, ())):
            self._join(member, leader)
        if feed_forward:  # the last one in the model's order leaves the block
            for member in mount.group:
                member.leaves = member is mount

    def _join(self, mount: Mount, leader: Mount) -> None:
        if leader is not mount and leader.names != mount.names:
            raise ConfigError(
                f"{mount.key} and {leader.key} share a gate, but num_experts gives them different experts.",
                hint="use gate.share='linear', or the same number for all of them.",
            )
        if leader is not mount:
            mount.group = leader.group
        mount.group.append(mount)
