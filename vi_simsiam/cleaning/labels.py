"""Labels that a classifier, trained on other images, finds doubtful."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vi_simsiam.evaluation.logistic import LogisticConfig, LogisticProbe

FOLDS = 5
_TOLERANCE = 1e-3


class Doubts(NamedTuple):
    """Doubts about N labels."""

    score: NDArray[np.float64]
    """(N,) largest probability of another class minus that of the label, in [-1, 1]; NaN for a
    class of fewer than five images."""
    suggested: NDArray[np.int64]
    """(N,) the most probable class."""
    confident: NDArray[np.bool_]
    """(N,) True for likely errors."""


def doubt(
    embedding: NDArray[np.float32], labels: NDArray[np.int64], classes: int, *, seed: int = 0
) -> Doubts | None:
    """Rank labels by the normalised margin, and find likely errors by confident learning.

    Probabilities are those of a logistic regression fitted to the images of the other four folds.
    A likely error is an image whose most probable class is another one, with a probability of at
    least the mean one of that class's own images (Northcutt et al., "Confident Learning",
    arXiv 1911.00068). Holds N x classes numbers.

    Args:
        embedding: (N, F) in memory or mapped.
        labels: (N,) in [0, classes).
        classes: number of classes.
        seed: of the folds.

    Returns:
        None where fewer than two classes have five images.
    """
    counts = np.bincount(labels, minlength=classes)
    rows = np.flatnonzero(counts[labels] >= FOLDS)
    if len(np.unique(labels[rows])) < 2:
        return None
    order = np.random.default_rng(seed).permutation(len(rows))
    order = order[np.argsort(labels[rows][order], kind="stable")]
    fold = np.empty(len(rows), np.int64)
    fold[order] = np.arange(len(rows)) % FOLDS  # every class is in every fold
    known = torch.from_numpy(labels[rows])
    values = torch.from_numpy(np.array(embedding[rows]))
    found = torch.empty((len(rows), classes))
    config = LogisticConfig(tolerance=_TOLERANCE, seed=seed)
    for number in range(FOLDS):
        inside = torch.from_numpy(fold == number)
        probe = LogisticProbe.fit(values[~inside], known[~inside], classes, config)
        config = LogisticConfig(c=probe.c, tolerance=_TOLERANCE)  # chosen on the first folds
        found[inside] = probe.logits(values[inside]).softmax(1)
    own = found.gather(1, known[:, None])[:, 0]
    usual = torch.zeros(classes).index_add_(0, known, own)
    usual /= torch.from_numpy(counts).clamp_min(1)
    found.scatter_(1, known[:, None], -1)
    most, which = found.max(1)

    score = np.full(len(labels), np.nan)
    suggested = labels.copy()
    confident = np.zeros(len(labels), bool)
    score[rows] = (most - own).double().numpy()
    suggested[rows] = which.numpy()
    confident[rows] = ((most > own) & (most >= usual[which])).numpy()
    return Doubts(score, suggested, confident)
