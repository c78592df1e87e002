"""Snakemake, after a look at the grid, tied to the run that started it (`lthlib.book.lifeline`).

A grid that is refused ends with status `REFUSED` and one line that says why. What `lthlib.book.verify` finds wanting,
Snakemake is told to make: by itself it would miss a part of it.
"""

import json
import os
import sys
from pathlib import Path

from progress import DRY, PLAN
from snakemake.cli import main

from lthlib.book import front as report
from lthlib.book import lifeline, verify
from lthlib.book.grid import read_grid
from lthlib.core.errors import UserError
from lthlib.core.store import Store, say, why, write_atomically

REFUSED = 3

if __name__ == "__main__":
    lifeline.watch()
    grid, *arguments = sys.argv[1:]
    if "workflow/profiles/local" not in arguments:
        os.environ.pop(lifeline.VARIABLE)  # its jobs run elsewhere, where no process has that number
    try:
        found = read_grid(grid)
        stale = verify.stale(found, Store(), look=not DRY.isdisjoint(arguments))
        write_atomically(Path(PLAN) / f"{found.name}.json", json.dumps(report.plan(found)))
    except UserError as error:
        say(f"error: {error}")
        sys.exit(REFUSED)
    except OSError as error:
        if why(error) is None:
            raise
        say(f"error: this checkout cannot be used: {why(error)}.")
        sys.exit(REFUSED)
    forced = ["--forcerun", *stale] if stale else []
    sys.argv = ["snakemake", *arguments, *forced, "--config", f"grid={grid}"]
    sys.exit(main())
