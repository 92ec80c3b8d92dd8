"""A lock between processes and threads: the kernel drops it with whoever holds it, so a killed holder never blocks."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molora.errors import AdapterError

_PAUSE = 0.02


@contextmanager
def exclusive(file: Path, wait: float = 30.0) -> Iterator[None]:
    """Hold the lock file alone, waiting for others for so many seconds; AdapterError where they do not end by then."""
    with file.open("a+b") as stream:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise AdapterError(
                        f"{file.parent} has been in use by another process for {wait:g} s.",
                        hint="wait for it and try again.",
                    ) from None
                time.sleep(_PAUSE)
        yield
