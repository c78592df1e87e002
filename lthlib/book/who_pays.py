"""What the page of generalization shows of who pays: curves, the map of classes, the gallery of exemplars."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown

from lthlib import data, figures
from lthlib.book import pages
from lthlib.core.errors import UserError
from lthlib.data.corrupted import sample
from lthlib.figures.classes import IN_A_ROW, exemplar_gallery, recall_map
from lthlib.results.classes import exemplar_table, odd_ones, recall_changes

NOT_RECORDED = Markdown(
    "*Not recorded: these results are older than what is shown here. `recorded = None` measures them anew.*"
)
MOST_ROWS = 8  # of the gallery


def by_class(page: pages.Page, round: int) -> None:
    """Show the worst class and churn against sparsity, and the change of recall by class at a round."""
    shown, results = pages.cases(page, round), page.results
    changes = recall_changes(results.tickets, results.arrays, shown)
    if changes.empty:
        pages.show(NOT_RECORDED)
        return
    panels = [(name, "none") for name in ("worst_class_accuracy", "churn") if (page.judged["metric"] == name).any()]
    figures.curves(page.judged, panels)
    recall_map(changes.rename(columns={case: pages.title_of(*case) for case in shown}))


def exemplars(page: pages.Page, round: int) -> None:
    """Show how many exemplars there are by method and round, and some of them, as far as the images are at hand."""
    results = page.results
    table = exemplar_table(results.tickets, results.arrays)
    if table.empty:
        one = len(page.study.seeds) == 1
        pages.show(Markdown("*It takes two seeds to agree; this page has one.*") if one else NOT_RECORDED)
        return
    pages.show(pages.html_table(table.set_index("method")))
    odd = {case: odd_ones(results.tickets, results.arrays, *case) for case in pages.cases(page, round)}
    odd = {pages.title_of(*case): found for case, found in odd.items() if found is not None and len(found)}
    if not odd:
        return
    try:
        exemplar_gallery(_pictured(page, odd))
    except UserError as error:
        pages.show(Markdown(f"*The images are not at hand: {error}*"))


def _pictured(page: pages.Page, odd: Mapping[str, pd.DataFrame]) -> dict[str, tuple[np.ndarray, pd.DataFrame]]:
    """Return the first images of each row, those that are exemplars of most rows before the others."""
    test = data.load(page.study.data, page.store, page.study.train_size).test
    at = sample(test.labels, page.results.provenance[0]["parameters"]["n_test"])
    shared = pd.concat(odd.values())["image"].value_counts()
    found = {}
    for title, lines in list(odd.items())[:MOST_ROWS]:
        order = lines["image"].map(shared).sort_values(ascending=False, kind="stable").index[:IN_A_ROW]
        chosen = lines.loc[order]
        pixels = test.pixels[at[torch.tensor(chosen["image"].to_numpy())]]
        found[title] = pixels.numpy(), chosen
    return found
