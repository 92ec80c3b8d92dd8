"""Which process of a distributed run was lost: the others only see that a connection broke."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lightning.pytorch import Trainer

from molora.errors import InterruptedRun, MoLoraError

_BROKEN = ("gloo", "nccl", "connection", "processgroup", "socket")
_PATIENCE = 5.0  # seconds that the launcher may take to notice


@contextmanager
def explained_loss_of_a_process(trainer: Trainer) -> Iterator[None]:
    """What a broken connection raises, as an InterruptedRun that names the processes that ended."""
    try:
        yield
    except MoLoraError:
        raise
    except RuntimeError as error:
        if trainer.world_size == 1 or not any(word in str(error).lower() for word in _BROKEN):
            raise
        raise InterruptedRun(
            f"{_ended(trainer)}, so process {trainer.global_rank} of {trainer.world_size} stopped at step "
            f"{trainer.global_step}. Checkpoints up to there are intact.",
            hint="look at that process's own output (memory that ran out kills without a word); go on with --resume.",
        ) from error


def _ended(trainer: Trainer) -> str:
    """The processes this one started that have ended badly; only the first one of a machine starts any."""
    started = getattr(trainer.strategy.launcher, "procs", [])
    until = time.monotonic() + (_PATIENCE if started else 0)
    while (
        not (codes := {i: p.poll() for i, p in enumerate(started, 1) if p.poll()})
        and time.monotonic() < until
    ):
        time.sleep(0.05)
    if not codes:
        return "the connection to another process broke"
    return " and ".join(
        f"process {trainer.node_rank * (len(started) + 1) + i} ended by {_how(code)}"
        for i, code in codes.items()
    )


def _how(code: int | None) -> str:
    with suppress(ValueError, TypeError):
        return signal.Signals(-code).name  # type: ignore[operator]
    return f"exit code {code}"
