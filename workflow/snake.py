"""Snakemake, tied to the run that started it (`lthlib.lifeline`)."""

import sys

from snakemake.cli import main

from lthlib import lifeline

if __name__ == "__main__":
    lifeline.watch()
    sys.exit(main())
