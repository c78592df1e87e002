"""What flatness measured on some images, or of some tickets, says of others: intervals and rankings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lthlib.core.errors import UserError
from lthlib.metrics import METRICS


def image_interval(per_image: np.ndarray, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return a bootstrap interval (BCa) for the mean over images, as if the batch were drawn again.

    Args:
        per_image: Contributions of the images, shape (N,), N at least 2.
        level: Confidence level.
        seed: Of the resampling.

    Raises:
        UserError: For fewer than two images.
    """
    from scipy.stats import bootstrap

    values = np.asarray(per_image, dtype=float)
    if len(values) < 2:
        raise UserError("An interval over images needs at least two images.")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, confidence_level=level, n_resamples=2000, rng=np.random.default_rng(seed))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def batch_means(per_image: np.ndarray, batch: int) -> np.ndarray:
    """Return the means of as many whole batches of that size as there are, shape (batches,)."""
    return per_image[: len(per_image) // batch * batch].reshape(-1, batch).mean(1)


def rank_agreement(rows: pd.DataFrame, first: str, others: Sequence[str]) -> pd.DataFrame:
    """Compare how two metrics rank tickets: Kendall's tau. 1: the same order; 0: unrelated; -1: reversed.

    "Flatter" is lower or higher as each metric has it. Methods are ranked at each round (means over seeds); with fewer
    than three methods, rounds of each method instead.

    Args:
        rows: The tidy table of `lthlib.results.collect.Results`.
        first: Name of the metric that the others are compared with.
        others: Their names.

    Returns:
        One column per name in ``others``; the index has the name ``"round"`` or ``"method"``. NaN: no order.
    """
    from scipy.stats import kendalltau

    sparse = rows[(rows["method"] != "dense") & (rows["shift"] == "none")]
    table = sparse.pivot_table(index=["method", "round"], columns="metric", values="value")
    level = "round" if table.index.get_level_values("method").nunique() >= 3 else "method"
    found = {}
    for key, group in table.groupby(level=level):
        flatter = {name: group[name] * (1 if METRICS[name].higher_is_better else -1) for name in (first, *others)}
        found[key] = {
            name: kendalltau(flatter[first], flatter[name]).statistic if len(group) > 1 else np.nan for name in others
        }
    return pd.DataFrame.from_dict(found, orient="index", columns=list(others)).rename_axis(level)
