"""Nearest neighbours by the cosine of embeddings: exact, and block by block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

_KEYS = 16384
"""Keys in a block."""

Rows = Tensor | NDArray[np.float32]


def nearest(
    queries: Rows, keys: Rows | None, count: int, *, device: torch.device, block: int = 4096
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the keys of largest cosine to every query, in N x K x F operations.

    Args:
        queries: (N, F), in memory or mapped from a file; a row of zeros has cosine 0 to everything.
        keys: (K, F); None for the queries themselves, of which none is its own neighbour.
        count: of neighbours; there are fewer where there are fewer keys.
        device: where to compute.
        block: queries at a time.

    Yields:
        For each block of queries (the last may be smaller): numbers of the keys, (B, count) int64,
        and their cosines, (B, count) float32, falling; equal ones in the order of the keys. Both on
        `device`.
    """
    own = keys is None
    keys = queries if keys is None else keys
    count = min(count, len(keys) - own)
    for start in range(0, len(queries), block):
        rows = _unit(queries[start : start + block], device)
        best = rows.new_empty((len(rows), 0))
        which = torch.empty((len(rows), 0), dtype=torch.int64, device=device)
        for first in range(0, len(keys), _KEYS):
            cosine = rows @ _unit(keys[first : first + _KEYS], device).mT
            if own:
                # Entry (i, j) is an image's cosine to itself where start + i = first + j.
                cosine.diagonal(start - first)[:] = -torch.inf
            values, columns = cosine.topk(min(count, cosine.shape[1]), dim=1)
            # Ordered by column first: the stable sort by cosine keeps that order among equal ones.
            columns, by_column = columns.sort(dim=1)
            which = torch.cat([which, columns + first], dim=1)
            best, order = torch.cat([best, values.gather(1, by_column)], dim=1).sort(
                dim=1, descending=True, stable=True
            )
            which, best = which.gather(1, order)[:, :count], best[:, :count]
        yield which, best


def _unit(rows: Rows, device: torch.device) -> Tensor:
    # A mapped array is read into memory, which also makes it writable, as torch requires.
    tensor = torch.from_numpy(np.array(rows)) if isinstance(rows, np.ndarray) else rows
    return F.normalize(tensor.to(device), dim=1)
