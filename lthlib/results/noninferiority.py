"""A test of non-inferiority: how far a sparse network is from its dense parent, and how surely.

Two things are left to chance, the training and the images, as readers and cases are in studies of diagnosis: every
network answers for the same images, and each side has trainings of its own. The variance of the difference of means is
that of Obuchowski and Rockette (1995): the spread over trainings, which holds what an image does to one network alone,
plus what images do to all networks of a side at once, their covariance, as far as the two sides do not share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import pandas as pd
from scipy.special import digamma, polygamma
from scipy.stats import t as student

from lthlib.metrics import METRICS
from lthlib.metrics.resampling import REPLICATES, held

KEPT, LOST, NOT_SHOWN = "kept", "lost", "not shown"
TICKET, CASE = ["dataset", "arch", "method", "round"], ["metric", "shift", "severity"]
BOTH = "other trainings and other images like these"
IMAGES, TRAININGS = "these networks, on other images like these", "other trainings, on these images"

MOST_PRIOR_DF = 5.0  # tickets are never taken for more alike: some dozens of two seeds each could not tell
FEW, TREND = 5, 12  # variances from which on their own spread, and its trend with sparsity, is estimated
LEAST_SHARE = 0.02  # of the median: two equal trainings, as counts often are, are no sign that all would be
POWER = 0.8  # the chance that an equal network is shown to be so, by convention
RULE_OF_THREE = 3 / 1.645  # steps: an event unseen in n cases has a rate below 3/n (at 95 %)


def votes(lines: pd.DataFrame) -> pd.DataFrame:
    """Return the lines of those metrics that LTH-PASS asks for."""
    return lines[lines["metric"].map(lambda name: METRICS[name].in_verdict).astype(bool)]


def moderated(
    variances: np.ndarray, df: np.ndarray, rounds: np.ndarray, use: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return variances over trainings, each drawn towards what the tickets of a study have in common.

    Two trainings leave one degree of freedom. Smyth's empirical Bayes (2004, as limma has it) takes the true variances
    for draws from a scaled inverse chi-square around a trend, here log-linear in the round, and estimates from the
    spread of the observed ones how alike they are. Unlike tickets are hardly pooled; alike ones lend each other
    degrees of freedom.

    Args:
        variances: Sample variance of each ticket, (G,).
        df: Its degrees of freedom, trainings less one, (G,); of 0 the variance is not read.
        rounds: Round on the ladder of sparsity, 0 for dense, (G,).
        use: Which tickets may tell of the others, (G,): not those that have collapsed.

    Returns:
        Variance and degrees of freedom of each ticket, (G,); NaN and 0 where nothing is known.
    """
    seen = use & (df > 0)
    seen = seen if seen.any() else df > 0
    v, d = variances[seen], df[seen].astype(float)
    if not len(v):
        return np.full(len(df), np.nan), np.zeros(len(df))
    if len(v) < FEW or not v.any():
        return np.full(len(df), (d * v).sum() / d.sum()), np.full(len(df), d.sum())
    log = np.log(np.maximum(v, LEAST_SHARE * np.median(v[v > 0]))) - digamma(d / 2) + np.log(d / 2)
    degree = 1 if len(v) >= TREND and len(set(rounds[seen])) > 2 else 0
    trend = np.polyfit(rounds[seen], log, degree)
    unlike = ((log - np.polyval(trend, rounds[seen])) ** 2).sum() / (len(v) - degree - 1) - polygamma(1, d / 2).mean()
    grid = np.geomspace(1, MOST_PRIOR_DF, 100)
    prior_df = grid[np.abs(polygamma(1, grid / 2) - unlike).argmin()]
    within = np.clip(rounds, rounds[seen].min(), rounds[seen].max())
    prior = np.exp(np.polyval(trend, within) + digamma(prior_df / 2) - np.log(prior_df / 2))
    own = np.where(df > 0, variances, 0.0)
    return (prior_df * prior + df * own) / (prior_df + df), prior_df + df


def over_images(sparse: np.ndarray, dense: np.ndarray, weight: float, trainings: bool) -> tuple[float, float]:
    """Return what images do to weight x (mean of dense) - (mean of sparse): variance, and bias of the statistic.

    Args:
        sparse: Replicates less the value of each training, (S, B).
        dense: The same of the dense parents, from the same resamples, (D, B).
        weight: Of the dense mean.
        trainings: Whether the spread over trainings is counted elsewhere; only covariances of different networks
            count then, since that spread holds the rest. Else the variance is that of these very networks.
    """
    difference = weight * dense.mean(0) - sparse.mean(0)
    bias = float(difference.mean())
    if not trainings:
        return float(difference.var(ddof=1)), bias
    shared = 2 * weight * float(np.cov(dense.mean(0), sparse.mean(0))[0, 1])
    return max(0.0, _between(sparse) + weight**2 * _between(dense) - shared), bias


def _between(replicates: np.ndarray) -> float:
    """Mean covariance of the replicates of two different trainings."""
    k = len(replicates)
    return (k * k * replicates.mean(0).var(ddof=1) - replicates.var(1, ddof=1).sum()) / (k * (k - 1))


def pooled(summary: pd.DataFrame, use: np.ndarray) -> pd.DataFrame:
    """Add the variance over trainings of each line, drawn towards those of the other tickets of its study."""
    own = (summary["seeds"] * summary["error"] ** 2).to_numpy()
    df, rounds = summary["seeds"].to_numpy() - 1, summary["round"].to_numpy()
    variance, pooled_df = np.full(len(summary), np.nan), np.zeros(len(summary))
    for at in summary.groupby(["dataset", "arch", "dimension", *CASE], sort=False).indices.values():
        variance[at], pooled_df[at] = moderated(own[at], df[at], rounds[at], use[at])
    return summary.assign(variance=variance, pooled_df=pooled_df)


def with_images(
    lines: pd.DataFrame, rows: pd.DataFrame, replicates: Mapping[str, Mapping[str, np.ndarray]]
) -> pd.DataFrame:
    """Add what resampled images say: ``images_variance``, ``bias``, ``step``, ``images``; NaN where nothing is kept."""
    tickets = rows.drop_duplicates([*TICKET, "ticket"]).groupby(TICKET, sort=False)["ticket"].agg(list).to_dict()
    dense = {key[:2]: key for key in tickets if key[2] == "dense"}

    def of(ticket: tuple, case: tuple) -> np.ndarray | None:
        found = [held(replicates.get(name, {}), *case) for name in tickets[ticket]]
        return None if any(one is None or np.isnan(one).any() for one in found) else np.stack(found).astype(float)

    parent = cache(of)
    found = np.full((len(lines), 4), np.nan)
    several = (lines[["seeds", "dense_seeds"]].min(axis=1) > 1).to_numpy()
    keys = zip(*(lines[name] for name in (*TICKET, *CASE)), strict=True)
    for i, key in enumerate(keys):
        mine, theirs = of(key[:4], key[4:]), parent(dense[key[:2]], key[4:])
        if (
            mine is not None
            and theirs is not None
            and theirs.shape[1:] == mine.shape[1:]
            and mine[0, 0] == theirs[0, 0] > 1
        ):
            variance, bias = over_images(mine[:, 2:], theirs[:, 2:], lines["weight"].iat[i], several[i])
            found[i] = variance, bias, mine[:, 1].max(), mine[0, 0]
    return lines.assign(**dict(zip(("images_variance", "bias", "step", "images"), found.T, strict=True)))


def decided(lines: pd.DataFrame, alpha: float) -> pd.DataFrame:
    """Test every line: the bounds of its shortfall, its outcome, and what would decide it."""
    several = lines[["seeds", "dense_seeds"]].min(axis=1) > 1
    mine = lines["variance"] / lines["seeds"]
    theirs = lines["weight"] ** 2 * lines["dense_variance"] / lines["dense_seeds"]
    trainings = (mine + theirs).where(several)
    over_images = np.maximum(lines["images_variance"], (RULE_OF_THREE * lines["step"]) ** 2)
    known = lines["images"].notna()
    scope = np.select([several & known, known, several], [BOTH, IMAGES, TRAININGS], "")
    variance = (trainings.fillna(0.0) + over_images.fillna(0.0)).where(scope != "").where(lines["dense"].notna())
    # Both sides' variances rest on what the tickets have in common: one estimate, as it were, not two.
    seeds_df = lines[["pooled_df", "dense_df"]].min(axis=1).where(several, 1)
    images_df = (np.minimum(lines["images"], REPLICATES) - 1).fillna(1)
    parts = trainings.fillna(0.0) ** 2 / seeds_df, over_images.fillna(0.0) ** 2 / images_df
    df = (variance**2 / sum(parts)).fillna(1.0)  # Satterthwaite's
    error = np.sqrt(variance)
    bias = (lines["sign"] * lines["bias"]).fillna(0.0)
    margin = lines["shortfall"] - lines["allowed"]
    low, high = margin - bias.clip(lower=0), margin - bias.clip(upper=0)  # the statistic's bias is known by half
    p = pd.Series(np.where(error > 0, student.sf(low / error.where(error > 0), df), low <= 0), lines.index)
    p, level = _holm(lines.assign(p=p.where(error.notna())), alpha)
    quantile = student.isf(alpha, df)
    room = (margin / quantile) ** 2  # what the variance may be at most
    wide = (lines["allowed"] / (quantile + student.isf(1 - POWER, df))) ** 2  # the same for a network equal to dense
    lines = lines.assign(
        scope=scope,
        least=lines["allowed"] + low - error * np.where(error > 0, student.isf(level, df), 0),
        most=lines["allowed"] + high + error * quantile,
        outcome=np.select([high + error * quantile <= 0, p <= alpha], [KEPT, LOST], NOT_SHOWN),
        seeds_error=np.sqrt(trainings),
        images_error=np.sqrt(over_images),
        times_needed=variance / room,
        power=student.cdf(lines["allowed"] / error - quantile, df),
    )
    shown = lines["outcome"] != NOT_SHOWN
    for name, grows, stays in (
        ("images", over_images, trainings.fillna(0.0)),
        ("seeds", trainings, over_images.fillna(0.0)),
    ):
        for what, most in (("needed", room.mask(shown)), ("for_power", wide)):
            times = (grows / (most - stays)).where(most > stays, np.inf).where(grows.notna() & most.notna())
            lines[f"{name}_{what}"] = np.ceil(lines[name] * times)
    return lines


def _holm(lines: pd.DataFrame, alpha: float) -> tuple[pd.Series, pd.Series]:
    """Return p corrected over the metrics of each ticket that have a vote, and the level at which each was tested."""
    voting = votes(lines[lines["p"].notna()])
    each = voting.drop_duplicates([*TICKET, *CASE]).sort_values("p", kind="stable")
    groups = each.groupby(TICKET, sort=False)["p"]
    left = groups.transform("size") - groups.cumcount()
    each = each.assign(corrected=(left * each["p"]).clip(upper=1.0), level=alpha / left)
    each["corrected"] = each.groupby(TICKET, sort=False)["corrected"].cummax()
    found = lines[[*TICKET, *CASE]].merge(each[[*TICKET, *CASE, "corrected", "level"]], on=[*TICKET, *CASE], how="left")
    found.index = lines.index
    return found["corrected"].fillna(lines["p"]), found["level"].fillna(alpha)
