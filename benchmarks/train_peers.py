"""Trainings of the same SimSiam on the same images: ours, a plain script, a tuned one, and lightly.

All train a ResNet-18 with SimSiam's projector and predictor on the same views, batches and epochs,
with the learning rate and schedule of `TrainConfig`. lightly's loss is half of ours, which changes
the meaning of learning rate and weight decay; here its two terms are added, so that all do the same
training.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from vi_simsiam.config import Method, TrainConfig
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import TrainingError
from vi_simsiam.models import build_model
from vi_simsiam.text import counted

from . import peers
from .harness import synchronize
from .results import LIGHTLY, OURS, OURS_SIMSIAM

_Views = Sequence[Tensor]


class Recorder:
    """The clock of one training. It is stopped while features are evaluated.

    `evaluate` gives the accuracy of a backbone after every `every` epochs; None for no evaluation.
    """

    def __init__(
        self,
        device: torch.device,
        epochs: int,
        evaluate: Callable[[nn.Module], float] | None,
        every: int,
    ) -> None:
        self.device, self._epochs, self._evaluate, self._every = device, epochs, evaluate, every
        gc.collect()  # the memory of earlier trainings
        self._before = 0
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        self._start = time.perf_counter()
        self.epoch_ends: list[float] = []
        """Seconds from the start to the end of each epoch."""
        self.total_seconds = 0.0
        """Seconds from the start to the end of the training."""
        self.accuracies: list[tuple[int, float, float]] = []
        """Epochs done, seconds from the start, accuracy."""
        self.evaluation_seconds: float | None = None
        """Duration of the last evaluation."""
        self.peak_bytes: int | None = None
        """Peak memory of tensors on a GPU above that in use before, without resident images."""
        self.captured: bool | None = None
        """Ours trained with one CUDA graph; None for others and on a CPU."""
        self._trained: nn.Module | None = None
        self._losses: list[Tensor] = []

    def epoch_done(self, backbone: nn.Module, loss: Tensor) -> None:
        """Record the end of an epoch, with the loss of its last step."""
        synchronize(self.device)
        self._trained = backbone
        self._losses.append(loss.detach())
        now = time.perf_counter()
        if self.device.type == "cuda" and self.evaluation_seconds is None:
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        self.epoch_ends.append(now - self._start)
        done = len(self.epoch_ends)
        if self._evaluate is not None and (done == self._epochs or done % self._every == 0):
            self.accuracies.append((done, now - self._start, self._evaluate(backbone)))
            self.evaluation_seconds = time.perf_counter() - now
            self._start += self.evaluation_seconds

    def finish(self) -> None:
        """Record the end of the training, its last checkpoint written.

        Raises:
            TrainingError: epochs are missing, or the training diverged, so that its time is void.
        """
        self.total_seconds = time.perf_counter() - self._start
        if len(self.epoch_ends) != self._epochs:
            raise TrainingError(
                f"wrong: {len(self.epoch_ends)} of {counted(self._epochs, 'epoch')} were trained"
            )
        # A GradScaler skips the updates of a loss that is not finite, so the weights may be finite.
        values = [*self._losses, *(self._trained.parameters() if self._trained is not None else ())]
        if not all(torch.isfinite(value).all() for value in values):
            raise TrainingError("diverged: losses or weights are not finite")


@dataclass(frozen=True)
class Training:
    """The task of every provider: images, decoded in `pack` for ours, workers for the others."""

    config: TrainConfig
    source: ImageSource
    pack: Path
    device: torch.device
    workers: int
    folder: Path
    """Run folder of ours."""


Trains = Callable[[Training, Recorder], None]


def ours(training: Training, recorder: Recorder, *, method: Method) -> None:
    """`vi-simsiam train`, with run folder, metrics and checkpoints; always captured on a GPU."""
    config = dataclasses.replace(
        training.config,
        method=method,
        data=f"pack:{training.pack}",
        device=str(training.device),
        capture="on" if training.device.type == "cuda" else "auto",
    )
    trainer = Trainer(config, training.folder, overwrite=True, console=Console(quiet=True))
    trainer.fit(
        epoch_done=lambda: recorder.epoch_done(
            trainer.model.backbone, trainer.train_step.losses[trainer.step - 1]
        )
    )
    lines, _ = read_log(training.folder)
    recorder.captured = lines[-1].get("captured")
    feed = trainer.loader.feed
    if recorder.peak_bytes is not None and feed is not None and feed.memory == "gpu":
        recorder.peak_bytes -= len(trainer.loader.source.pixels)


def script(training: Training, recorder: Recorder, *, tuned: bool) -> None:
    """A script as users write it: PIL transforms in a DataLoader, autocast and a GradScaler.

    If `tuned`, with common advice: channels_last, bfloat16, torch.compile, asynchronous copies.
    """
    layout = torch.channels_last if tuned else torch.preserve_format
    model = build_model(dataclasses.replace(training.config, method="simsiam")).to(training.device)
    model.to(memory_format=layout)  # type: ignore[call-overload]

    def loss_of(views: list[Tensor]) -> Tensor:
        return _over_pairs(_half_loss, *model(views))

    if tuned:
        torch.compiler.reset()
        loss_of = torch.compile(loss_of, dynamic=False)

    def to_device(view: Tensor) -> Tensor:
        return view.to(training.device, non_blocking=tuned, memory_format=layout)

    transform = peers.torchvision_transform(training.config.augment)
    with torch.backends.cudnn.flags(enabled=True, benchmark=tuned, allow_tf32=True):
        _train(
            training,
            recorder,
            transform,
            model,
            model.backbone,
            lambda views: loss_of([to_device(view) for view in views]),
            tuned=tuned,
        )


def lightly(training: Training, recorder: Recorder) -> None:
    """lightly's transform, heads and loss around torchvision's ResNet, as in its SimSiam example.

    With autocast on a GPU.
    """
    heads, losses = peers.installed("lightly.models.modules.heads"), peers.installed("lightly.loss")
    device, sizes = training.device, training.config.model
    resnet = torchvision.models.resnet18(zero_init_residual=True)
    features = resnet.fc.in_features
    backbone = nn.Sequential(*list(resnet.children())[:-1], nn.Flatten())
    projector = heads.SimSiamProjectionHead(features, sizes.projector_hidden, sizes.dim)
    predictor = heads.SimSiamPredictionHead(sizes.dim, sizes.predictor_hidden, sizes.dim)
    model = nn.ModuleList([backbone, projector, predictor]).to(device)
    criterion = losses.NegativeCosineSimilarity()

    def loss_of(views: list[Tensor]) -> Tensor:
        projections = [projector(backbone(view.to(device))) for view in views]
        predictions = [predictor(projection) for projection in projections]
        return _over_pairs(criterion, predictions, [each.detach() for each in projections[:2]])

    transform = peers.lightly_transform(training.config.augment)
    _train(training, recorder, transform, model, backbone, loss_of)


PLAIN, TUNED = "plain PyTorch", "tuned PyTorch"
PROVIDERS: dict[str, Trains] = {
    OURS: partial(ours, method="vi-simsiam"),
    OURS_SIMSIAM: partial(ours, method="simsiam"),
    PLAIN: partial(script, tuned=False),
    TUNED: partial(script, tuned=True),
    LIGHTLY: lightly,
}


def _train(
    training: Training,
    recorder: Recorder,
    transform: Callable[[Any], list[Tensor]],
    model: nn.Module,
    backbone: nn.Module,
    loss_of: Callable[[list[Tensor]], Tensor],
    *,
    tuned: bool = False,
) -> None:
    """The loop of a script: on a GPU with float16 and a GradScaler, or with bfloat16 if `tuned`."""
    config, kind = training.config, training.device.type
    cuda = kind == "cuda"
    loader: DataLoader[Any] = DataLoader(
        peers.SourceViews(training.source, transform),
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=training.workers,
        persistent_workers=training.workers > 0,
        pin_memory=cuda,
    )
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=tuned,
    )
    total = config.epochs * (len(training.source) // config.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))
    )
    scaler = torch.amp.GradScaler(kind, enabled=cuda and not tuned)
    for _ in range(config.epochs):
        for views in loader:
            with torch.autocast(kind, torch.bfloat16 if tuned else torch.float16, enabled=cuda):
                loss = loss_of(views)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        recorder.epoch_done(backbone, loss)


def _half_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return -F.cosine_similarity(prediction, target, dim=-1).mean()


def _over_pairs(
    term: Callable[[Tensor, Tensor], Tensor], predictions: _Views, targets: _Views
) -> Tensor:
    """Twice the mean of `term` over all pairs of a view's prediction and another view's target."""
    pairs = [(p, z) for v, p in enumerate(predictions) for g, z in enumerate(targets) if v != g]
    return 2 * torch.stack([term(p, z) for p, z in pairs]).mean()
