"""Weighted k-nearest-neighbour classification of a run's frozen features, see `engine.knn`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from vi_simsiam.engine.knn import KnnConfig, classify
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.evaluation.results import pack_bits


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
