"""The training loop."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from vi_simsiam.config import PLACE_FIELDS, TrainConfig
from vi_simsiam.data.cache import cached
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.statistics import print_views, with_statistics, with_statistics_of
from vi_simsiam.data.subsets import content, listed
from vi_simsiam.data.views import check_batch
from vi_simsiam.engine import failure, run
from vi_simsiam.engine.checkpoint import Checkpoint, checkpoint_path, checkpoints, load_last
from vi_simsiam.engine.device import deterministic, memory_errors, prepare
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.graph import CapturedTraining
from vi_simsiam.engine.kernels import choose_kernels
from vi_simsiam.engine.knn import OnlineKnn
from vi_simsiam.engine.loggers import check_loggers
from vi_simsiam.engine.model import initial_model, save_start
from vi_simsiam.engine.monitor import Monitor, Timed, representation_statistics
from vi_simsiam.engine.processes import stop_signals
from vi_simsiam.engine.saving import Saver
from vi_simsiam.engine.step import check_step, configured_step, learning_rates
from vi_simsiam.errors import ImageWarning, InputError, TrainingError
from vi_simsiam.models import Output
from vi_simsiam.ops.backends import choose_backend
from vi_simsiam.paths import user_path
from vi_simsiam.text import print_line

# All ranks log and communicate in the same steps, so these fields must agree between them.
_COMMON_FIELDS = {"log_every", "capture", "kernels", "compile", "knn_every", "stop_on"}
_FAILURES = 10  # of reading one batch, after a signal to several ranks


class Trainer:
    """Trains one model into one run folder.

    All input is checked here, before the folder is touched. The same configuration gives the same
    run on the same machine, also when it is interrupted and resumed at any step; a GPU does so
    with `config.deterministic`. A long run times its layers first, and other layers round otherwise
    (see `choose_kernels`). An ImageWarning names images that are left out and losses in decoding.

    On a GPU the fused kernel makes the views while the step before trains, and a whole step is
    replayed as one CUDA graph; for other views see `CapturedTraining`. On a CPU worker processes
    make the views.

    Args:
        config: the configuration.
        folder: the run folder; must be new or empty unless `resume` or `overwrite` is set. None for
            a new one in runs/.
        resume: go on from the folder's last checkpoint; "auto" starts the run where there is none.
            The images may have moved, but not changed.
        overwrite: replace the run in the folder.
        console: destination of printed lines; None for standard output.
        world: the ranks that train together, each with its own Trainer; rank 0 writes. None for
            this process alone.
        splits: images that are already open; None to open those of the configuration.
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
        resume: run.Resume = False,
        overwrite: bool = False,
        console: Console | None = None,
        world: World | None = None,
        splits: Splits | None = None,
        quiet: bool = False,
    ) -> None:
        config = config.located()
        path = None if folder is None else user_path("folder", folder)
        if path is None and resume:
            raise InputError("resume: no folder given; it must be the run folder to go on with")
        going_on = path is not None and run.check_folder(path, resume=resume, overwrite=overwrite)
        resumed = path if going_on else None
        saved = config if resumed is None else run.read_config(resumed)
        config = with_statistics_of(saved, config)
        run.check_config(replace(saved, decode=config.decode), config, path)  # that may yet change
        self.resume, self.quiet = going_on, quiet
        self.world = world or World(run.resolve_device(config.device))
        self.world.agree("configuration", config.to_dict(), ignore=PLACE_FIELDS - _COMMON_FIELDS)
        self.world.local_batch(config.batch_size)
        self.console, self.device = self.world.console(console), self.world.device
        on_gpu = self.device.type == "cuda"
        prepare(self.device, deterministic=config.deterministic)
        check_step(config, self.world)
        if self.world.is_main:  # the others do not log
            check_loggers(config, resumed)
        self.backend = choose_backend(config.backend, self.device.type)
        self.log_every = config.log_every or (100 if on_gpu else 10)

        checkpoint, found = None, list[Path]()
        if resumed is not None:
            found, checkpoint = checkpoints(resumed), load_last(resumed)
            run.check_saved(resumed, saved, checkpoint)
        # Ranks can have folders of their own, or read a file otherwise.
        self.world.agree("checkpoint", None if checkpoint is None else checkpoint.step)
        shown = None if quiet else self.console
        with self.world.main_first():  # rank 0 decodes the images, the others read its cache
            splits = splits or run.open_splits(config, run=resumed)
            # Images that are already decoded set the rule for the other images of the run.
            given, config = config, replace(config, decode=splits.train.decode)
            if checkpoint is not None:
                decoded = None if config.decode == given.decode else splits.name
                run.check_config(saved, config, path, decoded=decoded)
                run.check_images(saved, config, checkpoint, listed(splits))
            check_batch(config.batch_size, splits.train)  # before the images are decoded
            self.model = initial_model(config, self.world, shown, fresh=not going_on)
            images, _ = cached(
                splits.train, cache_dir=config.cache_dir, workers=config.workers, console=shown
            )
            config = replace(config, augment=with_statistics(config.augment, images))
            self.online = None
            if config.knn_every is not None:
                self.online = OnlineKnn(config, splits, images, self.device)
        for text in images.warnings:
            warnings.warn(text, ImageWarning, stacklevel=2)
        self.config = config
        self.content = content(splits, images)
        self.world.agree("data", self.content)
        if checkpoint is not None:
            run.check_images(saved, config, checkpoint, self.content)
        bf16 = config.uses_bf16(self.device.type)
        views = torch.bfloat16 if bf16 and on_gpu else torch.float32
        self.loader = MultiViewLoader(
            images,
            config.augment,
            config.batch_size,
            self.device,
            seed=config.seed,
            workers=config.workers,
            dtype=views,
            memory=config.data_memory,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.total_steps = config.epochs * self.loader.steps_per_epoch
        rates = learning_rates(config, self.loader.steps_per_epoch)
        make_step = partial(
            configured_step, config, loss_scale=config.loss_scale, backend=self.backend, bf16=bf16
        )
        self.kernels = choose_kernels(
            config,
            self.world,
            self.model,
            make_step,
            dtype=views,
            steps=self.total_steps - (0 if checkpoint is None else checkpoint.step),
            resumed=resumed,
        )
        self.train_step = make_step(self.model, rates, self.kernels.kernels, self.world)
        self.step, self.seconds = 0, 0.0
        self._logged = 0  # the last step that is in the metrics
        self.knn: float | None = None
        self.collapsed = False
        if path is None:
            made = run.new_folder(Path("runs"), config) if self.world.is_main else None
            path = self.world.exchange(made)[0]
        self.folder: Path = path
        self.saver = Saver(
            path, config, self.world, found, resume=resume, overwrite=overwrite, last=checkpoint
        )
        if checkpoint is not None:
            self._restore(checkpoint)

    def _restore(self, checkpoint: Checkpoint) -> None:
        step, losses = checkpoint.step, checkpoint.losses
        if step > self.total_steps:
            raise InputError(f"resume: the checkpoint is of step {step} of {self.total_steps}")
        checkpoint.restore(self.model, self.train_step.momentum)
        self._logged = step - len(losses)
        self.train_step.losses[self._logged : step] = losses.to(self.device)
        self.train_step.counter.fill_(step)
        self.step, self.seconds, self.knn = step, checkpoint.seconds, checkpoint.knn

    def fit(self, *, epoch_done: Callable[[], object] | None = None) -> None:
        """Train to the end. Rank 0 writes checkpoints and metrics on the way.

        Args:
            epoch_done: called after every whole epoch, before its checkpoint, unless a signal ended
                the epoch's last step.

        Raises:
            TrainingError: the loss or the weights are no longer finite, or the GPU's memory is too
                small; the last good checkpoint is kept.
            CollapsedError: it has collapsed, and `config.stop_on` ends it then.
            KeyboardInterrupt: a signal of `stop_signals` arrived; the run can be resumed where it
                stopped.
        """
        main = self.world.is_main
        with contextlib.ExitStack() as stack:
            notice = "stopping after this step; the run can be resumed" if main else ""
            stop = stack.enter_context(stop_signals(patient=not self.world.alone, notice=notice))
            if self.config.deterministic:
                stack.enter_context(deterministic())
            if main:
                stack.enter_context(run.claimed(self.folder))
                self.saver.check_again()
            if not self.resume:
                if main:
                    run.start_folder(self.folder, self.config)
                    save_start(self.folder, self.config, self.model)
                self._save()
            elif main:
                run.record_place(self.folder, self.config)
            if main and self.config.kernels == "auto":
                self.kernels.save(self.folder)
                if self.kernels.explained and not self.quiet:
                    print_line(self.console, f"kernels: {self.kernels}")
            on_gpu = self.loader.feed is not None
            print_views(self.config, on_gpu, None if self.quiet else self.console)
            stack.enter_context(contextlib.closing(self.loader))
            monitor = None
            if main:
                monitor = Monitor(
                    self.folder,
                    self.config,
                    step=self.step,
                    steps_per_epoch=self.loader.steps_per_epoch,
                    console=self.console,
                    images=len(self.loader.source) if self.device.type == "cpu" else None,
                    resumed=self.resume,
                    quiet=self.quiet,
                )
                stack.enter_context(monitor)
            stack.enter_context(memory_errors(self.device))
            self.model.train()
            replay, feed = None, self.loader.feed
            if feed is not None:
                mode, alone = self.config.capture, self.world.alone
                replay = CapturedTraining(self.train_step, feed, self.step, mode, alone=alone)
            while self.step < self.total_steps:
                metrics, stopped = self._train_epoch(replay, monitor, stop)
                if epoch_done is not None and not stopped:
                    epoch_done()
                best = self.saver.is_best(self.knn)  # the weights that were measured are kept
                if stopped or best or self.step == self.total_steps or self.saver.due():
                    self._save()
                if self.collapsed:
                    raise failure.collapsed(self.folder, self.step)
                if stopped:
                    raise KeyboardInterrupt
                if monitor is not None:
                    monitor.epoch_done(self.step, metrics)
            if monitor is not None:
                monitor.finish()
            if self.world.any_rank(bool(stop)):  # while the last checkpoint was written
                raise KeyboardInterrupt

    def _train_epoch(
        self, replay: CapturedTraining | None, monitor: Monitor | None, stop: list[int]
    ) -> tuple[dict[str, float], bool]:
        """Train to the end of the epoch; returns the last metrics, and True if a signal arrived."""
        # Several ranks must stop and save after the same step: they do so where metrics are due.
        one_rank = self.world.size == 1
        end = (self.step // self.loader.steps_per_epoch + 1) * self.loader.steps_per_epoch
        metrics: dict[str, float] = {}
        stopped = False
        timed = Timed(self.step)
        for output, wait in self._outputs(replay, end, stop):
            timed.waited += wait
            self.step += 1
            if monitor is not None:
                monitor.advance(self.step)
            logging = self.step % self.log_every == 0 or self.step == end
            if logging:
                self._check_losses()
                self.seconds += timed.seconds
                metrics = self._metrics(output, timed) | self._measure_knn()
                if monitor is not None:
                    monitor.log(metrics, None if replay is None else replay.launched)
                if self.config.stop_on is not None and self.step < self.total_steps:
                    found = monitor is not None and monitor.health.state == "collapsed"
                    self.collapsed = self.world.any_rank(found)
                self._logged, timed = self.step, Timed(self.step)
            elif monitor is not None and monitor.due:
                monitor.show(self._metrics(output, timed))
            if logging or one_rank:
                stopped = self.world.any_rank(bool(stop)) or self.collapsed
                if not stopped and self.step < end and self.saver.due():
                    self.seconds += timed.seconds
                    self._save()
                    timed = Timed(self.step)
            if stopped:
                self.seconds += timed.seconds
                break
        return metrics, stopped or bool(stop and one_rank)

    def _outputs(
        self, replay: CapturedTraining | None, end: int, stop: list[int]
    ) -> Iterator[tuple[Output, float]]:
        """Train step by step up to `end`; yields each output, and the seconds waited for data."""
        if replay is not None:
            yield from map(replay, range(self.step, end))
            return
        batches, failures = self.loader.epoch(*divmod(self.step, self.loader.steps_per_epoch)), 0
        while self.step < end:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                time.sleep(0.2)  # the end of a job can reach the workers before this process
                one_rank = self.world.size == 1
                if stop and one_rank:
                    return
                failures += 1
                if stop and failures < _FAILURES:  # the other ranks need this one until all stop
                    batches = self.loader.epoch(*divmod(self.step, self.loader.steps_per_epoch))
                    continue
                if not one_rank or not isinstance(error, TrainingError):
                    raise
                self._save()  # a worker died
                text = f"{error}; saved at step {self.step}, to go on from with --resume"
                raise TrainingError(text) from error
            waited, failures = time.perf_counter() - start, 0
            yield self.train_step(batch.views), waited

    def _metrics(self, output: Output, timed: Timed) -> dict[str, float]:
        """A line of metrics.jsonl: the steps since the one before, and the output of the last."""
        losses = self.train_step.losses[self._logged : self.step].tolist()
        seconds = timed.seconds
        views = (self.step - timed.first) * self.config.batch_size * len(output.predictions)
        return {
            "step": self.step,
            "epoch": self.step / self.loader.steps_per_epoch,
            "loss": sum(losses) / len(losses) / self.config.loss_scale,
            **representation_statistics(self.model, output),
            "grad_norm": self.train_step.gradient_norm().item(),
            "lr": self.train_step.rates[self.step - 1].item(),
            "views_per_s": views / seconds,
            "data_wait": timed.waited / seconds,
            "seconds": self.seconds,
        }

    def _measure_knn(self) -> dict[str, float]:
        """After an epoch that is due: measure on rank 0, whose BatchNorm statistics are saved."""
        epoch, after = divmod(self.step, self.loader.steps_per_epoch)
        if self.online is None or after or epoch % (self.config.knn_every or 1):
            return {}
        with self.world.together():
            found = self.online.measure(self.model.backbone) if self.world.is_main else None
        (self.knn, *_) = self.world.exchange(found)
        return {} if self.knn is None else {"knn": self.knn}

    def _check_losses(self) -> None:
        """Raise TrainingError unless the losses since the last line of metrics are finite."""
        losses, images = self.train_step.losses[self._logged : self.step], self.loader.source
        if not torch.isfinite(losses).all():
            found = failure.failed(self.config, images, self._logged, losses, self.saver.step)
            if self.world.is_main:
                failure.record(self.folder, found)
            raise failure.error(self.folder, found, self._last_good())

    def _save(self) -> None:
        self._check_losses()
        # Of BatchNorm's statistics rank 0's are saved.
        saved = self.model.state_dict().values() if self.world.is_main else self.model.parameters()
        if not all(torch.isfinite(tensor).all() for tensor in saved):
            text = f"the weights are not finite at step {self.step}; {self._last_good()}"
            raise TrainingError(text)
        checkpoint = Checkpoint(
            self.step,
            self.seconds,
            len(self.loader.source),
            self.model.state_dict(),
            self.train_step.momentum,
            self.train_step.losses[self._logged : self.step],
            self.content,
            self.knn,
            config=self.config.to_dict(),
        )
        self.saver.save(checkpoint)

    def _last_good(self) -> str:
        path = checkpoint_path(self.folder, self.saver.step)
        return f"the last good checkpoint is {path} (step {self.saver.step})"
