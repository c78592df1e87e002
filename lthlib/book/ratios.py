"""What the chapter on costs shows: ratios to other people's code, growth and limits, as `benchmarks/ratios.py` records.

The record has an entry for each kind of processor; all stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from lthlib.book.reproducibility import markdown_table
from lthlib.results.recorded import RATIOS, recorded_json

NONE = "Nothing is recorded: `make benchmarks` does that."


def machines() -> list[Mapping]:
    """Return the entries of the record, a kind of processor each."""
    return recorded_json(RATIOS)["machines"] if RATIOS.exists() else []


def ratios_table(found: Sequence[Mapping]) -> str:
    """Return how many times as fast as each peer this library is, a column a processor, as a table in Markdown."""
    if not found:
        return NONE
    columns = []
    for machine in found:
        lines = [line for line in machine["lines"] if "peer" in line]
        cells = {(x["what"], x["peer"]): f"**{x['theirs'] / x['ours']:.2g}** ({x['theirs']:.2g} s)" for x in lines}
        columns.append(pd.Series(cells, name=_name(machine)))
    table = pd.concat(columns, axis=1, sort=False).fillna("–")
    lines = [[what, peer, *cells] for (what, peer), cells in zip(table.index, table.to_numpy(), strict=True)]
    made = [f"{_name(machine)}: {_made(machine)}" for machine in found]
    return markdown_table(["what", "beside", *table.columns], lines) + "\n\n" + "\n\n".join(made)


def growth_table(found: Sequence[Mapping]) -> str:
    """Return how seconds grow with a number of things, as a table in Markdown."""
    lines = []
    for machine, line in ((m, line) for m in found for line in m["lines"] if "by" in line):
        (few, fast), *_, (many, slow) = ((int(n), s) for n, s in line["seconds"].items())
        steps = ", ".join(f"{int(n):,}: {s:.2g} s" for n, s in line["seconds"].items())
        growth = f"{slow / fast:.2g} times for {many / few:.2g} times as many"
        lines.append([line["what"], line["by"], steps, growth, _name(machine)])
    return markdown_table(["what", "number of", "seconds", "growth", "processor"], lines) if lines else NONE


def limits(found: Sequence[Mapping]) -> pd.DataFrame:
    """Return images a second of a training, and the most that multiplying and memory allow, a line a processor."""
    lines = [{**line["limit"], "processor": _name(m)} for m in found for line in m["lines"] if "limit" in line]
    return pd.DataFrame(lines, columns=["processor", "images", "multiply", "memory"]).set_index("processor")


def _name(machine: Mapping) -> str:
    return f"{machine['processor']}, {machine['instructions']}"


def _made(machine: Mapping) -> str:
    of = machine["provenance"]
    return (
        f"{of['time'][:10]}, commit {of['commit']}, Python {of['python']}, PyTorch {of['torch']}, default precision "
        f"{of['precision']}."
    )
