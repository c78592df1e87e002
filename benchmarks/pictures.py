"""Make the two pictures of README.md: the answer, from recorded results, and a page, from the built book.

    .venv/bin/python benchmarks/pictures.py [--grid cifar10-study] [--html _build/html]

The page is drawn by Chromium, as `.ci/look.py` drives it. Both go to ``book/_assets/readme``, in few colours.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".ci"))
from look import INSPECT, Browser

from lthlib import figures
from lthlib.book import front
from lthlib.book.grid import Grid, study_name
from lthlib.book.plan import recorded_grids
from lthlib.core.errors import choose
from lthlib.core.store import ROOT
from lthlib.results import verdict

FOLDER = ROOT / "book" / "_assets" / "readme"
COLOURS, SHOWN = 64, "#reliability-diagrams"


def answer(grid: Grid) -> Image.Image:
    """Draw how far each method is shown to keep each metric in the first study of a recorded grid."""
    study = grid.studies[0]
    judged = front._evidence(grid, study, front._recorded(grid, study)).judged
    figures.use_style()
    drawn = io.BytesIO()
    figures.reach_map(verdict.reach(judged), verdict.ends(judged)).savefig(drawn, dpi=120, bbox_inches="tight")
    return Image.open(drawn)


def page(grid: Grid, html: Path, folder: Path) -> Image.Image:
    """Draw a screen of the page that compares all methods in calibration: its reliability diagrams."""
    file = html / "_generated" / grid.name / study_name(grid.studies[0]) / "calibration" / "comparison.html"
    with Browser(60) as browser:
        session = browser.open(file.resolve())
        browser.evaluate(session, INSPECT)  # waits for pictures, which move what is below
        browser.evaluate(session, f"(document.querySelector('{SHOWN}').scrollIntoView({{behavior: 'instant'}}), true)")
        browser.shoot(session, folder / "page.png")
    return Image.open(folder / "page.png").convert("RGB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", default="cifar10-study", help="whose recorded results")
    parser.add_argument("--html", type=Path, default=ROOT / "_build" / "html", help="the built book")
    options = parser.parse_args()
    known = {grid.name: grid for grid in recorded_grids(but="")}
    choose(options.grid, known, "recorded grid")
    grid = known[options.grid]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, picture in {"page": page(grid, options.html, FOLDER), "answer": answer(grid)}.items():
        file = FOLDER / f"{name}.png"
        picture.convert("RGB").quantize(COLOURS).save(file, optimize=True)
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")
