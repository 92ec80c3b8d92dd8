"""A round at the server: what each client sent is taken or dropped with a reason, and what is left becomes one adapter."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from molora.config.federated import aggregate_problems
from molora.config.names import check_name
from molora.errors import AdapterError, ConfigError
from molora.federated.aggregate import Aggregated, aggregate
from molora.federated.folder import (
    LOG_FILE,
    adapter_of,
    copy_adapter,
    read_log,
    repeats,
    rounds_done,
    write_adapter,
    write_log,
)
from molora.federated.update import Start, Unusable, Update, read_start, read_update


@dataclass(frozen=True)
class Decision:
    """What became of one client's update; `share` is its part of the sum of all weights."""

    client: str
    accepted: bool
    records: int = 0
    share: float = 0.0
    fault: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a round; `adapter` is the new one, or None where the round is repeated.

    `lost`: the share of the update's norm that was cut off to keep the rank, see `aggregate.flora`.
    """

    decisions: tuple[Decision, ...]
    adapter: Path | None
    lost: float = 0.0


class Round:
    """The round that is due at a server, asked of these clients.

    Args:
        folder: the server's.
        start: an adapter folder, where the server has none yet; it is copied as `round-0`.
        clients: who is asked.
        aggregate: how adapters become one, by name.
        min_clients: with fewer usable updates the round is repeated.
        max_repeats: how often that may be.

    Raises:
        ConfigError: a name that is not allowed, or an adapter that cannot be aggregated in this way.
        AdapterError: a damaged adapter.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        start: str | os.PathLike[str] | None = None,
        *,
        clients: Sequence[str],
        aggregate: str = "fedavg",
        min_clients: int = 1,
        max_repeats: int = 3,
    ) -> None:
        self.folder, self.aggregate = Path(folder), aggregate
        self.clients = [check_name(name, "client") for name in clients]
        self.min_clients, self.max_repeats = min_clients, max_repeats
        if not 1 <= min_clients <= len({*self.clients}):
            raise ConfigError(
                f"min_clients is {min_clients}; allowed: 1 to the {len({*self.clients})} clients asked."
            )
        done = rounds_done(self.folder)
        number = max(done, default=-1) + 1
        if not done:
            if start is None:
                raise ConfigError(f"{folder} has no adapter to start from.", hint="give one as `start`.")
            copy_adapter(Path(start), adapter_of(self.folder, 0))
            number = 1
        self.start: Start = read_start(number, adapter_of(self.folder, number - 1))
        for key, text in aggregate_problems(aggregate, self.start.config):
            raise ConfigError(f"{self.start.folder}: {key} {text}")

    @property
    def number(self) -> int:
        """Rounds count from 1."""
        return self.start.number

    def collect(self, updates: Iterable[tuple[str, str | os.PathLike[str]]]) -> Outcome:
        """Judge what has come, as (client, folder), and close the round where enough of it can be used.

        Weights are the numbers of training records, over the accepted updates alone. Too few of them leave the server as it
        was, but for the log.

        Raises:
            AdapterError: too few once more than `max_repeats` times.
            ConfigError: the round is over already.
        """
        target = adapter_of(self.folder, self.number)
        if target.exists():
            raise ConfigError(
                f"round {self.number} is over: {target} is there.", hint="make a new Round for the next."
            )
        decisions, taken = self._judge(updates)
        closed = len(taken) >= self.min_clients
        made = Aggregated({})
        if closed:
            states, weights = [u.tensors for u in taken], [u.records for u in taken]
            made = aggregate(self.aggregate, self.start.tensors, states, weights)
        before = repeats(self.folder, self.number)
        self._write_log(decisions, before + 1, closed, made.lost)
        if closed:
            write_adapter(self.start.folder, made.tensors, target)
            return Outcome(tuple(decisions), target, made.lost)
        if before >= self.max_repeats:
            dropped = "\n  ".join(f"{d.client}: {d.fault}: {d.reason}" for d in decisions if not d.accepted)
            raise AdapterError(
                f"round {self.number} had fewer than {self.min_clients} usable updates {before + 1} times, the last "
                f"time {len(taken)}:\n  {dropped}",
                hint=f"mend the clients, ask more of them or lower min_clients; the adapter of round {self.number - 1} is "
                f"untouched, and {self.folder / LOG_FILE} has every decision.",
            )
        return Outcome(tuple(decisions), None)

    def _judge(
        self, updates: Iterable[tuple[str, str | os.PathLike[str]]]
    ) -> tuple[list[Decision], list[Update]]:
        decisions: list[Decision] = []
        taken: dict[str, Update] = {}
        seen: set[str] = set()
        for name, folder in updates:
            try:
                if name not in self.clients:
                    raise Unusable("unknown", "it is not one of the clients asked in this round.")
                if name in seen:
                    raise Unusable(
                        "duplicate", "it has sent an update for this round already; the first one counts."
                    )
                seen.add(name)
                taken[name] = read_update(name, Path(folder), self.start, self.aggregate)
            except Unusable as error:
                decisions.append(Decision(name, False, fault=error.fault, reason=error.reason))
        for name in dict.fromkeys(self.clients):
            if name not in seen:
                decisions.append(Decision(name, False, fault="missing", reason="nothing has come."))
        ordered = [taken[name] for name in sorted(taken)]  # so that sums do not depend on who came first
        total = sum(update.records for update in ordered)
        accepted = [Decision(u.client, True, u.records, u.records / total) for u in ordered]
        return [*accepted, *decisions], ordered

    def _write_log(self, decisions: Sequence[Decision], attempt: int, closed: bool, lost: float) -> None:
        """Add a line for each decision and one for the round; those of an attempt that was cut short are replaced."""
        here = {"round": self.number, "attempt": attempt}
        kept = [line for line in read_log(self.folder) if {**line, **here} != line]
        outcome = {
            "outcome": "closed" if closed else "repeated",
            "accepted": sum(d.accepted for d in decisions),
        }
        write_log(
            self.folder,
            [*kept, *({**here, **asdict(d)} for d in decisions), {**here, **outcome, "lost": lost}],
        )
