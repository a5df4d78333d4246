"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from vi_simsiam.config import PLACE_FIELDS, TrainConfig
from vi_simsiam.data.cache import cached
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.subsets import content, listed
from vi_simsiam.data.views import check_batch
from vi_simsiam.engine import failure, run
from vi_simsiam.engine.checkpoint import Checkpoint
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.graph import Captured, capture
from vi_simsiam.engine.kernels import choose_kernels
from vi_simsiam.engine.knn import OnlineKnn
from vi_simsiam.engine.memory import keep_freed_memory
from vi_simsiam.engine.monitor import Monitor, representation_statistics
from vi_simsiam.engine.processes import stop_signals
from vi_simsiam.engine.step import (
    OverlappedStep,
    check_step,
    configured_step,
    learning_rates,
)
from vi_simsiam.errors import CollapsedError, ImageWarning, InputError, TrainingError
from vi_simsiam.models import Output, SimSiam, VISimSiam, build_model
from vi_simsiam.ops.backends import choose_backend
from vi_simsiam.paths import user_path
from vi_simsiam.text import print_line

# All ranks log and communicate in the same steps, so these fields must agree between them.
_COMMON_FIELDS = {"log_every", "capture", "kernels", "compile", "knn_every", "stop_on"}


class Trainer:
    """Trains one model into one run folder.

    All input is checked here, before the folder is touched. The same configuration gives the same
    run on the same machine, also when it is interrupted and resumed at any step; a long run times
    its layers first, and other layers round otherwise (see `choose_kernels`). An ImageWarning
    names images that are left out and losses in decoding.

    On a GPU the images lie in its memory or are streamed to it, their views are made while the step
    before trains, and a whole step is replayed as one CUDA graph. On a CPU worker processes make
    the views.

    Args:
        config: the configuration.
        folder: the run folder; must be new or empty unless `resume` or `overwrite` is set. None for
            a new one in runs/.
        resume: go on from the folder's checkpoint. The images may have moved, but not changed.
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
        resume: bool = False,
        overwrite: bool = False,
        console: Console | None = None,
        world: World | None = None,
        splits: Splits | None = None,
        quiet: bool = False,
    ) -> None:
        config = config.located()
        path = None if folder is None else user_path("folder", folder)
        if path is not None:
            run.check_folder(path, resume=resume, overwrite=overwrite)
        elif resume:
            raise InputError("resume: no folder given; it must be the run folder to go on with")
        resumed = path if resume else None
        saved = config if resumed is None else run.read_config(resumed)
        # The decoding may change until the images are open.
        run.check_config(dataclasses.replace(saved, decode=config.decode), config, path)
        self.resume, self.quiet = resume, quiet
        self.world = world or World(run.resolve_device(config.device))
        self.world.agree("configuration", config.to_dict(), ignore=PLACE_FIELDS - _COMMON_FIELDS)
        self.world.local_batch(config.batch_size)
        self.console, self.device = self.world.console(console), self.world.device
        on_gpu = self.device.type == "cuda"
        check_step(config, self.world)
        self.backend = choose_backend(config.backend, self.device.type)
        self.log_every = config.log_every or (100 if on_gpu else 10)
        bf16 = config.precision == "bf16" or (config.precision == "auto" and on_gpu)

        self.model = self._build(config, load_frozen=not resume)
        default_scale = 1 / (config.model.dim - 1) if isinstance(self.model, VISimSiam) else 1.0
        self.loss_scale = config.loss.loss_scale or default_scale

        checkpoint = None
        if resumed is not None:
            checkpoint = Checkpoint.load(resumed / run.CHECKPOINT, self.device)
        with self.world.main_first():  # rank 0 decodes the images, the others read its cache
            splits = splits or run.open_splits(config, run=resumed)
            # Images that are already decoded set the rule for the other images of the run.
            given, config = config, dataclasses.replace(config, decode=splits.train.decode)
            if checkpoint is not None:
                decoded = None if config.decode == given.decode else splits.name
                run.check_config(saved, config, path, decoded=decoded)
                run.check_images(saved, config, checkpoint, listed(splits))
            check_batch(config.batch_size, splits.train)  # before the images are decoded
            images, _ = cached(
                splits.train,
                cache_dir=config.cache_dir,
                workers=config.workers,
                console=None if quiet else self.console,
            )
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
        make_step = partial(
            configured_step, config, loss_scale=self.loss_scale, backend=self.backend, bf16=bf16
        )
        if not on_gpu:
            keep_freed_memory()
        self.kernels = choose_kernels(
            config,
            self.world,
            self.model,
            make_step,
            dtype=views,
            steps=self.total_steps - (0 if checkpoint is None else checkpoint.step),
            resumed=resumed,
        )
        rates = learning_rates(config, self.loader.steps_per_epoch)
        self.train_step = make_step(self.model, rates, self.kernels.kernels, self.world)
        self.step, self.seconds = 0, 0.0
        self.knn: float | None = None
        self.collapsed = False
        if path is None:
            made = run.new_folder(Path("runs"), config) if self.world.is_main else None
            path = self.world.exchange(made)[0]
        self.folder: Path = path
        if checkpoint is not None:
            checkpoint.restore(self.model, self.train_step.optimizer)
            self.train_step.resume(checkpoint.step)
            self.step, self.seconds = checkpoint.step, checkpoint.seconds
            self.saved_step, self.saved_at = self.step, time.monotonic()

    def _build(self, config: TrainConfig, *, load_frozen: bool) -> SimSiam:
        """The model on its device, with the weights of the seed or of the frozen run."""
        # The weights of a run replace torchvision's.
        pretrained = config.model.pretrained and config.frozen_run is None
        parts = dataclasses.replace(config.model, pretrained=pretrained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = build_model(dataclasses.replace(config, model=parts)).to(self.device)
        if config.frozen_run is not None and load_frozen:
            run.load_frozen(model, config, self.device)
        model.to(memory_format=torch.channels_last)
        if config.sync_batch_norm and not self.world.alone:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
        return model

    def fit(self, *, epoch_done: Callable[[], object] | None = None) -> None:
        """Train to the end. Rank 0 writes checkpoints and metrics on the way.

        Args:
            epoch_done: called after every whole epoch, before its checkpoint.

        Raises:
            TrainingError: the loss or the weights are no longer finite, or the GPU's memory is too
                small; the last good checkpoint is kept.
            CollapsedError: it has collapsed, and `config.stop_on` ends it then.
            KeyboardInterrupt: SIGINT or SIGTERM arrived; the run can be resumed where it stopped.
        """
        main = self.world.is_main
        with contextlib.ExitStack() as stack:
            notice = "stopping after this step; the run can be resumed" if main else ""
            stop = stack.enter_context(stop_signals(patient=self.world.size > 1, notice=notice))
            if not self.resume:
                if main:
                    run.start_folder(self.folder, self.config)
                self._save()
            elif main:
                run.record_place(self.folder, self.config)
            if main and self.config.kernels == "auto":
                self.kernels.save(self.folder)
                if self.kernels.explained and not self.quiet:
                    print_line(self.console, f"kernels: {self.kernels}")
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
            stack.enter_context(_memory_errors(self.device))
            self.model.train()
            replay = self._replay()
            while self.step < self.total_steps:
                metrics, stopped = self._train_epoch(replay, monitor, stop)
                if epoch_done is not None and not stopped:
                    epoch_done()
                if stopped or self.step == self.total_steps or self._is_due():
                    self._save()
                if self.collapsed:
                    raise CollapsedError(
                        f"the training has collapsed, saved at step {self.step}; vi-simsiam doctor "
                        f"{self.folder} has a remedy; to go on all the same: "
                        f"vi-simsiam train --out {self.folder} --resume --stop-on None"
                    )
                if stopped:
                    raise KeyboardInterrupt
                if monitor is not None:
                    monitor.epoch_done(self.step, metrics)
            if monitor is not None:
                monitor.finish()

    def _replay(self) -> Captured | None:
        """On a GPU the whole step; None where batches come from the loader."""
        if self.loader.feed is None:
            return None
        whole = OverlappedStep(self.train_step, self.loader.feed)
        whole.prepare(self.step)
        mode = self.config.capture if self.world.alone else "off"
        replay = capture(whole, state=whole.state, mode=mode)
        if not self.world.alone:
            replay.reason = "a step with the collectives of torchrun's ranks is not captured"
        return replay

    def _launched(self, replay: Captured | None) -> dict[str, bool | str]:
        """For the log: whether a GPU replays a graph, and if not, the reason."""
        return {} if replay is None else replay.launched

    def _train_epoch(
        self, replay: Captured | None, monitor: Monitor | None, stop: list[int]
    ) -> tuple[dict[str, float], bool]:
        """Train to the end of the epoch; returns the last metrics, and True if a signal arrived."""
        # Several ranks must stop after the same step: they react to signals where metrics are due.
        alone = self.world.size == 1
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
            if logging or (stop and alone):
                stopped = self.world.any_rank(bool(stop))
                self._check_losses(first)
                seconds = time.perf_counter() - since
                self.seconds += seconds
                metrics = self._metrics(output, first, seconds, waited) | self._measure_knn()
                if logging and monitor is not None:
                    monitor.log(metrics, self._launched(replay))
                if self.config.stop_on is not None and self.step < self.total_steps:
                    collapsed = monitor is not None and monitor.health.state == "collapsed"
                    self.collapsed = self.world.any_rank(collapsed)
                    stopped |= self.collapsed
                waited, since, first = 0.0, time.perf_counter(), self.step
            elif monitor is not None and monitor.due:
                monitor.show(self._metrics(output, first, time.perf_counter() - since, waited))
            if stopped:
                break
        return metrics, stopped or bool(stop and alone)

    def _outputs(
        self, replay: Captured | None, end: int, stop: list[int]
    ) -> Iterator[tuple[Output, float]]:
        """Train step by step up to `end`; yields each output, and the seconds waited for data."""
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
            start = time.perf_counter()
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                time.sleep(0.2)  # the end of a job can reach the workers before this process
                alone = self.world.size == 1
                if stop and alone:
                    return
                if stop:  # the other ranks need this one up to the step where all stop
                    batches = self.loader.epoch(*divmod(self.step, self.loader.steps_per_epoch))
                    continue
                if not alone or not isinstance(error, TrainingError):
                    raise
                self._check_losses(self.saved_step)  # a worker died
                self._save()
                text = f"{error}; saved at step {self.step}, to go on from with --resume"
                raise TrainingError(text) from error
            waited = time.perf_counter() - start
            yield self.train_step(batch.views), waited

    def _metrics(
        self, output: Output, first: int, seconds: float, waited: float
    ) -> dict[str, float]:
        """A line of metrics.jsonl: the steps from `first` on, and the output of the last one."""
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

    def _measure_knn(self) -> dict[str, float]:
        """After an epoch that is due: measure on rank 0, whose BatchNorm statistics are saved."""
        epoch, after = divmod(self.step, self.loader.steps_per_epoch)
        if self.online is None or after or epoch % (self.config.knn_every or 1):
            return {}
        with self.world.together():
            found = self.online.measure(self.model.backbone) if self.world.is_main else None
        (self.knn, *_) = self.world.exchange(found)
        return {} if self.knn is None else {"knn": self.knn}

    def _check_losses(self, first: int) -> None:
        """Raise TrainingError unless the losses of the steps from `first` on are finite."""
        losses = self.train_step.losses[first : self.step].tolist()
        if not all(map(math.isfinite, losses)):
            found = failure.failed(
                self.config, self.loader.source, first, losses, checkpoint_step=self.saved_step
            )
            if self.world.is_main:
                failure.record(self.folder, found)
            raise TrainingError(
                f"the loss is not finite at step {found['step']} (epoch {found['epoch']}); "
                f"{self._last_good()}; a lower learning rate or clip_norm may help; "
                f"vi-simsiam doctor {self.folder} --replay shows the images of that step"
            )

    def _is_due(self) -> bool:
        """True if it is time for another checkpoint, by rank 0's clock."""
        due = time.monotonic() - self.saved_at >= self.config.save_every
        return self.world.any_rank(due and self.world.is_main)

    def _save(self) -> None:
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            raise TrainingError(
                f"the weights are not finite at step {self.step}; {self._last_good()}"
            )
        model, optimizer = self.model.state_dict(), self.train_step.optimizer.state_dict()
        images = len(self.loader.source)
        state = Checkpoint(self.step, self.seconds, images, model, optimizer, self.content)
        with self.world.together():
            if self.world.is_main:
                state.save(self.folder / run.CHECKPOINT)
                failure.forget(self.folder, self.step)
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _last_good(self) -> str:
        path = self.folder / run.CHECKPOINT
        return f"the last good checkpoint is {path} (step {self.saved_step})"


@contextlib.contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into one line with the options that need less memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        text = " ".join(str(error).split(". ")[:2])
        raise TrainingError(
            f"memory of {device}: {text} ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free); "
            "a smaller --batch-size, fewer --local-views or --data-memory host need less"
        ) from error
