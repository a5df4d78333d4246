"""Weighted k-nearest-neighbour classification of a run's frozen features, see `engine.knn`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from vi_simsiam.engine.knn import KnnConfig, classify
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.evaluation.results import pack_bits


def evaluate_knn(features: FeatureSets, config: KnnConfig | None = None) -> dict[str, Any]:
    """Classify the validation images by their neighbours among the training images.

    Writes RUN/knn.json atomically and returns its content. For every encoder "top1" holds a
    fraction, and "correct" which validation images were classified correctly
    (`results.unpack_bits`); "moved_top1" is the fraction of the moved ones, {} without them.
    "settings" holds the k that was used: fewer training images than k are all neighbours.
    """
    device, labels = features.device, features.train_labels.to(features.device)
    config = config or KnnConfig()
    config = replace(config, k=min(config.k, len(labels)))

    def hits(encoder: str, queries: Tensor) -> Tensor:
        given, classes = features.train[encoder].to(device), len(features.classes)
        found = classify(given, labels, queries.to(device), classes=classes, config=config)
        return found.cpu() == features.val_labels

    found = {encoder: hits(encoder, queries) for encoder, queries in features.val.items()}
    moved = {encoder: hits(encoder, queries) for encoder, queries in features.moved.items()}
    body = {
        "settings": asdict(config),
        "top1": {encoder: right.double().mean().item() for encoder, right in found.items()},
        "moved_top1": {encoder: right.double().mean().item() for encoder, right in moved.items()},
        "correct": {encoder: pack_bits(right) for encoder, right in found.items()},
    }
    return features.write("knn", body, ("torch", "torchvision", "numpy", "pillow"))
