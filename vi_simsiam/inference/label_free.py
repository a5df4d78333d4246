"""Scores of uncertainty that need no labels, of embeddings that may be mapped from a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vi_simsiam.engine.forward import nearest

NEIGHBOURS = 20
"""Neighbours of the score "knn_distance"."""
_BLOCK = 4096  # rows in memory at a time

Score = Literal["kappa", "embedding_norm", "knn_distance", "mahalanobis"]


class Meaning(NamedTuple):
    """A score in words."""

    title: str
    rises: bool
    """True if it is high for uncertain images."""


SCORES: dict[Score, Meaning] = {
    "kappa": Meaning("κ / (D − 1)", rises=False),
    "embedding_norm": Meaning("length of the embedding", rises=False),
    "knn_distance": Meaning("distance to the nearest neighbours", rises=True),
    "mahalanobis": Meaning("Mahalanobis distance", rises=True),
}


class Gaussian:
    """One Gaussian about the mean of all embeddings, with the covariance of Ledoit and Wolf.

    It is that of `sklearn.covariance.LedoitWolf` ("A well-conditioned estimator for
    large-dimensional covariance matrices", 2004), which needs all rows in memory: here they are
    read block by block, so that memory is bounded by F^2 numbers.

    Args:
        rows: (N, F) float32 embeddings, N >= 1, in memory or mapped from a file.
    """

    def __init__(self, rows: NDArray[np.float32]) -> None:
        count, width = rows.shape
        self._mean = sum(block.sum(0) for block in _blocks(rows)) / count
        scatter, fourth = np.zeros((width, width)), 0.0
        for block in _blocks(rows):
            away = block - self._mean
            scatter += away.T @ away
            fourth += float(np.square(np.square(away).sum(1)).sum())
        covariance = scatter / count
        level, total = float(np.trace(covariance)) / width, float(np.square(covariance).sum())
        distance = total - width * level**2
        noise = min((fourth / count - total) / count, distance)
        share = noise / distance if noise > 0 else 0.0
        values, vectors = np.linalg.eigh((1 - share) * covariance + share * level * np.eye(width))
        # precision = root root^T, with a zero where all embeddings are the same.
        kept = values > values[-1] * width * np.finfo(np.float64).eps
        self._root = vectors * np.where(kept, values, np.inf) ** -0.5

    def distances(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """Squared Mahalanobis distances of embeddings (M, F) to the mean, (M,)."""
        found = [np.square((block - self._mean) @ self._root).sum(1) for block in _blocks(rows)]
        return np.concatenate(found)


def knn_distances(cosines: NDArray[np.float32]) -> NDArray[np.float64]:
    """1 minus the mean cosine to the nearest embeddings, (M,) of cosines (M, K), K >= 1."""
    distances: NDArray[np.float64] = 1 - cosines.mean(1, dtype=np.float64)
    return distances


def lengths(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Euclidean lengths of embeddings (M, F), (M,)."""
    return np.concatenate([np.linalg.norm(block, axis=1) for block in _blocks(rows)])


def measured(score: Score, rows: NDArray[np.float32], device: torch.device) -> NDArray[np.float64]:
    """A score of every embedding among all of them, (N,) float64.

    No embedding is its own neighbour.

    Args:
        score: any but "kappa".
        rows: (N, F) embeddings, N >= 1, for "knn_distance" N >= 2.
        device: where neighbours are computed.
    """
    if score == "embedding_norm":
        return lengths(rows)
    if score == "mahalanobis":
        return Gaussian(rows).distances(rows)
    near = nearest(rows, None, NEIGHBOURS, device=device)
    return np.concatenate([knn_distances(cosines.cpu().numpy()) for _, cosines in near])


def _blocks(rows: NDArray[np.float32]) -> Iterator[NDArray[np.float64]]:
    for start in range(0, len(rows), _BLOCK):
        yield rows[start : start + _BLOCK].astype(np.float64)
