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
crops and flips (see `augmented`), drawn anew in every epoch on a GPU; the 4 passes on a CPU are
ours. It does not state the number of epochs or the schedule: 90 and the cosine are SimSiam's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam.checks import require
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.evaluation.augmented import default_passes
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.evaluation.results import pack_bits, write_result
from vi_simsiam.text import counted

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

    def __post_init__(self) -> None:
        passes = 0 if self.augmented is None else self.augmented
        for name, holds, accepted in (
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("min_steps", self.min_steps >= 0, "at least 0"),
            ("held_out", 0 <= self.held_out < 1, "at least 0 and below 1"),
            ("augmented", passes >= 0, "at least 0, or None"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
        ):
            require(name, getattr(self, name), holds, accepted)


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
    (`results.unpack_bits`). All accuracies are those of un-augmented images.

    Raises:
        InputError: too few training images to hold any out, or passes of augmented images for
            features that come without the images.
    """
    config, device, labels = config or LinearConfig(), features.device, features.train_labels
    if config.augmented != 0 and features.augmented is None:
        raise InputError(
            f"augmented: {config.augmented} is not accepted; it must be 0 for features that come "
            "without their images"
        )
    passes = config.augmented
    if passes is None:
        passes = default_passes(config.epochs, device)
    classes = len(features.classes)
    counted = min(5, classes)
    kept, held_out = hold_out(len(labels), config.held_out, config.seed)
    scores: dict[str, dict[str, float]] = {
        name: {} for name in ("top1", "top5", "train_top1", "held_out_top1")
    }
    correct = {}
    for encoder, train in features.train.items():
        views = _views(features, kept, passes) if encoder == "trained" and passes else None
        known = labels[kept].to(device)
        probe = LinearProbe.fit(train[kept].to(device), known, classes, config, views)
        logits = probe(features.val[encoder].to(device)).cpu()
        scores["top1"][encoder] = accuracy(logits, features.val_labels, 1)
        scores["top5"][encoder] = accuracy(logits, features.val_labels, counted)
        correct[encoder] = pack_bits(logits.argmax(1) == features.val_labels)
        fitted = probe(train.to(device)).cpu()
        scores["train_top1"][encoder] = accuracy(fitted[kept], labels[kept], 1)
        if len(held_out):
            scores["held_out_top1"][encoder] = accuracy(fitted[held_out], labels[held_out], 1)
    if features.augmented is not None:
        features.augmented.close()
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
        "top5_counts": counted,
        **scores,
        "held_out_top1": scores["held_out_top1"] or None,
        "correct": correct,
    }
    packages = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "pillow")
    return write_result("linear", features, body, packages)


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
        views: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    ) -> LinearProbe:
        """Train a probe. The same inputs and seed give the same probe, bit for bit on a CPU.

        Args:
            features: (N, F) float32.
            labels: (N,) int64 in [0, classes), on the same device.
            classes: number of classes.
            config: how to train.
            views: maps an epoch to its features (n, F) and labels (n,); None for `features` in
                every epoch, which always give the standardisation and the number of steps.
        """
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
        optimizer = build_optimizer(layer, config)
        inputs = (features - shift) * scale
        total, step, epoch = _steps(config, count), 0, 0
        while step < total:
            if views is not None:
                drawn, labels = (tensor.to(features.device) for tensor in views(epoch))
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
            epoch += 1
        return cls(shift, scale, layer)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Logits (N, classes) of features (N, F)."""
        logits: Tensor = self.layer((features - self.shift) * self.scale)
        return logits


def build_optimizer(layer: nn.Module, config: LinearConfig) -> torch.optim.Optimizer:
    """LARS over the layer's parameters, with layer-wise adaptation also at weight decay 0."""
    from timm.optim import Lars  # type: ignore[attr-defined]

    optimizer: torch.optim.Optimizer = Lars(
        layer.parameters(),
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        always_adapt=True,
    )
    return optimizer


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


def _views(
    features: FeatureSets, kept: Tensor, passes: int
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Map an epoch to augmented features and labels of the images in `kept`: the passes in turn."""
    augmented = features.augmented
    assert augmented is not None
    is_kept = torch.zeros(len(features.train_labels), dtype=torch.bool)
    is_kept[kept] = True

    def views(epoch: int) -> tuple[Tensor, Tensor]:
        drawn, index = augmented.views(epoch % passes)
        chosen = is_kept[index]
        return drawn[chosen], features.train_labels[index[chosen]]

    return views


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
