"""The training loop."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vi_simsiam.config import TrainConfig, differing_fields
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.sources import scan
from vi_simsiam.engine.checkpoint import Checkpoint
from vi_simsiam.engine.monitor import Monitor, representation_statistics
from vi_simsiam.engine.run import (
    CHECKPOINT,
    check_folder,
    new_folder,
    read_config,
    resolve_device,
    resolve_workers,
    start_folder,
)
from vi_simsiam.errors import InputError, TrainingError
from vi_simsiam.models import Output, VISimSiam, build_model
from vi_simsiam.ops.backends import choose_backend


class Trainer:
    """Trains one model into one run folder.

    Everything that can be wrong with the input is found here, before the folder is touched. The same configuration
    gives the same run on the same machine, also when it is interrupted and resumed at any step.

    Args:
        config: what to train.
        folder: the run folder; new or empty unless `resume` or `overwrite` is said. None for a new one in runs/.
        resume: go on from the folder's checkpoint.
        overwrite: replace the run that the folder holds.
        console: where to print; None for standard output.

    Raises:
        InputError: a configuration, folder or data set that cannot be used.
        BackendUnavailableError: a backend named in the configuration cannot run here.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: str | Path | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        console: Console | None = None,
    ) -> None:
        config = config.located()
        if folder is not None:
            folder = Path(folder).expanduser()
            check_folder(folder, resume=resume, overwrite=overwrite)
        elif resume:
            raise InputError("resume: say which run folder to go on with")
        if resume and (differing := differing_fields(read_config(folder), config)):  # type: ignore[arg-type]
            raise InputError(f"resume: the configuration differs from {folder}'s: {'; '.join(differing)}")
        self.config, self.resume = config, resume
        self.console = console or Console()
        self.device = resolve_device(config.device)
        self.backend = choose_backend(config.backend, self.device.type)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = build_model(config).to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        default_scale = 1 / (config.model.dim - 1) if isinstance(self.model, VISimSiam) else 1.0
        self.loss_scale = default_scale if config.loss.loss_scale is None else config.loss.loss_scale

        source, unreadable = scan(open_dataset(config.data, root=config.data_root).train)
        if unreadable:
            names = ", ".join(f"{image.path} ({image.reason})" for image in unreadable)
            text = f"warning: {len(unreadable)} unreadable images left out: {names}"
            self.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
        self.loader = MultiViewLoader(
            source,
            config.augment,
            batch_size=config.batch_size,
            seed=config.seed,
            workers=resolve_workers(config.workers, self.device),
            pin_memory=self.device.type == "cuda",
        )
        self.total_steps = config.epochs * self.loader.steps_per_epoch
        self.step, self.seconds = 0, 0.0
        self.folder = new_folder(Path("runs"), config) if folder is None else folder
        if resume:
            self._restore()

    def fit(self) -> None:
        """Train to the end, with a checkpoint after every epoch.

        Raises:
            TrainingError: the loss or the weights stopped being finite; the last good checkpoint is kept.
            KeyboardInterrupt: SIGINT or SIGTERM arrived; the run can be resumed at the step it had reached.
        """
        steps = self.loader.steps_per_epoch
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(_stop_signals())
            if not self.resume:
                start_folder(self.folder, self.config)
                self._save()
            stack.enter_context(contextlib.closing(self.loader))
            monitor = stack.enter_context(
                Monitor(
                    self.folder, step=self.step, total=self.total_steps, steps_per_epoch=steps, console=self.console
                )
            )
            while self.step < self.total_steps:
                epoch, start = divmod(self.step, steps)
                metrics = self._train_epoch(epoch, start, monitor, stop)
                self._save()
                if stop:
                    raise KeyboardInterrupt
                monitor.epoch_done(self.step, metrics)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to the peak, then a cosine to 0 (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""
        warmup = round(self.config.warmup_epochs * self.loader.steps_per_epoch)
        if step < warmup:
            return self.config.lr * (step + 1) / warmup
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.total_steps - warmup)))

    def _train_epoch(self, epoch: int, start: int, monitor: Monitor, stop: list[int]) -> dict[str, float]:
        self.model.train()
        losses: list[Tensor] = []
        metrics: dict[str, float] = {}
        waited, since = 0.0, time.perf_counter()
        batches = iter(self.loader.epoch(epoch, start))
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches, None)
            except RuntimeError:
                if stop:  # the end of the job has reached the workers first
                    break
                raise
            waited += time.perf_counter() - asked
            if batch is None:
                break
            last = self.step + 1 == (epoch + 1) * self.loader.steps_per_epoch
            logging = (self.step + 1) % self.config.log_every == 0 or last
            loss, output, grad_norm = self._train_step(batch.views, logging or self.config.clip_norm is not None)
            losses.append(loss)
            self.step += 1
            monitor.advance(self.step)
            if logging or stop:
                self._check_finite(losses)
                seconds = time.perf_counter() - since
                self.seconds += seconds
                views = len(losses) * self.config.batch_size * len(batch.views)
                metrics = {
                    "step": self.step,
                    "epoch": self.step / self.loader.steps_per_epoch,
                    "loss": torch.stack(losses).mean().item() / self.loss_scale,
                    **representation_statistics(self.model, output),
                    "grad_norm": grad_norm.item(),
                    "lr": self.learning_rate(self.step - 1),
                    "views_per_s": views / seconds,
                    "data_wait": waited / seconds,
                    "seconds": self.seconds,
                }
                if logging:
                    monitor.log(metrics)
                losses, waited, since = [], 0.0, time.perf_counter()
            if stop:
                break
        return metrics

    def _train_step(self, views: list[Tensor], wants_norm: bool) -> tuple[Tensor, Output, Tensor]:
        """One optimiser step; returns the scaled loss, the model's output and the gradient's norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        views = [view.to(self.device, non_blocking=True, memory_format=torch.channels_last) for view in views]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model(views)
            loss = self.model.loss(output, self.backend, self.loss_scale)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = loss.new_zeros(())
        if wants_norm:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, grad_norm)
        self.optimizer.step()
        return loss.detach(), output, grad_norm

    def _check_finite(self, losses: list[Tensor]) -> None:
        finite = torch.isfinite(torch.stack(losses)).tolist()
        if not all(finite):
            step = self.step - len(losses) + finite.index(False) + 1
            raise TrainingError(
                f"the loss is not finite at step {step} (epoch {(step - 1) // self.loader.steps_per_epoch + 1}); "
                f"{self._last_good()}; a lower learning rate or clip_norm may help"
            )

    def _save(self) -> None:
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            raise TrainingError(f"the weights are not finite at step {self.step}; {self._last_good()}")
        images = len(self.loader.source)
        state = Checkpoint(self.step, self.seconds, images, self.model.state_dict(), self.optimizer.state_dict())
        state.save(self.folder / CHECKPOINT)
        self.saved_step = self.step

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.folder / CHECKPOINT} (step {self.saved_step})"

    def _restore(self) -> None:
        checkpoint = Checkpoint.load(self.folder / CHECKPOINT, self.device)
        if checkpoint.images != len(self.loader.source):
            raise InputError(
                f"resume: {self.config.data} has {len(self.loader.source)} readable training images, "
                f"and {self.folder} was trained on {checkpoint.images}"
            )
        checkpoint.restore(self.model, self.optimizer)
        self.step = self.saved_step = checkpoint.step
        self.seconds = checkpoint.seconds


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM; a second one takes its ordinary course.

    The end of a job reaches the loader's workers, too. From the first signal on their end is no error: torch's
    handler of SIGCHLD would raise one wherever the program happens to be, in the middle of a checkpoint, say.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()
        if hasattr(signal, "SIGCHLD"):
            previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    with contextlib.suppress(ValueError):  # signals reach the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)

    try:
        yield received
    finally:
        restore()
