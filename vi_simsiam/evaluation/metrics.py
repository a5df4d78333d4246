"""Measures of an uncertainty score: detection of errors, other data sets and damaged images.

Scores rise with uncertainty and are finite. A measure that is not defined (an AUROC with one kind
of image only) is None, never NaN. Images with equal scores have no order: every measure is the mean
over all orders of the tied images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.engine.forward import nearest

Scores = NDArray[np.float64]
Flags = NDArray[np.bool_]

BINS, POINTS = 15, 50


def auroc(scores: Scores, positive: Flags) -> float | None:
    """Probability that a positive image has a higher score than a negative one, ties counting half.

    The Mann-Whitney statistic as a share of all pairs.

    Args:
        scores: (N,).
        positive: (N,) bool: errors, or images of another data set.

    Returns:
        A number in [0, 1], or None if there are only positives or only negatives.
    """
    if not _both_kinds(positive):
        return None
    return float(_higher(scores[positive], scores[~positive]))


def aupr(scores: Scores, positive: Flags) -> float | None:
    """Average precision of finding the positives: area under the precision-recall curve.

    There is no interpolation; a constant score gives the share of positives. Arguments and result
    as `auroc`.
    """
    from sklearn.metrics import average_precision_score

    if not _both_kinds(positive):
        return None
    return float(average_precision_score(positive, scores))


def fpr95(scores: Scores, positive: Flags) -> float | None:
    """Share of negatives above the highest threshold that at least 95 % of the positives reach.

    The positives are the images of the other data set, so this is the share of validation images
    flagged when 95 % of the others are: the convention of OpenOOD (Zhang et al., arXiv 2306.09301).
    Other authors exchange the roles. Images at the threshold are flagged, so a constant score gives
    1. Arguments and result as `auroc`.
    """
    from sklearn.metrics import roc_curve

    if not _both_kinds(positive):
        return None
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    return float(false[np.argmax(true >= 0.95)])


def aurc(scores: Scores, wrong: Flags) -> float:
    """Area under the risk-coverage curve (Geifman and El-Yaniv, arXiv 1805.08206).

    The mean over k = 1..N of the share of errors among the k most certain images.

    Args:
        scores: (N,), N >= 1.
        wrong: (N,) bool, True for misclassified images.
    """
    errors = _expected_errors(scores, wrong)
    return float(np.mean(errors / np.arange(1, len(errors) + 1)))


def augrc(scores: Scores, wrong: Flags) -> float:
    """Area under the generalised risk-coverage curve (Traub et al., arXiv 2407.01032).

    The generalised risk at coverage k/N is the number of errors among the k most certain images
    over N, not over k. The area is that under straight lines between its values, from 0 at coverage
    0 on; with accuracy a it is (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 exactly, as the paper derives.
    Arguments and result as `aurc`.
    """
    errors = _expected_errors(scores, wrong)
    return float((errors.sum() - errors[-1] / 2) / len(errors) ** 2)


def oracle(wrong: Flags) -> dict[str, float]:
    """The least possible "aurc" and "augrc": every error comes after every correct image."""
    scores = wrong.astype(np.float64)
    return {"aurc": aurc(scores, wrong), "augrc": augrc(scores, wrong)}


def risk_coverage(scores: Scores, wrong: Flags) -> dict[str, list[float]]:
    """The risk-coverage curve at up to `POINTS` evenly spaced coverages, the last of which is 1.

    Returns:
        "coverage", shares of the images, and "risk", the share of errors among that many of the
        most certain ones.
    """
    errors = _expected_errors(scores, wrong)
    count = len(errors)
    spaced = np.rint(np.linspace(count / POINTS, count, POINTS)).astype(int)
    kept = np.unique(spaced.clip(1))
    return {"coverage": (kept / count).tolist(), "risk": (errors[kept - 1] / kept).tolist()}


def retrieved(embedding: Tensor, labels: NDArray[np.int64]) -> Flags:
    """(N,) bool: True if the nearest other image, by the cosine, has the same class.

    Of neighbours exactly as near the first counts. The mean is Recall@1, and the AUROC of a score
    for its negation is R-AUROC (Kirchhof et al., the URL benchmark, arXiv 2307.03810).

    Args:
        embedding: (N, F) floating, N >= 2.
        labels: (N,) classes.
    """
    found = nearest(embedding, None, 1, device=embedding.device)
    neighbours = torch.cat([numbers[:, 0].cpu() for numbers, _ in found]).numpy()
    same: Flags = labels == labels[neighbours]
    return same


def level_trend(scores: Scores) -> dict[str, Any]:
    """Dependence of a score on the level of damage.

    Args:
        scores: (levels, N), the score of every image at every level, in ascending order.

    Returns:
        "spearman", the rank correlation of level and score over all images and levels, None if the
        score is constant; "monotone", the share of steps from a level to the next, within an image,
        at which the score rises; "aurocs", for each level but the first that of telling its images
        from those of the first.
    """
    from scipy.stats import spearmanr

    levels = np.repeat(np.arange(len(scores)), scores.shape[1])
    constant = float(np.ptp(scores)) == 0
    return {
        "spearman": None if constant else float(spearmanr(levels, scores.ravel()).statistic),
        "monotone": float(np.mean(np.diff(scores, axis=0) > 0)),
        "aurocs": _higher(scores[1:], np.broadcast_to(scores[0], scores[1:].shape)).tolist(),
    }


def calibration(expected: NDArray[np.float64], observed: NDArray[np.float64]) -> dict[str, Any]:
    """Compare expected with observed cosines, in bins of equally many pairs by the expected one.

    There are `BINS`. Equal expectations share one: a constant concentration has a single bin, and
    the noise of its pairs averages out.

    Args:
        expected: (P,) float64, P >= 1.
        observed: (P,) float64.

    Returns:
        "pairs"; the means "expected" and "observed"; "error", the mean over all pairs of the
        distance between the two means of the pair's bin; and "bins", a dictionary "expected",
        "observed", "count" for each.
    """
    first = np.searchsorted(np.sort(expected), expected, side="left")
    number = first * BINS // len(expected)
    counts = np.bincount(number, minlength=BINS)
    sums = [np.bincount(number, weights=each, minlength=BINS) for each in (expected, observed)]
    rows = [
        {"expected": float(e / count), "observed": float(o / count), "count": int(count)}
        for e, o, count in zip(*sums, counts, strict=True)
        if count
    ]
    return {
        "pairs": len(expected),
        "expected": float(expected.mean()),
        "observed": float(observed.mean()),
        "error": float(np.abs(sums[1] - sums[0]).sum() / len(expected)),
        "bins": rows,
    }


def detection_figures(inside: Scores, outside: Scores) -> dict[str, Any]:
    """ "auroc", "aupr" and "fpr95" of a score for detecting images of another data set."""
    scores = np.concatenate([inside, outside])
    positive = np.arange(len(scores)) >= len(inside)
    return {each.__name__: each(scores, positive) for each in (auroc, aupr, fpr95)}


def retrieval_figures(
    embedding: Tensor, labels: NDArray[np.int64], scores: Mapping[str, Scores]
) -> dict[str, Any]:
    """ "recall_at_1", and among "scores" the R-AUROC of each; see `retrieved`."""
    same = retrieved(embedding, labels)
    return {
        "recall_at_1": int(same.sum()) / len(same),
        "scores": {name: auroc(values, ~same) for name, values in scores.items()},
    }


def _expected_errors(scores: Scores, wrong: Flags) -> Scores:
    """Mean number of errors among the k most certain images, k = 1..N, over all orders of ties."""
    order = np.argsort(scores, kind="stable")
    _, group, sizes = np.unique(scores[order], return_inverse=True, return_counts=True)
    shares = np.bincount(group, weights=wrong[order], minlength=len(sizes)) / sizes
    return np.cumsum(shares[group])


def _higher(first: Scores, second: Scores) -> Any:
    """Share of pairs along the last axis with the higher score in `first`, ties counting half."""
    from scipy.stats import mannwhitneyu

    # The statistic is exact; "asymptotic" is about the p-value, which costs less then.
    found = mannwhitneyu(first, second, axis=-1, method="asymptotic")
    return found.statistic / (first.shape[-1] * second.shape[-1])


def _both_kinds(positive: Flags) -> bool:
    return bool(positive.any() and not positive.all())
