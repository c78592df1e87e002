"""Snakemake, after a look at the grid, tied to the run that started it (`lthlib.lifeline`).

A grid that is refused ends with status `REFUSED` and one line that says why.
"""

import os
import sys

from snakemake.cli import main

from lthlib import lifeline, report
from lthlib.errors import UserError
from lthlib.grid import read_grid
from lthlib.store import Store, say

REFUSED = 3

if __name__ == "__main__":
    lifeline.watch()
    grid, *arguments = sys.argv[1:]
    if "workflow/profiles/local" not in arguments:
        os.environ.pop(lifeline.VARIABLE)  # its jobs run elsewhere, where no process has that number
    try:
        report.verify(read_grid(grid), Store())
    except UserError as error:
        say(f"error: {error}")
        sys.exit(REFUSED)
    sys.argv = ["snakemake", *arguments, "--config", f"grid={grid}"]
    sys.exit(main())
