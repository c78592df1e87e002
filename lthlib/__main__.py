"""The steps of a grid, one command each; the workflow calls them, and so may you.

python -m lthlib tickets GRID STUDY METHOD SEED --done FILE   train and measure one method, one seed, all rounds
python -m lthlib book GRID --workers N                        make its pages, tables and front, and build the book
python -m lthlib record GRID                                  put its results into book/results
python -m lthlib estimate GRID                                say what training it costs, before it is run
python -m lthlib check DENSE PRUNED ... --data IMAGES          compare networks of your own with their dense parent
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from lthlib.core import gpus, lifeline
from lthlib.core.errors import UserError

MODULES = {"check": "lthlib.own", "estimate": "lthlib.book.cost"}  # the others' steps are in lthlib.book.make


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status, 1 after an error that the person can mend."""
    parser = argparse.ArgumentParser(prog="python -m lthlib", description="The steps of a grid, one command each.")
    commands = parser.add_subparsers(dest="command", required=True)
    tickets = commands.add_parser("tickets", help="train and measure one method and seed at every round")
    for name in ("grid", "study", "method"):
        tickets.add_argument(name)
    tickets.add_argument("seed", type=int)
    tickets.add_argument("--done", type=Path, help="file to write when all is done")
    book = commands.add_parser("book", help="make a grid's pages, tables and front, and build the book")
    book.add_argument("grid")
    book.add_argument("--workers", type=int, default=1, help="how many pages are made at once")
    record = commands.add_parser("record", help="put a grid's results into book/results")
    record.add_argument("grid")
    record.add_argument("--so-far", action="store_true", help="compute nothing: record what is measured by now")
    cost = commands.add_parser("estimate", help="say what training a grid costs, before it is run")
    cost.add_argument("grid")
    cost.add_argument(
        "--throughput", type=float, help="multiply-accumulates a second (default: measured here, on one core or GPU)"
    )
    cost.add_argument("--record", action="store_true", help="put what is measured into book/results")
    check = commands.add_parser("check", help="compare pruned networks of your own with their dense parent")
    check.add_argument("dense", type=Path, help="its weights, or a TorchScript, torch.export or ONNX file")
    check.add_argument("pruned", type=Path, nargs="+")
    check.add_argument("--data", help="images: a folder or zip in $LTHLIB_DATA, perhaps with @size, or a built-in set")
    check.add_argument("--network", help="what makes them: a name of this book, torchvision or timm, module:function")
    check.add_argument("--normalise", help="pixels first: images, imagenet, none or MEAN,.../STD,...")
    check.add_argument("--prunable", help="weights that count: conv, linear, all (default: those that were pruned)")
    check.add_argument("--config", type=Path, help="YAML file with dimensions, thresholds, precision, train_size")
    check.add_argument("--report", type=Path, help="HTML file to write, which shows and explains everything")
    check.add_argument("--json", type=Path, help="file to write the verdict to, for machines")
    check.add_argument("--rows", type=Path, help="where to write the tidy table of all numbers")
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    lifeline.watch()
    try:
        if command == "tickets":
            gpus.claim()
        module = importlib.import_module(MODULES.get(command, "lthlib.book.make"))  # --help need not wait for torch
        return getattr(module, command)(**options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
