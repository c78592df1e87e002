"""Processor seconds of each page of a grid whose results are there, each in a fork as a run makes it.

    OMP_NUM_THREADS=1 python benchmarks/pages.py [GRID] [--only calibration/comparison] [--profile] [--keep FOLDER]

The pages are made in a temporary folder, or kept in one; the book's own are left alone. `--profile` prints where the
time of each goes, in seconds, by function.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import sys
import tempfile
from pathlib import Path

from lthlib.book import make as book
from lthlib.book.grid import read_grid
from lthlib.book.plan import PagePlan, page_made_from, pages
from lthlib.book.runner import execute
from lthlib.core.forks import in_forks
from lthlib.core.store import ROOT


def make(page: PagePlan, folder: Path, profiled: bool) -> None:
    """Make one page, and leave its seconds beside it."""
    output, profile = folder / f"{page.path}.ipynb", cProfile.Profile()
    begin = resource.getrusage(resource.RUSAGE_SELF)
    if profiled:
        profile.enable()
    execute(ROOT / page.template, output, page.parameters, title=page.title)
    profile.disable()
    end = resource.getrusage(resource.RUSAGE_SELF)
    output.with_suffix(".seconds").write_text(str(end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime))
    if profiled:
        with output.with_suffix(".profile").open("w") as file:
            pstats.Stats(profile, stream=file).sort_stats("cumulative").print_stats(60)
        profile.dump_stats(output.with_suffix(".prof"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="?", default="workflow/grids/quick.yml")
    parser.add_argument("--only", default="", help="part of the names of the pages to make")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    plans = [page for page in pages(read_grid(options.grid)) if options.only in page.path]
    for page in plans:
        page_made_from(page, {})  # as a run does, so that the forks know the versions of the code
    book.prepare()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        in_forks({p.path: lambda p=p: make(p, folder, options.profile) for p in plans}, folder, 1)
        seconds = {}
        for page in plans:
            made = folder / f"{page.path}.seconds"
            if not made.exists():
                sys.exit((folder / f"{page.path}.log").read_text())
            seconds[page] = float(made.read_text())
            print(f"{seconds[page]:6.2f} s  {page.path}")
            if options.profile:
                print(made.with_suffix(".profile").read_text())
    for topic in dict.fromkeys(page.topic for page in plans):
        mine = [s for page, s in seconds.items() if page.topic == topic]
        print(f"{sum(mine) / len(mine):6.2f} s  a page of {topic} ({len(mine)})")
    print(f"{sum(seconds.values()) / len(seconds):6.2f} s  a page")


if __name__ == "__main__":
    main()
