"""Tasks in forks of this process, some at a time: what is imported and loaded here is there at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from lthlib.core import lifeline
from lthlib.core.errors import UserError

Task = Callable[[], None]


def in_forks(tasks: Mapping[str, Task], logs: Path, workers: int) -> dict[str, str]:
    """Run each task in a fork of its own, at most ``workers`` at a time.

    What a task says goes into a log of its name in the folder ``logs``, which goes where the task succeeds.

    Returns:
        Name -> the last line of its log, of the tasks that failed.
    """
    files = {name: logs / f"{name}.log" for name in tasks}
    running: dict[BaseProcess, Path] = {}
    for name, task in tasks.items():
        if len(running) >= workers:
            _reap(running)
        files[name].parent.mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_run, args=(files[name], task))
        process.start()
        running[process] = files[name]
    while running:
        _reap(running)
    return {name: last_line(log) for name, log in files.items() if log.exists()}


def _reap(running: dict[BaseProcess, Path]) -> None:
    ended = wait([process.sentinel for process in running])
    for process in [process for process in running if process.sentinel in ended]:
        process.join()  # what it held open is closed a moment before it is gone
        log = running.pop(process)
        if process.exitcode == 0:
            log.unlink()
            continue
        log.touch()  # what has one has failed
        if process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            reason = " (someone killed it, or memory ran out)" if name == "SIGKILL" else ""
            with log.open("a") as file:
                file.write(f"its process died of {name}{reason}\n")


def last_line(log: Path) -> str:
    """Return the last line that a log shows, of a progress bar what it showed at the end."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line.rsplit("\r", 1)[-1].strip() for line in lines]
    return next((line for line in reversed(said) if line), "it was not begun")


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
