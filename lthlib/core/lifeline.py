"""A worker that does not outlive its run.

A run that is killed (`kill -9`) cannot stop its workers, and workers that go on as orphans would compete with the next
run for the processor and finish what it finishes. So a run holds a lock, each process that it starts waits for the lock
in the background, and ends when it gets it: the system frees a lock with its holder, however that ends. Nothing is lost
by that: whatever was finished is in the store, and whatever was not was never visible.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator

VARIABLE = "LTHLIB_RUN"
"""Names the file that the run holds; unset in a cluster's jobs, which the scheduler owns."""


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold the lifeline of whatever is started inside the ``with`` block."""
    with tempfile.NamedTemporaryFile(prefix="lthlib-run-") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.environ[VARIABLE] = file.name
        try:
            yield
        finally:
            del os.environ[VARIABLE]


def watch() -> None:
    """End this process, from a background thread, once the run that `VARIABLE` names is gone."""
    if VARIABLE in os.environ:
        threading.Thread(target=_end_with, args=(os.environ[VARIABLE],), daemon=True, name="lifeline").start()


def _end_with(file: str) -> None:
    with contextlib.suppress(FileNotFoundError), open(file) as shared:
        fcntl.flock(shared, fcntl.LOCK_SH)
    os._exit(1)
