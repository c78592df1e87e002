"""Snakemake, after a look at the grid: stamps that no longer hold are taken back, so that it makes what they stood for.

A grid that is refused ends with status `REFUSED` and one line that says why.
"""

import json
import os
import shutil
import sys

from snakemake.cli import main

from lthlib.book import make, plan
from lthlib.book.grid import read_grid
from lthlib.core import lifeline
from lthlib.core.errors import UserError
from lthlib.core.store import ROOT, Store, say, why, write_atomically

REFUSED = 3
AIMS = plan.BUILD / "aims.json"  # what this run will have made, for workflow/report.py to count


def look(grid_file: str, dry: bool) -> None:
    """Check the grid and what there is of it, and write down what there will be."""
    grid, store = read_grid(grid_file), Store()
    if not dry:
        make.clear_stale(grid, store)
    kept = [str(store.path(key)) for job in plan.jobs(grid) for key in plan.artifacts(grid, job)]
    pages = [str(page.notebook) for page in plan.every_page(grid)]
    logs = {job.name: str(make.job_log(grid, job)) for job in plan.jobs(grid)}
    write_atomically(AIMS, json.dumps({"made": kept + pages, "logs": logs}))


if __name__ == "__main__":
    lifeline.watch()
    grid_file, *arguments = sys.argv[1:]
    if "workflow/profiles/local" not in arguments:
        os.environ.pop(lifeline.VARIABLE, None)  # its jobs run on other machines
    for notes in ("metadata", "incomplete", "locks"):  # stamps say what is done, and the run has a lock of its own
        shutil.rmtree(ROOT / ".snakemake" / notes, ignore_errors=True)
    try:
        look(grid_file, dry=not {"-n", "--dry-run", "--dryrun"}.isdisjoint(arguments))
    except UserError as error:
        say(f"error: {error}")
        sys.exit(REFUSED)
    except OSError as error:
        if why(error) is None:
            raise
        say(f"error: this checkout cannot be used: {why(error)}.")
        sys.exit(REFUSED)
    sys.argv = ["snakemake", *arguments, "--nolock", "--drop-metadata", "--rerun-triggers", "params"]
    sys.argv += ["--config", f"grid={grid_file}"]
    sys.exit(main())
