"""A worker that does not outlive its run.

A run that is killed (`kill -9`) cannot stop its workers, and workers that go on as orphans would compete with the next
run for the processor and finish what it finishes. So each process that a run starts watches it, and ends when it ends.
Nothing is lost by that: whatever was finished is in the store, and whatever was not was never visible.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

VARIABLE = "LTHLIB_RUN"
"""Names the process that started the run; unset in a cluster's jobs, which the scheduler owns."""

SECONDS = 0.5


def watch() -> None:
    """End this process, from a background thread, once the process named by `VARIABLE` is gone."""
    run = os.environ.get(VARIABLE)
    if run is not None:
        threading.Thread(target=_wait_for_end, args=(int(run),), daemon=True, name="lifeline").start()


def _wait_for_end(run: int) -> None:
    while is_alive(run):
        time.sleep(SECONDS)
    os._exit(1)


def is_alive(process: int) -> bool:
    """Say whether a process runs; one that has ended but whose parent has not asked for its status does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (OSError, IndexError):  # no /proc (macOS), or gone this moment
        return not Path("/proc/self").exists()
