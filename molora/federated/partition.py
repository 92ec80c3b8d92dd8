"""How a simulation splits training records over clients: evenly, or unevenly as a Dirichlet distribution draws it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from molora.config.federated import FederatedConfig
from molora.data.tasks import Task, TaskSet
from molora.errors import ConfigError


def split(tasks: TaskSet, settings: FederatedConfig, seed: int) -> list[TaskSet]:
    """The tasks of each client, with its own training records and no others; a task it has nothing of is left out.

    Each record goes to one client, and the same seed splits alike. `dirichlet`: of each task, and of each label of a
    classification, the clients' shares are drawn from a symmetric Dirichlet distribution (Hsu et al., arXiv:1909.06335, draws
    a client's shares of the classes; this is the transposed form that is usual since Li et al., arXiv:2102.02079).

    Raises:
        ConfigError: a client gets no record at all.
    """
    draw = np.random.default_rng(seed)
    owned: list[list[Task]] = [[] for _ in range(settings.clients)]
    for task in tasks:
        parts: list[list[int]] = [[] for _ in range(settings.clients)]
        for group in _groups(task):
            for client, indices in enumerate(_dealt(draw.permutation(group), settings, draw)):
                parts[client] += indices
        for client, indices in enumerate(parts):
            if indices:
                owned[client].append(replace(task, train=[task.train[i] for i in sorted(indices)], eval=()))
    if empty := [number for number, own in enumerate(owned, 1) if not own]:
        raise ConfigError(
            f"federated.partition: client {empty[0]} of {settings.clients} gets no training record.",
            hint="use fewer clients, a larger alpha, another seed, or more records.",
        )
    return [TaskSet(tuple(own), tasks.known_ids) for own in owned]


def _groups(task: Task) -> Iterator[list[int]]:
    """Indices of the records that are split by one draw: those of a label, or all."""
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(task.train):
        label = str(record.get(task.label)) if task.kind == "classification" else ""
        groups.setdefault(label, []).append(i)
    yield from (groups[label] for label in sorted(groups))


def _dealt(indices: np.ndarray, settings: FederatedConfig, draw: np.random.Generator) -> list[list[int]]:
    """The indices of each client."""
    if settings.partition == "iid":
        order = draw.permutation(settings.clients)  # so that what is left over goes to different clients
        return [indices[order[client] :: settings.clients].tolist() for client in range(settings.clients)]
    assert settings.alpha is not None
    shares = draw.dirichlet([settings.alpha] * settings.clients)
    ends = np.round(np.cumsum(shares) * len(indices)).astype(int)
    return [part.tolist() for part in np.split(indices, ends[:-1])]
