"""Commands that judge: run with a time limit, none of them, nor what it started, outlives its run."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from subprocess import DEVNULL, Popen, TimeoutExpired
from tempfile import TemporaryFile
from threading import Lock
from typing import IO


class Commands:
    """Runs commands, from several threads at once if they like, until it is stopped."""

    def __init__(self) -> None:
        self._lock, self._stopped = Lock(), False
        self._running: set[Popen[bytes]] = set()

    def run(self, command: Sequence[str], told: bytes, timeout: float, stderr: int | IO[bytes]) -> int | None:
        """What a command ends with that reads `told` from its standard input; None where it takes longer than `timeout` seconds.

        Its input is a file, and nothing it writes goes through a pipe: a child it leaves behind could hold one open.
        Raises OSError or ValueError where it cannot be started, CancelledError after `stop`.
        """
        with TemporaryFile() as given:
            given.write(told)
            given.seek(0)
            with self._lock:
                if self._stopped:
                    raise CancelledError
                process = Popen(
                    [*command], stdin=given, stdout=DEVNULL, stderr=stderr, start_new_session=True
                )
                self._running.add(process)
            try:
                return process.wait(timeout)
            except TimeoutExpired:
                return None
            finally:
                _end(process)
                with self._lock:
                    self._running.discard(process)

    def stop(self) -> None:
        """End those that run, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _end(process)

    def all(self, jobs: Sequence[tuple[Sequence[str], bytes]], timeout: float) -> list[int | None]:
        """`run` for each (command, told), one for each processor at once; when interrupted, those that run end at once."""
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            return [*pool.map(lambda job: self.run(job[0], job[1], timeout, DEVNULL), jobs)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self.stop()
            raise
        finally:
            pool.shutdown()


def _end(process: Popen[bytes]) -> None:
    """The process and all it started, which share its group."""
    with suppress(
        ProcessLookupError, PermissionError
    ):  # PermissionError: macOS, where none of the group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
