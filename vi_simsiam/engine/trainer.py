"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from vi_simsiam.config import PLACE_FIELDS, TrainConfig
from vi_simsiam.data.batches import check_batch
from vi_simsiam.data.cache import cached
from vi_simsiam.data.content import content, listed
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.engine.checkpoint import Checkpoint
from vi_simsiam.engine.distributed import World, sync_batch_norm, wrap
from vi_simsiam.engine.duration import duration_line
from vi_simsiam.engine.graph import Captured, capture
from vi_simsiam.engine.monitor import Monitor, representation_statistics
from vi_simsiam.engine.network import check_compiler, training_network
from vi_simsiam.engine.run import (
    CHECKPOINT,
    check_config,
    check_folder,
    check_images,
    load_frozen,
    new_folder,
    open_splits,
    read_config,
    record_place,
    resolve_device,
    start_folder,
)
from vi_simsiam.engine.signals import stop_signals
from vi_simsiam.engine.step import OverlappedStep, TrainStep, learning_rates
from vi_simsiam.engine.verdict import Health
from vi_simsiam.errors import ImageWarning, InputError, TrainingError
from vi_simsiam.models import Output, VISimSiam, build_model
from vi_simsiam.ops.backends import choose_backend, why_unavailable
from vi_simsiam.paths import user_path

# Ranks meet where metrics are due and in the network: these may differ between runs, not between ranks.
_COMMON_FIELDS = {"log_every", "capture", "kernels", "compile"}


class Trainer:
    """Trains one model into one run folder.

    Everything that can be wrong with the input is found here, before the folder is touched. The same configuration
    gives the same run on the same machine, also when it is interrupted and resumed at any step. An ImageWarning names
    images that are left out, and what decoding lost.

    On a GPU the images lie in its memory or are streamed to it, their views are made there while the step before
    trains, and a whole step is replayed as one CUDA graph. On a CPU worker processes make the views.

    Args:
        config: what to train.
        folder: the run folder; new or empty unless `resume` or `overwrite` is said. None for a new one in runs/.
        resume: go on from the folder's checkpoint. The images may lie elsewhere now, as long as they are the same.
        overwrite: replace the run that the folder holds.
        console: where to print; None for standard output.
        world: the ranks that train together, each with a Trainer of its own; None for this process alone. Rank 0 writes.
        splits: the images, where they are open already; None to open those that the configuration names.
        quiet: print warnings and the verdict only.

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
        world: World | None = None,
        splits: Splits | None = None,
        quiet: bool = False,
    ) -> None:
        config = config.located()
        folder = None if folder is None else user_path("folder", folder)
        if folder is not None:
            check_folder(folder, resume=resume, overwrite=overwrite)
        elif resume:
            raise InputError("resume: say which run folder to go on with")
        saved = read_config(folder) if resume else config  # type: ignore[arg-type]
        # How images are decoded is settled once they are open.
        check_config(dataclasses.replace(saved, decode=config.decode), config, folder)
        self.config, self.resume, self.quiet = config, resume, quiet
        self.world = world or World(resolve_device(config.device))
        self.world.agree("configuration", config.to_dict(), ignore=PLACE_FIELDS - _COMMON_FIELDS)
        self.world.local_batch(config.batch_size)
        self.console = self.world.console(console)
        self.device = self.world.device
        if config.capture == "on" and self.device.type != "cuda":
            raise InputError(
                f"capture: 'on' needs a CUDA device, and this run is on {self.device}; auto and off run here"
            )
        if config.capture == "on" and not self.world.alone:
            raise InputError(
                "capture: 'on' is for a run without torchrun; the ranks' collectives are not captured"
            )
        if config.compile:
            check_compiler(self.device)
        self.backend = choose_backend(config.backend, self.device.type)
        self.log_every = config.log_every or (100 if self.device.type == "cuda" else 10)
        bf16 = config.precision == "bf16" or (
            config.precision == "auto" and self.device.type == "cuda"
        )

        # Weights that come from a run need none of torchvision's.
        model = dataclasses.replace(
            config.model, pretrained=config.model.pretrained and config.frozen_run is None
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = build_model(dataclasses.replace(config, model=model)).to(self.device)
        if config.frozen_run is not None and not resume:
            load_frozen(self.model, config, self.device)
        self.model.to(memory_format=torch.channels_last)
        if config.sync_batch_norm:
            sync_batch_norm(self.model, self.world)
        default_scale = 1 / (config.model.dim - 1) if isinstance(self.model, VISimSiam) else 1.0
        self.loss_scale = (
            default_scale if config.loss.loss_scale is None else config.loss.loss_scale
        )

        checkpoint = Checkpoint.load(folder / CHECKPOINT, self.device) if resume else None  # type: ignore[operator]
        with (
            self.world.main_first()
        ):  # it decodes the images if that is to be done, and the others find them
            splits = splits or open_splits(config, run=folder if resume else None)
            # What is decoded already was by a rule of its own, and the run's other images are to follow it.
            given = config.decode
            self.config = config = dataclasses.replace(config, decode=splits.train.decode)
            if checkpoint is not None:
                check_config(
                    saved, config, folder, decoded=splits.name if config.decode != given else None
                )
                check_images(saved, config, checkpoint, listed(splits))
            check_batch(config.batch_size, splits.train)  # known before all are decoded
            images, _ = cached(
                splits.train,
                cache_dir=config.cache_dir,
                workers=config.workers,
                console=None if quiet else self.console,
            )
        for text in images.warnings:
            warnings.warn(text, ImageWarning, stacklevel=2)
        self.content = content(splits, images)
        self.world.agree("data", self.content)
        if checkpoint is not None:
            check_images(saved, config, checkpoint, self.content)
        self.loader = MultiViewLoader(
            images,
            config.augment,
            config.batch_size,
            self.device,
            seed=config.seed,
            workers=config.workers,
            dtype=torch.bfloat16 if bf16 and self.device.type == "cuda" else torch.float32,
            memory=config.data_memory,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.total_steps = config.epochs * self.loader.steps_per_epoch
        network = training_network(
            self.model, kernels=_use_kernels(config, self.world), compiled=config.compile, bf16=bf16
        )
        self.train_step = TrainStep(
            self.model,
            learning_rates(config, self.loader.steps_per_epoch),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            loss_scale=self.loss_scale,
            backend=self.backend,
            bf16=bf16,
            clip_norm=config.clip_norm,
            ema=config.ema,
            network=wrap(network, self.world),
            world=self.world,
        )
        self.step, self.seconds = 0, 0.0
        self.folder: Path = folder or self.world.broadcast_object(
            new_folder(Path("runs"), config) if self.world.is_main else None
        )
        if checkpoint is not None:
            self._restore(checkpoint)

    def fit(self, *, epoch_done: Callable[[], object] | None = None) -> None:
        """Train to the end, with checkpoints on the way; rank 0 writes them, and the metrics.

        Args:
            epoch_done: called after every whole epoch, before its checkpoint.

        Raises:
            TrainingError: the loss or the weights stopped being finite, or the GPU's memory is too small; the last good
                checkpoint is kept.
            KeyboardInterrupt: SIGINT or SIGTERM arrived; the run can be resumed at the step it had reached.
        """
        steps = self.loader.steps_per_epoch
        with contextlib.ExitStack() as stack:
            notice = (
                "stopping after this step; the run can be resumed" if self.world.is_main else ""
            )
            stop = stack.enter_context(stop_signals(patient=self.world.size > 1, notice=notice))
            if not self.resume:
                if self.world.is_main:
                    start_folder(self.folder, self.config)
                self._save()
            elif self.world.is_main:
                record_place(self.folder, self.config)
            stack.enter_context(contextlib.closing(self.loader))
            monitor = None
            if self.world.is_main:
                monitor = Monitor(
                    self.folder,
                    step=self.step,
                    total=self.total_steps,
                    steps_per_epoch=steps,
                    console=self.console,
                    health=Health(self.config),
                    estimate=self._duration if self.device.type == "cpu" else None,
                    quiet=self.quiet,
                )
                stack.enter_context(monitor)
            stack.enter_context(_memory_errors(self.device))
            self.model.train()
            replay = self._replay()
            while self.step < self.total_steps:
                metrics, stopped = self._train_epoch(replay, monitor, stop)
                if epoch_done is not None and not stopped:
                    epoch_done()
                if stopped or self.step == self.total_steps or self._is_due():
                    self._save()
                if stopped:
                    raise KeyboardInterrupt
                if monitor is not None:
                    monitor.epoch_done(self.step, metrics)
            if monitor is not None:
                monitor.finish()

    def _duration(self, seconds: float) -> str:
        return duration_line(self.config, len(self.loader.source), seconds, resumed=self.resume)

    def _replay(self) -> Captured | None:
        """On a GPU the whole step, ready to be called; None where batches come from the loader."""
        if self.loader.feed is None:
            return None
        whole = OverlappedStep(self.train_step, self.loader.feed)
        whole.prepare(self.step)
        return capture(
            whole, state=whole.state, mode=self.config.capture if self.world.alone else "off"
        )

    def _launched(self, replay: Captured | None) -> dict[str, bool | str]:
        """Form in which a GPU launches the steps, for the log."""
        if replay is None or self.world.alone:
            return {} if replay is None else replay.launched
        return {
            "captured": False,
            "not_captured": "a step with the collectives of torchrun's ranks is not captured",
        }

    def _train_epoch(
        self, replay: Captured | None, monitor: Monitor | None, stop: list[int]
    ) -> tuple[dict[str, float], bool]:
        """Train to the end of the epoch or until a signal arrived; the last metrics, and whether one has.

        With several ranks a signal is heard where metrics are due: all must stop after the same step.
        """
        end = (self.step // self.loader.steps_per_epoch + 1) * self.loader.steps_per_epoch
        metrics: dict[str, float] = {}
        stopped = False
        waited, since, first = 0.0, time.perf_counter(), self.step
        for output, wait in self._outputs(replay, end, stop):
            waited += wait
            self.step += 1
            if monitor is not None:
                monitor.advance(self.step)
            logging = self.step % self.log_every == 0 or self.step == end
            if logging or (stop and self.world.size == 1):
                stopped = self._any_rank(bool(stop))
                self._check_losses(first)
                seconds = time.perf_counter() - since
                self.seconds += seconds
                metrics = self._metrics(output, first, seconds, waited)
                if logging and monitor is not None:
                    monitor.log(metrics, self._launched(replay))
                waited, since, first = 0.0, time.perf_counter(), self.step
            elif monitor is not None and monitor.due:
                monitor.show(self._metrics(output, first, time.perf_counter() - since, waited))
            if stopped:
                break
        return metrics, stopped or bool(stop and self.world.size == 1)

    def _outputs(
        self, replay: Captured | None, end: int, stop: list[int]
    ) -> Iterator[tuple[Output, float]]:
        """Make the steps before `end` one by one: what the model made of each, and the seconds waited for its data."""
        if replay is not None:
            feed = self.loader.feed
            assert feed is not None
            for step in range(self.step, end):
                before = feed.waited
                feed.load(step + 1)
                yield replay(), feed.waited - before
            return
        batches = self.loader.epoch(*divmod(self.step, self.loader.steps_per_epoch))
        while self.step < end:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                time.sleep(0.2)  # the end of a job can reach the workers before this process
                if (
                    not stop and self.world.size == 1 and isinstance(error, TrainingError)
                ):  # a worker died
                    self._check_losses(self.saved_step)
                    self._save()
                    raise TrainingError(
                        f"{error}; saved at step {self.step}, to go on from with --resume"
                    ) from error
                if not stop:
                    raise
                if self.world.size == 1:
                    return
                # The other ranks count on this one up to the step where all stop.
                batches = self.loader.epoch(*divmod(self.step, self.loader.steps_per_epoch))
                continue
            waited = time.perf_counter() - asked
            yield self.train_step(batch.views), waited

    def _metrics(
        self, output: Output, first: int, seconds: float, waited: float
    ) -> dict[str, float]:
        """A line of metrics.jsonl: of the steps from `first` on, which took so many seconds, and of the last one's output."""
        losses = self.train_step.losses[first : self.step].tolist()
        views = len(losses) * self.config.batch_size * len(output.predictions)
        return {
            "step": self.step,
            "epoch": self.step / self.loader.steps_per_epoch,
            "loss": sum(losses) / len(losses) / self.loss_scale,
            **representation_statistics(self.model, output),
            "grad_norm": self.train_step.gradient_norm().item(),
            "lr": self.train_step.rates[self.step - 1].item(),
            "views_per_s": views / seconds,
            "data_wait": waited / seconds,
            "seconds": self.seconds,
        }

    def _check_losses(self, first: int) -> None:
        """Raise TrainingError unless the losses of the steps from `first` on are finite."""
        finite = torch.isfinite(self.train_step.losses[first : self.step]).tolist()
        if not all(finite):
            step = first + finite.index(False) + 1
            raise TrainingError(
                f"the loss is not finite at step {step} (epoch {(step - 1) // self.loader.steps_per_epoch + 1}); "
                f"{self._last_good()}; a lower learning rate or clip_norm may help"
            )

    def _any_rank(self, flag: bool) -> bool:
        return bool(self.world.any_rank(torch.tensor(float(flag), device=self.device)))

    def _is_due(self) -> bool:
        """Whether it is time for another checkpoint; rank 0's clock decides."""
        due = time.monotonic() - self.saved_at >= self.config.save_every
        return self._any_rank(due and self.world.is_main)

    def _save(self) -> None:
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            raise TrainingError(
                f"the weights are not finite at step {self.step}; {self._last_good()}"
            )
        model, optimizer = self.model.state_dict(), self.train_step.optimizer.state_dict()
        state = Checkpoint(
            self.step, self.seconds, len(self.loader.source), model, optimizer, self.content
        )
        with self.world.together():
            if self.world.is_main:
                state.save(self.folder / CHECKPOINT)
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.folder / CHECKPOINT} (step {self.saved_step})"

    def _restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.restore(self.model, self.train_step.optimizer)
        self.train_step.resume(checkpoint.step)
        self.step = self.saved_step = checkpoint.step
        self.saved_at = time.monotonic()
        self.seconds = checkpoint.seconds


def _use_kernels(config: TrainConfig, world: World) -> bool:
    """Decide on the network's kernels. Raises InputError where they are asked for and cannot be used."""
    problem = why_unavailable("triton", world.device.type)
    if problem is not None:
        problem = f"Triton cannot run them here: {problem}"
    elif config.compile:
        problem = "compile replaces them"
    elif not world.alone:
        problem = "they are for a run without torchrun"
    elif config.sync_batch_norm:
        problem = "they do not take statistics over several GPUs, as sync_batch_norm asks"
    if config.kernels == "on" and problem is not None:
        raise InputError(f"kernels: 'on' cannot be used: {problem}; auto and off run here")
    wanted = config.kernels == "on" or (config.kernels == "auto" and world.device.type == "cuda")
    return wanted and problem is None


@contextlib.contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    """Say what a GPU's memory was too small for, and what needs less of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise TrainingError(
            f"memory of {device}: {' '.join(str(error).split('. ')[:2])} ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free); "
            "a smaller --batch-size, fewer --local-views or --data-memory host need less"
        ) from error
