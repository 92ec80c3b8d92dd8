"""Reading: the mounts that compute together, and the x they read in a call."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from molora.calls.call import Call
from molora.calls.task_ids import TaskIds
from molora.forward.mount import Mount, Plan


@dataclass
class Reading:
    """A plan that reads x.

    Args:
        mount: the member that was called.
        call: the current one.
        x: (batch, ..., d_in).
        experts: the experts in use, which the columns of weights stand for; None: all.
        alone: the plan is of this mount by itself, not of all that read the same input.
    """

    mount: Mount
    call: Call
    x: Tensor
    experts: tuple[int, ...] | None
    alone: bool = False
    traced: bool = field(init=False)  # into a graph, which must not be fixed to these sizes
    plan: Plan = field(init=False)  # what computes together: followers need what the leader decided
    lead: torch.Size = field(init=False)  # the shape of x without its last axis
    tasks: TaskIds | None = field(init=False)  # the batch's task ids, if any were given

    def __post_init__(self) -> None:
        mount = self.mount
        self.traced = torch.compiler.is_compiling()
        self.plan = mount.inputs.plan(mount, alone=self.alone, traced=self.traced)
        self.lead, self.tasks = self.x.shape[:-1], self.call.tasks.get(mount.adapter)

    def shares(self) -> Tensor | None:
        """Each sample's share of each task, (sample, task), where some members have a core for each task."""
        cores = [member.bank.cores for member in self.plan.members if member.bank.cores is not None]
        if self.tasks is None or not cores:
            return None
        shares = self.tasks.shares(cores[0].num_experts, self.x.device)
        return shares if len(shares) == 1 else shares.repeat_interleave(len(self.x) // len(shares), dim=0)
