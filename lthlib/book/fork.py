"""Run a module as ``python -m`` would, in a fork of the zygote where there is one: torch is there at once.

python -m lthlib.book.fork MODULE|FILE.py [ARGUMENT ...]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from lthlib.book import zygote
from lthlib.core.store import say


def run(main: str, arguments: Sequence[str]) -> NoReturn:
    """Run a module or file to its end, and end with its exit status, 128 + n if signal n ended it.

    Without a zygote (a cluster's node, macOS) this process becomes the plain one.
    """
    address = os.environ.get(zygote.VARIABLE)
    if address:
        try:
            process = zygote.fork(address, main, arguments, dict(os.environ), os.getcwd())
        except (OSError, ValueError) as problem:
            say(f"No fork from {zygote.VARIABLE}={address} ({problem}); starting a plain process.")
        else:
            os._exit(_wait(process))  # nothing here to take down
    how = [main] if main.endswith(".py") else ["-m", main]
    os.execv(sys.executable, [sys.executable, *how, *arguments])


def _wait(process: zygote.ForkedProcess) -> int:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: process.send_signal(number))
    status = process.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    run(sys.argv[1], sys.argv[2:])
