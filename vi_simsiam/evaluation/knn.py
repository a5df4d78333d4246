"""Weighted k-nearest-neighbour classification of frozen features.

Wu et al. (arXiv 1805.01978, section 3.4): the k training images of highest cosine similarity s vote
for their class with weight exp(s / T). Nothing is trained, so the accuracy depends on the features
alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vi_simsiam.checks import POSITIVE, at_least, check_fields, limited
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.evaluation.results import pack_bits
from vi_simsiam.inference.forward import nearest


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


def evaluate_knn(features: FeatureSets, config: KnnConfig | None = None) -> dict[str, Any]:
    """Classify the validation images by their neighbours among the training images.

    Writes RUN/knn.json atomically and returns its content. For every encoder "top1" holds a
    fraction, and "correct" which validation images were classified correctly
    (`results.unpack_bits`). "settings" holds the k that was used: fewer training images than k are
    all neighbours.
    """
    device, labels = features.device, features.train_labels.to(features.device)
    config = config or KnnConfig()
    config = replace(config, k=min(config.k, len(labels)))
    top1, correct = {}, {}
    for encoder, train in features.train.items():
        val, classes = features.val[encoder].to(device), len(features.classes)
        predicted = classify(train.to(device), labels, val, classes=classes, config=config)
        hits = predicted.cpu() == features.val_labels
        top1[encoder], correct[encoder] = hits.double().mean().item(), pack_bits(hits)
    body = {"settings": asdict(config), "top1": top1, "correct": correct}
    return features.write("knn", body, ("torch", "torchvision", "numpy", "pillow"))


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
