"""The explorer: what every study found, for a script in the reader's browser to draw (`book/_assets/explorer.js`)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata

import pandas as pd
from matplotlib.colors import to_hex

from lthlib import data, figures
from lthlib.book.plan import GENERATED
from lthlib.core.errors import UserError
from lthlib.data.corruptions import CORRUPTIONS
from lthlib.pruning import METHODS, masks
from lthlib.results.claims_parts import Evidence
from lthlib.results.evaluate import DIMENSIONS

FOLDER = "explorer"  # below book/_generated; Sphinx copies what is in it (html_static_path of _config.yml)
OUTCOMES = list(figures.MARKS)[:4]
NO_CONTEST, NOTHING = "-", " "  # in the place of an outcome's number: no direction; not measured
CASE = ["dimension", "metric", "shift", "severity"]


def files(studies: Mapping[str, Evidence]) -> dict[str, str]:
    """Return the scripts that the page loads, by name below ``book/_generated``: numbers, and what draws them.

    Args:
        studies: By the name that a link keeps.
    """
    numbers = json.dumps(explored(studies), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return {f"{FOLDER}/explorer-data.js": f"window.explorerData = {numbers};", f"{FOLDER}/vega.js": _vega()}


def explored(studies: Mapping[str, Evidence]) -> dict[str, object]:
    """Return all judged lines of some studies as plain values, numbers with five digits.

    A study has its ``rounds``, their sparsity in percent on the ``ladder``, each method's own sparsity (``methods``),
    and ``cases``, one for each dimension, metric, shift and severity. A case has the dense parents' mean, low and high,
    and by method means, lows, highs, and a string of outcomes, each with an entry a round. An outcome is a place in
    ``outcomes``, `NO_CONTEST` or `NOTHING`. Studies without a dense network, or with nothing else, are left out.
    """
    told = {name: e for name, e in studies.items() if not e.judged.empty}
    lines = pd.concat([e.judged for e in told.values()]) if told else pd.DataFrame(columns=["method", *CASE])
    colours = figures.colours()
    return {
        "outcomes": [{"name": name, "mark": figures.MARKS[name]} for name in OUTCOMES],
        "dimensions": {name: DIMENSIONS[name].title for name in lines["dimension"].unique()},
        "methods": {m: {"title": METHODS[m].title, "colour": to_hex(colours[m])} for m in lines["method"].unique()},
        "metrics": {m: {"label": figures.label(m), "factor": figures.factor(m)} for m in lines["metric"].unique()},
        "shifts": {
            _case(*which): _titled(*which)
            for which in lines[["shift", "severity"]].drop_duplicates().itertuples(index=False)
        },
        "studies": {name: {"title": e.label, **_study(e.judged)} for name, e in told.items()},
    }


def _study(judged: pd.DataFrame) -> dict[str, object]:
    """Return one study: its rounds, the sparsity of each method at each of them, and its cases."""
    codes = {name: str(i) for i, name in enumerate(OUTCOMES)} | {"": NO_CONTEST}
    lines = judged.assign(code=judged["outcome"].map(codes)).set_index([*CASE, "method", "round"])
    numbers = [lines[name].unstack("round").to_numpy() for name in ("mean", "low", "high")]
    told = lines["code"].unstack("round").fillna(NOTHING)
    place = {key: i for i, key in enumerate(told.index)}
    methods = list(dict.fromkeys(judged["method"]))
    sparsity = judged.groupby(["method", "round"])["sparsity"].mean().unstack("round").loc[methods]
    cases = []
    for key, first in judged.drop_duplicates(CASE).set_index(CASE).iterrows():
        mine = {m: place[*key, m] for m in methods if (*key, m) in place}
        cases.append(
            {
                "dimension": key[0],
                "metric": key[1],
                "shift": _case(*key[2:]),
                "images": int(first["n"]),
                "seeds": int(first["seeds"]),
                "dense": _rounded(first[["dense", "dense_low", "dense_high"]]),
                "methods": {m: [*(_rounded(n[i]) for n in numbers), "".join(told.iloc[i])] for m, i in mine.items()},
            }
        )
    return {
        "rounds": list(sparsity),
        "ladder": [f"{100 * masks.sparsity_of(n):.3g}" for n in sparsity],
        "methods": {m: _rounded(s) for m, s in sparsity.iterrows()},
        "cases": cases,
    }


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Return numbers with five digits, as short as can be; None for what is not finite."""
    short = [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]
    return [int(v) if v is not None and v.is_integer() else v for v in short]


def _case(shift: str, severity: float) -> str:
    return f"{shift} {severity:g}" if severity else shift


def _titled(shift: str, severity: float) -> str:
    """Return a shift and its severity as readers know them."""
    known = [registry[shift].title for registry in (CORRUPTIONS, data.DATASETS) if shift in registry]
    return _case(known[0] if known else shift, severity)


def _vega() -> str:
    """Return Vega-Lite's script, bundled anew only where its package is another one than last time.

    The bundle is made in a process of its own, since this one forks later, which the bundler's threads do not survive.
    """
    there = GENERATED / FOLDER / "vega.js"
    head = f"// Vega-Lite with Vega (BSD-3-Clause), by vl-convert-python {metadata.version('vl-convert-python')}\n"
    if there.exists() and (found := there.read_text()).startswith(head):
        return found
    code = "import vl_convert; print(vl_convert.javascript_bundle())"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if made.returncode:
        raise UserError(f"The script that the explorer draws with could not be bundled: {made.stderr.strip()[-300:]}")
    return f"{head}(() => {{\n{made.stdout}\n}})();"
