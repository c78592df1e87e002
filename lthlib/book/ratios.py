"""What the chapter on costs shows: ratios to other people's code, growth and limits, as `benchmarks/ratios.py` records.

The record has an entry for each kind of processor; all stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from lthlib.book.markdown import origin, recorded, table
from lthlib.results.recorded import RATIOS

NOT_YET = "Nothing of this is recorded yet: `make benchmarks` does that."


def chapter_tables() -> dict[str, str]:
    """Return the tables that the chapter includes, by file name."""
    return {
        "ratios.md": recorded(RATIOS, lambda found: ratios_table(found["machines"])),
        "growth.md": recorded(RATIOS, lambda found: growth_table(found["machines"])),
    }


def ratios_table(machines: Sequence[Mapping]) -> str:
    """Return how many times as fast as each peer this library is, a column a processor, as a table in Markdown."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for machine in machines:
        for of in _lines(machine, "peer"):
            line = lines.setdefault((of["what"], of["peer"]), {"what": of["what"], "beside": of["peer"]})
            ratio = of["theirs"] / of["ours"]
            line[_name(machine)] = f"**{ratio:{',.0f' if ratio >= 100 else '.2g'}}** ({of['theirs']:.2g} s)"
    made = {f"{_name(m)}: {origin(told['provenance'])}": None for m in machines for told in m["programs"].values()}
    return "\n\n".join([table(lines.values()), *made]) if lines else NOT_YET


def growth_table(machines: Sequence[Mapping]) -> str:
    """Return how seconds grow with a number of things, as a table in Markdown."""
    lines = []
    for machine, line in ((m, line) for m in machines for line in _lines(m, "by")):
        (few, fast), *_, (many, slow) = ((int(n), s) for n, s in line["seconds"].items())
        steps = ", ".join(f"{int(n):,}: {s:.2g} s" for n, s in line["seconds"].items())
        growth = f"{slow / fast:.2g} times for {many / few:.2g} times as many"
        told = {"what": line["what"], "number of": line["by"], "seconds": steps, "growth": growth}
        lines.append({**told, "processor": _name(machine)})
    return table(lines) if lines else NOT_YET


def limits(machines: Sequence[Mapping]) -> pd.DataFrame:
    """Return images a second of a training, and the most that multiplying and memory allow, a line a processor."""
    lines = [{**line["limit"], "processor": _name(m)} for m in machines for line in _lines(m, "limit")]
    return pd.DataFrame(lines, columns=["processor", "images", "beside", "multiply", "memory"]).set_index("processor")


def _lines(machine: Mapping, holding: str) -> Iterator[Mapping]:
    """Return what the programs told that holds a key: "peer" for a ratio, "by" for growth, "limit"."""
    return (line for told in machine["programs"].values() for line in told["lines"] if holding in line)


def _name(machine: Mapping) -> str:
    return f"{machine['processor']}, {machine['instructions']}"
