"""Linear probe: a linear classifier trained on frozen features.

LARS (You et al., arXiv 1708.03888) with a cosine schedule, as in the linear evaluation of SimSiam
(Chen and He, arXiv 2011.10566). Accuracies are those of un-augmented views.

Preset "default" trains on standardised features of the un-augmented view and treats all encoders
alike, so its figures compare encoders with each other rather than with published ones. At least 500
steps are made, without which LARS, whose weights grow by a bounded share a step, does not converge
on small data sets. For pixels and random networks on 8,000 Fashion-MNIST images its accuracy is
within one point of the best of scikit-learn's LogisticRegression over C = 1, 0.1 and 0.01.

Preset "paper" is the protocol of Nakamura et al. (arXiv 2203.11437, section 4.1): LARS with
learning rate 1.6, weight decay 0, momentum 0.9 and batch 512, on the features as they are, and a
random fifth of the training set held out. The trained encoder's classifier is trained on random
crops and flips (see `random_features`), drawn anew in every epoch on a GPU; the 4 passes on a CPU
are ours. It does not state the number of epochs or the schedule: 90 and the cosine are SimSiam's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam.errors import InputError, none_of
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.evaluation.results import pack_bits
from vi_simsiam.text import counted

CPU_PASSES = 4
"""Most passes of random views on a CPU, where the network takes most of the time."""
_SMALLEST_SHARE = 0.01


@dataclass(frozen=True)
class LinearConfig:
    """Settings of the linear probe."""

    lr: float = 1.6
    """Learning rate at the start; a cosine takes it to 0."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 512
    """At most; never more than the training images."""
    epochs: int = 100
    min_steps: int = 500
    """Least number of optimiser steps, with more epochs if need be."""
    held_out: float = 0.0
    """Share of the training images that is not trained on and reported apart."""
    standardize: bool = True
    """Shift and scale every feature to mean 0 and deviation 1 over the images trained on."""
    augmented: int | None = 0
    """Passes of random views of the training images, whose features the epochs take turns with; 0
    for the un-augmented features, None for as many passes as epochs on a GPU and at most 4 on a
    CPU. For the trained encoder only."""
    seed: int = 0
    """Key of the initial weights, the order of images, and the choice of those held out."""
    inferred: tuple[str, ...] = ()
    """Settings that the protocol's source does not state."""


LINEAR_PRESETS = {
    "default": LinearConfig(),
    "paper": LinearConfig(
        epochs=90,
        min_steps=0,
        held_out=0.2,
        standardize=False,
        augmented=None,
        inferred=("epochs", "schedule", "standardize", "augmented"),
    ),
}


def linear_preset(name: str) -> LinearConfig:
    """The named preset; InputError if there is none."""
    if name not in LINEAR_PRESETS:
        raise none_of("preset", name, LINEAR_PRESETS)
    return LINEAR_PRESETS[name]


def evaluate_linear(features: FeatureSets, config: LinearConfig | None = None) -> dict[str, Any]:
    """Train a probe on the training features of every encoder, and measure its accuracy.

    Writes RUN/linear.json atomically and returns its content. "top1" and "top5" hold fractions for
    every encoder, as do "train_top1" (on the images trained on) and "held_out_top1" (None if none
    are held out). With fewer than five classes "top5" counts as many as there are, given by
    "top5_counts". "correct" holds which validation images were classified correctly
    (`results.unpack_bits`). "moved_top1" is that of the moved validation images, all others are of
    un-augmented images.

    Raises:
        InputError: too few training images to hold any out.
    """
    config, device, labels = config or LinearConfig(), features.device, features.train_labels
    passes = config.augmented
    if passes is None:
        passes = config.epochs if device.type == "cuda" else min(config.epochs, CPU_PASSES)
    kept, held_out = hold_out(len(labels), config.held_out, config.seed)
    known, classes = labels[kept].to(device), len(features.classes)
    found: dict[str, dict[str, Any]] = {}
    for encoder, train in features.train.items():
        views = _views(features, kept, passes) if encoder == "trained" and passes else None
        probe = LinearProbe.fit(train[kept].to(device), known, classes, config, views)
        fitted = probe(train.to(device)).cpu()
        found[encoder] = {
            **validated(partial(_logits, probe, device), features, encoder),
            "train_top1": accuracy(fitted[kept], labels[kept], 1),
        }
        if len(held_out):
            found[encoder]["held_out_top1"] = accuracy(fitted[held_out], labels[held_out], 1)
    body = {
        "settings": {
            **asdict(config),
            "augmented": passes,
            "augmented_encoders": ["trained"] if passes else [],
            "optimizer": "LARS",
            "schedule": "cosine",
            "steps": _steps(config, len(kept)),
        },
        "held_out_images": len(held_out),
        "top5_counts": min(5, classes),
        "held_out_top1": None,
        **by_measure(found),
    }
    packages = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "pillow")
    return features.write("linear", body, packages)


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier, and the standardisation of the features it was trained on."""

    shift: Tensor
    """(F,) float32; features enter as (x - shift) * scale."""
    scale: Tensor
    """(F,) float32."""
    layer: nn.Linear

    @classmethod
    def fit(
        cls,
        features: Tensor,
        labels: Tensor,
        classes: int,
        config: LinearConfig,
        views: Iterator[tuple[Tensor, Tensor]] | None = None,
    ) -> LinearProbe:
        """Train a probe. The same inputs and seed give the same probe, bit for bit on a CPU.

        Args:
            features: (N, F) float32.
            labels: (N,) int64 in [0, classes), on the same device.
            classes: number of classes.
            config: how to train.
            views: gives the features (n, F) and labels (n,) of each epoch; None for `features` in
                every epoch, which always give the standardisation and the number of steps.
        """
        from timm.optim import Lars  # type: ignore[attr-defined]

        count, width = features.shape
        shift, scale = features.new_zeros(width), features.new_ones(width)
        if config.standardize:
            shift, scale = standardization(features)
        # Drawn on the CPU: every device starts from the same weights and takes the same batches.
        generator = torch.Generator().manual_seed(config.seed)
        layer = nn.Linear(width, classes, device="meta").to_empty(device=features.device)
        with torch.no_grad():
            layer.weight.copy_(0.01 * torch.randn(classes, width, generator=generator))
            layer.bias.zero_()
        # With layer-wise adaptation also at weight decay 0.
        optimizer = Lars(
            layer.parameters(),
            config.lr,
            config.momentum,
            weight_decay=config.weight_decay,
            always_adapt=True,
        )
        inputs = (features - shift) * scale
        total, step = _steps(config, count), 0
        while step < total:
            if views is not None:
                drawn, labels = (tensor.to(features.device) for tensor in next(views))
                inputs = (drawn - shift) * scale
            batch = min(config.batch_size, len(inputs))
            order = torch.randperm(len(inputs), generator=generator).to(features.device)
            for start in range(0, min(len(inputs) // batch, total - step) * batch, batch):
                chosen = order[start : start + batch]
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / total))
                loss = F.cross_entropy(layer(inputs[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
        return cls(shift, scale, layer)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Logits (N, classes) of features (N, F)."""
        logits: Tensor = self.layer((features - self.shift) * self.scale)
        return logits


def _logits(probe: LinearProbe, device: torch.device, features: Tensor) -> Tensor:
    return probe(features.to(device)).cpu()


def hold_out(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split range(count) at random: indices to train on, and round(share * count) held out.

    Both are int64 and sorted.

    Raises:
        InputError: a positive share of so few images is no image, or all.
    """
    held = round(share * count)
    if share > 0 and not 0 < held < count:
        raise InputError(
            f"held_out: {share} of {counted(count, 'training image')} is {held}; it must be at "
            "least 1, and not all: give more images, or use a preset that holds none out"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values


def accuracy(logits: Tensor, labels: Tensor, counted: int) -> float:
    """Share of rows of logits (N, classes) whose label (N,) is among the `counted` highest."""
    from torchmetrics.functional.classification import multiclass_accuracy

    share = multiclass_accuracy(
        logits, labels, num_classes=logits.shape[1], top_k=counted, average="micro"
    )
    # The exact fraction instead of its float32: files hold 0.853, not 0.8529999852180481.
    return round(float(share) * len(labels)) / len(labels)


def validated(
    probe: Callable[[Tensor], Tensor], features: FeatureSets, encoder: str
) -> dict[str, Any]:
    """ "top1", "top5", "correct" and, of moved images, "moved_top1" of a result file.

    `probe` gives logits (M, classes) of an encoder's features (M, F).
    """
    logits, labels = probe(features.val[encoder]), features.val_labels
    found = {
        "top1": accuracy(logits, labels, 1),
        "top5": accuracy(logits, labels, min(5, logits.shape[1])),
        "correct": pack_bits(logits.argmax(1) == labels),
    }
    if features.moved:
        found["moved_top1"] = accuracy(probe(features.moved[encoder]), labels, 1)
    return found


def by_measure(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{measure: {encoder: value}} of {encoder: {measure: value}}."""
    measures = next(iter(found.values()))
    return {name: {encoder: each[name] for encoder, each in found.items()} for name in measures}


def _views(features: FeatureSets, kept: Tensor, passes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented features and labels of the images in `kept`: the first passes in turn."""
    assert features.augmented is not None
    start, labels = features.augmented, features.train_labels
    is_kept = torch.zeros(len(labels), dtype=torch.bool)
    is_kept[kept] = True

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        for drawn, index in itertools.islice(start(), passes):
            chosen = is_kept[index]
            yield drawn[chosen], labels[index[chosen]]

    # `cycle` keeps every pass in memory, which is too much where there is one for each epoch.
    if passes <= CPU_PASSES:
        return itertools.cycle(once())
    return itertools.chain.from_iterable(once() for _ in itertools.count())


def _steps(config: LinearConfig, count: int) -> int:
    return max(config.epochs * (count // min(config.batch_size, count)), config.min_steps)


def standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation of every feature: (F,) each, of features (N, F).

    A deviation below a hundredth of the largest is raised to that, so that a feature that hardly
    varies (a corner pixel) is not scaled up to the size of the others.
    """
    deviation = features.std(0, correction=0)
    smallest = (_SMALLEST_SHARE * deviation.max()).clamp_min(torch.finfo(deviation.dtype).tiny)
    return features.mean(0), 1 / deviation.clamp_min(smallest)
