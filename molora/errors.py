"""Every error a user of molora can meet, each with its process exit code."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class MoLoraError(Exception):
    """Base class: a message that says what, where and what is allowed, and a hint that says what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n  hint: {hint}")
        self.message = message
        self.hint = hint


class ConfigError(MoLoraError, ValueError):
    """A recipe, a config object or a command line that is invalid."""

    exit_code = 2


class RoutingError(MoLoraError, ValueError):
    """A forward call whose task ids or experts do not fit the model."""

    exit_code = 2


class DataError(MoLoraError, ValueError):
    """A record, file or data set that is not what its task declares."""

    exit_code = 3


class AdapterError(MoLoraError, RuntimeError):
    """An adapter or checkpoint folder that is damaged, incomplete or made for another base."""

    exit_code = 4


class DivergedError(MoLoraError, RuntimeError):
    """Training produced a loss that is not finite; the last good checkpoint is untouched.

    `batch` is the epoch and the number of the batch it happened at, where that is known.
    """

    exit_code = 5
    batch: tuple[int, int] | None = None


class ThresholdError(MoLoraError):
    """An evaluation finished but missed a threshold the user asked for."""

    exit_code = 6


class InterruptedRun(MoLoraError):
    """Training was stopped by a signal after saving; the run can be resumed."""

    exit_code = 130


class OutOfMemory(MoLoraError, MemoryError):
    """The host or the device has no memory for what the settings ask; checkpoints are untouched."""

    exit_code = 2


@contextmanager
def explained() -> Iterator[None]:
    """A full disk, a folder that may not be written, or memory that ran out, as errors that say what to do.

    Raises:
        AdapterError: the disk is full. ConfigError: a file may not be read or written. OutOfMemory.
    """
    try:
        yield
    except MoLoraError:
        raise
    except Exception as error:
        if (found := explain(error)) is None:
            raise
        raise found from error


def explain(error: Exception) -> MoLoraError | None:
    """What of the machine an exception complains of, as an error that says what to do; None for anything else."""
    if isinstance(error, MemoryError) or _of_memory(error):
        return OutOfMemory(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'the system gave no more'}.",
            hint="lower train.batch_size (and raise train.accumulate), data.max_length, eval.batch_size, adapter.r or "
            "adapter.num_experts, or set train.gradient_checkpointing: true. Checkpoints written so far are intact: "
            "--resume goes on from the last one, with the settings it was started with.",
        )
    if not isinstance(error, OSError):
        return None
    name = f" {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
    if error.errno in NO_SPACE:
        return AdapterError(
            f"no room to write{name}: {error.strerror}. What was complete before is unchanged.",
            hint="free some space, raise the quota, or write elsewhere.",
        )
    if error.errno in NOT_ALLOWED:
        return ConfigError(
            f"no access to{name or ' a file'}: {error.strerror}.",
            hint="choose another folder, or change its permissions.",
        )
    return None


def _of_memory(error: Exception) -> bool:
    # torch's, by name: this file imports nothing heavy. On a CPU it is a plain RuntimeError.
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
