"""Calibration of the concentration, and the agreement of augmented views of an image.

For a Power Spherical distribution E[mu.z] = kappa / (kappa + D - 1) (De Cao and Aziz, arXiv
2006.04437): the prediction of view v implies the mean of its cosine with the representation of
another view g. Over many images these expected cosines are compared with the observed ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.scores import Network, disagreement
from vi_simsiam.inference.forward import random_views

BINS = 15
VIEWS = 4
"""Augmented views of every image: 12 ordered pairs to calibrate on."""


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
    """Yield random global views of images in order, (views, B, 3, size, size) float32 on `device`.

    A view is a function of the seed, the image's number in `images` and the view's number.

    Args:
        images: N decoded images.
        chosen: numbers of the images to view.
        policy: the random views; local ones are left out.
        views: number of views per image, 2 to 16.
        seed: key of the views.
        device: where they are computed.
        batch_size: images at a time.
    """
    for start in range(0, len(chosen), batch_size):
        samples = chosen[start : start + batch_size]
        yield random_views(
            [np.asarray(images.image(number)) for number in samples.tolist()],
            samples,
            policy,
            views=views,
            seed=seed,
            device=device,
            later_epochs=False,
        )


def agreement(
    network: Network,
    images: PackedImages,
    chosen: NDArray[np.int64],
    policy: AugmentConfig,
    *,
    seed: int,
    calibrate: bool = False,
) -> tuple[NDArray[np.float64], dict[str, Any] | None]:
    """The score "view_agreement" of images by `VIEWS` augmented views of each, (N,) float64.

    With `calibrate` also the calibration of the concentrations; None if there are none.
    """
    parts, pairs = [], []
    for views in augmented_views(
        images, chosen, policy, views=VIEWS, seed=seed, device=network.device
    ):
        passed = network(views.flatten(0, 1), targets=calibrate)
        parts.append(disagreement(passed.embedding.unflatten(0, views.shape[:2])))
        if calibrate and passed.concentration is not None:
            outputs = (passed.loc, passed.concentration, passed.target)
            each = [output.unflatten(0, views.shape[:2]) for output in outputs]
            pairs.append([cosines.cpu().flatten() for cosines in pair_cosines(*each)])
    if not pairs:
        return np.concatenate(parts), None
    expected, observed = (torch.cat(each).double().numpy() for each in zip(*pairs, strict=True))
    return np.concatenate(parts), calibration(expected, observed)


def pair_cosines(loc: Tensor, concentration: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Expected and observed cosines of V views, for every ordered pair v != g.

    Args:
        loc: (V, B, D) mean directions mu, unit vectors.
        concentration: (V, B) kappa.
        projection: (V, B, D) projections z of the same views, of any length.

    Returns:
        kappa_v / (kappa_v + D - 1) and mu_v.z_g / |z_g|, two tensors (V (V - 1), B).
    """
    count, dim = len(loc), loc.shape[-1]
    cosines = torch.einsum("vbd,gbd->vgb", loc, F.normalize(projection, dim=-1))
    expected = (concentration / (concentration + dim - 1)).unsqueeze(1).expand_as(cosines)
    others = ~torch.eye(count, dtype=torch.bool, device=loc.device)
    return expected[others], cosines[others]


def calibration(
    expected: NDArray[np.float64], observed: NDArray[np.float64], bins: int = BINS
) -> dict[str, Any]:
    """Compare expected with observed cosines, in bins of equally many pairs by expected cosine.

    Equal expectations share a bin: a constant concentration has one, and the noise of its pairs
    averages out.

    Args:
        expected: (P,) float64, P >= 1.
        observed: (P,) float64.
        bins: the most bins.

    Returns:
        "pairs"; the means "expected" and "observed"; "error", the mean over all pairs of the
        distance between the two means of the pair's bin; and "bins", a dictionary "expected",
        "observed", "count" for each.

    Raises:
        InputError: numbers that are not finite.
    """
    if not (np.isfinite(expected).all() and np.isfinite(observed).all()):
        raise InputError("expected, observed: some are not finite; the model's weights are damaged")
    first = np.searchsorted(np.sort(expected), expected, side="left")
    number = first * bins // len(expected)
    counts = np.bincount(number, minlength=bins)
    sums = [np.bincount(number, weights=each, minlength=bins) for each in (expected, observed)]
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
