"""Scores of uncertainty that need no labels, of embeddings that may be mapped from a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.engine.forward import Rows, nearest
from vi_simsiam.stages import NAMES as STAGES

NEIGHBOURS = 20
"""Neighbours of the scores "knn_distance" and "neighbour_agreement"."""
AGREEMENT = "neighbour_agreement"
_BLOCK = 4096  # rows in memory at a time

Score = Literal["embedding_norm", "knn_distance", "mahalanobis"]
"""Scores of embeddings."""


class Meaning(NamedTuple):
    """A score in words."""

    title: str
    rises: bool
    """True if it is high for uncertain images."""


SCORES = {
    "kappa": Meaning("κ / (D − 1)", rises=False),
    "embedding_norm": Meaning("length of the embedding", rises=False),
    **{
        f"{name}_norm": Meaning(f"length of the pooled output of {name}", rises=False)
        for name in STAGES
    },
    "knn_distance": Meaning("distance to the nearest neighbours", rises=True),
    "mahalanobis": Meaning("Mahalanobis distance", rises=True),
    AGREEMENT: Meaning("share of neighbours that the seeds have in common", rises=False),
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


def common_neighbours(first: Tensor, second: Tensor) -> Tensor:
    """Share of each image's neighbours in one space that are its neighbours in another, too.

    Args:
        first, second: numbers of the neighbours, (M, K) int64, K >= 1.

    Returns:
        (M,) float64, from 0 to 1.
    """
    return (first.unsqueeze(2) == second.unsqueeze(1)).any(2).double().mean(1)


def neighbour_agreement(
    spaces: Sequence[Rows], among: Sequence[Rows | None], device: torch.device
) -> NDArray[np.float64]:
    """Mean share of neighbours in common over all pairs of R >= 2 spaces, (M,).

    It is the neighbourhood consistency of Park et al. ("Quantifying Representation Reliability in
    Self-Supervised Learning Models", arXiv 2306.00206), with that share as the similarity of two
    neighbourhoods: low where networks that differ in their seed place an image differently.

    Args:
        spaces: embeddings of the images in each space, (M, F) each.
        among: embeddings that neighbours are among, by space, (N, F) each, N >= 1; None for those
            of the images, N >= 2, of which none is its own neighbour.
        device: where neighbours are computed.
    """
    found = [
        nearest(queries, keys, NEIGHBOURS, device=device)
        for queries, keys in zip(spaces, among, strict=True)
    ]
    shares = [
        torch.stack([common_neighbours(*pair) for pair in itertools.combinations(near, 2)]).mean(0)
        for near in ([which for which, _ in blocks] for blocks in zip(*found, strict=True))
    ]
    agreement: NDArray[np.float64] = torch.cat(shares).cpu().numpy()
    return agreement


def lengths(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Euclidean lengths of embeddings (M, F), (M,)."""
    return np.concatenate([np.linalg.norm(block, axis=1) for block in _blocks(rows)])


def measured(score: Score, rows: NDArray[np.float32], device: torch.device) -> NDArray[np.float64]:
    """A score of every embedding among all of them, (N,) float64.

    No embedding is its own neighbour.

    Args:
        score: which one.
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
