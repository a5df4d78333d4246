"""Monitoring of a training: statistics of representations, progress bar, logs, time estimate."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from vi_simsiam.config import Stem, TrainConfig
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.loggers import Loggers
from vi_simsiam.engine.run import METRICS
from vi_simsiam.engine.verdict import Health
from vi_simsiam.errors import TrainingError
from vi_simsiam.files import json_lines, write_text
from vi_simsiam.models import Output, SimSiam, VISimSiam
from vi_simsiam.ops.power_spherical import ONE_PLUS_COS_MIN
from vi_simsiam.text import counted, print_line

_SECONDS_SHOWN = 1.0
_SECONDS_TIMED = 3.0
_STEPS_TIMED = 3
_OTHER_COLUMNS = 16
"""Columns of the remaining time, of a short bar, and of the spaces around them."""

_LONG, _SHORT = 20 * 60, 15 * 60
_FEWEST_EPOCHS = 4
_SMALLER = 64
# Relative cost of a view of s x s pixels: s^2, several times that with other stems, and a constant.
# Fitted to steps of ResNet-18 on two CPU cores: 0.22 s (28 pixels), 0.65 (64), 2.7 (128), 2.1 (32,
# small stem). The medium stem, at 28 pixels, takes 3.8 times the ImageNet stem's time.
_FIXED = 625
_STEM: dict[Stem, int] = {"imagenet": 1, "medium": 6, "small": 13}


@torch.no_grad()
def representation_statistics(model: SimSiam, output: Output) -> dict[str, float]:
    """Statistics of one batch.

    Returns:
        cosine: mean over samples and pairs v != g of the predictions' cosine with the targets.
        kappa: mean concentration / (D - 1), for VI-SimSiam.
        kappa_best: the one concentration / (D - 1) that fits these cosines best, kappa* =
            c/(1 - c) with log(1 + c) the mean of theirs; 0 where c is negative.
        projection_spread: part of the projections' squared length before the last BatchNorm that
            differs between images, from 0 to 1, by that BatchNorm's running statistics. 0 if all
            images have the same projection, which z_std does not show: BatchNorm stretches the
            smallest difference to its full size.
        z_std: standard deviation over the batch of the normalised targets, mean over dimensions,
            times sqrt(D) (Chen and He, arXiv 2011.10566, section 4.1).
        effective_rank: exp of the entropy of the normalised singular values of the targets (Roy and
            Vetterli, 2007).
    """
    directions = [F.normalize(p[:, : model.dim].float(), dim=1) for p in output.predictions]
    targets = [F.normalize(target.float(), dim=1) for target in output.targets]
    pairs = torch.stack(
        [(d * t).sum(1) for v, d in enumerate(directions) for g, t in enumerate(targets) if v != g]
    )
    statistics = {
        "cosine": pairs.mean(),
        "z_std": targets[0].std(0).mean() * math.sqrt(model.dim),
    }
    if isinstance(model, VISimSiam):
        concentrations = [model.concentration(prediction) for prediction in output.predictions]
        statistics["kappa"] = torch.stack(concentrations).mean() / (model.dim - 1)
        fit = pairs.clamp(min=ONE_PLUS_COS_MIN - 1).log1p().mean().expm1().clamp(0, 1 - 1e-6)
        statistics["kappa_best"] = fit / (1 - fit)
    norm = model.projector[-1]
    if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
        assert norm.running_var is not None
        variance = norm.running_var.sum()
        statistics["projection_spread"] = variance / (variance + norm.running_mean.square().sum())
    # One wait for the device.
    values = torch.stack([value.double() for value in statistics.values()]).tolist()
    rank = effective_rank(targets[0]).item()
    return {**dict(zip(statistics, values, strict=True)), "effective_rank": rank}


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the singular values of x (B, D), normalised to sum 1.

    Between 1 and min(B, D); NaN if x is not finite.
    """
    # The products of the shorter side in float64, on the host: much faster than a decomposition
    # on a GPU.
    x = x.double() if len(x) <= x.shape[1] else x.double().T
    products = (x @ x.T).cpu()
    if not torch.isfinite(products).all():  # eigvalsh would raise an error
        return torch.tensor(math.nan)
    singular = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    share = singular / singular.sum()
    return torch.exp(-torch.special.xlogy(share, share).sum())


class Timed:
    """The time of the steps after step `first`, and of it the seconds of waiting for data."""

    def __init__(self, first: int) -> None:
        self.first, self.waited = first, 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """The time so far."""
        return time.perf_counter() - self._started


class Monitor:
    """Progress bar, metrics.jsonl and other loggers of one run; a context manager.

    Args:
        folder: the run folder.
        config: of the run.
        step: the step at which training starts; later lines of an earlier session are dropped.
        steps_per_epoch: number of steps.
        console: destination of the printed lines and the bar.
        images: number of training images, for an estimate of the time that is printed a few steps
            after the start; None for no estimate.
        resumed: see `duration_line`.
        quiet: print warnings only.

    Attributes:
        health: the state of the run after the lines logged so far.
        last: the last logged metrics, also of an earlier session; None before there are any.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        *,
        step: int,
        steps_per_epoch: int,
        console: Console,
        images: int | None = None,
        resumed: bool = False,
        quiet: bool = False,
    ) -> None:
        lines, damaged = read_log(folder)
        logged = max((int(line["step"]) for line in lines), default=0)
        lines = [line for line in lines if line["step"] <= step]
        write_text(folder / METRICS, json_lines(lines))
        self.folder, self.health = folder, Health(config)
        self.last: dict[str, Any] | None = lines[-1] if lines else None
        self._knn: float | None = None
        for line in lines:
            self.health.update(line)
            self._knn = line.get("knn", self._knn)
        self._file = (folder / METRICS).open("a")
        self._stack = contextlib.ExitStack()
        self._steps_per_epoch, self._epochs = steps_per_epoch, config.epochs
        self._total = config.epochs * steps_per_epoch
        self._console, self._config, self._quiet = console, config, quiet
        self._images, self._resumed = images, resumed
        warn = partial(self._print, style="yellow")
        self._loggers = Loggers(folder, config, step=step, logged=logged, warn=warn)
        self._warned: set[str] = set()
        self._shown = -math.inf
        self._timed: tuple[int, float] | None = None
        self._bar = console.is_terminal and not quiet  # a log file gets the line of every epoch
        fixed = Column(no_wrap=True)
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}", table_column=fixed),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(table_column=fixed.copy()),
            TimeRemainingColumn(compact=True, table_column=fixed.copy()),
            TextColumn("{task.fields[text]}", table_column=fixed.copy()),
            console=console,
            transient=True,
            expand=True,
            disable=not self._bar,
        )
        epoch = self._epoch(step)
        self._task = self._progress.add_task(
            "", total=self._total, completed=step, text="", epoch=epoch
        )
        if damaged:
            lost = counted(damaged, "damaged line")
            self._print(f"warning: {lost} of metrics.jsonl left out", style="yellow")

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""
        self._progress.update(self._task, completed=step, epoch=self._epoch(step))
        if self._images is None or self._quiet:
            return
        now = time.monotonic()
        if self._timed is None:  # from the end of the first step, which takes longer than others
            self._timed = step, now
        steps, seconds = step - self._timed[0], now - self._timed[1]
        if steps >= _STEPS_TIMED and seconds >= _SECONDS_TIMED:
            rest, images = seconds / steps * (self._total - step), self._images
            self._print(duration_line(self._config, images, rest, resumed=self._resumed))
            self._images = None

    @property
    def due(self) -> bool:
        """True if the bar should show new figures: after the first step, and once a second."""
        return self._bar and time.monotonic() - self._shown >= _SECONDS_SHOWN

    def show(self, metrics: dict[str, float]) -> None:
        """Show metrics on the bar; they must have the keys of `log`."""
        self._shown = time.monotonic()
        self._progress.update(self._task, text=self._figures(metrics))

    def _figures(self, metrics: dict[str, float]) -> str:
        """The most important figures, as many as fit beside epoch, count and remaining time."""
        kappa = "kappa" if self._console.options.ascii_only else "κ"
        parts = [f"loss {metrics['loss']:.3g}", f"cos {metrics['cosine']:.2f}"]
        if "kappa" in metrics:
            parts.append(f"{kappa}/(D-1) {metrics['kappa']:.2g}")
        if self._knn is not None:
            parts.append(f"kNN {self._knn:.1%}")
        parts.append(f"{metrics['views_per_s']:.0f} views/s")
        if self.health.since is not None:
            parts = [self.health.state, f"since step {self.health.since}", parts[1]]
        counts = f"epoch {self._epochs}/{self._epochs} {self._total}/{self._total} "
        free = self._console.width - len(counts) - _OTHER_COLUMNS
        text = ""
        for part in parts:
            if len(text) + len(part) > free:
                break
            text += f"{part} "
        return text.rstrip()

    def log(
        self, metrics: dict[str, float], launched: Mapping[str, bool | str] | None = None
    ) -> None:
        """Log one line of metrics.

        Args:
            metrics: with the keys step, loss, cosine, z_std, views_per_s and data_wait.
            launched: see `Captured.launched`; in metrics.jsonl only.

        Raises:
            TrainingError: this line or an earlier one could not be written (a full disk, say).
        """
        begins = self.health.update(metrics)
        self._knn = metrics.get("knn", self._knn)
        self.last = {**metrics, **(launched or {}), "state": self.health.state}
        if self.health.since is not None:
            self.last["since"] = self.health.since
        try:
            self._file.write(json_lines([self.last]))
            self._file.flush()
            self._loggers.log(metrics)
        except OSError as error:
            raise TrainingError(
                f"the logs in {self.folder} could not be written ({error.strerror or error}); "
                "the last checkpoint is kept, to go on from with --resume"
            ) from error
        self.show(metrics)
        if begins and self.health.state not in self._warned:
            self._warned.add(self.health.state)
            self._print(f"warning: step {int(metrics['step'])}: {self.health.line}", style="yellow")

    def epoch_done(self, step: int, metrics: dict[str, float]) -> None:
        """Print one line for the epoch that ended at `step`."""
        if self._quiet:
            return
        parts = [
            f"epoch {step // self._steps_per_epoch}/{self._epochs}",
            f"loss {metrics['loss']:.4g}",
            f"cos {metrics['cosine']:.3f}",
            f"kappa/(D-1) {metrics['kappa']:.3g}" if "kappa" in metrics else "",
            f"z-std {metrics['z_std']:.2f}",
            f"rank {metrics['effective_rank']:.0f}",
            f"kNN {metrics['knn']:.1%}" if "knn" in metrics else "",
            f"{metrics['views_per_s']:.0f} views/s",
            f"waiting for data {metrics['data_wait']:.0%}",
            self.health.short,
        ]
        self._print("  ".join(part for part in parts if part))

    def finish(self) -> None:
        """Print the state of the run, and how a GPU launched its steps."""
        if self.last is None:
            return
        self._print(self.health.line)
        if "captured" in self.last:
            reason = self.last.get("not_captured", "there were too few steps")
            single = f"without a CUDA graph: {reason}"
            self._print(f"steps ran {'as one CUDA graph' if self.last['captured'] else single}")

    def _print(self, line: str, style: str | None = None) -> None:
        print_line(self._console, line, style)

    def _epoch(self, step: int) -> str:
        return f"{min(step // self._steps_per_epoch + 1, self._epochs)}/{self._epochs}"

    def __enter__(self) -> Monitor:
        former = threading.excepthook

        # Every thread keeps the hook that it started with. A hook that holds `self` would free the
        # whole training when the thread ends; during the interpreter's shutdown freeing tensors
        # aborts the process.
        def show(failure: threading.ExceptHookArgs) -> None:
            if not isinstance(failure.exc_value, OSError):
                former(failure)

        # TensorBoard's thread would print the traceback of a full disk; `log` raises that error.
        threading.excepthook = show
        self._stack.callback(setattr, threading, "excepthook", former)
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._progress.stop()
        ignored = () if kind is None else (OSError,)  # of a full disk, the first error is enough
        for close in (self._file.close, partial(self._loggers.close, failed=kind is not None)):
            with contextlib.suppress(*ignored):
                close()
        self._stack.close()


def duration_line(
    config: TrainConfig, images: int, seconds: float, *, resumed: bool = False
) -> str:
    """The time that the rest of a run takes, and for a long one the options of a run of 15 minutes.

    Args:
        config: of the run.
        images: number of training images.
        seconds: duration of the rest at the speed of the first steps.
        resumed: the run goes on, and its settings cannot be changed any more.
    """
    text = f"{duration(seconds)} to go on this CPU"
    if seconds <= _LONG or resumed:
        return text
    augment, model = config.augment, config.model
    size, stem, options = augment.size, model.stem, []
    if augment.local_views:
        single = " --no-local-predictor" if model.local_predictor else ""
        options.append(f"--local-views 0{single}")
    if size > _SMALLER:
        size = _SMALLER
        options.append(f"--size {size}")
    if stem != "imagenet":
        stem = "imagenet"
        options.append(f"--stem {stem}")
    sizes = [augment.size] * 2 + [augment.local_size] * augment.local_views
    shorter = seconds * 2 * _cost(size, stem) / sum(_cost(side, model.stem) for side in sizes)
    if shorter > _SHORT:
        fewest = min(_FEWEST_EPOCHS, config.epochs)
        epochs = max(fewest, int(config.epochs * _SHORT / shorter))
        options.append(f"--epochs {epochs}")
        # The default warm-up follows --epochs by itself.
        fitted = config.warmup_epochs in (config.epochs / 20, config.epochs / 8)
        if config.warmup_epochs >= epochs and not fitted:
            options.append(f"--warmup-epochs {epochs / 10:g}")
        shorter *= epochs / config.epochs
    fewer = max(2 * config.batch_size, int(images * _SHORT / shorter))
    if shorter > _SHORT and fewer < images:
        options.append(f"--images {fewer}")
        shorter *= fewer / images
    return f"{text}; {' '.join(options)}: {duration(shorter)}"


def duration(seconds: float) -> str:
    """An approximate time: "about 40 s", "about 12 min", "about 4 h", "about 3 days"."""
    for unit, name, most in ((1, "s", 90), (60, "min", 90), (3600, "h", 48)):
        if seconds < most * unit:
            return f"about {max(1, round(seconds / unit))} {name}"
    return f"about {round(seconds / 86400)} days"


def _cost(size: int, stem: Stem) -> int:
    return _FIXED + size * size * _STEM[stem]
