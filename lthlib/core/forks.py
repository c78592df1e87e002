"""Tasks in forks of this process, some at a time: what is imported and loaded here is there at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from lthlib.core import lifeline
from lthlib.core.errors import UserError

Task = Callable[[], None]


def in_forks(tasks: Iterable[tuple[Path, Task]], workers: int) -> None:
    """Run each task in a fork of its own, at most ``workers`` at a time; what one says goes into its log.

    Tasks are pairs of a log and what to do. One has failed where its log is there at the end: that of a task that
    succeeded is removed.
    """
    running: dict[BaseProcess, Path] = {}
    for log, task in tasks:
        if len(running) >= workers:
            _reap(running)
        log.parent.mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_run, args=(log, task))
        process.start()
        running[process] = log
    while running:
        _reap(running)


def _reap(running: dict[BaseProcess, Path]) -> None:
    wait([process.sentinel for process in running])
    for process in [process for process in running if process.exitcode is not None]:
        log = running.pop(process)
        if process.exitcode == 0:
            log.unlink()
        elif process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            reason = " (someone killed it, or memory ran out)" if name == "SIGKILL" else ""
            with log.open("a") as file:
                file.write(f"its process died of {name}{reason}\n")


def _run(log: Path, task: Task) -> None:
    lifeline.watch()
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    try:
        task()
    except UserError as error:
        print(f"error: {error}")
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # taking torch down module by module costs half a second
