"""Made-up studies whose truth is known: what the verdict says of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lthlib.metrics import METRICS, Value
from lthlib.metrics.resampling import kept, resampled_mean, resamples
from lthlib.results import verdict

CLASSES = 10
BASE = 0.5  # every metric's value for a dense network
SHARED, OWN = 20.0, 10.0  # deviations of an image's effect on all networks, and on one, in units of the tolerance


def simulate(
    studies: int,
    images: int,
    seeds: int,
    *,
    loss: float = 0.0,
    metrics: Sequence[str] = ("test_accuracy",),
    rounds: int = 1,
    trainings: float = 0.3,
    unlike: float = 0.0,
) -> pd.DataFrame:
    """Judge made-up studies, all at once; a study is a data set of its own.

    An image's term is the mean over images, plus what the training does to it, plus what the image does to every
    network, plus what it does to this one, all normal; sizes are standard deviations in units of the tolerance. The
    defaults are about those of accuracies of 96 % that two trainings take 0.3 points apart.

    Args:
        studies, images, seeds: How many; of each study, and of its dense and each of its sparse networks.
        loss: True shortfall of the sparse networks in each metric, in units of the tolerance; 0: as the dense.
        metrics: Names in `METRICS`.
        rounds: Sparse tickets of a study, which tell of each other's spread.
        trainings: Spread over trainings.
        unlike: Standard deviation, over tickets, of the logarithm of their spread over trainings.
    """
    rng, counts, limits = np.random.default_rng(0), resamples(images), verdict.Thresholds()
    lines, replicates = [], {}
    tolerances = np.array([limits.allowed(metric, BASE, CLASSES) for metric in metrics])
    signs = np.array([1 if METRICS[metric].higher_is_better else -1 for metric in metrics])
    lost = loss * (np.arange(rounds + 1) > 0)[:, None, None]
    for study in range(studies):
        shape = rounds + 1, seeds, len(metrics)
        spread = trainings * np.exp(unlike * rng.standard_normal((rounds + 1, 1, 1)))
        terms = spread * rng.standard_normal(shape) - lost + OWN * rng.standard_normal((images, *shape))
        terms += SHARED * rng.standard_normal((images, 1, 1, len(metrics)))
        values = BASE + tolerances * signs * terms.mean(0)
        again = resampled_mean(terms.reshape(images, -1), counts).reshape(-1, *shape)
        again = BASE + tolerances * signs * again
        for n, k in np.ndindex(shape[:2]):
            ticket, method = f"{study}-{n}-{k}", "lth" if n else "dense"
            replicates[ticket] = {}
            for j, metric in enumerate(metrics):
                replicates[ticket] |= kept(Value(metric, values[n, k, j], images), again[:, n, k, j])
                which = f"made up {study}", "none", method, n, 1 - 0.8**n, k, METRICS[metric].dimension
                lines.append((*which, metric, "none", 0, images, values[n, k, j], ticket))
    columns = [*verdict.TICKET, "sparsity", "seed", "dimension", *verdict.CASE, "n", "value", "ticket"]
    return verdict.judge(pd.DataFrame(lines, columns=columns), replicates, CLASSES, limits)


def outcomes(judged: pd.DataFrame) -> dict[str, float]:
    """Return the share of lines that are kept, lost and not shown, and of scorecards with a loss (``any lost``)."""
    named = (verdict.KEPT, verdict.LOST, verdict.NOT_SHOWN)
    lost = (judged["outcome"] == verdict.LOST).groupby([judged[key] for key in verdict.TICKET])
    return {name: float((judged["outcome"] == name).mean()) for name in named} | {"any lost": float(lost.any().mean())}
