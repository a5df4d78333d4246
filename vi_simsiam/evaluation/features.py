"""Frozen features of a run's images, computed once for every evaluation.

Three encoders are compared on the same images: the trained backbone, the same backbone before
training, and the pixels themselves. An accuracy means little without those two beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vi_simsiam.backbones import build_backbone
from vi_simsiam.config import TrainConfig
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.loader import eval_loader
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.data.subsets import subset
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.run import Run
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.augmented import AugmentedFeatures
from vi_simsiam.inference.forward import extract
from vi_simsiam.text import brief_repr, counted

ENCODERS = ("trained", "untrained", "pixels")
"""In the order of every result."""
CALIBRATION_IMAGES = 10_000
"""Most training images for the BatchNorm statistics of an untrained backbone."""
PIXELS_SIZE = 32
"""Largest side of the images behind the pixel features."""


@dataclass(frozen=True)
class FeatureSets:
    """Features of the training and validation images under every encoder; tensors on the CPU."""

    path: Path
    """Run folder, where results are written."""
    data: str
    """Name of the data set."""
    classes: tuple[str, ...]
    train: dict[str, Tensor]
    """Per encoder (N, F) float32."""
    train_labels: Tensor
    """(N,) int64."""
    val: dict[str, Tensor]
    """Per encoder (M, F) float32."""
    val_labels: Tensor
    """(M,) int64."""
    device: torch.device
    """Device of the evaluations."""
    unreadable: int = 0
    """Images left out because they cannot be read."""
    augmented: AugmentedFeatures | None = None
    """The trained encoder's features of random views of the training images, computed lazily."""

    __repr__ = brief_repr


def collect(
    run: Run, *, report: Callable[[str], None] | None = None, world: World | None = None
) -> FeatureSets:
    """Compute the features of a run's training and validation images under the three encoders.

    Args:
        run: a run with labelled training and validation images.
        report: called with a short phrase at the start of every stage.
        world: ranks that share the work, all of which must call; None for this process alone.

    Raises:
        InputError: the data has no labels or no validation images, or too many files cannot be
            read.
    """
    report = report or (lambda phrase: None)
    sources: dict[str, PackedImages] = {}
    unreadable = 0
    for split, source in labelled_splits(run.splits).items():
        report(f"reading the {split} images")
        sources[split], failures = run.readable(source)
        unreadable += len(failures)
    size, device, workers = run.config.augment.size, run.device, run.workers

    report("calibrating the untrained encoder")
    train, trained = sources["train"], run.model.backbone
    untrained = untrained_backbone(run.config, train, device=device, workers=workers)
    features: dict[str, dict[str, Tensor]] = {split: {} for split in sources}
    for split, source in sources.items():
        images = counted(len(source), f"{split} image")
        for name, backbone in (("trained", trained), ("untrained", untrained)):
            report(f"{name} features of {images}")
            features[split][name] = extract(
                backbone, source, size=size, device=device, workers=workers, world=world
            )
        report(f"pixels of {images}")
        features[split]["pixels"] = pixels(source, size, workers=workers)
    return FeatureSets(
        path=run.path,
        data=run.splits.name,
        classes=train.classes or (),
        train=features["train"],
        train_labels=torch.from_numpy(train.labels),
        val=features["val"],
        val_labels=torch.from_numpy(sources["val"].labels),
        device=device,
        unreadable=unreadable,
        augmented=AugmentedFeatures(
            trained, train, size=size, device=device, workers=workers, report=report
        ),
    )


def labelled_splits(splits: Splits) -> dict[str, ImageSource]:
    """The sources "train" and "val" of a data set, on which runs can be evaluated.

    Raises:
        InputError: one of them is missing, empty or has no labels, there are fewer than two
            classes, or the two parts have other classes.
    """
    name, train, val = splits.name, splits.train, splits.val
    needs = "evaluation needs class folders under train/ and val/ (figures and training do not)"
    if train.labels is None:
        raise InputError(f"data: {name} has no labels; {needs}")
    if len(train) == 0:
        raise InputError(f"data: {name} has no training images; {needs}")
    if val is None or len(val) == 0:
        raise InputError(
            f"data: {name} has no validation images; {needs}; training with --held-out 0.2 sets a "
            "fifth apart"
        )
    if val.labels is None:
        raise InputError(f"data: the validation images of {name} have no labels; {needs}")
    if len(train.classes or ()) < 2:
        raise InputError(f"data: {name} has one class; evaluation needs at least two")
    if train.classes != val.classes:
        others = sorted(set(train.classes or ()) ^ set(val.classes or ())) or ["their order"]
        raise InputError(
            f"data: training and validation images of {name} differ in their classes "
            f"({', '.join(others)}); both must have the same ones in the same order"
        )
    return {"train": train, "val": val}


def untrained_backbone(
    config: TrainConfig, source: ImageSource, *, device: torch.device, workers: int
) -> nn.Module:
    """The run's backbone before training: random weights drawn from `config.seed`.

    Two things make it a fair baseline. Its residual branches do not start at zero, as they do in
    training, which would leave a shallow network. And its BatchNorm statistics are those of the
    training images (see `calibrate_batch_norm`), since the initial ones do not normalise anything.
    Weights are random also where the run started from pretrained ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone, _ = build_backbone(
            config.model.backbone, stem=config.model.stem, zero_init_residual=False
        )
    size, seed = config.augment.size, config.seed
    backbone.to(device)
    return calibrate_batch_norm(
        backbone, source, size=size, seed=seed, device=device, workers=workers
    )


def calibrate_batch_norm(
    backbone: nn.Module,
    source: ImageSource,
    *,
    size: int,
    seed: int,
    device: torch.device,
    workers: int,
    batch_size: int = 256,
) -> nn.Module:
    """Replace the running statistics of every BatchNorm by averages over the images of `source`.

    One pass in training mode over at most `CALIBRATION_IMAGES` un-augmented images, drawn and
    shuffled by `seed` to mix the classes. Mean and variance are the cumulative averages of the
    batches' (momentum None). Batches are of equal size, so that all count the same; the few images
    left over are not used. Returns the backbone in eval mode.
    """
    shuffled = np.random.default_rng(seed).permutation(len(source))[:CALIBRATION_IMAGES]
    batches = -(-len(shuffled) // batch_size)
    batch_size = len(shuffled) // batches
    used = subset(source, shuffled[: batches * batch_size])
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    backbone.train()
    with torch.no_grad():
        for images, _ in eval_loader(used, size, batch_size, workers):
            backbone(images.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return backbone.eval()


def pixels(source: ImageSource, size: int, *, workers: int) -> Tensor:
    """Un-augmented views of at most 32 x 32 pixels, flattened: (N, 3 * side * side) float32."""
    side = min(size, PIXELS_SIZE)
    return extract(nn.Flatten(), source, size=side, device=torch.device("cpu"), workers=workers)
