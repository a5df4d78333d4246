"""Images that are copies of earlier ones, exact or nearly so."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vi_simsiam.cleaning.alignment import aligned_correlation
from vi_simsiam.cleaning.facts import SIDE
from vi_simsiam.engine.forward import nearest

CANDIDATES = 8
"""Nearest images by the cosine of embeddings, and as many by that of small thumbnails, that are
compared pixel by pixel."""
THRESHOLD = 0.95
"""Correlation of aligned thumbnails from which two images are near duplicates."""
_SHRINK = 4  # thumbnails of 12 pixels give candidates
_BLOCK = 1024  # pairs compared at a time


class Copies(NamedTuple):
    """Duplicates among N images."""

    similarity: NDArray[np.float64]
    """(N,) largest correlation with a candidate, 1 for exact copies; 0 without a candidate."""
    other: NDArray[np.int64]
    """(N,) the first image of which this one is a copy; -1 without an earlier one."""
    pair: NDArray[np.float64]
    """(N,) correlation with `other`."""


def find_copies(
    embedding: NDArray[np.float32],
    facts: NDArray[np.void],
    *,
    device: torch.device,
    threshold: float = THRESHOLD,
) -> Copies:
    """Find exact copies by their digests, near ones among the nearest neighbours.

    Two images are near duplicates if the details of their gray thumbnails correlate at `threshold`
    or more, once their rows and columns are scaled and shifted to fit (`aligned_correlation`).
    Candidates are the nearest by embedding, and by brightness at 12 pixels a side for encoders
    that have learned little. Takes N^2 (F + 144) operations.

    Args:
        embedding: (N, F) in memory or mapped.
        facts: (N,) of `FACTS`.
        device: where neighbours and correlations are computed.
        threshold: least correlation of near duplicates.
    """
    count = len(facts)
    _, first, group = np.unique(facts["digest"], return_index=True, return_inverse=True)
    lead = first[group]  # by image, the first with the same pixels
    alone = np.sort(first)
    small = _small(facts["thumbnail"][alone])
    rows = embedding if len(alone) == count else embedding[alone]
    pairs = alone[np.unique(np.concatenate([_near(rows, device), _near(small, device)]), axis=0)]
    values = _correlations(facts["thumbnail"], pairs, device)
    similarity = np.where(np.bincount(group)[group] > 1, 1.0, 0.0)
    for column in pairs.T:
        np.maximum.at(similarity, column, values)
    similarity = np.maximum(similarity, similarity[lead])

    near = values >= threshold
    close, strength = pairs[near], values[near]
    other, pair = np.full(count, -1), np.zeros(count)
    earlier: dict[int, dict[int, float]] = {}
    for (first_row, row), value in zip(close.tolist(), strength.tolist(), strict=True):
        earlier.setdefault(row, {})[first_row] = value
    for row, found in earlier.items():
        other[row] = min(found)
        pair[row] = found[min(found)]
    copied = lead != np.arange(count)
    other[copied], pair[copied] = lead[copied], 1.0
    return Copies(similarity, other, pair)


def _small(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Brightness of thumbnails (N, 48, 48) at 12 pixels a side, less its mean, (N, 144)."""
    side = SIDE // _SHRINK
    blocks = thumbnails.reshape(-1, side, _SHRINK, side, _SHRINK)
    means = blocks.mean((2, 4), dtype=np.float32).reshape(-1, side * side)
    centred: NDArray[np.float32] = means - means.mean(1, keepdims=True)
    return centred


def _near(rows: NDArray[np.float32], device: torch.device) -> NDArray[np.int64]:
    """Pairs (P, 2) of an image and one of its nearest, the smaller number first."""
    pairs = [np.empty((0, 2), np.int64)]
    start = 0
    for which, _ in nearest(rows, None, CANDIDATES, device=device):
        first = np.repeat(np.arange(start, start + len(which)), which.shape[1])
        pairs.append(np.sort(np.stack([first, which.cpu().numpy().ravel()], 1), axis=1))
        start += len(which)
    return np.concatenate(pairs)


def _correlations(
    thumbnails: NDArray[np.uint8], pairs: NDArray[np.int64], device: torch.device
) -> NDArray[np.float64]:
    """Correlation of the details of each pair (P, 2) of thumbnails, aligned, (P,)."""
    found = [np.empty(0)]
    for start in range(0, len(pairs), _BLOCK):
        block = thumbnails[pairs[start : start + _BLOCK]]
        images = torch.from_numpy(block).to(device).float()
        found.append(aligned_correlation(images[:, 0], images[:, 1]).double().cpu().numpy())
    return np.concatenate(found)
