"""How well an uncertainty score does its work: telling errors, other data sets and damaged images from the rest.

Scores rise with uncertainty. A figure that is not defined (an AUROC with one kind of image only) is None, never NaN.
Equal scores count as what they are, an order left open: every figure is the mean over the orders of the tied images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.errors import InputError

Scores = NDArray[np.float64]
Flags = NDArray[np.bool_]

_BLOCK = 2**25
"""Similarities held at a time: 128 MiB."""


def auroc(scores: Scores, positive: Flags) -> float | None:
    """Probability that a positive image has a higher score than a negative one, ties counting half.

    Args:
        scores: (N,) finite.
        positive: (N,) bool: errors, or images of another data set.

    Returns:
        A number in [0, 1], or None if there are only positives or only negatives.

    Raises:
        InputError: shapes that differ, or scores that are not finite.
    """
    from sklearn.metrics import roc_auc_score

    _check(scores, positive)
    return None if _one_kind(positive) else float(roc_auc_score(positive, scores))


def aupr(scores: Scores, positive: Flags) -> float | None:
    """Average precision of finding the positives, the area under the precision-recall curve without interpolation.

    Arguments, result and errors as `auroc`. A constant score gives the share of positives.
    """
    from sklearn.metrics import average_precision_score

    _check(scores, positive)
    return None if _one_kind(positive) else float(average_precision_score(positive, scores))


def fpr_at_tpr(scores: Scores, positive: Flags, tpr: float = 0.95) -> float | None:
    """Share of the negatives above the highest threshold that at least `tpr` of the positives reach.

    The positives are the images of the other data set: how many validation images are flagged when 95 % of those are,
    the convention of OpenOOD (Zhang et al., arXiv 2306.09301). Others exchange the roles. Images at the threshold are
    flagged, so a constant score gives 1. Arguments, result and errors as `auroc`.
    """
    from sklearn.metrics import roc_curve

    _check(scores, positive)
    if _one_kind(positive):
        return None
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    return float(false[np.argmax(true >= tpr)])


def aurc(scores: Scores, wrong: Flags) -> float | None:
    """Area under the risk-coverage curve (Geifman and El-Yaniv, arXiv 1805.08206).

    The mean over k = 1..N of the share of errors among the k most certain images. None without images.

    Args:
        scores: (N,) finite.
        wrong: (N,) bool, whether an image is misclassified.

    Raises:
        InputError: shapes that differ, or scores that are not finite.
    """
    errors = _expected_errors(scores, wrong)
    return float(np.mean(errors / np.arange(1, len(errors) + 1))) if len(errors) else None


def augrc(scores: Scores, wrong: Flags) -> float | None:
    """Area under the generalised risk-coverage curve (Traub et al., arXiv 2407.01032).

    The generalised risk at coverage k/N is the number of errors among the k most certain images over N, not over k. The
    area is that under straight lines between its values, from 0 at coverage 0 on; with accuracy a it is
    (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 exactly, as the paper derives. Arguments, result and errors as `aurc`.
    """
    errors = _expected_errors(scores, wrong)
    count = len(errors)
    return float((errors.sum() - errors[-1] / 2) / count**2) if count else None


def oracle(wrong: Flags) -> dict[str, float | None]:
    """The least "aurc" and "augrc" there are for these errors: every error after every correct image."""
    scores = wrong.astype(np.float64)
    return {"aurc": aurc(scores, wrong), "augrc": augrc(scores, wrong)}


def at_random(wrong: Flags) -> dict[str, float | None]:
    """The mean "aurc" and "augrc" of all orders: with a share r of errors, r and r / 2."""
    if not len(wrong):
        return {"aurc": None, "augrc": None}
    share = float(np.mean(wrong))
    return {"aurc": share, "augrc": share / 2}


def risk_coverage(scores: Scores, wrong: Flags, points: int = 50) -> dict[str, list[float]]:
    """The risk-coverage curve at up to `points` evenly spaced coverages, the last of which is 1.

    Returns:
        "coverage", shares of the images, and "risk", the share of errors among so many of the most certain ones.
    """
    errors = _expected_errors(scores, wrong)
    count = len(errors)
    kept = (
        np.unique(np.rint(np.linspace(count / points, count, points)).astype(int).clip(1))
        if count
        else np.array([])
    )
    kept = kept.astype(int)
    return {"coverage": (kept / max(count, 1)).tolist(), "risk": (errors[kept - 1] / kept).tolist()}


def retrieved(embedding: Tensor, labels: NDArray[np.int64]) -> Flags:
    """Whether the nearest other image, by the cosine of the embeddings, has the same class: (N,) bool.

    Of neighbours exactly as near the first counts. The mean is Recall@1, and the AUROC of a score for its negation is
    R-AUROC (Kirchhof et al., the URL benchmark, arXiv 2307.03810).

    Args:
        embedding: (N, F) floating, N >= 2.
        labels: (N,) classes.

    Raises:
        InputError: fewer than two images, or shapes that differ.
    """
    if len(embedding) < 2 or len(labels) != len(embedding):
        raise InputError(
            f"embedding, labels: {len(embedding)} and {len(labels)} given, must be equal and at least 2"
        )
    unit = F.normalize(embedding, dim=1)
    nearest = []
    for rows in torch.arange(len(unit)).split(max(1, _BLOCK // len(unit))):
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        nearest.append(similarity.argmax(1).cpu())
    same: Flags = labels == labels[torch.cat(nearest).numpy()]
    return same


def level_trend(scores: Scores) -> dict[str, float | None]:
    """How a score follows the level of damage.

    Args:
        scores: (levels, N), the score of every image at every level, in ascending order of the levels.

    Returns:
        "spearman", the rank correlation of level and score over all images and levels, None if the score is constant;
        "monotone", the share of steps from a level to the next, within an image, at which the score rises.

    Raises:
        InputError: another shape, or scores that are not finite.
    """
    from scipy.stats import spearmanr

    if scores.ndim != 2 or scores.shape[0] < 2:
        raise InputError(
            f"scores: shape {scores.shape} must be (levels, images) with at least two levels"
        )
    if not np.isfinite(scores).all():
        raise InputError("scores: some are not finite")
    if scores.size == 0:
        return {"spearman": None, "monotone": None}
    levels = np.repeat(np.arange(len(scores)), scores.shape[1])
    constant = float(np.ptp(scores)) == 0
    return {
        "spearman": None if constant else float(spearmanr(levels, scores.ravel()).statistic),
        "monotone": float(np.mean(np.diff(scores, axis=0) > 0)),
    }


def failure_figures(scores: Scores, wrong: Flags) -> dict[str, Any]:
    """ "auroc", "aurc" and "augrc" of a score for finding errors."""
    return {
        "auroc": auroc(scores, wrong),
        "aurc": aurc(scores, wrong),
        "augrc": augrc(scores, wrong),
    }


def detection_figures(inside: Scores, outside: Scores) -> dict[str, Any]:
    """ "auroc", "aupr" and "fpr95" of a score for telling images of another data set from those of the own one."""
    scores = np.concatenate([inside, outside])
    positive = np.arange(len(scores)) >= len(inside)
    return {
        "auroc": auroc(scores, positive),
        "aupr": aupr(scores, positive),
        "fpr95": fpr_at_tpr(scores, positive),
    }


def _expected_errors(scores: Scores, wrong: Flags) -> Scores:
    """Mean number of errors among the k most certain images, k = 1..N, over all orders of images with equal scores."""
    _check(scores, wrong)
    order = np.argsort(scores, kind="stable")
    _, group, sizes = np.unique(scores[order], return_inverse=True, return_counts=True)
    shares = np.bincount(group, weights=wrong[order], minlength=len(sizes)) / sizes
    return np.cumsum(shares[group])


def _one_kind(positive: Flags) -> bool:
    return bool(positive.all() or not positive.any())


def _check(scores: Scores, flags: Flags) -> None:
    if scores.ndim != 1 or scores.shape != flags.shape:
        raise InputError(
            f"scores: shape {scores.shape} must be (N,), and that of the flags {flags.shape} the same"
        )
    if not np.isfinite(scores).all():
        raise InputError("scores: some are not finite")
