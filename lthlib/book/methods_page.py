"""What the page on the methods themselves shows: their densities, overlaps, costs, leads and controls."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence

import pandas as pd
from IPython.display import HTML, Markdown

from lthlib.book.pages import Page, html_table, show
from lthlib.core.errors import choose
from lthlib.pruning import METHODS, Method
from lthlib.pruning.masks import sparsity_of
from lthlib.results import overlaps, verdict
from lthlib.results.recorded import LATENCY, recorded_json

LOOKS_AT = {
    "init": "the initial weights",
    "dense": "the trained dense network",
    "previous": "its own trained ticket of the round before",
}
STARTS = {
    "init": "its initial weights",
    "rewind": "the dense run's weights after epoch {rewind_epoch}",
    "reinit": "initial weights of another seed",
}


def method_table(page: Page, about: str | None = None) -> HTML:
    """Show what each method looks at, from where its tickets are trained, and its options; or that of one method."""
    if about is not None:
        return html_table(pd.DataFrame({METHODS[about].title: _facts(page, about)}), words=True)
    lines = {}
    for name in page.study.methods:
        facts = _facts(page, name)
        options = f" Options: {facts['options']}." if facts["options"] != "–" else ""
        text = f"{facts['what it does']} Looks at {facts['looks at']}; trains from {facts['trains from']}.{options}"
        lines[METHODS[name].title] = {"name": name, "what it does": text}
    return html_table(pd.DataFrame(lines).T, words=True)


def _facts(page: Page, name: str) -> dict[str, str]:
    method = METHODS[name]
    options = {**method.options, **page.study.options.get(name, {})}
    return {
        "name": name,
        "what it does": inspect.getdoc(method.find).split("\n\n")[0].replace("\n", " ").replace("`", ""),
        "looks at": _looks_at(method),
        "trains from": STARTS[method.start].format(rewind_epoch=page.study.rewind_epoch),
        "options": ", ".join(f"{key} {value}" for key, value in options.items()) or "–",
    }


def _looks_at(method: Method) -> str:
    if method.source_recipe:
        return f"a dense network of its own, trained with {', '.join(method.source_recipe)}"
    return LOOKS_AT.get(method.source) or f"the ticket of {METHODS[method.source].title}, same round"


def settle(page: Page, about: str | None, shown_round: int | None) -> tuple[str | None, int]:
    """Return the method to look at and the round to draw: those given, else the only method and the middle round.

    Raises:
        UserError: For a method or a round that is not among the page's.
    """
    methods, rounds = page.study.methods, page.study.rounds
    if about is None and len(methods) == 1:
        about = methods[0]
    if about is not None:
        choose(about, methods, "method of this page")
    if shown_round is None:
        return about, rounds[len(rounds) // 2]
    choose(shown_round, rounds, "round of this page")
    return about, shown_round


def densities(page: Page) -> pd.DataFrame:
    """Return the density of each layer, mean over seeds: a line a sparse method and round, a column a layer."""
    tickets = page.results.tickets[page.results.tickets["method"] != "dense"]
    index = pd.MultiIndex.from_frame(tickets[["method", "round"]])
    by_layer = pd.DataFrame(list(tickets["density_by_layer"]), index=index)
    return by_layer.groupby(level=["method", "round"], sort=False).mean()


def empty_layers(page: Page, about: str | None = None) -> Markdown:
    """Name the tickets with a layer in which no weight is left."""
    found = [
        f"- {METHODS[t.method].title} at {100 * t.sparsity:.1f} %, seed {t.seed}: "
        + ", ".join(f"`{layer}`" for layer, density in t.density_by_layer.items() if density == 0)
        for t in page.results.tickets.itertuples()
        if about in (None, t.method) and 0 in t.density_by_layer.values()
    ]
    if not found:
        return Markdown("No ticket shown here has an empty layer.")
    return Markdown("Tickets with empty layers:\n\n" + "\n".join(found))


def mask_overlaps(page: Page, round: int, about: str | None = None) -> pd.DataFrame:
    """Return the overlaps of the page's masks at one round, see `lthlib.results.overlaps.compare`."""
    known = {"recorded": page.recorded, "compute_missing": page.compute_missing}
    return overlaps.compare(page.study, page.store, rounds=[round], about=about, **known)


def costs(page: Page) -> pd.DataFrame:
    """Return accuracy and size of each method at each round, mean over seeds; dense among them."""
    columns = ["accuracy", "n_parameters", "macs", "macs_dense_kernel"]
    tickets = page.results.tickets.assign(accuracy=page.results.tickets["ticket"].map(_accuracy(page)))
    return tickets.groupby(["method", "round"], sort=False)[columns].mean().reset_index()


def _accuracy(page: Page) -> pd.Series:
    rows = page.results.rows
    clean = (rows["metric"] == "test_accuracy") & (rows["shift"] == "none")
    return rows[clean].set_index("ticket")["value"]


def lead_table(page: Page, references: Sequence[str], about: str | None = None) -> HTML | Markdown:
    """Show by how much each method leads some references of the same round in test accuracy.

    Args:
        page: The page.
        references: Names of methods.
        about: Show only the pairs of which this method is one.
    """
    mine = page.study.methods
    pairs = [
        (method, reference)
        for reference in references
        if reference in mine
        for method in mine
        if method not in references and METHODS[method].family != "control" and about in (None, method, reference)
    ]
    return _leads(page, pairs, references)


def control_table(page: Page, about: str | None = None) -> HTML | Markdown:
    """Show by how much each method leads the controls made of its masks in test accuracy."""
    controls = [name for name, method in METHODS.items() if method.family == "control"]
    mine = page.study.methods
    pairs = [(METHODS[c].source, c) for c in controls if {c, METHODS[c].source} <= set(mine)]
    return _leads(page, [pair for pair in pairs if about is None or about in pair], controls)


def _leads(page: Page, pairs: Sequence[tuple[str, str]], wanted: Sequence[str]) -> HTML | Markdown:
    if not pairs:
        names = ", ".join(f"`{name}`" for name in wanted)
        return Markdown(f"Nothing to compare: this takes a method and one of {names} on the same page.")
    cells: dict[str, dict[str, str]] = {}
    for line in leads(page, pairs).itertuples():
        pair = f"{METHODS[line.first].title} − {METHODS[line.second].title}"
        cells.setdefault(f"{100 * sparsity_of(line.round):.1f} %", {})[pair] = _lead(line)
    return html_table(pd.DataFrame(cells))


def leads(page: Page, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Return by how many percentage points of test accuracy the first of each pair leads the second.

    Returns:
        One line for each pair and round: ``mean`` over seeds of the difference taken seed by seed, ``low`` and ``high``
        as `lthlib.results.verdict.spread` draws them.
    """
    tickets = page.results.tickets.set_index(["method", "round", "seed"]).sort_index()
    accuracy = 100 * tickets["ticket"].map(_accuracy(page))
    lines = []
    for (first, second), round in itertools.product(pairs, page.study.rounds):
        gap = accuracy[first, round] - accuracy[second, round]
        error = gap.std() / len(gap) ** 0.5
        lines.append((first, second, round, len(gap), gap.mean(), error, gap.min(), gap.max()))
    columns = ["first", "second", "round", "seeds", "mean", "error", "least", "most"]
    table = pd.DataFrame(lines, columns=columns)
    table["low"], table["high"] = verdict.spread(table)
    return table


def _lead(line) -> str:
    if line.seeds == 1:
        return f"{line.mean:+.2f}"
    mark = " ▲" if line.low > 0 else " ▼" if line.high < 0 else ""
    return f"{line.mean:+.2f} [{line.low:+.2f}, {line.high:+.2f}]{mark}"


def chance_of_signs(page: Page) -> Markdown:
    """Say how often all seeds agree on who leads where nothing differs."""
    n = len(page.study.seeds)
    return Markdown(
        f"Differences are taken seed by seed. With {n} seed{'s' * (n > 1)}, all of them agree on who leads in "
        f"{100 * 0.5 ** (n - 1):.3g} % of the cells even where nothing differs."
    )


def latency() -> None:
    """Display the recorded latencies, each also in units of the dense network's; or say how to measure them."""
    if not LATENCY.exists():
        command = "python benchmarks/latency.py --record"
        show(Markdown(f"No latency has been recorded. `{command}` measures and records it."))
        return
    content = recorded_json(LATENCY)
    made = content["provenance"]
    source = (
        f"{content['title']}. Forward passes in float32, median of {content['repeats']}, on {made['processor']}, "
        f"commit `{made['commit']}`, torch {made['torch']}. In brackets: in units of the dense network's time."
    )
    rows = pd.DataFrame(content["rows"])
    dense = rows[rows["network"] == "dense"].set_index(["batch", "threads"])
    same = dense["milliseconds"].loc[pd.MultiIndex.from_frame(rows[["batch", "threads"]])].to_numpy()
    rows = rows.assign(ratio=rows["milliseconds"] / same, share=rows["macs"] / dense["macs"].iloc[0])
    show(_latency_table(rows), Markdown(source), Markdown(_latency_reading(rows)))


def _latency_reading(rows: pd.DataFrame) -> str:
    """Say what the zeros of a mask save, and what removed channels save, from the recorded times."""
    said = {}
    for name, settings in rows.groupby("network"):
        low, high = 100 * settings["ratio"].min(), 100 * settings["ratio"].max()
        said[name] = f"{100 * settings['share'].iloc[0]:.0f} % of the MACs in {low:.0f} to {high:.0f} % of the time"
    return (
        f"The mask leaves {said['unstructured mask']}: a dense kernel multiplies by zeros as by any other number. "
        "Channels that are gone are not multiplied by. At equal parameters, the network without them does "
        f"{said['channels removed, equal parameters']}; at equal MACs, {said['channels removed, equal MACs']}."
    )


def _latency_table(rows: pd.DataFrame) -> HTML:
    table: dict[str, dict[str, str]] = {"parameters": {}, "MACs of kept weights": {}}
    for row in rows.itertuples():
        table["parameters"][row.network] = f"{row.parameters:,}"
        table["MACs of kept weights"][row.network] = f"{row.macs:,}"
        setting = f"batch {row.batch}, {row.threads} thread{'s' * (row.threads > 1)} [ms]"
        table.setdefault(setting, {})[row.network] = f"{row.milliseconds:.2f} ({row.ratio:.2f})"
    return html_table(pd.DataFrame(table))
