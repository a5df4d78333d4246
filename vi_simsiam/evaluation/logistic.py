"""Logistic regression on frozen features: a linear classifier without learning rate or epochs.

Features are standardised as in the linear probe, and scikit-learn's lbfgs minimises the convex

    1/2 |W|^2 + C * sum of the cross-entropies over the training images

C is the value of a small grid with the smallest mean cross-entropy on a random fifth of the
training images; the classifier is then trained on all of them. The validation images choose
nothing. The grid is tried upwards, each solution from the one before and at ten times the
tolerance, until the cross-entropy rises.

Computed in float32: on 8,000 Fashion-MNIST images under a random network the probabilities differ
from those of a solution in float64 (tolerance 1e-8) as much as float64 does at the same tolerance.
One core takes a few seconds for those 512 features, and most of a minute for the 2,352 pixels.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.checks import require
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.evaluation.linear import (
    accuracy,
    by_measure,
    hold_out,
    standardization,
    validated,
)
from vi_simsiam.text import brief_repr

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

_CHOICE_TOLERANCE = 10
"""Factor on the tolerance in the choice of C: cross-entropies move by a thousandth or two."""


@dataclass(frozen=True)
class LogisticConfig:
    """Settings of the logistic regression."""

    c: float | None = None
    """C, the inverse strength of the penalty; None to choose it from `grid`."""
    grid: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """Values of C to try, upwards, until the held-out cross-entropy rises."""
    held_out: float = 0.2
    """Share of the training images for the choice of C."""
    tolerance: float = 1e-4
    """Largest component of the mean loss's gradient at which the solver stops."""
    max_iterations: int = 1000
    seed: int = 0
    """Key of the draw of the held-out images."""

    def __post_init__(self) -> None:
        require("c", self.c, self.c is None or 0 < self.c < math.inf, "a positive number")


def evaluate_logistic(
    features: FeatureSets, config: LogisticConfig | None = None
) -> dict[str, Any]:
    """Fit a logistic regression to the training features of every encoder, and measure it.

    Writes RUN/logistic.json atomically and returns its content. "top1", "top5" and "train_top1"
    hold fractions for every encoder, "correct" which validation images were classified correctly
    (`unpack_bits`). With fewer than five classes "top5" counts as many as there are, given by
    "top5_counts". "c" is the C used and "held_out_loss" the basis of its choice; "converged" is
    False, with the reason in "warnings", where the solver stopped for another reason than its
    tolerance. Computes on the CPU whatever the features' device.

    Raises:
        InputError: too few training images or classes.
    """
    config, classes = config or LogisticConfig(), len(features.classes)
    found: dict[str, dict[str, Any]] = {}
    for encoder, train in features.train.items():
        probe = LogisticProbe.fit(train, features.train_labels, classes, config)
        found[encoder] = {
            **validated(probe.logits, features, encoder),
            "train_top1": accuracy(probe.logits(train), features.train_labels, 1),
            "c": probe.c,
            "held_out_loss": {str(c): loss for c, loss in probe.held_out_loss.items()},
            "iterations": probe.iterations,
            "converged": not probe.warnings,
            "warnings": list(probe.warnings),
        }
    solver = {"solver": "lbfgs", "penalty": "l2", "dtype": "float32", "standardize": True}
    body = {
        "settings": {**asdict(config), **solver},
        "top5_counts": min(5, classes),
        **by_measure(found),
    }
    packages = ("torch", "torchvision", "scikit-learn", "torchmetrics", "numpy", "pillow")
    return features.write("logistic", body, packages)


@dataclass(frozen=True)
class LogisticProbe:
    """A fitted logistic regression with the standardisation of its features; tensors on the CPU."""

    shift: Tensor
    """(F,) float32; features enter as (x - shift) * scale."""
    scale: Tensor
    """(F,) float32."""
    weight: Tensor
    """(classes, F) float32, of the standardised features."""
    bias: Tensor
    """(classes,) float32; minus infinity for a class without training images."""
    c: float
    """C of the fit."""
    held_out_loss: dict[float, float]
    """Mean cross-entropy on the held-out images by the C tried; empty if C was given."""
    iterations: int
    """Iterations of the solver in the last fit."""
    warnings: tuple[str, ...]
    """Warnings of the solver; empty if all fits converged."""

    __repr__ = brief_repr

    @classmethod
    def fit(
        cls,
        train: Tensor,
        labels: Tensor,
        classes: int,
        config: LogisticConfig | None = None,
    ) -> LogisticProbe:
        """Choose C and fit a probe; the smallest C of the grid where no image can be held out.

        Deterministic for the same inputs, library versions and number of threads. Held-out images
        of a class that the others lack are not counted.

        Args:
            train: (N, F) floating point, on any device.
            labels: (N,) int64 in [0, classes).
            classes: number of classes.
            config: how to fit.

        Raises:
            InputError: images of fewer than two classes.
        """
        from sklearn.linear_model import LogisticRegression

        config = config or LogisticConfig()
        train, labels = train.detach().cpu().float(), labels.cpu()
        if len(labels.unique()) < 2:
            raise InputError(
                "labels: the training images are of one class; at least two are accepted"
            )
        c = config.c
        loss: dict[float, float] = {}
        caught: list[str] = []
        if c is None:
            loss, caught = _choose(train, labels, classes, config)
            c = min(loss or config.grid, key=lambda c: (loss.get(c), c))
        shift, scale = standardization(train)
        regression = LogisticRegression(C=c, tol=config.tolerance, max_iter=config.max_iterations)
        weight, bias = _solve(regression, (train - shift) * scale, labels, classes, caught)
        iterations = int(regression.n_iter_.max())
        return cls(shift, scale, weight, bias, c, loss, iterations, tuple(caught))

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits of features (N, F), floating point on any device: (N, classes) float32, CPU."""
        return F.linear((x.cpu().float() - self.shift) * self.scale, self.weight, self.bias)


def _choose(
    train: Tensor, labels: Tensor, classes: int, config: LogisticConfig
) -> tuple[dict[float, float], list[str]]:
    """Mean cross-entropy on the held-out images by C, and warnings of the solver."""
    from sklearn.linear_model import LogisticRegression

    loss: dict[float, float] = {}
    caught: list[str] = []
    if not 0 < round(config.held_out * len(labels)) < len(labels):
        return loss, caught
    kept, held_out = hold_out(len(labels), config.held_out, config.seed)
    held_out = held_out[torch.isin(labels[held_out], labels[kept])]
    if not len(held_out) or len(labels[kept].unique()) < 2:
        return loss, caught
    shift, scale = standardization(train[kept])
    inputs, held_out_inputs = (train[kept] - shift) * scale, (train[held_out] - shift) * scale
    tolerance = _CHOICE_TOLERANCE * config.tolerance
    regression = LogisticRegression(tol=tolerance, max_iter=config.max_iterations, warm_start=True)
    for c in sorted(config.grid):
        regression.set_params(C=c)
        solution = _solve(regression, inputs, labels[kept], classes, caught)
        loss[c] = float(F.cross_entropy(F.linear(held_out_inputs, *solution), labels[held_out]))
        if loss[c] > min(loss.values()):
            break
    return loss, caught


def _solve(
    regression: LogisticRegression, inputs: Tensor, labels: Tensor, classes: int, caught: list[str]
) -> tuple[Tensor, Tensor]:
    """Fit in place, and append the first line of every warning to `caught`.

    Returns:
        Weight (classes, F) and bias (classes,) in float32; the bias of an unseen class is -inf.
    """
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        regression.fit(inputs.numpy(), labels.numpy())
    caught += [f"C = {regression.C}: {str(each.message).splitlines()[0]}" for each in found]
    coefficients = torch.from_numpy(regression.coef_).float()
    intercepts = torch.from_numpy(regression.intercept_).float()
    if len(regression.classes_) == 2:  # scikit-learn gives the log-odds of the second class alone
        coefficients = torch.cat([-coefficients / 2, coefficients / 2])
        intercepts = torch.cat([-intercepts / 2, intercepts / 2])
    weight = torch.zeros(classes, coefficients.shape[1])
    bias = torch.full((classes,), -math.inf)
    seen = torch.from_numpy(regression.classes_)
    weight[seen], bias[seen] = coefficients, intercepts
    return weight, bias
