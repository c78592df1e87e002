"""Seconds per page: a plain kernel against one forked by the zygote, same notebook, alternating.

python benchmarks/pages.py [REPETITIONS]
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lthlib.book.runner import execute
from lthlib.book.zygote import ROOT, VARIABLE, zygote

CELLS = (
    "import pandas, seaborn, torch, torchvision",
    "import matplotlib.pyplot as plt",
    "print(torch.ones(3) @ torch.ones(3))\nplt.plot([1, 2]);",
)


def template(folder: Path) -> Path:
    head = new_code_cell("x = 1", metadata={"tags": ["parameters"]})
    path = folder / "template.ipynb"
    nbformat.write(new_notebook(cells=[head, *map(new_code_cell, CELLS)]), path)
    return path


def in_process(path: Path) -> None:
    execute(path, path.with_name("page.ipynb"))


def command_line(path: Path) -> None:
    command = [sys.executable, "-m", "lthlib.book.runner", str(path), str(path.with_name("page.ipynb"))]
    subprocess.run(command, check=True, cwd=ROOT)


def seconds(run, path: Path, address: str | None) -> float:
    os.environ.pop(VARIABLE, None)
    if address:
        os.environ[VARIABLE] = address
    start = time.perf_counter()
    run(path)
    return time.perf_counter() - start


def main(repetitions: int) -> None:
    with tempfile.TemporaryDirectory() as folder, zygote() as address:
        path = template(Path(folder))
        print(f"first forked page, with the zygote's own imports: {seconds(in_process, path, address):.2f} s")
        for run in (in_process, command_line):
            times = {None: [], address: []}
            for _ in range(repetitions):
                for kernel, taken in times.items():
                    taken.append(seconds(run, path, kernel))
            plain, forked = (statistics.median(taken) for taken in times.values())
            name = run.__name__.replace("_", " ")
            print(f"{name:12}  plain {plain:5.2f} s  forked {forked:5.2f} s  ratio {plain / forked:4.1f}")
        os.environ[VARIABLE] = address


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
