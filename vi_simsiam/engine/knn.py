"""Weighted k-nearest-neighbour classification of features, and its accuracy during a training.

Wu et al. (arXiv 1805.01978, section 3.4): the k training images of highest cosine similarity s vote
for their class with weight exp(s / T). Nothing is trained, so the accuracy depends on the features
alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from vi_simsiam.checks import POSITIVE, at_least, check_fields, limited
from vi_simsiam.config import TrainConfig
from vi_simsiam.data.cache import cached
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.loader import eval_pixels
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.subsets import at_most, labelled_splits
from vi_simsiam.engine.forward import extract, nearest
from vi_simsiam.errors import InputError

_PIXELS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Pixels of each part's images, by device: they fit a CPU of two cores, and 100 MB of memory."""
_FEWEST, _MOST = 200, 10_000
"""With 200 images an accuracy has a standard error of at most 3.5 %."""
_BATCH = 64  # beside a training little of a GPU's memory is free


@dataclass(frozen=True)
class KnnConfig:
    """Settings of the k-nearest-neighbour classifier."""

    k: int = limited(20, at_least(1))
    """Number of neighbours, or all training images where they are fewer; Wu et al. use 200 for data
    sets of ImageNet's size."""
    temperature: float = limited(0.1, POSITIVE)
    """T: neighbours are weighted by exp(cosine / T). Wu et al. use 0.07."""

    def __post_init__(self) -> None:
        check_fields(self)


@torch.inference_mode()
def classify(
    train: Tensor, labels: Tensor, queries: Tensor, *, classes: int, config: KnnConfig
) -> Tensor:
    """Classes of `queries` by the weighted vote of their k nearest training features.

    Args:
        train: (N, F) float32, N >= 1.
        labels: (N,) int64 in [0, classes).
        queries: (M, F) float32.
        classes: number of classes.
        config: k and temperature; where k exceeds N, all training images vote.

    Returns:
        (M,) int64, on the device of `train`.
    """
    predicted = []
    for neighbours, similarity in nearest(queries, train, config.k, device=train.device):
        # Relative to the nearest neighbour: the vote is the same, and a small temperature does not
        # overflow.
        weights = ((similarity - similarity[:, :1]) / config.temperature).exp()
        votes = weights.new_zeros(len(weights), classes)
        predicted.append(votes.scatter_add_(1, labels[neighbours], weights).argmax(1))
    return torch.cat(predicted)


class OnlineKnn:
    """kNN accuracy of a network in training, on a fixed part of its images (k = 20, T = 0.1).

    The images are drawn by the run's seed and in proportion to the classes, as many of training and
    validation as take a few seconds, and kept in memory. A measurement changes nothing that the
    training uses: the network is in eval mode meanwhile, and no random numbers are drawn.

    Args:
        config: of the run.
        splits: the run's images.
        train: the decoded training images.
        device: of the network.

    Raises:
        InputError: there are no labels, no validation images or fewer than two classes, or too many
            validation images cannot be read.
    """

    def __init__(
        self, config: TrainConfig, splits: Splits, train: PackedImages, device: torch.device
    ) -> None:
        try:
            sources = labelled_splits(replace(splits, train=train))
        except InputError as error:
            raise InputError(f"knn_every: {str(error).removeprefix('data: ')}") from error
        self._size, self._device = config.augment.size, device
        self._constants = config.augment.constants
        count = min(max(_PIXELS[device.type] // self._size**2, _FEWEST), _MOST)
        self._parts: list[ArraySource] = []
        for source in sources.values():
            images, _ = cached(
                at_most(source, count, config.seed),
                cache_dir=config.cache_dir,
                workers=config.workers,
            )
            squares = np.concatenate(
                [pixels for pixels, _ in eval_pixels(images, self._size, _BATCH, workers=0)]
            )
            self._parts.append(ArraySource(squares, images.labels, images.classes, images.name))

    def measure(self, backbone: nn.Module) -> float | None:
        """Return the accuracy of a backbone's features, from 0 to 1; None unless all are finite."""
        try:
            train, val = (
                extract(
                    backbone,
                    part,
                    size=self._size,
                    device=self._device,
                    workers=0,
                    batch_size=_BATCH,
                    constants=self._constants,
                ).to(self._device)
                for part in self._parts
            )
        except InputError:  # the training itself may go on: it uses other statistics
            return None
        known, expected = (torch.from_numpy(part.labels) for part in self._parts)
        classes = len(self._parts[0].classes or ())
        labels = known.to(self._device)
        predicted = classify(train, labels, val, classes=classes, config=KnnConfig())
        return (predicted.cpu() == expected).double().mean().item()
