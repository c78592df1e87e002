"""Out-of-distribution detection: foreign images are the positive class, and higher scores are more foreign.

Scores take logits (N, C) and give (N,) in float64. The numbers take scores of in-distribution images (N,) and of
foreign ones (M,). All raise `UserError` for NaN, infinity, and empty sets.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from lthlib.core.errors import UserError, choose
from lthlib.metrics.arrays import as_array, check_logits
from lthlib.metrics.registry import metric

_row = partial(metric, dimension="generalization", higher_is_better=True)
_row("ood_auroc", "OoD ROC-AUC", reference="hendrycks2017baseline", in_verdict=True)(
    r"$P(s_\mathrm{OoD} > s_\mathrm{ID}) + \frac12 P(=)$ with the score $1-\max_c p_c$."
)
_row("ood_auroc_max_logit", "OoD ROC-AUC (max logit)", reference="hendrycks2022scaling")(
    r"ROC-AUC with the score $-\max_c z_c$."
)
_row("ood_auroc_energy", "OoD ROC-AUC (energy)", reference="liu2020energy")(
    r"ROC-AUC with the score $-\log\sum_c e^{z_c}$."
)
_row("ood_aupr", "OoD AUPR", reference="hendrycks2017baseline")(
    "Average precision with OoD as the positive class; chance is the share of OoD images."
)
_row("ood_aupr_id", "OoD AUPR (ID positive)", reference="hendrycks2017baseline")(
    "Average precision with in-distribution as the positive class; chance is the share of ID images."
)
_row("ood_fpr95", "OoD FPR95", higher_is_better=False, reference="liang2018enhancing")(
    "Share of OoD images accepted when 95 % of the in-distribution images are accepted."
)
_row("ood_fpr95_ood_positive", "OoD FPR95 (OoD positive)", higher_is_better=False, reference="hendrycks2019deep")(
    "Share of in-distribution images flagged when 95 % of the OoD images are flagged."
)


def msp_score(logits: ArrayLike) -> np.ndarray:
    """1 - max softmax probability (Hendrycks and Gimpel, 2017).

    Summed over the classes that are not the largest, so that confidences which all round to 1 keep their order instead
    of tying.
    """
    z = check_logits(logits)
    rows, top = np.arange(len(z)), z.argmax(axis=1)
    others = np.exp(z - z[rows, top][:, None])
    others[rows, top] = 0
    rest = others.sum(axis=1)
    return rest / (1 + rest)


def max_logit_score(logits: ArrayLike) -> np.ndarray:
    """Minus the largest logit (Hendrycks et al., 2022)."""
    return -check_logits(logits).max(axis=1)


def energy_score(logits: ArrayLike) -> np.ndarray:
    """Energy -log sum_c exp(z_c) (Liu et al., 2020, at the temperature 1 that they find best)."""
    return -special.logsumexp(check_logits(logits), axis=1)


SCORES = {"ood_auroc": msp_score, "ood_auroc_max_logit": max_logit_score, "ood_auroc_energy": energy_score}


def _problem(in_scores: ArrayLike, out_scores: ArrayLike, positive: str = "ood") -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores as scikit-learn takes them."""
    choose(positive, ("ood", "id"), "positive class")
    sides = []
    for scores, name in ((in_scores, "in-distribution scores"), (out_scores, "OoD scores")):
        array = as_array(scores, name)
        if array.ndim != 1 or len(array) == 0:
            raise UserError(f"The {name} have the shape {array.shape}; one per image and at least one is needed.")
        sides.append(array.astype(np.float64))
    foreign, scores = np.arange(sum(map(len, sides))) >= len(sides[0]), np.concatenate(sides)
    return (foreign, scores) if positive == "ood" else (~foreign, -scores)


def roc_auc(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Area under the ROC curve: P(OoD score > in score) + P(equal) / 2. Higher is better, 0.5 is chance.

    The same whichever class is called positive.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_problem(in_scores, out_scores)))


def roc_curve(in_scores: ArrayLike, out_scores: ArrayLike, positive: str = "ood") -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every distinct threshold, from none flagged to all; ties are flagged together.

    With ``positive="id"`` in-distribution images are to be accepted, by low scores.
    """
    from sklearn.metrics import roc_curve

    return roc_curve(*_problem(in_scores, out_scores, positive), drop_intermediate=False)[:2]


def aupr(in_scores: ArrayLike, out_scores: ArrayLike, positive: str = "ood") -> float:
    """Area under the precision-recall curve as average precision, sum_k (R_k - R_{k-1}) P_k. Higher is better.

    The step-wise sum, since interpolating linearly between points is too optimistic (Davis and Goadrich, 2006). Unlike
    ROC-AUC it depends on which class is positive, ``"ood"`` (AUPR-out) or ``"id"`` (AUPR-in), and on the share of OoD
    images: chance is that share.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_problem(in_scores, out_scores, positive)))


def fpr_at_tpr(in_scores: ArrayLike, out_scores: ArrayLike, tpr: float = 0.95, positive: str = "id") -> float:
    """False positive rate at the first threshold that reaches a true positive rate in (0, 1]. Lower is better.

    Two conventions go by the name FPR95 and give different numbers. ``positive="id"`` (Liang et al., 2018, and most of
    the literature) is the share of *OoD* images accepted as known when 95 % of the in-distribution images are accepted;
    ``positive="ood"`` (Hendrycks et al., 2019, pytorch-ood) is the share of *in-distribution* images flagged when 95 %
    of the OoD images are flagged.
    """
    if not 0 < tpr <= 1:
        raise UserError(f"tpr is {tpr!r}; a rate in (0, 1] is needed.")
    false, true = roc_curve(in_scores, out_scores, positive)
    return float(false[np.argmax(true >= tpr)])


def detection(in_logits: ArrayLike, out_logits: ArrayLike) -> dict[str, float]:
    """Every detection number of a network, by its name in `METRICS`, from logits (N, C) and (M, C).

    The ROC-AUC of every score; the other numbers are of `msp_score`.
    """
    known, foreign = msp_score(in_logits), msp_score(out_logits)
    return {name: roc_auc(of(in_logits), of(out_logits)) for name, of in SCORES.items()} | {
        "ood_aupr": aupr(known, foreign, "ood"),
        "ood_aupr_id": aupr(known, foreign, "id"),
        "ood_fpr95": fpr_at_tpr(known, foreign, positive="id"),
        "ood_fpr95_ood_positive": fpr_at_tpr(known, foreign, positive="ood"),
    }
