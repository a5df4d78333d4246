"""Whether a predicted concentration means what it says: how near another view of the image really comes.

For a Power Spherical distribution E[mu.z] = kappa / (kappa + D - 1) (De Cao and Aziz, arXiv 2006.04437), so a prediction
of view v claims how large its cosine with the representation of another view g is on average. Over many images the
claims can be held against the cosines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.views import GLOBAL_VIEWS, add_offsets, draw_table
from vi_simsiam.errors import InputError
from vi_simsiam.ops.augment import augment

BINS = 15


def augmented_views(
    images: PackedImages,
    chosen: NDArray[np.int64],
    policy: AugmentConfig,
    *,
    views: int,
    seed: int,
    device: torch.device,
    batch_size: int = 64,
) -> Iterator[Tensor]:
    """Yield random global views of images in order, (views, B, 3, size, size) float32 on `device`, batch by batch.

    A view is a function of the seed, the image's number in `images` and the view's number.

    Args:
        images: N decoded images.
        chosen: numbers of the images to look at.
        policy: the random views; of the local ones there are none.
        views: how many of each image, 2 to 16.
        seed: key of the views.
        device: where they are made.
        batch_size: images at a time.

    Raises:
        InputError: a number of views that is out of range.
    """
    if not GLOBAL_VIEWS <= views <= GLOBAL_VIEWS + 14:
        raise InputError(f"views: {views} must be between {GLOBAL_VIEWS} and {GLOBAL_VIEWS + 14}")
    # More global views are what the table calls local ones, drawn like the global ones.
    policy = dataclasses.replace(
        policy,
        local_views=views - GLOBAL_VIEWS,
        local_size=policy.size,
        local_scale=policy.crop_scale,
    )
    for start in range(0, len(chosen), batch_size):
        samples = chosen[start : start + batch_size]
        heights, widths = images.heights[samples], images.widths[samples]
        lengths = 3 * heights.astype(np.int64) * widths
        # Only the bytes of these images: the file that the images are mapped from may be larger than the memory.
        firsts = images.offsets[samples]
        pixels = np.concatenate(
            [images.pixels[a : a + n] for a, n in zip(firsts, lengths, strict=True)]
        )
        table = draw_table(
            policy, seed=seed, epoch=0, samples=samples, heights=heights, widths=widths
        )
        add_offsets(table, np.cumsum(lengths) - lengths)
        yield augment(
            torch.from_numpy(pixels).to(device), torch.from_numpy(table).to(device), policy.size
        )


def pair_cosines(loc: Tensor, concentration: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """What the predictions of V views claim of each other, and what is the case.

    Args:
        loc: (V, B, D) mean directions mu, unit vectors.
        concentration: (V, B) kappa.
        projection: (V, B, D) projections z of the same views, of any length.

    Returns:
        Expected cosines kappa_v / (kappa_v + D - 1) and observed ones mu_v.z_g / |z_g|, for every ordered pair v != g:
        two tensors (V (V - 1), B).
    """
    count, dim = len(loc), loc.shape[-1]
    cosines = torch.einsum("vbd,gbd->vgb", loc, F.normalize(projection, dim=-1))
    expected = (concentration / (concentration + dim - 1)).unsqueeze(1).expand_as(cosines)
    others = ~torch.eye(count, dtype=torch.bool, device=loc.device)
    return expected[others], cosines[others]


def calibration(
    expected: NDArray[np.float64], observed: NDArray[np.float64], bins: int = BINS
) -> dict[str, Any]:
    """Hold expected cosines against observed ones, in bins of equally many pairs ordered by the expected cosine.

    Equal expectations are never parted: a constant concentration has one bin, and the noise of its pairs averages out.

    Args:
        expected: (P,) float64.
        observed: (P,) float64.
        bins: how many, at most.

    Returns:
        "pairs"; the means "expected" and "observed"; "error", the mean over all pairs of the distance between the two
        means of the pair's bin; and "bins", a dictionary "expected", "observed", "count" for each.

    Raises:
        InputError: no pairs, other shapes, or numbers that are not finite.
    """
    if expected.ndim != 1 or expected.shape != observed.shape or not len(expected):
        raise InputError(
            f"expected, observed: shapes {expected.shape} and {observed.shape} must be (P,) with P >= 1"
        )
    if not (np.isfinite(expected).all() and np.isfinite(observed).all()):
        raise InputError("expected, observed: some are not finite; the model's weights are damaged")
    if bins < 1:
        raise InputError(f"bins: {bins} must be at least 1")
    first = np.searchsorted(np.sort(expected), expected, side="left")
    number = first * bins // len(expected)
    counts = np.bincount(number, minlength=bins)
    totals = {
        "expected": np.bincount(number, weights=expected, minlength=bins),
        "observed": np.bincount(number, weights=observed, minlength=bins),
    }
    rows = [
        {
            **{name: float(total[b] / counts[b]) for name, total in totals.items()},
            "count": int(counts[b]),
        }
        for b in np.flatnonzero(counts)
    ]
    return {
        "pairs": len(expected),
        "expected": float(expected.mean()),
        "observed": float(observed.mean()),
        "error": float(np.abs(totals["observed"] - totals["expected"]).sum() / len(expected)),
        "bins": rows,
    }
