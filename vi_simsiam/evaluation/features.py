"""Frozen features of a run's images, computed once for every evaluation.

Three encoders are compared on the same images: the trained backbone, the same backbone with random
weights, and the pixels themselves. An accuracy means little without those two beside it. A run that
started from given weights has a fourth, these: the training has to improve on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.filesize import decimal
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from vi_simsiam.backbones import build_backbone, input_options
from vi_simsiam.config import AugmentConfig, Constants, TrainConfig
from vi_simsiam.data.loader import MultiViewLoader, eval_loader
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.data.subsets import labelled_splits, subset
from vi_simsiam.data.views import GLOBAL_VIEWS, IMAGENET
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.forward import evaluating, extract, finite
from vi_simsiam.engine.model import starting_backbone
from vi_simsiam.engine.run import Run
from vi_simsiam.errors import TrainingError
from vi_simsiam.evaluation.moved import move
from vi_simsiam.files import write_json
from vi_simsiam.info import versions
from vi_simsiam.text import brief_repr, counted

ENCODERS = ("trained", "untrained", "pixels")
"""In the order of every result, after "trained" `STARTING` where the run has it."""
STARTING = "starting"
"""The backbone with the weights that the run began with, if they were given."""
CALIBRATION_IMAGES = 2_000
"""Most training images for the BatchNorm statistics of an untrained backbone."""
PIXELS_SIZE = 32
"""Largest side of the images behind the pixel features."""
_BATCH = 256


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
    step: int
    """The optimiser step of the trained encoder."""
    moved: dict[str, Tensor] = field(default_factory=dict)
    """Per encoder (M, F) float32 of the validation images shifted and turned a little (`move`);
    empty if they are not evaluated."""
    unreadable: int = 0
    """Images left out because they cannot be read."""
    augmented: Callable[[], Iterator[tuple[Tensor, Tensor]]] | None = None
    """Starts `random_features` of the trained encoder on the training images."""

    __repr__ = brief_repr

    def write(self, name: str, body: dict[str, Any], packages: tuple[str, ...]) -> dict[str, Any]:
        """Write RUN/`name`.json atomically: `body`, what it was measured on, and versions.

        Returns the content.
        """
        result = {
            "evaluation": name,
            "step": self.step,
            "data": self.data,
            "classes": len(self.classes),
            "train_images": len(self.train_labels),
            "val_images": len(self.val_labels),
            "unreadable_images": self.unreadable,
            "features": {encoder: feature.shape[1] for encoder, feature in self.train.items()},
            "device": self.device.type,
            **body,
            "versions": versions(packages),
        }
        write_json(self.path / f"{name}.json", result)
        return result


def collect(
    run: Run, *, report: Callable[[str], None] | None = None, world: World | None = None
) -> FeatureSets:
    """Compute the features of a run's training and validation images under the encoders.

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
    constants = run.config.augment.constants

    report("calibrating the untrained encoder")
    train, trained = sources["train"], run.model.backbone
    untrained = untrained_backbone(run.config, train, device=device, workers=workers)
    start = starting_backbone(run.path, trained)
    starting = {} if start is None else {STARTING: start}
    backbones = {"trained": trained, **starting, "untrained": untrained}
    features: dict[str, dict[str, Tensor]] = {}
    for split, change in (("train", None), ("val", None), ("moved", move)):
        source = sources["val" if change else split]
        given: dict[str, Any] = {"workers": workers, "constants": constants, "change": change}
        images = counted(len(source), f"{split} image")
        found = features[split] = {}
        for name, backbone in backbones.items():
            report(f"{name} features of {images}")
            found[name] = extract(backbone, source, size=size, device=device, world=world, **given)
        report(f"pixels of {images}")
        found["pixels"] = pixels(source, size, **given)
    return FeatureSets(
        path=run.path,
        data=run.splits.name,
        classes=train.classes or (),
        train=features["train"],
        train_labels=torch.from_numpy(train.labels),
        val=features["val"],
        val_labels=torch.from_numpy(sources["val"].labels),
        device=device,
        step=run.step,
        moved=features["moved"],
        unreadable=unreadable,
        augmented=lambda: random_features(
            trained,
            train,
            size=size,
            device=device,
            workers=workers,
            report=report,
            constants=constants,
        ),
    )


def untrained_backbone(
    config: TrainConfig, source: ImageSource, *, device: torch.device, workers: int
) -> nn.Module:
    """The run's backbone before training, in eval mode: random weights drawn from `config.seed`.

    Two things make it a fair baseline. Its residual branches do not start at zero, as they do in
    training, which would leave a shallow network. And its BatchNorm statistics are those of the
    training images, since the initial ones do not normalise anything: the cumulative averages over
    equal batches of at most `CALIBRATION_IMAGES` un-augmented images, drawn and shuffled by the
    seed to mix the classes. Weights are random also where the run started from pretrained ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone, _ = build_backbone(
            config.model.backbone,
            stem=config.model.stem,
            zero_init_residual=False,
            **input_options(config),
        )
    shuffled = np.random.default_rng(config.seed).permutation(len(source))[:CALIBRATION_IMAGES]
    batches = math.ceil(len(shuffled) / _BATCH)
    batch_size = len(shuffled) // batches
    used = subset(source, shuffled[: batches * batch_size])
    backbone.to(device)
    size, constants = config.augment.size, config.augment.constants
    update_bn(eval_loader(used, size, batch_size, workers, constants), backbone, device)
    return backbone.eval()


def pixels(source: ImageSource, size: int, **options: Any) -> Tensor:
    """Un-augmented views of at most 32 x 32 pixels, flattened: (N, C * side * side) float32.

    `options` are those of `extract`.
    """
    side, cpu = min(size, PIXELS_SIZE), torch.device("cpu")
    return extract(nn.Flatten(), source, size=side, device=cpu, **options)


def random_features(
    backbone: nn.Module,
    images: PackedImages,
    *,
    size: int,
    device: torch.device,
    workers: int,
    policy: AugmentConfig | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda phrase: None,
    constants: Constants = IMAGENET,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features of random views of all images, pass after pass and without end.

    Pass p holds view p mod 2 of the two that the loader makes of an image in its epoch p // 2.

    Args:
        backbone: on `device`; maps images (B, 3, size, size) to features (B, F), as in `extract`.
        images: N >= 1 training images.
        size: side of the views in pixels.
        device: where to compute.
        workers: processes that prepare views on a CPU, until the iterator is closed.
        policy: the views, of which the local ones are not made; None for those of SimSiam's linear
            evaluation (Chen and He, arXiv 2011.10566), crops of 8 to 100 % of the area, flipped
            half of the time.
        seed: of the views.
        report: called with a short phrase before every pair of passes.
        constants: mean and standard deviation of the channels, the run's.

    Yields:
        Features (n, F) float32 and their images (n,) int64, ascending; on the CPU. Batches are of
        equal size; the few images left over, fewer than there are batches, are missing in both
        passes of a loader's epoch, and other ones in the next.

    Raises:
        InputError: features are not finite.
    """
    policy = policy or AugmentConfig(
        crop_scale=(0.08, 1.0), jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0
    )
    policy = dataclasses.replace(policy, size=size, local_views=0)
    if constants != IMAGENET:
        policy = policy.normalised_by(constants)
    batch_size = len(images) // math.ceil(len(images) / _BATCH)
    loader = MultiViewLoader(images, policy, batch_size, device, seed=seed, workers=workers)
    with contextlib.closing(loader):
        for epoch in itertools.count():
            number = GLOBAL_VIEWS * epoch + 1
            report(f"features of augmented training images, pass {number} and the next")
            parts, indices = [], []
            with evaluating(backbone, device):
                for batch in loader.epoch(epoch):
                    parts.append([backbone(view).float().cpu() for view in batch.views])
                    indices.append(batch.index.cpu())
            index, order = torch.cat(indices).sort()
            for views in zip(*parts, strict=True):
                yield finite(torch.cat(views)[order], images), index


def mapped_features(
    file: IO[bytes],
    backbone: nn.Module,
    images: PackedImages,
    policy: AugmentConfig,
    *,
    views: int,
    seed: int,
    device: torch.device,
    workers: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features of random views of all images, in a file that is mapped into memory.

    Args:
        file: empty, opened to be read and written.
        backbone, images, policy, seed, device, workers: see `random_features`.
        views: V of every image.

    Returns:
        Features (V, N, F), and the numbers of the images of which all V are there, ascending.

    Raises:
        InputError: features are not finite.
        TrainingError: there is no room for the file.
    """
    complete = np.ones(len(images), bool)
    features: Any = None
    passes = random_features(
        backbone,
        images,
        size=policy.size,
        device=device,
        workers=workers,
        policy=policy,
        seed=seed,
        constants=policy.constants,
    )
    with contextlib.closing(passes):  # type: ignore[type-var]
        for view, (found, index) in enumerate(itertools.islice(passes, views)):
            if features is None:
                shape = (views, len(images), found.shape[1])
                _reserve(file, 4 * math.prod(shape))
                features = np.memmap(file, np.float32, "r+", shape=shape)
            features[view, index.numpy()] = found.numpy()
            complete &= np.isin(np.arange(len(images)), index.numpy())
    return features, np.flatnonzero(complete)


def _reserve(file: IO[bytes], size: int) -> None:
    """Make a file of `size` bytes that are there: a full disk would end a write to mapped memory.

    Raises:
        TrainingError: there is no room for it.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as error:
        raise TrainingError(
            f"the features take {decimal(size)} for which there is no room ({error.strerror}); "
            "fewer --views or --images take less"
        ) from error
