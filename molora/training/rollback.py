"""with_rollback: training that goes back to its last checkpoint and leaves out the batch that made it diverge."""

from __future__ import annotations

import logging
from collections.abc import Callable

from lightning.pytorch import Trainer

from molora.data.module import MoLoraDataModule
from molora.errors import DivergedError

log = logging.getLogger(__name__)

MOST = 3  # batches left out; a run that needs more has another fault than a bad record


def with_rollback(attempt: Callable[[], Trainer], data: MoLoraDataModule) -> Trainer:
    """Train until it succeeds, leaving out one more batch each time.

    Args:
        attempt: trains from the last checkpoint, which exists from the start on.
        data: its `left_out` reaches the loader of every attempt, and every checkpoint.

    Raises:
        DivergedError: the weights themselves are at fault, or `MOST` batches were left out before.
    """
    for _ in range(MOST):
        try:
            return attempt()
        except DivergedError as error:
            if error.batch is None or error.batch in data.left_out:
                raise
            data.left_out.add(error.batch)
            epoch, number = error.batch
            log.warning(
                "%s Going back to the last checkpoint, without batch %d of epoch %d (%s).",
                error.message, number, epoch, ", ".join(data.records_of(epoch, number)),
            )  # fmt: skip
    return attempt()
