"""Every error a user of molora can meet, each with its process exit code."""

from __future__ import annotations


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
    """Training produced a loss that is not finite; the last good checkpoint is untouched."""

    exit_code = 5


class ThresholdError(MoLoraError):
    """An evaluation finished but missed a threshold the user asked for."""

    exit_code = 6


class InterruptedRun(MoLoraError):
    """Training was stopped by a signal after saving; the run can be resumed."""

    exit_code = 130
