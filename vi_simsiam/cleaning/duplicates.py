"""Groups of images that are copies of each other, exact or nearly so."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.cleaning.facts import SIDE
from vi_simsiam.engine.forward import nearest

CANDIDATES = 8
"""Nearest images by the cosine of embeddings that are compared pixel by pixel."""
THRESHOLD = 0.9
"""Correlation of thumbnails from which two images are near duplicates."""
_CROPS = (1.0, 0.97, 0.95, 0.93, 0.9)  # sides of the crops that are tried
_PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
_ALIKE = 0.7  # correlation of brightness from which crops are tried, too
_BLOCK = 1024  # pairs compared at a time


class Copies(NamedTuple):
    """Duplicates among N images."""

    similarity: NDArray[np.float64]
    """(N,) largest correlation with a candidate, 1 for exact copies; 0 without a candidate."""
    other: NDArray[np.int64]
    """(N,) the first image that was found to be a copy of this one, for all images of a group but
    its first; -1 for the others."""
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
    or more, as they are or once either is cropped by up to a tenth of its sides. Groups are the
    connected components of such pairs. Takes N^2 F operations.

    Args:
        embedding: (N, F) in memory or mapped.
        facts: (N,) of `FACTS`.
        device: where neighbours and correlations are computed.
        threshold: least correlation of near duplicates.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(facts)
    _, first, group = np.unique(facts["digest"], return_index=True, return_inverse=True)
    lead = first[group]  # by image, the first with the same pixels
    alone = np.sort(first)
    pairs = _candidates(embedding if len(alone) == count else embedding[alone], device)
    pairs = alone[pairs]
    values = _correlations(facts["thumbnail"], pairs, device)
    similarity = np.where(np.bincount(group)[group] > 1, 1.0, 0.0)
    for column in pairs.T:
        np.maximum.at(similarity, column, values)
    similarity = np.maximum(similarity, similarity[lead])

    near = values >= threshold
    close, strength = pairs[near], values[near]
    edges = np.concatenate([close, np.stack([np.arange(count), lead], 1)])
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(count, count))
    component = connected_components(graph, directed=False)[1]
    heads = np.unique(component, return_index=True)[1]
    other, pair = np.full(count, -1), np.zeros(count)
    partners: dict[int, dict[int, float]] = {}
    for (a, b), value in zip(close.tolist(), strength.tolist(), strict=True):
        partners.setdefault(a, {})[b] = partners.setdefault(b, {})[a] = value
    for row in np.delete(np.arange(count), heads).tolist():
        if lead[row] != row:
            other[row], pair[row] = lead[row], 1.0
            continue
        known = partners[row]
        other[row] = min(known)
        pair[row] = known[min(known)]
    return Copies(similarity, other, pair)


def _candidates(embedding: NDArray[np.float32], device: torch.device) -> NDArray[np.int64]:
    """Pairs (P, 2) of an image and one of its nearest, each pair once, the smaller number first."""
    pairs = [np.empty((0, 2), np.int64)]
    start = 0
    for which, _ in nearest(embedding, None, CANDIDATES, device=device):
        rows = np.repeat(np.arange(start, start + len(which)), which.shape[1])
        pairs.append(np.sort(np.stack([rows, which.cpu().numpy().ravel()], 1), axis=1))
        start += len(which)
    return np.unique(np.concatenate(pairs), axis=0)


def _correlations(
    thumbnails: NDArray[np.uint8], pairs: NDArray[np.int64], device: torch.device
) -> NDArray[np.float64]:
    """Correlation of the details of each pair (P, 2) of thumbnails, best aligned, (P,)."""
    crops = _crops(device)
    found = [np.empty(0)]
    for start in range(0, len(pairs), _BLOCK):
        block = thumbnails[pairs[start : start + _BLOCK]]
        images = torch.from_numpy(block).to(device).float()
        values = _details(images).prod(1).sum(1)
        alike = _unit(images.flatten(-2)).prod(1).sum(1) >= _ALIKE
        images, best = images[alike], values[alike]
        whole = _details(images)
        for rows, columns in crops:
            cut = _details(rows @ images @ columns.mT)
            for cropped, other in ((0, 1), (1, 0)):
                best = torch.maximum(best, (cut[:, cropped] * whole[:, other]).sum(1))
        values[alike] = best
        found.append(values.double().cpu().numpy())
    return np.concatenate(found)


def _crops(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Matrices (24, 24) for rows and columns that stretch a part of an image to the whole."""
    places = torch.arange(SIDE, dtype=torch.float32)
    found: list[tuple[Tensor, Tensor]] = []
    for share in _CROPS:
        sides = []
        for shift in _PLACES if share < 1 else _PLACES[:1]:
            at = ((places + 0.5) * share + shift * (1 - share) * SIDE - 0.5).clamp(0, SIDE - 1)
            weight = (1 - (at[:, None] - places).abs()).clamp_min(0)  # linear interpolation
            sides.append(weight.to(device))
        found += itertools.product(sides, sides)
    return found


def _details(images: Tensor) -> Tensor:
    """Differences of neighbouring pixels of (..., 24, 24), without their mean, of unit length."""
    steps = [images.diff(dim=axis).flatten(-2) for axis in (-2, -1)]
    return _unit(torch.cat(steps, -1))


def _unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values - values.mean(-1, keepdim=True), dim=-1)
