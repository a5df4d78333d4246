"""What one watches while training: statistics of the representations, and where they are shown and written."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.tensorboard import SummaryWriter

from vi_simsiam.engine.checkpoint import write_atomically
from vi_simsiam.engine.verdict import Health
from vi_simsiam.errors import TrainingError
from vi_simsiam.models import Output, SimSiam, VISimSiam
from vi_simsiam.ops.power_spherical import ONE_PLUS_COS_MIN
from vi_simsiam.paths import utf8_path

_SECONDS_SHOWN = 1.0
_SECONDS_TIMED = 3.0
_STEPS_TIMED = 3
_OTHER_COLUMNS = 16
"""Columns of the remaining time, of a short bar, and of the spaces around them."""


@torch.no_grad()
def representation_statistics(model: SimSiam, output: Output) -> dict[str, float]:
    """Statistics of one batch.

    Returns:
        cosine: mean over samples and pairs v != g of the predictions' cosine with the targets.
        kappa: mean concentration / (D - 1), for VI-SimSiam.
        kappa_best: the one concentration / (D - 1) that would fit these cosines best, kappa* = c/(1 - c) with
            log(1 + c) the mean of theirs; 0 where c is negative.
        projection_spread: part of the projections' squared length before the last BatchNorm that differs from image to image,
            between 0 and 1, from that BatchNorm's running statistics. 0 if all images have the same projection, which
            z_std does not show: BatchNorm stretches the smallest difference to its full size.
        z_std: standard deviation over the batch of the normalised targets, mean over dimensions, times sqrt(D)
            (Chen and He, arXiv 2011.10566, section 4.1).
        effective_rank: exp of the entropy of the normalised singular values of the targets (Roy and Vetterli, 2007).
    """
    directions = [
        F.normalize(prediction[:, : model.dim].float(), dim=1) for prediction in output.predictions
    ]
    targets = [F.normalize(target.float(), dim=1) for target in output.targets]
    pairs = [
        (d * t).sum(1) for v, d in enumerate(directions) for g, t in enumerate(targets) if v != g
    ]
    statistics = {
        "cosine": torch.stack(pairs).mean(),
        "z_std": targets[0].std(0).mean() * math.sqrt(model.dim),
    }
    if isinstance(model, VISimSiam):
        concentrations = [model.concentration(prediction) for prediction in output.predictions]
        statistics["kappa"] = torch.stack(concentrations).mean() / (model.dim - 1)
        fit = torch.stack(pairs).clamp(min=ONE_PLUS_COS_MIN - 1).log1p().mean().expm1()
        fit = fit.clamp(0, 1 - 1e-6)
        statistics["kappa_best"] = fit / (1 - fit)
    norm = model.projector[-1]
    if (
        isinstance(norm, _BatchNorm)
        and norm.running_mean is not None
        and norm.running_var is not None
    ):
        variance = norm.running_var.sum()
        statistics["projection_spread"] = variance / (variance + norm.running_mean.square().sum())
    values = torch.stack(
        [value.double() for value in statistics.values()]
    ).tolist()  # one wait for the device
    return {
        **dict(zip(statistics, values, strict=True)),
        "effective_rank": effective_rank(targets[0]).item(),
    }


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the singular values of x (B, D), normalised to sum 1; between 1 and min(B, D)."""
    # The products of the shorter side in float64, on the host: a fraction of the time of a decomposition on a GPU.
    x = x.double() if len(x) <= x.shape[1] else x.double().T
    singular = torch.linalg.eigvalsh((x @ x.T).cpu()).clamp(min=0).sqrt()
    share = singular / singular.sum()
    return torch.exp(-torch.special.xlogy(share, share).sum())


class Monitor:
    """Progress bar, metrics.jsonl and TensorBoard of one run. Use it as a context manager.

    Args:
        folder: the run folder.
        step: the step training starts at; later lines of an earlier session are dropped.
        total: number of steps of the run.
        steps_per_epoch: for the epoch shown on the bar.
        console: where lines and the bar are printed.
        health: the state of the run, before any line.
        estimate: the line that is printed a few steps after the start, from the seconds that the rest will take; None for none.
        quiet: print warnings only.

    Attributes:
        health: the state of the run after the lines logged so far.
        last: the last metrics that were logged, also in an earlier session; None before there are any.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        total: int,
        steps_per_epoch: int,
        console: Console,
        health: Health,
        estimate: Callable[[float], str] | None = None,
        quiet: bool = False,
    ) -> None:
        self._path = folder / "metrics.jsonl"
        lines = [line for line in self._lines() if _step(line) <= step]
        write_atomically(
            self._path, lambda file: file.write("".join(line + "\n" for line in lines).encode())
        )
        self.health = health
        for line in lines:
            health.update(json.loads(line))
        self.last: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
        self._file = self._path.open("a")
        self._place = contextlib.ExitStack()
        self._tensorboard = SummaryWriter(
            str(self._place.enter_context(utf8_path(folder))), purge_step=step + 1
        )
        self._steps_per_epoch, self._total = steps_per_epoch, total
        self._epochs = -(-total // steps_per_epoch)
        self._console, self._quiet, self._estimate = console, quiet, estimate
        self._warned: set[str] = set()
        self._shown = -math.inf
        self._timed: tuple[int, float] | None = None
        self._bar = console.is_terminal and not quiet  # a log file gets the line of every epoch
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            expand=True,
            disable=not self._bar,
        )
        self._task = self._progress.add_task(
            "train", total=total, completed=step, text="", epoch=self._epoch(step)
        )

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""
        self._progress.update(self._task, completed=step, epoch=self._epoch(step))
        if self._estimate is None or self._quiet:
            return
        now = time.monotonic()
        if self._timed is None:  # from the end of the first step on, which takes longer than others
            self._timed = step, now
        steps, seconds = step - self._timed[0], now - self._timed[1]
        if steps >= _STEPS_TIMED and seconds >= _SECONDS_TIMED:
            line, self._estimate = self._estimate(seconds / steps * (self._total - step)), None
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    @property
    def due(self) -> bool:
        """Whether the bar is to show new figures: after the first step, and a second after it did."""
        return self._bar and time.monotonic() - self._shown >= _SECONDS_SHOWN

    def show(self, metrics: dict[str, float]) -> None:
        """Show metrics on the bar; they must have the keys of `log`."""
        self._shown = time.monotonic()
        self._progress.update(self._task, text=self._figures(metrics))

    def _figures(self, metrics: dict[str, float]) -> str:
        """As many figures as fit, the most telling first: the epoch, the count and the remaining time always stay."""
        greek = not self._console.options.ascii_only
        parts = [f"loss {metrics['loss']:.3g}", f"cos {metrics['cosine']:.2f}"]
        if "kappa" in metrics:
            parts.append(f"{'κ' if greek else 'kappa'}/(D-1) {metrics['kappa']:.2g}")
        parts.append(f"{metrics['views_per_s']:.0f} views/s")
        if self.health.short:
            state, since, step = self.health.short.partition(" since ")
            parts = [state, f"{since.strip()} {step}".strip(), parts[1]]
        room = (
            self._console.width
            - len(f"epoch {self._epochs}/{self._epochs} {self._total}/{self._total} ")
            - _OTHER_COLUMNS
        )
        text = ""
        for part in parts:
            if len(text) + len(part) > room:
                break
            text += f"{part} "
        return text.rstrip()

    def log(
        self, metrics: dict[str, float], launched: Mapping[str, bool | str] | None = None
    ) -> None:
        """Log one line of metrics; it must have the keys step, loss, cosine, z_std, views_per_s and data_wait.

        Args:
            metrics: the figures.
            launched: how a GPU launches the steps, see `Captured.launched`; in metrics.jsonl only.

        Raises:
            TrainingError: it, or one before, could not be written (a full disk, say).
        """
        begins = self.health.update(metrics)
        state = {"state": self.health.state} | (
            {} if self.health.since is None else {"since": self.health.since}
        )
        self.last = {**metrics, **(launched or {}), **state}
        try:
            self._file.write(json.dumps(self.last) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, int(metrics["step"]))
        except OSError as error:
            raise TrainingError(
                f"the logs in {self._path.parent} could not be written ({error.strerror or error}); the last checkpoint is kept, "
                "to go on from with --resume"
            ) from error
        self.show(metrics)
        if begins and self.health.state not in self._warned:
            self._warned.add(self.health.state)
            text = f"warning: step {int(metrics['step'])}: {self.health.line}"
            self._console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def epoch_done(self, step: int, metrics: dict[str, float]) -> None:
        """Print one line for the epoch that ended at `step`."""
        if not self._quiet:
            self._console.print(
                f"epoch {step // self._steps_per_epoch}/{self._epochs}  {_describe(metrics)}"
                + (f"  {self.health.short}" if self.health.short else ""),
                soft_wrap=True,
                highlight=False,
            )

    def finish(self) -> None:
        """Print the state of the run, and how a GPU launched its steps."""
        if self.last is None:
            return
        lines = [self.health.line]
        if "captured" in self.last:
            reason = self.last.get("not_captured", "there were too few steps")
            how = (
                "as one CUDA graph" if self.last["captured"] else f"without a CUDA graph: {reason}"
            )
            lines.append(f"steps ran {how}")
        for line in lines:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _epoch(self, step: int) -> str:
        return f"{min(step // self._steps_per_epoch + 1, self._epochs)}/{self._epochs}"

    def _lines(self) -> list[str]:
        return self._path.read_text().splitlines() if self._path.exists() else []

    def __enter__(self) -> Monitor:
        former = threading.excepthook

        # Every thread keeps the hook that it started with. One that held `self` too would free the whole training when
        # it ends, and where that is during the interpreter's own end, freeing tensors there aborts the process.
        def show(failure: threading.ExceptHookArgs) -> None:
            if not isinstance(failure.exc_value, OSError):
                former(failure)

        # TensorBoard's thread would print the traceback of a full disk; `log` raises what that thread ended with.
        self._hook, threading.excepthook = former, show
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        for file in (self._file, self._tensorboard):
            with contextlib.suppress(
                *[OSError] * (error is not None)
            ):  # of a full disk, the first is enough
                file.close()
        self._place.close()
        threading.excepthook = self._hook


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl; that of a line cut off by a crash is beyond all others."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def _describe(metrics: dict[str, float]) -> str:
    """Metrics as one line."""
    loss, cosine, kappa, speed = (
        metrics.get(key, 0.0) for key in ("loss", "cosine", "kappa", "views_per_s")
    )
    concentration = f"  kappa/(D-1) {kappa:.3g}" if "kappa" in metrics else ""
    return (
        f"loss {loss:.4g}  cos {cosine:.3f}{concentration}  z-std {metrics['z_std']:.2f}  "
        f"rank {metrics['effective_rank']:.0f}  {speed:.0f} views/s  waiting for data {metrics['data_wait']:.0%}"
    )
