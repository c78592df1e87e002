"""The report on networks of your own: what its notebook's cells show, and how they become one file."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import Markdown
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from lthlib import figures
from lthlib.book.claims import plain
from lthlib.book.pages import html_table, show
from lthlib.book.runner import execute
from lthlib.core.store import ROOT, write_atomically
from lthlib.figures.calibration import reliability
from lthlib.figures.classes import exemplar_gallery, recall_map
from lthlib.figures.corruption import corruption_map
from lthlib.figures.flatness import method_table
from lthlib.figures.interpretability import explanations
from lthlib.own.compare import DENSE, Comparison
from lthlib.own.words import conclusion
from lthlib.results import verdict
from lthlib.results.classes import recall_changes

TEMPLATE = ROOT / "notebooks" / "own.ipynb"
LOOK = Path(__file__).with_name("report.css")
WORDS = {**{outcome: outcome for outcome in verdict.WORSE.categories}, verdict.COLLAPSED: "lost: it has collapsed"}


# --- the cells ---------------------------------------------------------------------------------------------------


def load(folder: str) -> Comparison:
    """Return the comparison that the notebook is about, and set the look of its figures."""
    if get_ipython() is not None:
        get_ipython().run_line_magic("matplotlib", "inline")
    figures.use_style()
    return Comparison.read(folder)


def by_title(found: Comparison) -> dict[str, Mapping[str, np.ndarray]]:
    """Return the arrays of the networks by their names, dense first."""
    return {name: found.arrays[ticket] for name, ticket in found.networks.items()}


def verdicts(found: Comparison) -> Markdown:
    """Say of each pruned network whether it keeps what the dense one has, and what would decide what is open."""
    lines = []
    for name in found.pruned:
        outcome, sentence, sparsity, votes = conclusion(found, name)
        share = "" if np.isnan(sparsity) else f", {100 * sparsity:.1f} % pruned"
        lines.append(f"**{plain(name)}{share}: {WORDS[outcome]}.** {plain(sentence)}")
        lines += [f"- {line.title} would be decided by {line.decides}." for line in votes.itertuples() if line.decides]
        lines.append("")
    if left := found.facts["not_measured"]:
        lines.append(f"Not measured: {', '.join(left)}. The end of this page says why.")
    return Markdown("\n\n".join(lines).replace("\n\n- ", "\n- "))


def votes(found: Comparison) -> None:
    """Show each metric with a vote: both numbers, how much worse the pruned one is, what is tolerated, the outcome."""
    for name in found.pruned:
        lines = conclusion(found, name).votes
        scaled = lines[["dense", "mean", "shortfall", "least", "most", "allowed"]]
        scaled = scaled.mul(lines["metric"].map(figures.factor), axis=0).map("{:.4g}".format)
        table = pd.DataFrame(
            {
                "metric": [
                    figures.label(metric) + f", {shift}" * (shift != "none")
                    for metric, shift in zip(lines["metric"], lines["shift"], strict=True)
                ],
                DENSE: scaled["dense"].tolist(),
                name: scaled["mean"].tolist(),
                "worse by": [f"{line.shortfall} [{line.least}, {line.most}]" for line in scaled.itertuples()],
                "tolerated": scaled["allowed"].tolist(),
                "outcome": [f"{figures.MARKS[o]} {WORDS[o]}" for o in lines["outcome"]],
            }
        )
        show(html_table(table.set_index("metric")))


def assumed(found: Comparison) -> Markdown:
    """Say what was taken for granted."""
    return Markdown(f"{plain(found.facts['images'])}. {plain(found.facts['assumed'])}")


def reliability_diagrams(found: Comparison) -> object:
    """Draw the networks' reliability diagrams side by side."""
    return _measured(found, "calibration", lambda: reliability(by_title(found)))


def corruption_maps(found: Comparison) -> object:
    """Draw of each pruned network what corruption does to it, beside the dense one."""

    def draw() -> None:
        for name in found.pruned:
            mine = found.judged[found.judged["method"] == name]
            metric = next(m for m in ("corrupted_accuracy", "corrupted_ece") if (mine["metric"] == m).any())
            corruption_map(mine, metric, int(mine["round"].iloc[0]))

    either = {"generalization", "calibration"} - set(found.facts["not_measured"])
    return _measured(found, min(either, default="generalization"), draw)


def classes(found: Comparison) -> Figure:
    """Draw by how much the recall of each class changes."""
    tickets = found.rows.drop_duplicates("method")[["ticket", "method", "round", "seed"]]
    cases = [(name, round) for _, name, round, _ in tickets.itertuples(index=False) if name != DENSE]
    changes = recall_changes(tickets, found.arrays, cases)
    figure = recall_map(changes.rename(columns={case: case[0] for case in cases}))
    figure.axes[0].set_ylabel("class")
    return figure


def lost_images(found: Comparison) -> None:
    """Count the images on which only one of two networks is right, and draw some that the pruned one lost."""
    rows = {}
    for name, arrays in list(by_title(found).items())[1:]:
        lost, won, n = arrays["lost_counts"].tolist()
        text = f"Of {n:,} images **{plain(name)}** loses {lost:,} that dense has right, and wins {won:,} others."
        show(Markdown(text))
        if lost:
            columns = dict(zip(("true", DENSE, "sparse"), arrays["lost_answers"], strict=True))
            rows[name] = arrays["lost_pixels"], pd.DataFrame(columns)
    if rows:
        exemplar_gallery(rows)


def explained(found: Comparison) -> object:
    """Draw explanations of the same images by all networks."""
    return _measured(found, "interpretability", lambda: explanations(by_title(found)))


def flatness(found: Comparison) -> object:
    """Show the numbers of flatness, and how each was found."""

    def draw() -> None:
        rows = found.judged[found.judged["dimension"] == "flatness"]
        rows = rows[rows["metric"] != "test_accuracy"]
        values = rows.pivot(index="metric", columns="method", values="mean")[found.pruned]
        values.insert(0, DENSE, rows.drop_duplicates("metric").set_index("metric")["dense"])
        values = values.loc[rows["metric"].drop_duplicates()].rename_axis(None, axis="columns")
        values = values.mul(values.index.map(figures.factor), axis=0).map("{:.4g}".format)
        values.index = [figures.label(name) for name in values.index]
        show(html_table(values), html_table(method_table(by_title(found))))
        if found.facts["in_memory"]:
            show(Markdown("*Measured on the images that were given, since no training images were.*"))

    return _measured(found, "flatness", draw)


def density(found: Comparison) -> Figure | Markdown:
    """Draw which share of its weights each layer keeps."""
    layers = found.facts["layers"]
    names = list(layers[DENSE])
    if not names:
        return Markdown("*The weights of these files cannot be read, so their density is not known.*")
    figure, axis = plt.subplots(figsize=(figures.WIDTH, 3.6), layout="constrained")
    for (name, of), colour in zip(layers.items(), ["black", *figures.shades(len(layers) - 1)], strict=True):
        shares, style = [100 * share for share in of.values()], "--" if name == DENSE else "-"
        title = name if of else f"{name} (cannot be read)"
        axis.plot(range(len(of)), shares, f"o{style}", ms=4, color=colour, label=title)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axis.set(ylabel="weights that are left [%]", ylim=(-3, 103))
    axis.legend(frameon=False)
    plt.close(figure)
    return figure


def not_measured(found: Comparison) -> Markdown:
    """Say what was not measured, and why."""
    lines = [f"- {name.capitalize()}: {plain(reason)}" for name, reason in found.facts["not_measured"].items()]
    seeds = "- The spread over trainings: there is one network on each side. Another training may come out otherwise."
    speed = "- Speed and memory: they depend on the kernels that will run the network, not on its zeros."
    return Markdown("\n".join([*lines, seeds, speed]))


def again(found: Comparison) -> Markdown:
    """Say how to run it again, and what made this."""
    made = found.facts["provenance"]
    sizes = "; ".join(
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in of.items() if key.startswith("n_"))
        for name, of in found.facts["settings"].items()
    )
    return Markdown(
        f"```bash\n{found.facts['again']}\n```\n\nMade on {made['time']} by commit `{made['commit']}`, torch "
        f"{made['torch']}, in {made['precision']} on {plain(made['processor'])}. How much was measured: {sizes}."
    )


def _measured(found: Comparison, dimension: str, draw: Callable[[], object]) -> object:
    """Return what drawing returns, or why there is nothing to draw."""
    reason = found.facts["not_measured"].get(dimension)
    if reason is not None:
        return Markdown(f"*Not measured. {plain(reason)}*")
    draw()
    return None


# --- one file ----------------------------------------------------------------------------------------------------


def write(found: Comparison, path: Path) -> None:
    """Execute the notebook about a comparison, and write it as one HTML file."""
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder))
        page = Path(folder) / "report.ipynb"
        run = partial(execute, TEMPLATE, page, {"found": folder})
        if get_ipython() is None:
            run()
        else:  # a notebook's own shell and figures are left alone
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(run).result()
        write_atomically(path, as_html(nbformat.read(page, as_version=4), ", ".join(found.pruned)))


def as_html(page: nbformat.NotebookNode, title: str) -> str:
    """Return an executed notebook's text and outputs, without its code, as one HTML file that loads nothing."""
    render, parts = MarkdownIt("commonmark", {"html": False}).render, []
    for cell in page.cells:
        if cell.cell_type == "markdown":
            parts.append(render(cell.source))
        for output in cell.get("outputs", []):
            kinds = output.get("data", {})
            if "image/png" in kinds:
                source = f"data:image/png;base64,{kinds['image/png'].strip()}"
                parts.append(f'<img alt="Figure: see the text above" src="{source}">')
            elif "text/markdown" in kinds:
                parts.append(render(kinds["text/markdown"]))
            elif "text/html" in kinds:
                parts.append(kinds["text/html"])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{LOOK.read_text()}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(parts)}</main>\n</body>\n</html>\n"
    )
