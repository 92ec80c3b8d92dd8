"""A writer killed at any moment leaves the last complete folder, and the next writer cleans up."""

import random
import signal
import subprocess
import sys
import time

from molora.disk.atomic import recover, sweep, write_folder
from molora.disk.manifest import verify_folder

WRITER = """
import sys
from pathlib import Path
from molora.disk.atomic import write_folder
version = int(sys.argv[2])
while True:
    version += 1
    with write_folder(Path(sys.argv[1])) as folder:
        for name in ("a", "b", "c"):
            (folder / name).write_bytes(str(version).encode() * 50_000)
    print(version, flush=True)
"""


def test_no_kill_loses_or_damages_the_folder(tmp_path):
    target, chance, last = tmp_path / "folder", random.Random(0), 0
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, target, str(last)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        last = int(child.stdout.readline())  # at least one complete write
        time.sleep(chance.uniform(0.0, 0.05))
        child.send_signal(signal.SIGKILL)
        last = max([last, *map(int, child.stdout.read().split())])
        child.wait()
        verify_folder(recover(target))
        versions = {(target / name).read_bytes() for name in ("a", "b", "c")}
        assert (
            versions <= {str(version).encode() * 50_000 for version in (last, last + 1)}
            and len(versions) == 1
        )
        last += 1
    sweep(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    with write_folder(target) as folder:
        (folder / "x").write_text("still writable")
    verify_folder(target)
