"""What the generated pages are written with: tables, figures, what people wrote, and what is recorded."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from lthlib.results.recorded import recorded_json


def table(lines: Iterable[Mapping[str, str]], rule: str = "---") -> str:
    """Return lines, which map the heads of columns to cells, as a table; ``rule`` sets all columns but the first."""
    lines = [*lines]
    head = list(dict.fromkeys(name for line in lines for name in line))
    cells = [[line.get(name, "–") for name in head] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *[rule] * (len(head) - 1)], *cells])


def plain(text: str) -> str:
    """Return what a person wrote so that Markdown, HTML and Sphinx show it and read nothing into it."""
    return "".join(c if c.isalnum() or c in " .,:;()%+-/'" else f"&#{ord(c)};" for c in text)


def svg(figure: Figure, box: str | None = "tight") -> bytes:
    """Return a figure as SVG and close it; cut to its ``box`` it is drawn twice, which takes twice as long."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", bbox_inches=box)
    plt.close(figure)
    return drawn.getvalue()


def picture(name: str, caption: str) -> str:
    """Return a figure of the width of the page."""
    return f"```{{figure}} /_generated/{name}\n:width: 100%\n{caption}\n```"


def recorded(path: Path, told: Callable[[Mapping], str]) -> str:
    """Return what there is to tell of a recorded file; or which of the benchmarks records it."""
    if path.exists():
        return told(recorded_json(path))
    program = {"power": "verdict"}.get(path.stem, path.stem.replace("-", "_"))
    return f"Nothing is recorded: `.venv/bin/python benchmarks/{program}.py --record` does that."


def origin(made: Mapping) -> str:
    """Say where something recorded comes from, by its provenance."""
    return (
        f"Recorded on {made['time'][:10]} at commit {made['commit']}, with Python {made['python']} and PyTorch "
        f"{made['torch']} on {made['processor']}."
    )
