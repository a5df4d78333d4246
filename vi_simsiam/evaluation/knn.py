"""Weighted k-nearest-neighbour classification of a run's frozen features, see `engine.knn`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from vi_simsiam.engine.knn import KnnConfig, classify
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.evaluation.results import FEW_LABELS, pack_bits

DRAWS = 10
"""Draws of the few labelled images; their accuracies are averaged."""


def evaluate_knn(features: FeatureSets, config: KnnConfig | None = None) -> dict[str, Any]:
    """Classify the validation images by their neighbours among the training images.

    Writes RUN/knn.json atomically and returns its content. For every encoder "top1" holds a
    fraction, and "correct" which validation images were classified correctly
    (`results.unpack_bits`); "moved_top1" is the fraction of the moved ones, {} without them, and
    "few_labels_top1" that by the nearest one of `results.FEW_LABELS` training images of each class,
    averaged over `DRAWS` draws of them. "settings" holds the k that was used: fewer training images
    than k are all neighbours.
    """
    device, labels = features.device, features.train_labels
    config = config or KnnConfig()
    config = replace(config, k=min(config.k, len(labels)))

    def hits(
        encoder: str, queries: Tensor, config: KnnConfig, known: Tensor | slice = slice(None)
    ) -> Tensor:
        train, classes = features.train[encoder][known].to(device), len(features.classes)
        given = labels[known].to(device)
        found = classify(train, given, queries.to(device), classes=classes, config=config)
        return found.cpu() == features.val_labels

    found = {encoder: hits(encoder, queries, config) for encoder, queries in features.val.items()}
    moved = {encoder: hits(encoder, queries, config) for encoder, queries in features.moved.items()}
    nearest, draws = replace(config, k=1), [_few_of_each(labels, seed) for seed in range(DRAWS)]
    few = {
        encoder: torch.cat([hits(encoder, queries, nearest, drawn) for drawn in draws])
        for encoder, queries in features.val.items()
    }

    def top1(hits: dict[str, Tensor]) -> dict[str, float]:
        return {encoder: right.double().mean().item() for encoder, right in hits.items()}

    body = {
        "settings": asdict(config),
        "top1": top1(found),
        "moved_top1": top1(moved),
        "few_labels_top1": top1(few),
        "correct": {encoder: pack_bits(right) for encoder, right in found.items()},
    }
    return features.write("knn", body, ("torch", "torchvision", "numpy", "pillow"))


def _few_of_each(labels: Tensor, seed: int) -> Tensor:
    """Indices of `FEW_LABELS` random images of each class, or of all where it has fewer."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == each][:FEW_LABELS] for each in labels.unique()])
