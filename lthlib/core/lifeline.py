"""A worker that does not outlive its run.

A run that is killed (`kill -9`) cannot stop its workers, and workers that go on as orphans would compete with the next
run for the processor and finish what it finishes. So a run holds a lock, each process that it starts looks whether the
lock is still held, and ends when it is not: the system frees a lock with its holder, however that ends. Nothing is lost
by that: whatever was finished is in the store, and whatever was not was never visible.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator

from filelock import FileLock, Timeout

VARIABLE = "LTHLIB_RUN"
"""Names the file that the run holds; unset in a cluster's jobs, which the scheduler owns."""

SECONDS = 0.5


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold the lifeline of whatever is started inside the ``with`` block."""
    with tempfile.NamedTemporaryFile(prefix="lthlib-run-") as file, FileLock(file.name):
        os.environ[VARIABLE] = file.name
        try:
            yield
        finally:
            del os.environ[VARIABLE]


def watch() -> None:
    """End this process, from a background thread, once the run that `VARIABLE` names is gone."""
    if VARIABLE in os.environ:
        threading.Thread(target=_wait_for_end, args=(os.environ[VARIABLE],), daemon=True, name="lifeline").start()


def _wait_for_end(file: str) -> None:
    while os.path.exists(file):
        try:
            FileLock(file).acquire(timeout=0).lock.release()
        except Timeout:
            time.sleep(SECONDS)
        else:
            break
    os._exit(1)
