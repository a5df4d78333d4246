"""A mean direction and a concentration for any frozen encoder.

VI-SimSiam trains the network with them. Here the network stays as it is: features of several views
of every image are computed once, standardised column by column, and a predictor learns from those
of one view the Power Spherical distribution of another's. Standardising matters: features after a
ReLU all point the same way, so that their cosines would be near 1 for any two images.

The result is a VI-SimSiam run like any other, with the encoder as its backbone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam.backbones import own_size
from vi_simsiam.checks import require
from vi_simsiam.config import TrainConfig
from vi_simsiam.data.cache import cached
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.defaults import suited
from vi_simsiam.data.statistics import with_statistics
from vi_simsiam.engine import run
from vi_simsiam.engine.checkpoint import Checkpoint, checkpoint_path
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.forward import evaluating
from vi_simsiam.engine.model import initial_model
from vi_simsiam.engine.monitor import representation_statistics
from vi_simsiam.engine.run import FITTED, METRICS, Run
from vi_simsiam.errors import InputError, TrainingError
from vi_simsiam.evaluation import metrics
from vi_simsiam.evaluation.features import mapped_features
from vi_simsiam.evaluation.scores import pair_cosines
from vi_simsiam.files import json_lines, write_json, write_text
from vi_simsiam.inference.encoder import Encoder
from vi_simsiam.inference.images import Images, open_images
from vi_simsiam.info import versions
from vi_simsiam.models import Output, VISimSiam
from vi_simsiam.other_backbones import pooled_width
from vi_simsiam.paths import user_path
from vi_simsiam.text import counted, print_line

VIEWS = 8
"""Views of every image."""
EPOCHS = 30
BATCH_SIZE, LR, WEIGHT_DECAY = 256, 1e-3, 1e-4
HELD_OUT, MOST_HELD_OUT = 0.1, 2_000
"""Share and largest number of images whose views are kept to measure the calibration."""
_FEWEST = 4
_CONSTANT = 1e-10
"""Variance over squared mean below which a column of features is constant."""
_PACKAGES = ("torch", "torchvision", "numpy", "pillow")


class Fitted(NamedTuple):
    """An encoder with its fitted distributions, and their calibration."""

    encoder: Encoder
    calibration: dict[str, Any]
    """Expected against observed cosines of views of images that nothing was fitted to, see
    `evaluation.metrics.calibration`."""


def fit_concentration(
    encoder: str | Path | nn.Module,
    images: Images,
    *,
    out: str | Path | None = None,
    config: TrainConfig | None = None,
    size: int | None = None,
    views: int = VIEWS,
    epochs: int = EPOCHS,
    overwrite: bool = False,
    console: Console | None = None,
) -> Fitted:
    """Fit a Power Spherical distribution (mean direction and concentration) to a frozen encoder.

    The representation of a view is its features, each column with mean 0 and variance 1 over the
    images, so that D is their width. A predictor of two layers learns by the loss of VI-SimSiam on
    pairs of views, with AdamW and a cosine schedule.

    Args:
        encoder: a run folder, whose backbone and views are taken; a backbone by name, as
            `ModelConfig.backbone`; or a module that maps normalised images (B, 3, size, size) to
            features (B, F).
        images: a data set by name or place, or everything that `open_images` takes.
        out: the run folder to write; None for none. A module has no name that a run could keep.
        config: data_root, offline, cache_dir, images, seed, device, workers, pretrained weights,
            init, decoding and views; None for the defaults. The views are those of the run that
            `encoder` is, and otherwise fitted to the images.
        size: side of the views in pixels; None for one that suits.
        views: V, random views of every image, at least 2.
        epochs: passes over the features.
        overwrite: replace the run in `out`.
        console: destination of a line at the start of every stage; None for no output.

    Raises:
        InputError: no such encoder or images, too few of them, or numbers out of range.
        TrainingError: the loss is not finite.
    """
    require("views", views, 2 <= views <= 256, "between 2 and 256")
    require("epochs", epochs, epochs >= 1, "at least 1")
    config = (config or TrainConfig()).located()

    def report(line: str) -> None:
        if console is not None:
            print_line(console, line)

    place = None if out is None else user_path("out", out)
    run_folder = _run_folder(encoder)
    if place is not None:
        run.check_folder(place, resume=False, overwrite=overwrite)
        if run_folder is not None and place.resolve() == run_folder.resolve():
            raise InputError(f"out: {out} is the encoder itself; give another folder")
        if isinstance(encoder, nn.Module):
            raise InputError(
                "out: a run needs an encoder by name, torchvision's, timm:NAME or "
                "module:PACKAGE.ATTRIBUTE, that it can be made again from"
            )
        if not isinstance(images, str | Path):
            raise InputError("out: a run needs images by name or place")
    if run_folder is not None:
        config = dataclasses.replace(config, decode=run.read_config(run_folder).decode)
    if not isinstance(encoder, str | Path) or run_folder is not None:
        for name, given in (("init", config.init), ("pretrained", config.model.pretrained or None)):
            require(name, given, given is None, "left out: the encoder has weights")
    splits, config = _images(images, config)
    config = dataclasses.replace(config, decode=splits.train.decode)
    device = run.resolve_device(config.device)
    workers = run.resolve_workers(config.workers, device)
    model, config = _model(encoder, config, splits, size, device, console)
    packed, _ = cached(splits.train, cache_dir=config.cache_dir, workers=workers)
    require("images", len(packed), len(packed) >= _FEWEST, f"at least {_FEWEST}")
    config = dataclasses.replace(config, augment=with_statistics(config.augment, packed))
    with contextlib.ExitStack() as stack:
        if place is not None:
            stack.enter_context(run.claimed(place))
            run.check_folder(place, resume=False, overwrite=overwrite)  # it may have been filled
        file = stack.enter_context(tempfile.TemporaryFile(dir=place))
        report(f"features of {counted(views, 'view')} of {counted(len(packed), 'image')}")
        features, kept = mapped_features(
            file,
            model.backbone,
            packed,
            config.augment,
            views=views,
            seed=config.seed,
            device=device,
            workers=workers,
        )
        shuffled = kept[np.random.default_rng(config.seed).permutation(len(kept))]
        count = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(kept))))
        held_out, fitted = np.sort(shuffled[:count]), np.sort(shuffled[count:])
        batch = min(BATCH_SIZE, len(fitted))
        config = dataclasses.replace(
            config, epochs=epochs, batch_size=batch, lr=LR, weight_decay=WEIGHT_DECAY
        )
        report(f"fitting the distributions of {counted(len(fitted), 'image')}")
        lines = _fit(model, features, fitted, config, device)
        calibration = _calibration(model, features, held_out, device)
        steps = epochs * (len(fitted) // batch)
        opened = Run(place or Path(), config, model, splits, device, workers, steps, steps)
        if place is not None:
            _write(place, opened, lines, views, len(fitted), calibration)
    return Fitted(Encoder(opened), calibration)


def _images(images: Images, config: TrainConfig) -> tuple[Splits, TrainConfig]:
    if isinstance(images, str | Path):
        config = dataclasses.replace(config, data=str(images)).located()
        return run.open_splits(config), config
    source = open_images(images, config.decode)
    return Splits(source.name, source, None), config


def _model(
    encoder: str | Path | nn.Module,
    config: TrainConfig,
    splits: Splits,
    size: int | None,
    device: torch.device,
    console: Console | None,
) -> tuple[VISimSiam, TrainConfig]:
    """The model to fit, with the encoder as its backbone, in eval mode on the device."""
    model: Any
    if (run_folder := _run_folder(encoder)) is not None:
        saved, whole, _, _ = run.load_model(run_folder, device)
        parts = dataclasses.replace(saved.model, pretrained=False, local_predictor=False)
        augment = dataclasses.replace(saved.augment, local_views=0)
        if size is not None:
            plain = dataclasses.replace(saved, model=parts, init=None)
            fits = size == augment.size or own_size(plain) is None
            require("size", size, fits, f"{augment.size}, as the run's network has a fixed size")
            augment = dataclasses.replace(augment, size=size)
        config = dataclasses.replace(config, model=parts, augment=augment)
        backbone: nn.Module = whole.backbone
    elif not isinstance(encoder, nn.Module):
        if ":" not in str(encoder) and len(Path(encoder).parts) > 1:
            raise InputError(
                f"encoder: {encoder} is no folder; give a run folder, or a backbone by name as for "
                "train --backbone"
            )
        parts = dataclasses.replace(config.model, backbone=str(encoder))
        config = dataclasses.replace(config, model=parts)
        config = suited(config, splits.train, size=size)
        config = dataclasses.replace(config, warmup_epochs=0.0)
        whole = initial_model(config, World(device), console, fresh=True)
        own = str(encoder).startswith("module:")  # it may bring its weights
        if not own and config.init is None and not config.model.pretrained:
            raise InputError(
                f"encoder: {encoder} is a network of random weights; name its weights with --init, "
                "or take its library's with --pretrained"
            )
        backbone = whole.backbone
    else:
        config = dataclasses.replace(suited(config, splits.train, size=size), warmup_epochs=0.0)
        backbone = copy.deepcopy(encoder).to(device)  # the user's own stays as it is
    sizes, channels = [config.augment.size], config.decode.channels
    width = pooled_width(backbone, "encoder: it", sizes, channels, device=device)
    require("encoder", f"features of width {width}", width >= 2, "of width 2 or more")
    parts = dataclasses.replace(config.model, projector="standardised", dim=width)
    config = dataclasses.replace(config, method="vi-simsiam", model=parts)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        fields = {name: value for name, value in vars(config.loss).items() if name != "loss_scale"}
        shape = {name: getattr(parts, name) for name in ("dim", "projector", "predictor_hidden")}
        model = VISimSiam(backbone, features=width, **shape, **fields)
    model.backbone.requires_grad_(False)
    return model.to(device, memory_format=torch.channels_last).eval(), config


def _run_folder(encoder: str | Path | nn.Module) -> Path | None:
    path = None if isinstance(encoder, nn.Module) else user_path("encoder", encoder)
    return path if path is not None and path.is_dir() else None


def _fit(
    model: VISimSiam,
    features: NDArray[np.float32],
    images: NDArray[np.int64],
    config: TrainConfig,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Fit the predictor to the features of `images`; returns a line of metrics for every epoch."""
    _standardise(model, features, images)
    trained = [*model.predictor.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    batch, per_epoch = config.batch_size, len(images) // config.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * per_epoch)
    generator = np.random.default_rng((config.seed, 1))
    lines, start = [], time.perf_counter()
    for epoch in range(1, config.epochs + 1):
        order, losses = generator.permutation(images), torch.zeros(per_epoch)
        for step in range(per_epoch):
            rows = np.sort(order[step * batch : (step + 1) * batch])
            pair = generator.permutation(len(features))[:2]
            targets = tuple(_projections(model, features[view, rows], device) for view in pair)
            model.predictor.train()
            output = Output(tuple(model.predictor(target) for target in targets), targets)
            loss = model.loss(output, loss_scale=config.loss_scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[step] = loss.detach()
        if not torch.isfinite(losses).all():
            raise TrainingError("the loss of the distributions is not finite")
        lines.append(
            {
                "step": epoch * per_epoch,
                "epoch": float(epoch),
                "loss": float(losses.mean()) / config.loss_scale,
                **representation_statistics(model, output),
                "lr": schedule.get_last_lr()[0],
                "seconds": time.perf_counter() - start,
            }
        )
    model.eval()
    return lines


def _standardise(
    model: VISimSiam, features: NDArray[np.float32], images: NDArray[np.int64]
) -> None:
    """Set the statistics of the projector to those of the features of all views."""
    norm = model.projector[-1]
    count, total = 0, np.zeros((2, features.shape[2]))
    for view in features:
        for rows in np.array_split(images, math.ceil(len(images) / 4096)):
            part = view[rows].astype(np.float64)
            total += (part.sum(0), np.square(part).sum(0))
            count += len(part)
    mean = total[0] / count
    variance = total[1] / count - np.square(mean)
    variance[variance <= _CONSTANT * np.square(mean)] = 1  # rounding alone differs
    norm.running_mean.copy_(torch.from_numpy(mean))  # type: ignore[union-attr,operator]
    norm.running_var.copy_(torch.from_numpy(variance))  # type: ignore[union-attr,operator]


@torch.no_grad()
def _projections(model: VISimSiam, features: NDArray[np.float32], device: torch.device) -> Tensor:
    projected: Tensor = model.projector.eval()(torch.from_numpy(features).to(device))
    return projected


def _calibration(
    model: VISimSiam,
    features: NDArray[np.float32],
    images: NDArray[np.int64],
    device: torch.device,
) -> dict[str, Any]:
    """The calibration of the distributions on the views of `images`, by all ordered pairs."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for rows in np.array_split(images, math.ceil(len(images) / 64)):
        projection = torch.stack([_projections(model, view[rows], device) for view in features])
        with evaluating(model, device):
            prediction = model.predictor(projection.flatten(0, 1)).unflatten(
                0, projection.shape[:2]
            )
            loc = F.normalize(prediction[..., : model.dim], dim=-1)
            found = pair_cosines(loc, model.concentration(prediction), projection)
        pairs.append((found[0].cpu().flatten(), found[1].cpu().flatten()))
    expected, observed = (torch.cat(each).double().numpy() for each in zip(*pairs, strict=True))
    return metrics.calibration(expected, observed)


def _write(
    place: Path,
    fitted: Run,
    lines: list[dict[str, Any]],
    views: int,
    images: int,
    calibration: dict[str, Any],
) -> None:
    """Write the run folder, which is claimed; an earlier run stays until the weights are there."""
    state, seconds = fitted.model.state_dict(), lines[-1]["seconds"]
    checkpoint = Checkpoint(fitted.step, seconds, images, state, config=fitted.config.to_dict())
    temporary = place / f".fitted.{secrets.token_hex(8)}"
    checkpoint.save(temporary)
    run.start_folder(place, fitted.config)
    os.replace(temporary, checkpoint_path(place, fitted.step))
    write_text(place / METRICS, json_lines(lines))
    result = {
        "evaluation": "fit-kappa",
        "step": fitted.step,
        "data": fitted.splits.name,
        "images": images,
        "views": views,
        "calibration": calibration,
        "versions": versions(_PACKAGES),
    }
    write_json(place / FITTED, result)
