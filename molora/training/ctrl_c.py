"""Ctrl-C while Lightning fits stays Ctrl-C: Lightning makes it an exit with code 1, and is deaf to the next one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stays_ctrl_c() -> Iterator[None]:
    """Raise the KeyboardInterrupt that Lightning has turned into a SystemExit, and hear SIGINT again.

    It comes where training has not set its own handlers yet, or no longer (callbacks.Interrupt).
    """
    main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    heard = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        if main and heard is not None:
            signal.signal(signal.SIGINT, heard)
        raise KeyboardInterrupt from end
